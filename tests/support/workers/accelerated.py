"""Run under torchrun: accelerate's loop with several processes, stopped in a phase and resumed.

One argument: an empty folder.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

import oialr

OPTIONS = {"delay": 4, "update_interval": 4, "cutoff": 0.4, "layer_fraction": 1.0}
STEPS = 12


def loop(steps, *, folder=None, seed=0):
    """Train; go on from a folder if there is one."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(network, optimizer)
    method = oialr.OIALR(model, optimizer, release=10, **OPTIONS)
    accelerator.register_for_checkpointing(method)
    if folder:
        accelerator.load_state(folder)
        oialr.renew_wrappers(model)
    for step in range(method.step_count, steps):
        generator = torch.Generator().manual_seed(100 * step + accelerator.process_index)
        x = torch.randn(4, 8, generator=generator)
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        event = method.step()
        if event and event.shapes_changed:
            oialr.renew_wrappers(model)
        optimizer.zero_grad()
    return accelerator, method


def main(folder):
    _, whole = loop(STEPS)
    for steps in (3, 6, 9, 11):
        accelerator, method = loop(steps)
        place = folder / str(steps)
        accelerator.save_state(place)
        accelerator.wait_for_everyone()
        assert len(list(place.glob("model*.safetensors"))) == 1
        _, resumed = loop(STEPS, folder=place, seed=9)
        ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), steps
    if accelerator.is_main_process:
        print(f"{accelerator.num_processes} processes, {method.ranks()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
