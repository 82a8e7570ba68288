"""The runtime: which process this is, on which device, and how it reaches the others."""

import gc
import importlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from app.compatibility import (
    initialize_mpi,
    remove_stale_shared_memory_of_mpich,
    unlink_shared_memory_of_mpich,
)
from app.errors import AgreedUserError, UserError
from app.runtime.launch import Launch, read_launch
from app.runtime.rendezvous import make_store
from app.runtime.streams import flush, show
from app.runtime.watchdog import Watchdog
from oialr.placement.processes import Processes

LATER = 15.0
"""Seconds by which a collective's timeout is longer than distributed.timeout."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """This process among all processes of the program."""

    process_index: int
    process_count: int
    local_index: int
    """Index of this process on its node."""
    device: torch.device
    communicator: Any
    """mpi4py communicator of all processes; None alone and under torchrun."""
    processes: Processes
    """The torch.distributed groups."""

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which alone writes and reports."""
        return self.process_index == 0

    def abort(self, code: int) -> None:
        """End all processes now, this one with the exit code given."""
        abort_all(self.communicator, code)


def abort_all(communicator: Any, code: int) -> None:
    """End all processes now, this one with an exit code.

    Args:
        communicator: of all; None alone and under torchrun.
        code: of the exit.
    """
    flush()
    # mpirun hands output on in its own time, and drops what is under way when it ends all.
    time.sleep(1)
    if communicator is not None:
        communicator.Abort(code)
    os._exit(code)  # under torchrun the agent ends the others


@contextmanager
def start_runtime(*, device: str, timeout: float = 1800) -> Iterator[Runtime]:
    """Bring the processes up as they were launched, and down again.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout: seconds after which a start that stands still ends; a collective without answer is
            an error a little later.

    Raises:
        UserError: the launcher started N processes that do not see each other, or there is no GPU
            for each process.
    """
    launch = read_launch()
    alone = launch.process_count == 1
    with Watchdog(timeout=None if alone else timeout, abort=os._exit, name=launch.name):
        communicator = connect_mpi(launch)
        with _fault_ends_all(communicator):
            local_index, chosen = choose_device(device, launch, communicator, timeout=timeout)
    with join(
        launch, communicator, device=chosen, local_index=local_index, timeout=timeout
    ) as runtime:
        yield runtime


@contextmanager
def join(
    launch: Launch, communicator: Any, *, device: torch.device, local_index: int, timeout: float
) -> Iterator[Runtime]:
    """Join the processes of a communicator by torch.distributed, and leave it at the end.

    Args:
        launch: this process's index and count in the communicator.
        communicator: mpi4py communicator; None alone and under torchrun.
        device: of this process, of the same kind on all: nccl for GPUs, else gloo.
        local_index: index of this process on its node.
        timeout: as for :func:`start_runtime`.
    """
    groups = None
    if launch.process_count > 1:
        groups = Groups(launch, communicator, device=device, timeout=timeout)
    try:
        with use(groups, launch, communicator, device=device, local_index=local_index) as runtime:
            yield runtime
    finally:
        if groups:
            groups.close()


class Groups:
    """The groups of torch.distributed that processes have between them: connections and threads."""

    def __init__(
        self, launch: Launch, communicator: Any, *, device: torch.device, timeout: float
    ) -> None:
        """Connect. A collective call; a process has no other groups until these are closed.

        Args:
            launch, communicator, device, timeout: as for :func:`join`.
        """
        # DistributedDataParallel imports it at its first use. Imported while there are groups it
        # keeps them, and their connections and threads, for good (seen with torch 2.13).
        importlib.import_module("torch._dynamo")
        self.timeout = timeout
        # Which torch wraps into one of its own, each time anew, and leaves so.
        self._excepthook = sys.excepthook
        # The watchdog of a training says more than a collective that times out: let it be first.
        group_timeout = timedelta(seconds=timeout + LATER)
        with Watchdog(timeout=timeout, abort=os._exit, name=launch.name):
            _start_default_group(launch, communicator, device, group_timeout)
            # Of its own for host memory: stop flags and objects travel beside the gradients.
            self._host_group = dist.new_group(backend="gloo", timeout=group_timeout)

    def processes(self, communicator: Any) -> Processes:
        """Return the processes that are connected, for one use; they are to be closed after it."""
        return Processes(
            group=dist.group.WORLD, host_group=self._host_group, communicator=communicator
        )

    def close(self) -> None:
        """Disconnect, so that whatever another process does with its groups is an error."""
        # The groups' threads must end before the interpreter does: one that lets go of a tensor
        # afterwards aborts the process. They end with the last reference to their group.
        del self._host_group
        dist.destroy_process_group()
        sys.excepthook = self._excepthook
        gc.collect()  # wrappers of networks refer to the groups too, in cycles


