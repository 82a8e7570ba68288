"""The runtime: which process this is, on which device, and how it reaches the others."""

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from app.distributed.launch import Launch, read_launch
from app.distributed.processes import Processes
from app.errors import UserError


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
        if self.communicator is not None:
            self.communicator.Abort(code)
        os._exit(code)  # under torchrun the agent ends the others


@contextmanager
def start_runtime(*, device: str, timeout: float) -> Iterator[Runtime]:
    """Bring the processes up as they were launched, and down again.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout: seconds after which a collective without answer is an error.

    Raises:
        UserError: the launcher started N processes that do not see each other, or there is no GPU
            for each process.
    """
    launch = read_launch()
    communicator = _connect_mpi(launch)
    local_index, local_count = _local_place(launch, communicator)
    chosen = _choose_device(device, local_index, local_count)
    if launch.process_count == 1:
        yield Runtime(
            process_index=0,
            process_count=1,
            local_index=0,
            device=chosen,
            communicator=None,
            processes=Processes(),
        )
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=_make_store(launch, communicator),
        rank=launch.process_index,
        world_size=launch.process_count,
        timeout=timedelta(seconds=timeout),
    )
    # A group of its own for host memory: the stop flags and objects travel beside the gradients.
    host_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    processes = Processes(group=dist.group.WORLD, host_group=host_group)
    try:
        yield Runtime(
            process_index=launch.process_index,
            process_count=launch.process_count,
            local_index=local_index,
            device=chosen,
            communicator=communicator,
            processes=processes,
        )
    finally:
        # The groups' threads must end before the interpreter does: one that lets go of a tensor
        # afterwards aborts the process. They end with the last reference to their group.
        del host_group
        processes.close()
        dist.destroy_process_group()
        gc.collect()  # wrappers of networks refer to the groups too, in cycles


def _connect_mpi(launch: Launch) -> Any:
    """Return COMM_WORLD, checked against what the launcher started; None where MPI is not used.

    The import initializes MPI, so a process that is alone needs no MPI library.
    """
    if launch.launcher in ("alone", "torchrun") or launch.process_count == 1:
        return None
    started = f"{launch.launcher} started {launch.process_count} processes"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{started}, but MPI cannot be used: {error}") from None
    if launch.process_count != MPI.COMM_WORLD.Get_size():
        library = MPI.Get_library_version().split("\n")[0].rstrip("\0 ")
        cure = (
            "try srun --mpi=pmi2 (see srun --mpi=list)"
            if launch.launcher == "srun"
            else "use the mpirun of the environment's own MPI"
        )
        raise UserError(
            f"{started}, but each sees {MPI.COMM_WORLD.Get_size()} in its MPI ({library}): {cure}"
        )
    return MPI.COMM_WORLD


def _local_place(launch: Launch, communicator: Any) -> tuple[int, int]:
    """Return this process's index among those on its node, and their number."""
    if communicator is not None:
        from mpi4py import MPI

        node = communicator.Split_type(MPI.COMM_TYPE_SHARED)
        place = node.Get_rank(), node.Get_size()
        node.Free()
        return place
    if launch.launcher == "torchrun":
        return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    return 0, 1


def _choose_device(device: str, local_index: int, local_count: int) -> torch.device:
    """Give every process of a node a GPU of its own, or the CPU.

    Where the launcher shows each process one GPU only (srun --gpus-per-task=1), that one is taken.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 0:
        raise UserError("distributed.device: cuda was asked for, but PyTorch sees no GPU here")
    if visible == 1:
        local_index = 0
    elif local_count > visible:
        raise UserError(
            f"distributed.device: {local_count} processes share a node with {visible} GPUs; "
            f"start one process per GPU, or set distributed.device=cpu"
        )
    chosen = torch.device("cuda", local_index)
    torch.cuda.set_device(chosen)
    return chosen


def _make_store(launch: Launch, communicator: Any) -> dist.Store:
    """Open the key-value store through which torch.distributed's processes find each other.

    Under MPI process 0 takes a free port and tells the others, so that two programs on a node never
    race for one port.
    """
    if launch.launcher == "torchrun":
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            launch.process_count,
            is_master=False,
        )
    size, host = launch.process_count, socket.gethostname()
    if launch.process_index == 0:
        store = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        communicator.bcast((host, store.port), root=0)
        return store
    host, port = communicator.bcast(None, root=0)
    return dist.TCPStore(host, port, size, is_master=False)
