"""What the processes of test_gpu_processes do; each is started anew, without the test's state."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.gpu.networks import Size, Training, batches, build, input_shape, training
from torch import Tensor, multiprocessing, nn
from torch.nn import functional

from app.errors import AgreedUserError, UserError
from app.training.replicas import Replicas
from oialr.placement.processes import Processes

TRAINED = ("linear", "attention")
TIMEOUT = 120  # seconds


def start(count: int, backend: str, device: torch.device, size: Size, folder: Path) -> None:
    """Run :func:`work` in so many processes; a hang ends after a while."""
    place = (count, backend, device, size, folder)
    context = multiprocessing.spawn(work, (place,), nprocs=count, join=False)
    try:
        waited = 0
        while not context.join(timeout=10):  # raises what a process raised
            waited += 10
            assert waited < TIMEOUT, "the processes stand still"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def work(index: int, place: tuple[int, str, torch.device, Size, Path]) -> None:
    """Join the other processes, talk to them, train with them, and leave them."""
    count, backend, device, size, folder = place
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(folder / "store"), count),
        rank=index,
        world_size=count,
        timeout=timedelta(seconds=TIMEOUT),
    )
    host_group = dist.new_group(backend="gloo")
    processes = Processes(group=dist.group.WORLD, host_group=host_group)
    try:
        converse(device, processes)
        (folder / f"conversed-{index}").touch()
        train_and_save(device, size, processes, folder)
    finally:
        del host_group
        processes.close()
        dist.destroy_process_group()


def data(name: str, size: Size) -> list[tuple[Tensor, Tensor]]:
    """Return eight global batches."""
    return batches(input_shape(name, size), size, 8)


def train(name: str, size: Size, device: torch.device, processes: Processes) -> Training:
    """Train across events as the trainer does, each process on its share of every batch."""
    model = build(name, size, torch.float64).to(device)
    trained = training(model, processes=processes)
    shape = input_shape(name, size)

    def throw_away_loss(module: nn.Module) -> Tensor:
        loss: Tensor = module(torch.zeros(2, *shape, dtype=torch.float64, device=device)).sum()
        return loss

    replicas = Replicas(model, processes, device, throw_away_loss)
    share = slice(
        processes.index * size.batch // processes.count,
        (processes.index + 1) * size.batch // processes.count,
    )
    for inputs, labels in trained.placed(data(name, size)):
        trained.optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(replicas.module(inputs[share]), labels[share])
        loss.backward()
        trained.optimizer.step()
        if trained.method.conversion_due:
            replicas.release()
        if event := trained.method.step():
            trained.events[event.step] = event
            if event.shapes_changed:
                replicas.rebuild()
    return trained


def train_and_save(device: torch.device, size: Size, processes: Processes, folder: Path) -> None:
    """Save the weights, ranks and kinds of events of each network."""
    for name in TRAINED:
        trained = train(name, size, device, processes)
        torch.save(
            {
                "weights": trained.weights(),
                "ranks": trained.method.ranks(),
                "kinds": [event.kind for event in trained.events.values()],
                "bytes": [event.broadcast_bytes for event in trained.events.values()],
                "owners": [layer.owner for layer in trained.events[2].layers],
            },
            folder / f"{name}-{processes.index}.pt",
        )


def converse(device: torch.device, processes: Processes) -> None:
    """Make every call that the processes have for each other, with tensors on the device."""
    index, count = processes.index, processes.count
    mine = torch.tensor([index + 1.0, -index], device=device)
    total = processes.sum(mine.clone())
    assert total.tolist() == [sum(range(1, count + 1)), -sum(range(count))]
    assert processes.maximum(mine.clone()).tolist() == [count, 0]
    whole = torch.tensor([2**62 + index], device=device)
    assert processes.maximum(whole).item() == 2**62 + count - 1
    for owner in range(count):
        sent = torch.full((3,), float(index), device=device)
        processes.broadcast(sent, owner)
        assert sent.tolist() == [owner] * 3
        sent = torch.full((3,), float(index), device=device)
        processes.start_broadcast(sent, owner).wait()
        assert sent.tolist() == [owner] * 3
    assert processes.broadcast_bytes == 2 * count * 3 * 4
    assert processes.gather({"index": index}) == [{"index": i} for i in range(count)]
    assert processes.from_first(f"from {index}") == "from 0"
    processes.barrier()

    def mistake() -> None:
        if index == count - 1:
            raise UserError("a mistake of the last")

    with pytest.raises(AgreedUserError, match="a mistake of the last"):
        processes.agree(mistake)
    assert processes.agree(lambda: index) == index
