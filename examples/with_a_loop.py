"""A small network for the digits of scikit-learn, trained low-rank in a loop of one's own, resumed.

  python -m examples.with_a_loop
  torchrun --nproc-per-node 2 -m examples.with_a_loop

Nothing is downloaded. What this prints is in docs/integrations.md.
"""

import copy
import os
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# added, for either:
import oialr

PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)
PROCESS = int(os.environ.get("RANK") or 0)
EPOCHS, BATCH = 10, 64


def train(
    epochs: int, *, seed: int, stored: list[Any] | None = None
) -> tuple[list[Any], oialr.StabilityTracker]:
    """Train a new network, or go on from states; return network, optimizer, method, and tracker."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    # added, for the method:
    method = oialr.OIALR(network, optimizer, delay=30, update_interval=20, cutoff=0.3)
    parts: list[Any] = [network, optimizer, method]
    for holder, state in zip(parts, stored or [], strict=False):
        holder.load_state_dict(state)
    model = DistributedDataParallel(network) if PROCESSES > 1 else network
    # added, for stability:
    tracker = oialr.StabilityTracker(network)

    images, classes = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16).float(), torch.tensor(classes)
    batches = len(inputs) // (BATCH * PROCESSES)
    for _ in range(method.step_count // batches, epochs):
        for number in range(batches):
            first = (number * PROCESSES + PROCESS) * BATCH
            part = slice(first, first + BATCH)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[part]), targets[part]).backward()
            optimizer.step()
            # added, for the method:
            event = method.step()
            # added, for DistributedDataParallel:
            if event and event.shapes_changed and PROCESSES > 1:
                # added, for DistributedDataParallel:
                model = DistributedDataParallel(method.model)
        # added, for stability:
        tracker.measure()
    return parts, tracker


def main() -> None:
    """Train to the end, and again in two parts, and compare."""
    if PROCESSES > 1:
        torch.distributed.init_process_group("gloo")
    (network, _, method), tracker = train(EPOCHS, seed=0)
    first, _ = train(4, seed=0)
    states = [copy.deepcopy(part.state_dict()) for part in first]
    (resumed, _, _), _ = train(EPOCHS, seed=1, stored=states)
    if PROCESS == 0:
        print("ranks:", method.ranks())
        print(f"trained: {method.trainable_percent():.1f} % of the parameters")
        # added, for stability:
        stability = tracker.to_pandas().groupby("measurement").stability.mean()
        print(f"basis stability: {stability.iloc[-1]:.3f}, epoch {len(stability)}")
        equal = all(map(torch.equal, network.parameters(), resumed.parameters()))
        print("resumed after 4 of 10 epochs, with the same bits in the end:", equal)
    if PROCESSES > 1:
        torch.distributed.barrier()  # so that none leaves amid what the others still do
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
