"""Workers: the processes of the program in groups of equal size, each for a training of its own.

Every group gets torch.distributed to itself: what runs in it sees its own processes and no others.
Its connections stay from training to training, and are made anew after a fault in one, which so
leaves nothing behind for the next. Never made anew without need: of the threads of a group torch
keeps something for ever (seen with 2.13: 120 bytes of each, in memory that nothing else can use).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from app.errors import UserError
from app.runtime.launch import Launch, read_launch
from app.runtime.processes import Groups, Runtime, abort_all, choose_device, connect_mpi, use
from oialr.placement.processes import agree

Result = TypeVar("Result")
_POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among the workers. Communicators are mpi4py's."""

    index: int
    """Of this process's worker."""
    count: int
    """Number of workers."""
    world: Any
    """All processes of the program."""
    own: Any
    """The processes of this worker."""
    firsts: Any
    """The first processes of all workers; None on all other processes."""
    local_index: int
    """Index of this process among those of its worker on its node."""
    device: torch.device
    _kept: list[Groups] = field(default_factory=list)
    """The connections between two trainings; empty if there are none."""

    @property
    def is_first(self) -> bool:
        """Whether this is the worker's first process, which writes and reports."""
        return self.firsts is not None

    @contextmanager
    def join(self, *, timeout: float) -> Iterator[Runtime]:
        """Join the worker's processes for one training. A collective call of the worker.

        Leaving it by an error closes the connections: if one process fails, the others' next
        collective call is an error instead of a wait. An error that all raise alike after the same
        collective calls need not come out of it.
        """
        launch = Launch(
            launcher="mpi",
            process_index=self.own.Get_rank(),
            process_count=self.own.Get_size(),
        )
        alone = launch.process_count == 1
        groups = None if alone else self._connect(launch, timeout)
        try:
            with use(
                groups,
                launch,
                None if alone else self.own,
                device=self.device,
                local_index=self.local_index,
            ) as runtime:
                yield runtime
        except BaseException:
            self.close()
            raise

    def _connect(self, launch: Launch, timeout: float) -> Groups:
        """Return the connections that all processes have kept, or new ones. Collective."""
        kept = bool(self._kept) and self._kept[0].timeout == timeout
        if not all(self.gather(kept, timeout=timeout)):
            self.close()
            self._kept.append(Groups(launch, self.own, device=self.device, timeout=timeout))
        return self._kept[0]

    def close(self) -> None:
        """Close the connections, if there are any; the program is not to end with them."""
        if self._kept:
            self._kept.pop().close()

    def gather(self, value: Result, *, timeout: float) -> list[Result]:
        """Collect a picklable object of every process of the worker on all of them.

        They may come at different times. Who waits sleeps, since MPI would keep a core busy.

        Raises:
            TimeoutError: some process did not come in time (seconds).
        """
        wait(self.own, timeout=timeout)
        values: list[Result] = self.own.allgather(value)
        return values

    def agree(self, function: Callable[[], Result]) -> Result:
        """Call a function on every process of the program; a user's mistake on one is one on all.

        Raises:
            AgreedUserError: the first process's, by index, on every process.
        """

        def gather(message: str | None) -> list[str | None]:
            wait(self.world)
            messages: list[str | None] = self.world.allgather(message)
            return messages

        return agree(gather, function)

    def abort(self, code: int) -> None:
        """End all processes of the program now."""
        abort_all(self.world, code)


def start_workers(*, processes_per_worker: int, device: str) -> Workers:
    """Divide the processes of the program into workers of consecutive ones. A collective call.

    Args:
        processes_per_worker: processes of each.
        device: "auto", "cpu" or "cuda"; a GPU is given to one process of the node only.

    Raises:
        UserError: not under MPI, or the number of processes is no multiple; on all processes.
    """
    launch = read_launch()
    if launch.launcher == "torchrun":
        raise UserError("a search needs MPI: start it by mpirun or srun instead of torchrun")
    world = connect_mpi(launch)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"a search needs MPI, which cannot be used: {error}") from None
    world = MPI.COMM_SELF if world is None else world
    rank, size = world.Get_rank(), world.Get_size()
    if size % processes_per_worker:
        raise UserError(
            f"search.processes_per_worker: {processes_per_worker} does not divide the {size} "
            f"processes of this start"
        )
    # Over all workers, so that no two of them share a GPU.
    _, chosen = choose_device(device, launch, world if size > 1 else None)
    index = rank // processes_per_worker
    own = world.Split(index, rank)
    node = own.Split_type(MPI.COMM_TYPE_SHARED)
    local_index = node.Get_rank()
    node.Free()
    firsts = world.Split(0 if own.Get_rank() == 0 else 1, rank)
    return Workers(
        index=index,
        count=size // processes_per_worker,
        world=world,
        own=own,
        firsts=firsts if own.Get_rank() == 0 else None,
        local_index=local_index,
        device=chosen,
    )


def wait(communicator: Any, *, timeout: float | None = None) -> None:
    """Wait, asleep, until all processes of a communicator are here.

    Raises:
        TimeoutError: some process did not come in time (seconds).
    """
    end = None if timeout is None else time.monotonic() + timeout
    request = communicator.Ibarrier()
    while not request.Test():
        if end is not None and time.monotonic() > end:
            raise TimeoutError(f"a process did not answer within {timeout} s")
        time.sleep(_POLL_SECONDS)
