"""Programs that are started within milliseconds, killed at any moment, and waited for with an end.

A start of ``python -m app.train`` takes seconds for its imports. Here they are made once, in the
process that tries the faults, and every program is a fork of it, with the variables of torchrun
where it has several processes. Programs under mpirun are started as users start them.
"""

import importlib
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmarks._mpirun import mpirun

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 180.0
"""Seconds after which a program counts as hanging: far more than distributed.timeout here."""
_OTHERS_LIVE = 2.0
"""Seconds until the others get SIGTERM where a process has failed, as from torchrun's agent."""
_OTHERS_KILLED = 10.0
_POLL = 0.004
_IMPORTED = (
    "app.train",
    "app.training.run",
    "app.data.classification",
    "app.search.store",
    "sklearn.datasets",
    "timm",
    "timm.optim",
    "timm.scheduler",
    "torch._dynamo",
    "torch.distributed.optim",
)
"""What a training imports on its way."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a program has ended."""

    codes: tuple[int, ...]
    """Of its processes, in their order; -N: by signal N. Of mpirun alone where that started it."""
    output: str
    hung: bool
    orphans: int
    """Processes that were left."""

    @property
    def errors(self) -> list[str]:
        """Lines that tell of an error."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


class Program:
    """A program that runs."""

    def __init__(self, roots: Sequence[int], output: Path, *, mpirun: bool) -> None:
        """Take over processes that lead groups of their own."""
        self._roots, self._output, self._mpirun = list(roots), output, mpirun
        self._codes: dict[int, int] = {}
        self._begin = time.monotonic()
        self._seen: dict[int, str] = {}

    def processes(self) -> list[int]:
        """Return the processes of the training."""
        if not self._mpirun:
            return [root for root in self._roots if root not in self._codes]
        below = _descendants(self._roots[0])
        self._seen |= {pid: _start(pid) for pid in below}
        return [pid for pid in below if b"app.train" in _command(pid).split(b"\0")]

    def lives_after(
        self, seconds: float, until: Callable[[], bool] = lambda: True, *, patience: float = 0.0
    ) -> bool:
        """Wait until the program is so old; say whether it lives still.

        Args:
            seconds: since its start.
            until: is waited for then, too.
            patience: seconds that this may take.
        """
        while (age := time.monotonic() - self._begin) < seconds + patience and not self._ended():
            if age >= seconds and until():
                break
            time.sleep(_POLL if age < seconds else _POLL / 8)
        return not self._ended()

    def send(self, number: int, *, index: int | None) -> None:
        """Send a signal to one of the processes, or to all; what is gone already gets none."""
        processes = self.processes()
        if index is not None and processes:
            processes = [processes[index % len(processes)]]
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def wait(self) -> End:
        """Wait for all processes; whatever is left of them afterwards is ended."""
        hung, failed = False, None
        while not self._ended():
            now = time.monotonic()
            if now - self._begin > LIMIT:
                hung = True
                break
            if failed is None and any(self._codes.values()):
                failed = now
            if failed is not None and now - failed > _OTHERS_LIVE:
                late = now - failed > _OTHERS_LIVE + _OTHERS_KILLED
                self._signal_roots(signal.SIGKILL if late else signal.SIGTERM)
                time.sleep(0.1)
            time.sleep(_POLL)
        orphans = self._clear() if not hung else 0
        if hung:
            self._clear()
        codes = tuple(self._codes.get(root, -signal.SIGKILL) for root in self._roots)
        output = self._output.read_text(errors="replace") if self._output.exists() else ""
        return End(codes=codes, output=output, hung=hung, orphans=orphans)

    def _ended(self) -> bool:
        for root in self._roots:
            if root not in self._codes:
                found, status = os.waitpid(root, os.WNOHANG)
                if found:
                    self._codes[root] = os.waitstatus_to_exitcode(status)
        return len(self._codes) == len(self._roots)

    def _signal_roots(self, number: int) -> None:
        for root in self._roots:
            if root not in self._codes:
                os.kill(root, number)

    def _clear(self) -> int:
        """Kill what is left; return how many processes that were."""
        left = 0
        for root in self._roots:
            with suppress(ProcessLookupError):
                os.killpg(root, signal.SIGKILL)
                left += 1
        for pid, start in self._seen.items():
            if start and _start(pid) == start:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    left += 1
        while not self._ended():
            time.sleep(_POLL)
        return left


def prepare() -> None:
    """Import what a training needs, without a thread: forks have the calling one alone."""
    from app.compatibility import import_scikit_learn
    from oialr.compatibility import import_torchvision

    import_torchvision()
    import_scikit_learn()
    for name in _IMPORTED:
        importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"{threads} threads after the imports: set OMP_NUM_THREADS=1")


def start(
    arguments: Sequence[str], *, count: int, output: Path, variables: Mapping[str, str] = {}
) -> Program:
    """Start a training on some processes, as a fork of this one."""
    output.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    port = _free_port()
    roots = []
    for index in range(count):
        place = {}
        if count > 1:
            place = {
                "TORCHELASTIC_RUN_ID": "faults",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(index),
                "LOCAL_RANK": str(index),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
            }
        pid = os.fork()
        if pid == 0:
            _train(arguments, output, {**place, **variables})
        with suppress(OSError):  # it has done so itself, or is gone
            os.setpgid(pid, pid)
        roots.append(pid)
    return Program(roots, output, mpirun=False)


def start_under_mpirun(arguments: Sequence[str], *, count: int, output: Path) -> Program:
    """Start a training as users do."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    with output.open("wb") as file:
        process = subprocess.Popen(
            mpirun(count, "-m", "app.train", *arguments),
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    process.returncode = 0  # it is waited for here
    return Program([process.pid], output, mpirun=True)


@dataclass(frozen=True)
class Raised:
    """An exception of a function that was called in a fork, its kinds by name."""

    kinds: tuple[str, ...]
    text: str


def call(function: Callable[[], Any], *, folder: Path) -> tuple[End, Any]:
    """Call a function in a fork; return how that ended, and its result, which must be picklable.

    What the function raises is its result, as :class:`Raised`.
    """
    output, result = folder / "call.txt", folder / "call.pickle"
    output.unlink(missing_ok=True)
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:

        def act() -> int:
            try:
                value = function()
            except Exception as error:
                value = Raised(tuple(kind.__name__ for kind in type(error).__mro__), str(error))
            result.write_bytes(pickle.dumps(value))
            return 0

        _leave(act, output, {})
    with suppress(OSError):
        os.setpgid(pid, pid)
    end = Program([pid], output, mpirun=False).wait()
    return end, pickle.loads(result.read_bytes()) if result.exists() else None


def _train(arguments: Sequence[str], output: Path, variables: Mapping[str, str]) -> NoReturn:
    from app.command import run_command
    from app.train import main

    def act() -> int:
        sys.argv = ["app.train", *arguments]
        try:
            run_command(lambda: main(arguments))
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    _leave(act, output, variables)


def _leave(act: Callable[[], int], output: Path, variables: Mapping[str, str]) -> NoReturn:
    """Become a program of its own, act, and end without returning into the caller's blocks."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(variables)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (handle, 1), (handle, 2)):
            os.dup2(source, target)
        code = act()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


def _free_port() -> int:
    """Return a port that nobody listens on, below those that the system gives out by itself."""
    chance = random.SystemRandom()
    while True:
        port = chance.randrange(20_000, 32_000)
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(path.name))
        if fields:
            children.setdefault(int(fields[1]), []).append(int(path.name))
    found, waiting = [], [root]
    while waiting:
        below = sorted(children.get(waiting.pop(), []))
        found += below
        waiting += below
    return found


def _stat(pid: int) -> list[str]:
    """Return the fields of a process from its state on; none if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def _start(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields else ""


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
