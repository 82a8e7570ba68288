"""Run under mpirun: releases and target sizes on several processes against the same on one."""

import sys

import torch
from method import digest, run

from app.runtime.processes import start_runtime
from oialr.placement.processes import Processes

CASES = {
    "from cores": {"delay": 4, "release": 10},
    "to dense": {"delay": 4, "release": 10, "cutoff": 1e-9},
    "at the conversion": {"delay": 8, "release": 8, "target_size": 0.5},
    "some dense": {"delay": 4, "release": 10, "target_size": 0.8},
    "by its inputs": {"delay": 8, "release": 8, "target_size": 0.5, "truncation": "outputs"},
    "decayed": {"delay": 4, "release": 10, "target_size": 0.4, "frobenius_decay": 0.1},
    "cores at a size": {"delay": 4, "target_size": 0.6, "layer_fraction": 1.0},
}


def main():
    with start_runtime(device="cpu", timeout=60) as runtime:
        processes = runtime.processes
        for name, options in CASES.items():
            events = []

            def on_event(event, model, optimizer, name=name, events=events):
                events.append(event)
                digests = processes.gather(digest(model, optimizer))
                assert len(set(digests)) == 1, f"{name}: replicas differ after {event.step}"

            ignore = lambda *_: None  # noqa: E731
            model, method = run(processes, "owner", on_event, ignore, **options)
            assert (events[-1].kind == "release") == ("release" in options), name
            assert method.missed_target() is None, name
            alone, alone_method = run(Processes(), "owner", ignore, ignore, **options)
            assert alone_method.ranks() == method.ranks(), name
            state = {k: v for k, v in method.state_dict().items()}
            assert state == alone_method.state_dict(), name
            for mine, theirs in zip(model.modules(), alone.modules(), strict=True):
                if hasattr(mine, "weight"):
                    torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-6, atol=1e-8)
            groups = [len(group["params"]) for group in method.optimizer.param_groups]
            others = [len(group["params"]) for group in alone_method.optimizer.param_groups]
            assert groups == others, name
            forms = set(method.state_dict()["released"].values())
            wanted = {"from cores": "factors", "to dense": "dense", "decayed": "factors"}
            assert wanted.get(name, "factors") in forms or name == "cores at a size", (name, forms)
        if runtime.is_first:
            print("same on all processes")


if __name__ == "__main__":
    sys.exit(main())