@contextmanager
def use(
    groups: Groups | None,
    launch: Launch,
    communicator: Any,
    *,
    device: torch.device,
    local_index: int,
) -> Iterator[Runtime]:
    """Yield the runtime of processes that are connected; the groups stay.

    Args:
        groups: None: this process is alone.
        launch, communicator, device, local_index: as for :func:`join`.
    """
    processes = groups.processes(communicator) if groups else Processes()
    try:
        yield Runtime(
            process_index=launch.process_index,
            process_count=launch.process_count,
            local_index=local_index,
            device=device,
            communicator=communicator,
            processes=processes,
        )
    finally:
        processes.close()


def connect_mpi(launch: Launch) -> Any:
    """Return COMM_WORLD, checked against what the launcher started; None where MPI is not used.

    A collective call. A process that is alone needs no MPI library.

    Raises:
        UserError: MPI cannot be used, or does not see what the launcher started.
    """
    is_alone = launch.process_count == 1 and not launch.disputed
    if launch.launcher in ("alone", "torchrun") or is_alone:
        return None
    processes = "1 process" if launch.process_count == 1 else f"{launch.process_count} processes"
    started = f"{launch.launcher} started {processes}"
    remove_stale_shared_memory_of_mpich()
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{started}, but MPI cannot be used: {error}") from None
    initialize_mpi(MPI)
    world = MPI.COMM_WORLD
    size = world.Get_size()
    told = world.allgather((launch.process_index, launch.process_count))
    if told != [(index, size) for index in range(size)]:
        library = MPI.Get_library_version().split("\n")[0].rstrip("\0 ")
        same = size == launch.process_count
        seen = "their order is another in" if same else f"each sees {size} in its"
        line = f"{started}, but {seen} MPI ({library}): {_cure(launch, library)}"
        if size > 1 and world.Get_rank() == 0 and not any(index == 0 for index, _ in told):
            show(f"error: {line}", error=True)  # nobody takes itself for the first, which tells
        raise AgreedUserError(line)
    if size == 1:
        return None
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    unlink_shared_memory_of_mpich(node)
    node.Free()
    return world


def _cure(launch: Launch, library: str) -> str:
    """Return what helps where MPI sees another number of processes than was started."""
    if launch.launcher == "srun":
        kind = "pmix" if "Open MPI" in library else "pmi2"
        return f"try srun --mpi={kind}, in slurm/env.sh SRUN_MPI={kind} (see srun --mpi=list)"
    left = f", and unset {launch.disputed} where an outer launcher left them"
    return f"use the mpirun of the environment's own MPI{left if launch.disputed else ''}"


