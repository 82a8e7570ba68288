"""Run under mpirun: the method on several processes against the same on one."""

import hashlib
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from app.runtime.processes import start_runtime
from app.training.replicas import Replicas
from oialr.method import OIALR
from oialr.placement.processes import Processes

STEPS = 14


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 36, 40),
        nn.ReLU(),
        nn.Linear(40, 24),
        nn.Tanh(),
        nn.Linear(24, 5),
    ).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(24, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, x.mean((1, 2, 3)).mul(20).long().clamp(-2, 2) + 2


def run(processes, factorization, on_event, on_wrapped, factor=3.0, **options):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    arguments = {"delay": 4, "update_interval": 3, "cutoff": 0.2, "layer_fraction": 0.5}
    method = OIALR(
        model,
        optimizer,
        **{**arguments, **options},
        factorization=factorization,
        processes=processes,
        core_learning_rate_factor=factor,
    )

    def throw_away(module):
        return module(torch.zeros(2, 1, 8, 8, dtype=torch.float64)).sum()

    replicas = Replicas(model, processes, torch.device("cpu"), throw_away)
    on_wrapped(replicas)
    for step in range(STEPS):
        x, y = batch(step)
        part = slice(
            processes.index * 24 // processes.count, (processes.index + 1) * 24 // processes.count
        )
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(replicas.module(x[part]), y[part], reduction="sum") / 24
        (loss * processes.count).backward()
        del loss
        optimizer.step()
        event = method.step()
        if event:
            if event.shapes_changed:
                replicas.rebuild()
                on_wrapped(replicas)
            on_event(event, model, optimizer)
    return model, method


def digest(model, optimizer):
    content = hashlib.sha256()
    for parameter in model.parameters():
        content.update(parameter.detach().numpy().tobytes())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key in sorted(state):
                content.update(state[key].numpy().tobytes())
    return content.hexdigest()


def main():
    with start_runtime(device="cpu", timeout=60) as runtime:
        processes = runtime.processes
        sent = []
        broadcasts = []

        def count_gradients(replicas):
            def hook(state, bucket):
                sent.append(bucket.buffer().numel())
                return default_hooks.allreduce_hook(state, bucket)

            if processes.count > 1:
                replicas.module.register_comm_hook(None, hook)

        events = []

        def on_event(event, model, optimizer):
            events.append(event)
            digests = processes.gather(digest(model, optimizer))
            assert len(set(digests)) == 1, f"replicas differ after step {event.step}"
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            # What was sent since the last event are gradients of the parameters trained then.
            sent.clear()
            broadcasts.append((event.step, event.broadcast_bytes, trained))

        real_broadcast, real_coalesced = dist.broadcast, dist._broadcast_coalesced
        outside = []
        dist.broadcast = lambda *a, **k: (outside.append(a), real_broadcast(*a, **k))[1]
        dist._broadcast_coalesced = lambda *a, **k: (outside.append(a), real_coalesced(*a, **k))[1]
        model, method = run(processes, "owner", on_event, count_gradients)
        dist.broadcast, dist._broadcast_coalesced = real_broadcast, real_coalesced
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        steps_since = STEPS - events[-1].step
        if processes.count > 1:
            # Only gradients of what is trained; nothing for frozen factors.
            assert sum(sent) == steps_since * trained, (sum(sent), steps_since, trained)
            # Factors of many layers travel together, at events alone: one message per owner.
            assert len(outside) <= len(events) * processes.count
            shapes = {report.name: report.matrix_shape for report in method.layers}
            for event in events:
                numbers = 0
                for layer in event.layers:
                    r = layer.previous_rank
                    m, n = shapes[layer.name] if event.kind == "convert" else (r, r)
                    numbers += m * r + r + r * n
                assert event.broadcast_bytes == 8 * numbers, event
                assert len(event.factorization_seconds) == processes.count
                assert len(event.predicted_seconds) == processes.count
        assert events[0].kind == "convert"
        assert any(event.kind == "cut" for event in events), "no cut: the test shows nothing"

        ignore = lambda *_: None  # noqa: E731
        replicated, _ = run(processes, "replicated", ignore, count_gradients)
        for mine, theirs in zip(model.parameters(), replicated.parameters(), strict=True):
            assert torch.equal(mine, theirs), "replicated differs from owner"
        heat, heat_method = run(processes, "heat", ignore, count_gradients)
        assert heat_method.ranks() == method.ranks()
        alone, alone_method = run(Processes(), "owner", ignore, ignore)
        assert alone_method.ranks() == method.ranks()
        for mine, theirs in zip(model.modules(), alone.modules(), strict=True):
            if hasattr(mine, "weight"):
                torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-7, atol=1e-9)
        for mine, theirs in zip(heat.modules(), alone.modules(), strict=True):
            if hasattr(mine, "weight"):
                torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-7, atol=1e-9)
        assert ("heat" in sys.modules) == (processes.count > 1), "heat is for split layers alone"
        if runtime.is_first:
            print("same on all processes")


if __name__ == "__main__":
    sys.exit(main())
