"""Workarounds for other packages: one function each, with the version seen and when it can go."""

import ctypes
import fcntl
import importlib
import inspect
import os
import random
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from app.errors import StorageError


def compile_alone(module: Any, *, backend: str) -> Any:
    """Compile a network, regardless of what was compiled before.

    torch.compile keeps what it compiled with the code of the network's class, and after a number of
    versions of it compiles no more. isolate_recompiles gives each call its own. Seen with torch
    2.11.0: it has no such option yet; there all that was compiled in this process is forgotten. It
    can go when torch is 2.12 or newer everywhere.

    Args:
        module: the network.
        backend: of torch.compile.
    """
    import torch

    # The overloads that torch declares lack isolate_recompiles.
    compile_: Any = torch.compile
    if "isolate_recompiles" in inspect.signature(compile_).parameters:
        return compile_(module, backend=backend, isolate_recompiles=True)
    torch.compiler.reset()
    return compile_(module, backend=backend)


def let_timm_posterize() -> None:
    """Keep timm's RandAugment from asking for images of no bits; idempotent.

    Seen with timm 1.0.31 and Pillow 13.0.0: at full strength PosterizeIncreasing asks for 0 bits,
    which Pillow refuses ("bits must be between or equal to 1 and 8"). One bit is kept instead. It
    can go when timm limits the bits itself.
    """
    from oialr.compatibility import import_torchvision

    import_torchvision()
    from timm.data import auto_augment

    for name, operation in auto_augment.NAME_TO_OP.items():
        if operation is auto_augment.posterize:
            auto_augment.NAME_TO_OP[name] = _posterize


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """At module level, for pickling: loader processes may be spawned."""
    from timm.data import auto_augment

    return auto_augment.posterize(image, max(1, bits))


def import_scikit_learn() -> None:
    """Import scikit-learn's data sets, and leave Python's random generator as it is.

    Seen with scikit-learn 1.9.1: where rich is installed it imports parts of it that draw a random
    number. It can go when the import no longer does.
    """
    state = random.getstate()
    importlib.import_module("sklearn.datasets")
    random.setstate(state)


def remove_stale_shared_memory_of_mpich(folder: Path = Path("/dev/shm")) -> None:
    """Take away what an earlier step of the same number left in shared memory on this node.

    To be called by every process of a step before it initializes MPI.

    Seen with MPICH 5.0.2: the processes of a node share a file that is named by a hash of the
    step's number, whoever finds none makes and clears it, and it is deleted at the end only. Of a
    process that was killed it stays, and what lies in it counts as messages in the next step of
    that number, of a requeued job for one: MPI_Init then aborts or hangs. It can go when MPICH
    tells a file of this step from another's.

    Args:
        folder: where POSIX shared memory lies.

    Raises:
        StorageError: such a file is another user's; MPI could not use it either.
    """
    step, daemon_start = os.environ.get("PMI_JOBID"), _start_of_step_daemon()
    if step is None or daemon_start is None or not folder.exists():
        return  # names of mpirun contain its process id and a random number
    name = 0x811C9DC5  # FNV-1a of 32 bits
    for byte in step.encode():
        name = (name ^ byte) * 0x01000193 & 0xFFFFFFFF
    lock = os.open(folder, os.O_RDONLY)
    try:
        # Otherwise one process would see an old file, and delete the one that another made since.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.glob(f"mpich_*_{name:x}_*"):
            if path.stat().st_mtime < daemon_start:  # files of this step are younger
                _unlink_what_is_in_the_way(path)
    finally:
        os.close(lock)


def _unlink_what_is_in_the_way(path: Path) -> None:
    try:
        path.unlink()
    except PermissionError:
        raise StorageError(
            f"{path} on {os.uname().nodename}, left by an earlier Slurm step of this number, is in "
            f"the way of MPI and belongs to user {path.stat().st_uid}, who may delete it: submit "
            "the job again, for another number"
        ) from None


