"""Run under mpirun: networks made low-rank, split by fully_shard, against the same on one process.

The argument is a folder for checkpoints that all processes see.
"""

import copy
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import oialr
from app.runtime.processes import start_runtime
from oialr import OIALR

SHARDED, STORED, END = 9, 12, 16
"""Steps after which the network is split, is stored, and is done."""
WHOLE = StateDictOptions(full_state_dict=True)
WAYS = {
    "cores": {"core_learning_rate_factor": 3.0, "cutoff": 0.4},
    "factors": {
        "cutoff": 0.6,
        "largest_cut": 0.8,
        "release": SHARDED,
        "release_warmup": 6,
        "frobenius_decay": 0.1,
    },
    "bases in bfloat16": {"cutoff": 0.4, "frozen_dtype": "bfloat16"},
}
"""Options by what is trained in the end."""


class Network(nn.Module):
    """Convolution, attention and linear layers, of sizes that two processes cannot halve."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 21, 4, stride=4)
        self.attention = nn.MultiheadAttention(21, 3, batch_first=True)
        self.mixing = nn.Sequential(nn.Linear(21, 45), nn.GELU(), nn.Linear(45, 21))
        self.norm = nn.LayerNorm(21)
        self.head = nn.Linear(21, 5)

    def forward(self, images):
        """Classify images (b, 3, 12, 12)."""
        x = self.patches(images).flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mixing(x)
        return self.head(self.norm(x).mean(1))


def make(seed, options):
    torch.manual_seed(seed)
    model = Network().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    # Events after steps 1, 9 and 17.
    method = OIALR(model, optimizer, delay=1, update_interval=8, **options)
    return model, optimizer, method


def shard(model):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for part in (model.attention, model.mixing):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(parts, first, last, *, share=slice(None)):
    """Train network, optimizer and method from a step to another on a share of the samples."""
    model, optimizer, method = parts
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(24, 3, 12, 12, generator=generator, dtype=torch.float64)
        targets = images.mean((1, 2, 3)).mul(60).long().clamp(-2, 2) + 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[share]), targets[share]).backward()
        optimizer.step()
        if method:
            method.step()


def whole(model):
    return get_model_state_dict(model, options=WHOLE)


def are_equal(mine, theirs):
    return list(mine) == list(theirs) and all(map(torch.equal, mine.values(), theirs.values()))


def check_way(options, folder, share):
    """Hold a sharded training against that of one process, and against its own resume."""
    alone, parts = make(0, options), make(0, options)
    for each in (alone, parts):
        train(each, 0, SHARDED)
    model, optimizer, method = parts
    ranks = method.ranks()
    assert min(ranks.values()) < 20, "no cut: the test shows little"
    train(alone, SHARDED, END)

    with method.sharding():
        shard(model)
    train(parts, SHARDED, STORED, share=share)
    names = "model", "optimizer"
    stored = dict(zip(names, get_state_dict(model, optimizer), strict=True))
    dcp.save({**stored, "method": method}, checkpoint_id=folder)
    train(parts, STORED, END, share=share)
    end = whole(model)
    # In float64; Adam divides by gradients, some of which are small.
    for name, tensor in alone[0].state_dict().items():
        torch.testing.assert_close(end[name], tensor, rtol=1e-8, atol=1e-9)

    model, optimizer, method = resumed = make(1, options)
    dcp.load({"method": method}, checkpoint_id=folder)
    with method.sharding():
        shard(model)
    stored = dict(zip(names, get_state_dict(model, optimizer), strict=True))
    dcp.load(stored, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=stored["model"],
        optim_state_dict=stored["optimizer"],
    )
    assert (method.step_count, method.ranks()) == (STORED, ranks)
    train(resumed, STORED, END, share=share)
    assert are_equal(whole(model), end)
    return parts


def check_refusal(parts, processes, share):
    """The next event is refused on all processes alike, and changes nothing."""
    model, optimizer, method = parts
    train((model, optimizer, None), END, END + 1, share=share)
    before, ranks = whole(model), method.ranks()
    for _ in range(2):
        try:
            method.step()
        except ValueError as error:
            message = str(error)
        assert message.startswith("an event is due after step 17, and needs whole weights")
        assert processes.gather(message) == [message] * processes.count
    assert are_equal(whole(model), before)
    assert method.ranks() == ranks


def check_without_method(file, processes, share):
    """Weights that were stored low-rank are split and trained without OIALR, too."""
    parts = make(0, {"cutoff": 0.4})
    train(parts, 0, SHARDED)
    model, optimizer, method = parts
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=WHOLE))
    if processes.index == 0:
        oialr.save(model, file)
    processes.barrier()
    with method.sharding():
        shard(model)
    train(parts, SHARDED, END, share=share)

    torch.manual_seed(1)
    other = oialr.load(Network().double(), file)
    shard(other)
    trained = [parameter for parameter in other.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    set_optimizer_state_dict(other, optimizer, state, options=WHOLE)
    train((other, optimizer, None), SHARDED, END, share=share)
    assert are_equal(whole(other), whole(model))


def main():
    warnings.simplefilter("ignore")  # of torch's distributed checkpoints
    folder = Path(sys.argv[1])
    with start_runtime(device="cpu", timeout=60) as runtime:
        processes = runtime.processes
        share = slice(processes.index, None, processes.count)
        ways = {way: check_way(WAYS[way], folder / way, share) for way in WAYS}
        check_refusal(ways["cores"], processes, share)
        check_without_method(folder / "low_rank.safetensors", processes, share)
        if runtime.is_first:
            print("sharded as on one process")


if __name__ == "__main__":
    sys.exit(main())
