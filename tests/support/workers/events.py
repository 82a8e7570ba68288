"""Run under mpirun: what can go wrong at an event, and what is sent."""

import logging

import torch
from torch import nn

from app.errors import DifferingReplicasError, DivergedError
from app.runtime.processes import start_runtime
from oialr.linalg.checksum import checksum
from oialr.linalg.svd import economy_svd
from oialr.method import OIALR
from oialr.placement import factorization
from oialr.transitions import Transitions

CPU = torch.device("cpu")


def make(processes, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(30, 40),
        nn.ReLU(),
        nn.Linear(40, 50),
        nn.ReLU(),
        nn.Linear(50, 36),
        nn.Linear(36, 3),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    arguments = {"delay": 2, "update_interval": 2, "layer_fraction": 1, "cutoff": 1e-6, **options}
    method = OIALR(model, optimizer, processes=processes, **arguments)

    def train(steps=2):
        for _ in range(steps):
            optimizer.zero_grad()
            x = torch.randn(16, 30, generator=torch.Generator().manual_seed(method.step_count))
            nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()

    return model, optimizer, method, train


def same(model, processes):
    bits = processes.gather(int(checksum(model.parameters(), CPU)))
    return len(set(bits)) == 1


def expect(error, text, method, processes):
    try:
        method.step()
        message = "nothing was raised"
    except error as raised:
        message = str(raised)
    assert all(text in found for found in processes.gather(message)), message


def warnings_of(call):
    """Return what a call returns, and what the library's loggers said meanwhile."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("oialr").addHandler(handler)
    try:
        return call(), records
    finally:
        logging.getLogger("oialr").removeHandler(handler)


def diverged_on_one_process(processes):
    model, _, method, train = make(processes)
    train()
    if processes.index == processes.count - 1:
        with torch.no_grad():
            model[2].weight[3, 1] = float("inf")
    expect(DivergedError, "2.weight holds NaN or infinity at step 2", method, processes)


def differing_replicas(processes):
    for what in ("weight", "moment"):
        model, optimizer, method, train = make(processes)
        train()
        method.step()
        train()
        tensor = model[4].U if what == "weight" else optimizer.state[model[4].core]["exp_avg"]
        if processes.index == processes.count - 1:
            with torch.no_grad():
                tensor.view(torch.int32)[1, 2] ^= 1
        expect(DifferingReplicasError, "4.weight differs between the processes", method, processes)


def mixed_hardware(processes):
    """The last process rounds its products otherwise."""
    real = Transitions.apply

    def apply(self, report, factors, **options):
        rank = real(self, report, factors, **options)
        if report.name == "2.weight":
            with torch.no_grad():
                self.tensors(report)[1][0, 0] += 1e-6
                self.tensors(report)[-1][0, 0] += 1e-6
        return rank

    model, _, method, train = make(processes)
    if processes.index == processes.count - 1:
        Transitions.apply = apply
    train()
    event, warnings = warnings_of(method.step)
    assert len(warnings) == 1
    assert "2.weight" in warnings[0]
    assert same(model, processes)
    repaired_bytes = event.broadcast_bytes
    train()
    event, warnings = warnings_of(method.step)
    assert not warnings
    assert event.broadcast_bytes > 0
    assert same(model, processes)
    Transitions.apply = real
    _, _, method, train = make(processes)
    train()
    assert method.step().broadcast_bytes < repaired_bytes


def no_convergence(processes):
    """The factorization of 2.weight fails: it stays as it was, until the next event."""
    real = factorization.economy_svd
    failing = True

    def svd(matrix):
        if failing and matrix.shape[1] == 40:
            raise torch.linalg.LinAlgError("no")
        return real(matrix)

    factorization.economy_svd = svd
    everything = ["0.weight", "2.weight", "4.weight"]
    for options in ({}, {"cut_at_conversion": True}, {"factorization": "replicated"}):
        model, _, method, train = make(processes, **options)
        failing = True
        train()
        event, warnings = warnings_of(method.step)
        assert [layer.name for layer in event.layers] == ["0.weight", "4.weight"]
        assert len(warnings) == 1
        assert "2.weight keeps its present full-rank weight" in warnings[0]
        assert isinstance(model[2], nn.Linear)
        assert method.state_dict()["ranks"] == {"0.weight": 30, "2.weight": None, "4.weight": 36}
        failing = False
        train()
        event, warnings = warnings_of(method.step)
        assert [layer.name for layer in event.layers] == everything
        assert not warnings
        assert event.shapes_changed
        assert method.ranks()["2.weight"] == 40
        failing = True
        train()
        before = model[2].weight.detach().clone()
        event, warnings = warnings_of(method.step)
        assert [layer.name for layer in event.layers] == ["0.weight", "4.weight"]
        assert len(warnings) == 1
        assert "2.weight keeps its present factors" in warnings[0]
        assert torch.equal(model[2].weight, before)
        assert not event.shapes_changed
        assert same(model, processes)
    factorization.economy_svd = real


def what_is_sent(processes):
    model, _, method, train = make(processes)
    train()
    method.step()
    train()
    event = method.step()
    numbers = sum(2 * layer.previous_rank**2 + layer.previous_rank for layer in event.layers)
    assert event.broadcast_bytes == 4 * numbers
    # Nothing was trained in between: all cores are diagonal, and only their order may change.
    method._timetable.step_count += 2
    with torch.no_grad():
        core = model[2].core
        core.copy_(core[torch.arange(len(core) - 1, -1, -1)].flip(1) * -1)
    before = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    event = method.step()
    assert event.broadcast_bytes == 0
    assert len(event.layers) == 3
    assert (model[2].core.diagonal().diff() <= 0).all()
    for i, weight in zip((0, 2, 4), before, strict=True):
        torch.testing.assert_close(model[i].weight, weight)

    # At a conversion that cuts, the columns that are kept.
    model, _, method, train = make(processes, cut_at_conversion=True, cutoff=0.3)
    train()
    event = method.step()
    shapes = {report.name: report.matrix_shape for report in method.layers}
    assert any(layer.rank < layer.previous_rank for layer in event.layers)
    numbers = sum(
        layer.rank * sum(shapes[layer.name]) + layer.previous_rank for layer in event.layers
    )
    assert event.broadcast_bytes == 4 * numbers
    assert same(model, processes)


def little_memory(processes):
    """Messages of one layer each, and room for none of them."""
    real = factorization.make_buckets
    factorization.make_buckets = lambda *arguments: real(*arguments, limit=1)
    room, factorization.BYTES_UNDER_WAY = factorization.BYTES_UNDER_WAY, 0
    model, _, method, train = make(processes)
    train()
    weights = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    method.step()
    for i, weight in zip((0, 2, 4), weights, strict=True):
        torch.testing.assert_close(model[i].weight, weight)
        torch.testing.assert_close(model[i].core.diagonal(), economy_svd(weight).s)
    assert same(model, processes)
    factorization.make_buckets, factorization.BYTES_UNDER_WAY = real, room


def main():
    with start_runtime(device="cpu", timeout=60) as runtime:
        for case in (
            what_is_sent,
            little_memory,
            no_convergence,
            mixed_hardware,
            differing_replicas,
            diverged_on_one_process,
        ):
            case(runtime.processes)
            runtime.processes.barrier()
            if runtime.is_first:
                print(case.__name__, flush=True)
        if runtime.is_first:
            print("all cases")


if __name__ == "__main__":
    main()