def choose_device(
    device: str, launch: Launch, communicator: Any, *, timeout: float = 1800
) -> tuple[int, torch.device]:
    """Return this process's index on its node and its device; the same kind on all processes.

    A collective call.

    Args:
        device: "auto", "cpu" or "cuda".
        launch: this process's index and count.
        communicator: mpi4py communicator; None alone and under torchrun.
        timeout: seconds after which processes of torchrun wait no longer for each other.

    Raises:
        AgreedUserError: GPUs were asked for, and some process has none of its own.
    """
    mine = _visible_gpus() if device != "cpu" else []
    if communicator is not None:
        from mpi4py import MPI

        node = communicator.Split_type(MPI.COMM_TYPE_SHARED)
        local_index, gpus = node.Get_rank(), node.allgather(mine)
        node.Free()
    elif launch.launcher == "torchrun":
        local_index = int(os.environ["LOCAL_RANK"])
        gpus = [mine] * int(os.environ["LOCAL_WORLD_SIZE"])
    else:
        local_index, gpus = 0, [mine]
    if device == "cpu":
        return local_index, torch.device("cpu")
    index, lack = own_gpu(gpus, local_index), ""
    if index is None:
        many = "1 process" if len(gpus) == 1 else f"{len(gpus)} processes"
        lack = f"{many} on {socket.gethostname()}, which shows {len(mine)} GPUs to one of them"
    lack, some = _first_lack(lack, bool(mine), launch, communicator, timeout=timeout)
    if lack:
        cure = "start one process per GPU, or set distributed.device=cpu"
        line = f"distributed.device: there is no GPU for each process: {lack}; {cure}"
        if device == "cuda":
            raise AgreedUserError(line)
        if some and launch.process_index == 0:  # where there are none at all, nothing is amiss
            show(f"warning: all compute on CPUs: {line}", error=True)
    if index is None or lack:
        return local_index, torch.device("cpu")
    chosen = torch.device("cuda", index)
    torch.cuda.set_device(chosen)
    return local_index, chosen


def _first_lack(
    lack: str, sees: bool, launch: Launch, communicator: Any, *, timeout: float
) -> tuple[str, bool]:
    """Return what a process lacks, and whether one sees a GPU, the same on all of them.

    Args:
        lack: of this process; empty if it has what it needs.
        sees: whether this process sees a GPU.
        launch, communicator, timeout: as for :func:`choose_device`.
    """
    if communicator is not None:
        lacks, seen = zip(*communicator.allgather((lack, sees)), strict=True)
        return next(filter(None, lacks), ""), any(seen)
    if launch.process_count == 1:
        return lack, sees
    store = make_store(launch, None, timeout=timedelta(seconds=timeout))
    if lack:
        store.compare_set("lack", "", lack)
    if sees:
        store.set("some", "")
    if store.add("looked", 1) == launch.process_count:
        store.set("all have looked", "")
    store.wait(["all have looked"])
    first = store.get("lack").decode() if store.check(["lack"]) else ""
    some = store.check(["some"])
    if store.add("read", 1) == launch.process_count:
        store.set("all have read", "")
    if launch.process_index == 0:  # which may be the store's host
        store.wait(["all have read"])
    return first, some


def own_gpu(gpus: Sequence[Sequence[str]], local_index: int) -> int | None:
    """Choose a GPU that no other process of the node takes.

    All processes of the node come to the same, by augmenting paths: who finds none of its own that
    is free lets another one move to another of its own.

    Args:
        gpus: for each process of the node, the identities of the GPUs that it sees, in its order.
            Launchers show every process all of them, each its own, or those that are near to it.
        local_index: of the process that asks.

    Returns:
        Index among the GPUs that it sees; None if some process of the node would have to share.
    """
    owners: dict[str, int] = {}

    def place(process: int, tried: set[str]) -> bool:
        free = [gpu for gpu in gpus[process] if gpu not in owners]
        for gpu in (*free, *gpus[process]):
            if gpu not in tried:
                tried.add(gpu)
                if gpu not in owners or place(owners[gpu], tried):
                    owners[gpu] = process
                    return True
        return False

    if not all(place(process, set()) for process in range(len(gpus))):
        return None
    return next(i for i, gpu in enumerate(gpus[local_index]) if owners.get(gpu) == local_index)


def _visible_gpus() -> list[str]:
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


def _start_default_group(
    launch: Launch, communicator: Any, device: torch.device, timeout: timedelta
) -> None:
    """Start torch.distributed's default group: nccl for GPUs, else gloo."""
    with _fault_ends_all(communicator):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=make_store(launch, communicator, timeout=timeout),
            rank=launch.process_index,
            world_size=launch.process_count,
            timeout=timeout,
        )


@contextmanager
def _fault_ends_all(communicator: Any) -> Iterator[None]:
    """End all processes if this one fails, unless all fail together."""
    try:
        yield
    except AgreedUserError:
        raise
    except Exception:
        # The others wait for this process in a collective that it will never reach.
        if communicator is not None:
            traceback.print_exc()
            communicator.Abort(1)
        raise
