"""What does it cost to use a trained network, dense against factored, in time and memory?

  python -m benchmarks.inference                                   # 25 minutes, by estimate
  python -m benchmarks.inference --models MLP ViT-192 ResNet       # two minutes
  python -m benchmarks.inference --quick                           # half a minute

All variants of a network and a batch size live in one process and are called in turn, so that a
disturbance of the machine meets all alike; times are medians over rounds, ratios are to dense,
round by round, and of CPU times where one thread computes. "plain" is what oialr.for_inference
makes, "trained" the network as it is trained, in evaluation mode.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step_time import at_rank_fraction, perceptron, resnet
from oialr.compatibility import import_torchvision
from oialr.inference import for_inference
from oialr.memory import TensorMemory

FRACTIONS = (0.1, 0.25, 0.4)
BATCHES = (1, 8, 64)


@dataclass(frozen=True)
class Case:
    """A network, the shape of a sample, and the rows that a layer's input has for each."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows: int
    is_quick: bool = True


def vision_transformer(**options: Any) -> nn.Module:
    """Build timm's VisionTransformer."""
    import_torchvision()
    from timm.models import VisionTransformer

    network: nn.Module = VisionTransformer(**options)
    return network


CASES = (
    Case("MLP 4 x 1024", perceptron, (1024,), 1),
    Case(
        "ViT-192, patch 4",
        lambda: vision_transformer(
            img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=10
        ),
        (3, 32, 32),
        65,
    ),
    Case("ResNet-20 x 2", resnet, (3, 32, 32), 64),  # positions of its last, largest layers
    Case("ViT-B/16", vision_transformer, (3, 224, 224), 197, is_quick=False),
)


class Variant:
    """A network that is called, and its times in seconds."""

    def __init__(self, network: nn.Module, batch: Tensor) -> None:
        """Take a network in evaluation mode."""
        self.network = network
        self.batch = batch
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def call(self) -> None:
        """Call the network once and note the time."""
        start, cpu = time.perf_counter(), time.process_time()
        self.network(self.batch)
        if self.batch.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu)

    @property
    def compared(self) -> list[float]:
        """The times that ratios are of."""
        on_one_core = self.batch.device.type == "cpu" and torch.get_num_threads() == 1
        return self.cpu_seconds if on_one_core else self.seconds

    def peak_bytes(self) -> int:
        """Return the most memory that parameters, buffers, input and results take at once."""
        tensors = [*self.network.parameters(), *self.network.buffers(), self.batch]
        with TensorMemory(tensors) as memory:
            self.network(self.batch)
        return memory.peak_bytes


@torch.inference_mode()
def measure(
    case: Case, fractions: tuple[float, ...], batch_size: int, rounds: int, device: str
) -> dict[str, dict[str, float]]:
    """Measure all variants of a network in turn.

    Args:
        case: network and sample.
        fractions: rank fractions.
        batch_size: samples of a call.
        rounds: calls of each variant, after one that does not count.
        device: where.

    Returns:
        Figures by variant: seconds are medians, ratios are to dense.
    """
    torch.manual_seed(0)
    with torch.inference_mode(False):
        dense = case.build().to(device).eval()
        batch = torch.randn(batch_size, *case.shape, device=device)
        networks = {"dense": for_inference(dense)}
        for fraction in fractions:
            trained = at_rank_fraction(dense, fraction, "auto").eval()
            networks[f"{fraction} trained"] = trained
            networks[f"{fraction} plain"] = for_inference(trained, rows=case.rows * batch_size)
    variants = {name: Variant(network, batch) for name, network in networks.items()}
    for number in range(rounds + 1):
        for variant in variants.values():
            if number == 1:
                variant.seconds.clear()
                variant.cpu_seconds.clear()
            variant.call()
    full = variants["dense"]
    full_bytes = full.peak_bytes()
    result = {}
    for name, variant in variants.items():
        pairs = zip(variant.compared, full.compared, strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        peak = variant.peak_bytes()
        result[name] = {
            "seconds_per_sample": statistics.median(variant.seconds) / batch_size,
            "time_ratio": statistics.median(ratios),
            "time_ratio_spread": quartiles[2] - quartiles[0],
            "peak_bytes": peak,
            "peak_bytes_ratio": peak / full_bytes,
        }
    return result


Figures = dict[str, dict[str, float]]
"""Of one network and batch size, as :func:`measure` returns them."""


def heading(fractions: tuple[float, ...]) -> str:
    """Return the head of a Markdown table with a row for each network and batch size."""
    shares = [f"{fraction:g}".removeprefix("0") for fraction in fractions]
    columns = ["network", "batch", "dense, ms per sample"]
    for what in ("time", "peak memory"):
        columns += [f"{'' if i else f'{what} '}at {share}" for i, share in enumerate(shares)]
    return "| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|"


def row(network: str, batch: int, figures: Figures, form: str) -> str:
    """Return a row of such a table.

    Args:
        network: its name.
        batch: samples of a call.
        figures: of all variants.
        form: "plain" or "trained": whose figures are shown, as ratios to dense.
    """
    shown = [values for name, values in figures.items() if name.endswith(form)]
    cells = [network, str(batch), f"{1000 * figures['dense']['seconds_per_sample']:.3f}"]
    cells += [f"{values['time_ratio']:.2f}" for values in shown]
    cells += [f"{values['peak_bytes_ratio']:.2f}" for values in shown]
    return "| " + " | ".join(cells) + " |"


def report(
    measured: Iterator[tuple[str, int, Figures]], fractions: tuple[float, ...]
) -> Iterator[str]:
    """Yield the lines that tell of all measurements, each as soon as it is known."""
    everything = []
    yield "plain networks, as ratios to dense:\n\n" + heading(fractions)
    for network, batch, figures in measured:
        everything.append((network, batch, figures))
        yield row(network, batch, figures, "plain")
    yield "\nnetworks as they are trained, as ratios to dense:\n\n" + heading(fractions)
    for network, batch, figures in everything:
        yield row(network, batch, figures, "trained")
    spreads = [
        values["time_ratio_spread"]
        for _, _, figures in everything
        for name, values in figures.items()
        if name != "dense"
    ]
    if spreads:
        yield f"\nquartiles of the ratios of times: {min(spreads):.2f} to {max(spreads):.2f} apart"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--models", nargs="+", help="parts of the models' names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, one fraction, batches of 1 and 8"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    fractions, batches = tuple(arguments.fractions), tuple(arguments.batches)
    rounds = arguments.rounds
    if arguments.quick:
        fractions, batches, rounds = (0.25,), (1, 8), 3
    measured = (
        (case.name, batch, measure(case, fractions, batch, rounds, arguments.device))
        for case in CASES
        if (case.is_quick or not arguments.quick)
        and (not arguments.models or any(part in case.name for part in arguments.models))
        for batch in batches
    )
    if not arguments.json:
        for line in report(measured, fractions):
            print(line, flush=True)
        return
    results: dict[str, dict[str, Figures]] = {}
    for network, batch, figures in measured:
        results.setdefault(network, {})[str(batch)] = figures
    print(json.dumps(results))


if __name__ == "__main__":
    main()
