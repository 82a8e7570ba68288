"""Run under mpirun: conversions by stability on several processes against the same on one."""

import sys

import torch
from method import digest, run

from app.runtime.processes import start_runtime
from oialr.placement.processes import Processes

OPTIONS = {
    "delay": "stability",
    "update_interval": 2,
    "stability_threshold": float(sys.argv[1]),
    "latest_delay": 12,
}


def main():
    with start_runtime(device="cpu", timeout=60) as runtime:
        processes = runtime.processes
        events, its_events = [], []
        wrapped = []

        def on_event(event, model, optimizer):
            events.append((event.step, event.kind, [layer.name for layer in event.layers]))
            digests = processes.gather(digest(model, optimizer))
            assert len(set(digests)) == 1, f"replicas differ after step {event.step}"

        def on_its_event(event, *_):
            its_events.append((event.step, event.kind, [layer.name for layer in event.layers]))

        model, method = run(processes, "owner", on_event, wrapped.append, **OPTIONS)
        ignore = lambda *_: None  # noqa: E731
        alone, its_method = run(Processes(), "owner", on_its_event, ignore, **OPTIONS)
        assert events == its_events, (events, its_events)
        conversions = [step for step, kind, _ in events if kind == "convert"]
        assert len(conversions) > 1, events
        assert len(wrapped) > len(conversions)
        assert processes.gather(len(wrapped)) == [len(wrapped)] * processes.count
        assert method.ranks() == its_method.ranks()
        assert method.state_dict() == its_method.state_dict()
        for mine, theirs in zip(model.modules(), alone.modules(), strict=True):
            if hasattr(mine, "weight"):
                torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-6, atol=1e-8)
        if runtime.is_first:
            print(f"same on all processes, conversions after {conversions}")


if __name__ == "__main__":
    sys.exit(main())
