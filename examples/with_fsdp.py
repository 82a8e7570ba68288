"""A small network for the digits of scikit-learn, made low-rank and then sharded by fully_shard.

  torchrun --nproc-per-node 2 -m examples.with_fsdp

Nothing is downloaded; runs/with_fsdp is written. What this prints is in docs/integrations.md.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

# added:
import oialr

PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)
PROCESS = int(os.environ.get("RANK") or 0)
SHARDED, STORED, END, BATCH = 60, 90, 120, 64
"""Steps after which the network is sharded, is stored, and is done; samples of a process."""
FOLDER = Path("runs/with_fsdp")


def make(seed: int) -> tuple[nn.Sequential, Optimizer, oialr.OIALR]:
    """Make a new network, its optimizer and method."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    )
    optimizer = AdamW(network.parameters(), lr=3e-3)
    # added:
    method = oialr.OIALR(network, optimizer, delay=30, update_interval=10, cutoff=0.3, release=60)
    return network, optimizer, method


def train(
    network: nn.Module,
    optimizer: Optimizer,
    method: oialr.OIALR,
    steps: range,
    *,
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    """Train for some steps, with something around the network."""
    images, classes = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16).float(), torch.tensor(classes)
    batches = len(inputs) // (BATCH * PROCESSES)
    model = wrap(network)
    for step in steps:
        first = (step % batches * PROCESSES + PROCESS) * BATCH
        part = slice(first, first + BATCH)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[part]), targets[part]).backward()
        optimizer.step()
        # added:
        event = method.step()
        # added:
        if event and event.shapes_changed:
            # added:
            model = wrap(network)


def shard(network: nn.Sequential, method: oialr.OIALR) -> None:
    """Split each layer's parameters over the processes."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    with method.sharding():
        for layer in network:
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)


def store(network: nn.Module, optimizer: Optimizer, method: oialr.OIALR) -> None:
    """Write a distributed checkpoint."""
    weights, moments = get_state_dict(network, optimizer)
    state = {"network": weights, "optimizer": moments, "method": method}
    dcp.save(state, checkpoint_id=FOLDER)


def restore(network: nn.Sequential, optimizer: Optimizer, method: oialr.OIALR) -> None:
    """Give a new network the ranks that were stored, shard it, and load what is left."""
    dcp.load({"method": method}, checkpoint_id=FOLDER)
    shard(network, method)
    weights, moments = get_state_dict(network, optimizer)
    dcp.load({"network": weights, "optimizer": moments}, checkpoint_id=FOLDER)
    set_state_dict(network, optimizer, model_state_dict=weights, optim_state_dict=moments)


def gather(network: nn.Module) -> dict[str, Any]:
    """Return the weights of a sharded network, whole, on all processes."""
    return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))


def main() -> None:
    """Train to the end, and again from the checkpoint, and compare."""
    warnings.filterwarnings("ignore")
    torch.distributed.init_process_group("gloo")
    network, _, method = parts = make(seed=0)
    train(*parts, range(SHARDED), wrap=DistributedDataParallel)
    shard(network, method)
    train(*parts, range(SHARDED, STORED), wrap=nn.Identity())
    store(*parts)
    train(*parts, range(STORED, END), wrap=nn.Identity())

    other, its_optimizer, its_method = make(seed=1)
    restore(other, its_optimizer, its_method)
    train(other, its_optimizer, its_method, range(STORED, END), wrap=nn.Identity())

    weights, resumed = gather(network), gather(other)
    shares: list[Any] = list(network.parameters())
    kept = sum(share.to_local().numel() for share in shares)
    if PROCESS == 0:
        whole, _, _ = make(seed=2)
        whole.load_state_dict(weights)  # on one process, as for an export
        images, classes = load_digits(return_X_y=True)
        answers = whole(torch.tensor(images / 16).float()).argmax(1)
        accuracy = (answers == torch.tensor(classes)).float().mean()
        print("ranks:", method.ranks())
        print(f"kept by process 0: {kept} of {sum(map(torch.numel, weights.values()))} parameters")
        print(f"accuracy on what was trained: {accuracy:.3f}")
        equal = all(map(torch.equal, weights.values(), resumed.values()))
        print("resumed after 90 of 120 steps, with the same bits in the end:", equal)
    torch.distributed.barrier()  # so that none leaves amid what the others still do
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
