"""A cell of a study: one training of one network by one method, in a folder of its own.

The folder is that of an ordinary run, with two files beside: cell.json tells configuration, commit
and fingerprint, output.txt what its processes have printed. The fingerprint is a hash of the
weights after 50 steps, where the run is stopped and resumed: to the last bit the run that is never
stopped.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from app.command import EXIT_STOPPED
from benchmarks.study.definition import ROOT

FINGERPRINT_STEPS = 50
OUTPUT = "output.txt"
PROGRAM = ("app", "oialr")
"""Folders of the program."""
IDLE = 0.5
"""Cores that others keep busy, above which CPU time is not that of a run alone."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """The program that is checked out."""

    commit: str
    digest: str
    """Of the sources of :data:`PROGRAM`, the version of torch and the kind of processor: what can
    change a training's bits."""
    machine: str = ""
    """Processor and number of cores."""


def busy_cores() -> float:
    """Return how many cores all programs keep busy, in the mean over a second.

    The load average would count for minutes what has ended, such as the run before.
    """
    import psutil

    return float(psutil.cpu_percent(interval=1.0) / 100 * psutil.cpu_count())


def present_code() -> Code:
    """Return what is checked out, whether it is committed or not."""
    processor = _processor()
    digest = hashlib.sha256(f"{version('torch')}\0{processor}".encode())
    for path in sorted(path for name in PROGRAM for path in (ROOT / name).rglob("*.py")):
        if not path.is_file():  # an editor's lock is a link that leads nowhere
            continue
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = "-changed" if _git("status", "--porcelain", "--", *PROGRAM) else ""
    return Code(
        commit=commit + changed,
        digest=digest.hexdigest()[:12],
        machine=f"{processor}, {os.cpu_count()} cores",
    )


def _processor() -> str:
    """Return the processor's name, with the family and model where the system tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    keys = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
    lines = dict(re.findall(rf"^({'|'.join(keys)})\s*: (.*)$", text, re.M))
    return ", ".join(f"{key} {lines[key]}" for key in keys if key in lines) or platform.machine()


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is to be trained, and where."""

    network: str
    method: str
    seed: int
    factor: float
    """Of the configuration's learning rate."""
    place: Path
    arguments: tuple[str, ...]
    """Of app.train, but for run.dir."""
    settings: dict[str, Any] = field(hash=False, compare=False)
    """Keys of the configuration that have not their default values, by section."""
    ranks: dict[str, int] | None = field(default=None, hash=False, compare=False)
    """Of every layer at its conversion, by name; None: those that the method finds."""

    @property
    def alone(self) -> "Cell":
        """The same cell in another folder, to be run with the machine to itself."""
        return Cell(**{**vars(self), "place": self.place.with_name(f"{self.place.name}-alone")})

    @property
    def finished(self) -> Path | None:
        """Folder of its finished run, be it the one that had the machine to itself."""
        places = (self.place, self.place.with_name(f"{self.place.name}-alone"))
        return next((place for place in places if (place / "summary.json").exists()), None)

    def summary(self) -> dict[str, Any] | None:
        """Return the figures of the finished run, the record of its cell among them."""
        if (place := self.finished) is None:
            return None
        figures: dict[str, Any] = json.loads((place / "summary.json").read_text())
        return {**figures, "cell": read_record(place), "place": str(place)}

    def __str__(self) -> str:
        rate = "" if self.factor == 1 else f", learning rate x {self.factor:g}"
        return f"{self.network}, {self.method}, seed {self.seed}{rate}"


def read_record(place: Path) -> dict[str, Any]:
    """Return what cell.json says; an empty record if there is none."""
    path = place / "cell.json"
    return json.loads(path.read_text()) if path.exists() else {"fingerprints": {}}


def write_record(place: Path, record: dict[str, Any]) -> None:
    """Write cell.json at once or not at all."""
    _write(place / "cell.json", record)


def write_summary(place: Path, summary: dict[str, Any]) -> None:
    """Write the summary.json of a run that was finished on another machine."""
    _write(place / "summary.json", summary)


def _write(path: Path, document: dict[str, Any]) -> None:
    from app.training.folder import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1) + "\n")


def validation_figure(summary: dict[str, Any]) -> float:
    """Return what tells of the tested weights on validation data: an error, the less the better.

    Args:
        summary: of a cell (:meth:`Cell.summary`).
    """
    if "validation" in summary["cell"]:  # it comes from another machine, without its metrics
        return float(summary["cell"]["validation"])
    from app.recording.store import read_rows

    rows = read_rows(Path(summary["place"]) / "metrics.h5", "eval")
    is_tested = (rows["step"] == summary["tested_step"]) & (rows["split"] == "validation")
    if "accuracy" in rows:
        return 1 - float(rows["accuracy"][is_tested][-1])
    return float(rows["mse"][is_tested][-1])


def diverged(cell: Cell, code: Code) -> str | None:
    """Return why the present code cannot finish a cell, if that is known already."""
    failed = read_record(cell.place).get("failed", {})
    return failed.get("reason") if failed.get("digest") == code.digest else None


class CellError(Exception):
    """A cell came to no end; the message says why."""


