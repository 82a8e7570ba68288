"""One program in a folder at a time: a lease that its owner renews, on whatever file system.

The lease is a file ``.lease-000001`` that is created exclusively; the next owner's has the next
number, so that two programs which both find an owner gone cannot both follow it. Locks of the file
system are not relied on: many network file systems have none, or keep them on one node.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

from app.errors import StorageError, TakenOverError, UserError

RENEWAL = 10.0
"""Seconds between two renewals."""
EXPIRY = 120.0
"""Seconds without renewal, by the file server's clock, after which an owner counts as gone."""
_PREFIX = ".lease-"
_NAME = _PREFIX + "{:06d}"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process, so described that it can be told from any other."""

    host: str
    boot_id: str
    """Of the kernel since its start; empty where there is none."""
    namespace: str
    """Of the process numbers: those of containers are their own."""
    process: int
    start: str
    """Of the process, in the kernel's ticks since its own start."""
    slurm_job: str
    slurm_restarts: int
    """How often Slurm has requeued the job."""
    token: str
    """Drawn by chance, for each lease another one."""

    @classmethod
    def current(cls, environment: Mapping[str, str] = os.environ) -> "Holder":
        """Describe this process."""
        return cls(
            host=socket.gethostname(),
            boot_id=_read_line("/proc/sys/kernel/random/boot_id"),
            namespace=_namespace(),
            process=os.getpid(),
            start=_start_of(os.getpid()) or "",
            slurm_job=environment.get("SLURM_JOB_ID", ""),
            slurm_restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
            token=uuid.uuid4().hex,
        )

    def is_gone(self, me: "Holder") -> bool | None:
        """Whether this process has ended, as far as ``me`` can know; None: it cannot."""
        if self.boot_id and (self.boot_id, self.namespace) == (me.boot_id, me.namespace):
            start = _start_of(self.process)
            return None if start is None and _is_hidden(self.process) else start != self.start
        if self.slurm_job and self.slurm_job == me.slurm_job:
            # Slurm starts a job again only when all of its processes are gone.
            return me.slurm_restarts > self.slurm_restarts or None
        return None

    def __str__(self) -> str:
        job = f" (Slurm job {self.slurm_job})" if self.slurm_job else ""
        return f"process {self.process} on {self.host}{job}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a lease says; any process of the owner's program may hold it against the folder."""

    folder: Path
    path: Path
    """Of the lease's file."""
    holder: Holder
    _found: list[float] = field(
        init=False, repr=False, compare=False, default_factory=lambda: [time.time()]
    )
    """When the lease was last there, by the clock of this process."""

    def check(self) -> None:
        """Make sure that the folder is this program's still.

        To be called before what others would see: a process that was suspended for long, or cut off
        from the file server, may have been followed by another one.

        Raises:
            TakenOverError: it is another's.
            StorageError: it is not there any more, or cannot be written to; or the lease is not
                there, and since it was another program may have come and gone.
        """
        later = [path for path in _leases(self.folder) if _number(path) > _number(self.path)]
        if later:
            owner = _read(later[-1]) or "another program"
            raise TakenOverError(
                f"run.dir: {self.folder} was taken over by {owner}, since this one stood still or "
                f"did not reach it for more than {EXPIRY:g} s; nothing more is written"
            )
        if _read(self.path) == self.holder:
            self._found[0] = time.time()
            return
        if not self.folder.is_dir():
            raise StorageError(f"run.dir: {self.folder} was removed or moved while the run lived")
        if self.path.exists():
            raise StorageError(f"run.dir: {self.folder} is another folder than before")
        if (silent := time.time() - self._found[0]) > EXPIRY:
            raise TakenOverError(
                f"run.dir: {self.path.name} in {self.folder} is gone, and this program stood still "
                f"or did not look at it for {silent:.0f} s, in which another one may have been "
                "there; nothing more is written"
            )
        try:
            _create(self.path, self.holder)  # somebody cleaned up
        except FileExistsError:  # another process of this program has been faster
            return
        except OSError as error:
            raise StorageError(
                f"run.dir: cannot write to {self.folder}: {error.strerror}"
            ) from None


class Lease:
    """The right to write into a folder, of which there is one at a time."""

    def __init__(self, claim: Claim) -> None:
        """Renew a lease that was just taken, see :meth:`take`, until it is released."""
        self.claim = claim
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path, *, me: Holder | None = None) -> "Lease":
        """Become the folder's owner.

        Raises:
            UserError: it has one, or cannot be written to. Nothing there was changed.
        """
        me = me or Holder.current()
        try:
            gone = {path: _refuse_while_used(folder, path, me) for path in _leases(folder)}
            own = folder / _NAME.format(1 + max((_number(path) for path in gone), default=0))
            _create(own, me)
            # Who looked at the same time has created one, too, and sees this one: both may give
            # way, but never does neither.
            for path in _leases(folder):
                if path != own and (path not in gone or _read(path) != gone[path]):
                    own.unlink(missing_ok=True)
                    raise FileExistsError(path)
            for path in gone:
                path.unlink(missing_ok=True)
        except FileExistsError:
            raise UserError(
                f"run.dir: another program is just starting in {folder}; choose another folder"
            ) from None
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {folder}: {error.strerror}") from None
        return cls(Claim(folder=folder, path=own, holder=me))

    def check(self) -> None:
        """Make sure that the folder is this program's still, see :meth:`Claim.check`."""
        self.claim.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder free."""
        self._ended.set()
        self._thread.join()
        path = self.claim.path
        if _read(path) == self.claim.holder:
            path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL):
            try:
                self.claim.check()
                os.utime(self.claim.path)
            except (OSError, StorageError):  # told by the next check, or the server answers again
                continue


def _refuse_while_used(folder: Path, path: Path, me: Holder) -> Holder | None:
    """Raise a UserError unless the owner is gone; return who that was, as far as it is known."""
    owner = _read(path)
    gone = owner.is_gone(me) if owner else None
    if gone:
        return owner
    hint = ""
    if gone is None:
        try:
            remaining = EXPIRY - (_server_time(folder) - path.stat().st_mtime)
        except FileNotFoundError:  # released meanwhile
            return owner
        if remaining <= 0:
            return owner
        hint = f" (if that is gone, the folder is free in {remaining:.0f} s)"
    raise UserError(
        f"run.dir: {folder} is in use by {owner or 'another program'}{hint}; "
        f"let it end, or choose another folder (in a copy of its folder, delete {path.name})"
    )


def _leases(folder: Path) -> list[Path]:
    """Return the leases in a folder, the latest last; none where there is no folder."""
    return sorted(
        path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()
    )


def _number(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _create(path: Path, holder: Holder) -> None:
    """Write a lease that must not exist yet; where the disk is full, none is left."""
    with path.open("x") as file:
        try:
            json.dump(asdict(holder), file)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _read(path: Path) -> Holder | None:
    """Return who wrote a lease; None if that is not there (yet)."""
    try:
        content = json.loads(path.read_text())
        return Holder(**{field.name: content[field.name] for field in fields(Holder)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _server_time(folder: Path) -> float:
    """Return the time by the clock that the folder's files are dated by."""
    probe = folder / f".time-{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _start_of(process: int) -> str | None:
    """Return the start of a process, in the kernel's words.

    Returns:
        Empty if it has ended and its parent does not know yet; None if there is none to be seen.
    """
    try:
        # proc(5): the second field may hold blanks and brackets; the third is the state.
        state, *numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return "" if state in ("Z", "X") else numbers[18]


def _is_hidden(process: int) -> bool:
    """Whether there is a process of another user, of whom /proc tells nothing (hidepid)."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return False


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
