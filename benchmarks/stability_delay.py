"""What does it cost to watch for bases that stand still (oialr.delay: stability)?

  python -m benchmarks.stability_delay            # a minute on one core
  python -m benchmarks.stability_delay --quick    # some seconds

CPU seconds of one thread, the median of several: of a training step (forward and backward of random
images, and AdamW), and of the end of a window, at which the bases of all layers are computed as
they were at its beginning and as they are. The last column is the window, in steps, from which on
the ends of windows take less than one percent of the steps; most are longer.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from app import models
from oialr import OIALR
from oialr.placement.processes import Processes
from oialr.stability.standstill import Standstill

VIT = {"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}
NETWORKS = {
    "digits, ViT of width 64": (
        "vision_transformer",
        {"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4},
        (1, 8, 8),
        64,
    ),
    "Fashion-MNIST, ViT of width 192": ("vision_transformer", VIT, (1, 28, 28), 128),
    "CIFAR-10, ResNet-20": ("cifar_resnet", {"depth": 20}, (3, 32, 32), 128),
}
"""By name: network, its arguments, shape of an image, and batch size."""


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median CPU seconds of some work, after a first time."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(name: str, repeats: int) -> tuple[float, float]:
    """Return the seconds of a step, and of the end of a window."""
    kind, arguments, shape, samples = NETWORKS[name]
    torch.manual_seed(0)
    model = models.build(kind, arguments, input_shape=shape, outputs=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, classes = torch.randn(samples, *shape), torch.arange(samples) % 10

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), classes).backward()
        optimizer.step()

    step_seconds = seconds(step, repeats)
    method = OIALR(model, optimizer, delay=1000, update_interval=1)
    weights = {
        layer: layer.reading.to_matrix(model.get_parameter(layer.name).detach())
        for layer in method.layers
    }
    standstill = Standstill(Processes(), threshold=1.0, window=1)
    count = 0

    def look() -> None:
        nonlocal count
        count += 1
        with torch.no_grad():
            for weight in weights.values():
                weight.mul_(1.01)  # so that no layer stands still, to the last digit
                weight.add_(torch.randn_like(weight), alpha=1e-3)
        standstill.look(count, weights)

    return step_seconds, seconds(look, repeats)


def main() -> None:
    """Measure all networks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--quick", action="store_true", help="the smallest network, twice")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [*NETWORKS][: 1 if options.quick else None]
    repeats = 2 if options.quick else options.repeats
    if options.json:
        rows = {name: measure(name, repeats) for name in names}
        keys = ("step_seconds", "window_end_seconds")
        print(json.dumps({name: dict(zip(keys, row, strict=True)) for name, row in rows.items()}))
        return
    print("| network | a step, s | the end of a window, s | steps for 1 % |")
    print("| --- | --- | --- | --- |")
    for name in names:
        step, end = measure(name, repeats)
        print(f"| {name} | {step:.4f} | {end:.4f} | {math.ceil(100 * end / step)} |")


if __name__ == "__main__":
    main()