class Runner:
    """Runs cells as programs of their own, and ends them when it is told to."""

    def __init__(self, code: Code) -> None:
        """Run nothing yet.

        Args:
            code: the present one.
        """
        self.code = code
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, cell: Cell, *, load: float | None = None) -> bool:
        """Bring a cell to its end, from where it stands.

        Args:
            cell: to be run.
            load: cores that others keep busy, for the record of a cell that is to run alone.

        Returns:
            Whether anything was left to do.

        Raises:
            CellError: it diverged, failed, or was stopped.
        """
        if cell.finished:
            return False
        if reason := diverged(cell, self.code):
            raise CellError(reason)
        record = read_record(cell.place)
        if record.get("digest", self.code.digest) != self.code.digest:
            if not record["fingerprints"]:
                shutil.rmtree(cell.place)  # it had not come as far as step 50
            elif not self.agrees(cell, cell.place):
                raise CellError(
                    f"commit {record['commit']} began it, whose first {FINGERPRINT_STEPS} steps "
                    f"are others: delete {cell.place} to begin anew"
                )
            record = read_record(cell.place)
        if "commit" not in record:
            record |= {
                "network": cell.network,
                "method": cell.method,
                "seed": cell.seed,
                "learning_rate_factor": cell.factor,
                "commit": self.code.commit,
                "digest": self.code.digest,
                "machine": self.code.machine,
                **({} if load is None else {"load": load}),
                "settings": cell.settings,
                "ranks": cell.ranks,
            }
            write_record(cell.place, record)
        if self.code.digest not in record["fingerprints"]:
            if not _is_done(cell.place, FINGERPRINT_STEPS):  # else stopped before this was written
                self._train(cell, cell.place, stop_after=FINGERPRINT_STEPS)
            record["fingerprints"][self.code.digest] = fingerprint(cell.place)
            write_record(cell.place, record)
        if not (cell.place / "summary.json").exists():
            self._train(cell, cell.place, stop_after=None)
        return True

    def agrees(self, cell: Cell, place: Path) -> bool:
        """Tell whether the present code takes the same first steps as a cell's own; try it once.

        Args:
            cell: another code's.
            place: folder of its run.

        Raises:
            CellError: the present code does not take these steps at all.
        """
        record = read_record(place)
        if self.code.digest not in record["fingerprints"]:
            trial = place.with_name(f"{place.name}-{self.code.digest}")
            shutil.rmtree(trial, ignore_errors=True)
            self._train(cell, trial, stop_after=FINGERPRINT_STEPS)
            record["fingerprints"][self.code.digest] = fingerprint(trial)
            write_record(place, record)
            shutil.rmtree(trial)
        return agrees(record, self.code)

    def stop(self) -> None:
        """Let every run write a checkpoint and end, and start none any more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _train(self, cell: Cell, place: Path, *, stop_after: int | None) -> None:
        """Start a run or go on with it."""
        place.mkdir(parents=True, exist_ok=True)
        stop = f"run.stop_after={'null' if stop_after is None else stop_after}"
        if (place / "config.yaml").exists():
            arguments = ["--resume", str(place), stop]
        else:
            arguments = [*cell.arguments, f"run.dir={place}", stop]
        program = ["-m", "app.train"]
        if cell.ranks is not None:
            ranks = place / "ranks.json"
            ranks.write_text(json.dumps(cell.ranks))
            program = ["-m", "benchmarks.study.given_ranks", str(ranks)]
        with (place / OUTPUT).open("a+") as log:
            code = self._call([sys.executable, *program, *arguments], log)
            # One that a signal of somebody else has stopped ends in order, too, and too early.
            if code in (0, EXIT_STOPPED) and not self._stopped and _is_done(place, stop_after):
                return
            log.seek(0)
            lines = log.read().splitlines() or [f"exit code {code}"]
        if self._stopped:
            raise CellError("stopped; start again to go on")
        reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
        reason = reason.removeprefix("error: ")
        if code == 1 and re.search("the loss is|has diverged", reason):  # and would do so again
            failed = {"digest": self.code.digest, "reason": reason}
            write_record(place, {**read_record(place), "failed": failed})
        raise CellError(f"{reason} ({place / OUTPUT})")

    def _call(self, command: list[str], log: Any) -> int:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self._lock:
            if self._stopped:
                raise CellError("stopped; start again to go on")
            if present_code().digest != self.code.digest:  # a run imports what lies there by then
                raise CellError("the program has changed since the study began: start again")
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code


def _is_done(place: Path, stop_after: int | None) -> bool:
    """Tell whether a run has come to its end, or as far as it was to come."""
    if (place / "summary.json").exists():
        return True
    return stop_after is not None and _newest_step(place) >= stop_after


def _newest_step(place: Path) -> int:
    """Return the step of a run's newest checkpoint; 0 if there is none."""
    # A step that was stored once more has a number behind it: step-00000050-1.
    steps = [int(path.name.split("-")[1]) for path in (place / "checkpoints").glob("step-*[0-9]")]
    return max(steps, default=0)


def agrees(record: dict[str, Any], code: Code) -> bool:
    """Tell whether a cell was made by this code, or by one that takes the same first steps."""
    fingerprints = record["fingerprints"]
    own = fingerprints.get(record.get("digest"))
    return own is not None and fingerprints.get(code.digest) == own


def fingerprint(place: Path) -> str:
    """Hash the weights of a run's newest checkpoint, names and shapes included."""
    import torch

    newest = max((place / "checkpoints").glob("step-*"))
    state = torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in sorted(state["model"].items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