def _start_of_step_daemon() -> float | None:
    """Return when Slurm's daemon of this step started on this node (s since 1970); None elsewhere.

    The daemon is an ancestor of all processes of the step on its node.
    """
    process = os.getpid()
    while process > 1:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return None
        name, rest = stat[stat.index("(") + 1 :].rsplit(")", 1)
        fields = rest.split()
        if name == "slurmstepd":
            since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
            return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
        process = int(fields[1])
    return None


def initialize_mpi(mpi: Any) -> None:
    """Initialize MPI, in a step of Slurm by lines that Slurm can read; nothing if it is.

    Seen with MPICH 5.0.2 under srun --mpi=pmi2 of Slurm 22.05: Slurm says that a value may have
    1,024 characters, and reads no more than 1,024 of a line that holds a key, too. With UCX a
    process publishes 4 KiB, its address and whatever lies behind it in memory, in pieces of about
    that length, so that a start fails now and then: MPI_Init aborts on one process and hangs on the
    others. Therefore MPICH is told of shorter values, by a thread between it and Slurm while MPI is
    initialized. It can go when Slurm reads whole lines, or says how long a value may be.

    Args:
        mpi: the module mpi4py.MPI, imported where mpi4py.rc.initialize is False.
    """
    if mpi.Is_initialized():
        return
    if "PMI_FD" not in os.environ or "PMI_JOBID" not in os.environ:  # mpirun gives no PMI_JOBID
        mpi.Init_thread()
        return
    with _shorter_values_of_slurm(int(os.environ["PMI_FD"])):
        # As mpi4py does it, but without Python's lock, so that the relay runs.
        initialize = ctypes.CDLL(mpi.__file__).MPI_Init_thread
        initialize(None, None, mpi.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int()))


@contextmanager
def _shorter_values_of_slurm(descriptor: int) -> Iterator[None]:
    """Put a relay between MPI, which talks to a file descriptor, and Slurm, which listens there."""
    slurm = socket.socket(fileno=os.dup(descriptor))
    ours, theirs = socket.socketpair()
    os.dup2(theirs.fileno(), descriptor)
    theirs.close()
    relay = threading.Thread(target=_relay, args=(ours, slurm), daemon=True)
    relay.start()
    try:
        yield
    finally:
        os.dup2(slurm.fileno(), descriptor)  # the last of theirs, which ends the relay
        relay.join()
        ours.close()
        slurm.close()


def _relay(mpi: socket.socket, slurm: socket.socket) -> None:
    other = {mpi: slurm, slurm: mpi}
    while True:
        for end in select.select([mpi, slurm], [], [])[0]:
            text = end.recv(2**16)
            if not text:
                return
            # With the longest key and name of a step a line has 114 characters more.
            other[end].sendall(re.sub(rb"(?<= vallen_max=)1024\b", b"900", text))


def unlink_shared_memory_of_mpich(node: Any) -> None:
    """Take away the name of the memory that MPICH's processes of a node share; the memory stays.

    A collective call.

    Seen with MPICH 5.0.2: the file in /dev/shm is deleted at the end only, and stays when a process
    is killed, memory of the node that nothing frees. It can go when MPICH deletes the file as soon
    as all have opened it.

    Args:
        node: mpi4py communicator of the node's processes.
    """
    node.Barrier()  # all have opened it
    maps = Path("/proc/self/maps")
    if node.Get_rank() == 0 and maps.exists():
        for path in set(re.findall(r"/dev/shm/mpich_shm_\w+$", maps.read_text(), re.MULTILINE)):
            Path(path).unlink(missing_ok=True)


def import_propulate() -> None:
    """Import propulate where GPy does not import, or is not there; idempotent.

    Call it before any other import of propulate, which initializes MPI.

    Seen with propulate 1.2.2: it imports GPy at once, which does not import with numpy 2. Only its
    surrogate models use it; an empty module of that name serves all the rest. It can go when
    propulate imports GPy where it uses it.
    """
    if "propulate" not in sys.modules:
        sys.modules.setdefault("GPy", ModuleType("GPy"))
    importlib.import_module("propulate")
