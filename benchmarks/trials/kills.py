"""Kills at random moments, of one process or all, by signals, under changing process counts."""

import shutil
import signal
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.trials.comparison import difference, read_outcome
from benchmarks.trials.programs import End
from benchmarks.trials.runs import STEPS, VARIANTS, References, replay, sessions, start

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_WEIGHTS = (3, 1, 1, 1)
MPIRUN_STARTS = 12.0
"""Seconds that imports and MPI take, as part of the time in which a kill may come."""


AIMED = 0.3
"""Share of the SIGKILLs that wait for the next checkpoint and come in the middle of it."""


def kill_run(
    folder: Path,
    chance: Random,
    references: References,
    *,
    counts: tuple[int, ...],
    kills: int,
    mpirun: bool = False,
) -> dict[str, Any]:
    """Start a run again and again, end it each time at a random moment, and at last let it end.

    Args:
        folder: of the run; removed if all is well.
        chance: gives all that is random.
        references: what it is compared with.
        counts: numbers of processes from which each start draws one.
        kills: to be delivered, at most.
        mpirun: start programs as users do; else by forks.

    Returns:
        Counts by kind, and "problems", a list of sentences.
    """
    variant = chance.choice(VARIANTS)
    found: Counter[str] = Counter()
    problems: list[str] = []
    history: list[str] = []
    for _ in range(kills):
        count = chance.choice(counts)
        seconds = references.get(variant, count).seconds * (1 - _newest_step(folder) / STEPS)
        moment = chance.uniform(0, seconds + (MPIRUN_STARTS if mpirun else 0))
        number = chance.choices(SIGNALS, _WEIGHTS)[0]
        index = chance.choice([None, chance.randrange(count)]) if count > 1 else None
        twice = number == signal.SIGINT and chance.random() < 0.3
        aimed = number == signal.SIGKILL and chance.random() < AIMED
        leftovers = _partial(folder)
        program = start(folder, variant, count, mpirun=mpirun)
        lives = (
            program.lives_after(moment, partial(_is_saving, folder, leftovers), patience=seconds)
            if aimed
            else program.lives_after(moment)
        )
        if not lives:
            problems += _judge(program.wait(), "", history)
            if (folder / "summary.json").exists():
                break
            continue
        program.send(number, index=index)
        if twice:
            program.send(number, index=index)
        whom = "all" if index is None else "one"
        name = signal.Signals(number).name + (" twice" if twice else "")
        history.append(f"{name} to {whom} of {count} after {moment:.3f} s")
        saving = _is_saving(folder, leftovers)
        end = program.wait()
        found["kills"] += 1
        found[f"{name}, {whom} of {'several' if count > 1 else 'one'}"] += 1
        found["in a checkpoint"] += saving and number == signal.SIGKILL
        found["before metrics.h5"] += not (folder / "metrics.h5").exists()
        problems += _judge(end, name, history)
        if (folder / "summary.json").exists():
            found["too late: the run had ended"] += 1
            break
    count = counts[0]
    end = start(folder, variant, count, mpirun=mpirun).wait()
    if any(end.codes) or end.hung:
        problems.append(f"the last start ended with {end.codes}: {end.output[-2000:]}")
    else:
        problems += _compare(folder, variant, counts, references)
    found["runs"] += 1
    if not problems:
        shutil.rmtree(folder, ignore_errors=True)
    described = [f"{folder.name} ({', '.join(variant)}; {'; '.join(history)}): " for _ in problems]
    return {
        "counts": dict(found),
        "problems": [start + text for start, text in zip(described, problems, strict=True)],
    }


def _partial(folder: Path) -> set[tuple[Path, int]]:
    """Return the checkpoints that are being written, or were when a program was killed."""
    found = set()
    for path in (folder / "checkpoints").rglob("partial-*"):
        with suppress(FileNotFoundError):  # complete meanwhile
            found.add((path, path.stat().st_mtime_ns))
    return found


def _is_saving(folder: Path, leftovers: set[tuple[Path, int]]) -> bool:
    return bool(_partial(folder) - leftovers)


def _newest_step(folder: Path) -> int:
    names = [path.name for path in (folder / "checkpoints").glob("step-*")]
    return max((int(name.split("-")[1]) for name in names), default=0)


def _judge(end: End, name: str, history: list[str]) -> list[str]:
    """Say what is wrong with the end of a program that got a signal (none: an empty name)."""
    problems = []
    if end.hung:
        problems.append(f"no end after {history[-1:]}: {end.output[-1500:]}")
    if end.orphans:
        problems.append(f"{end.orphans} processes left after {history[-1:]}")
    if not name and any(end.codes):
        problems.append(f"a session without a kill ended with {end.codes}: {end.output[-1500:]}")
    if name and name != "SIGKILL" and "Traceback" in end.output and _stopped(end):
        problems.append(f"a traceback at a stop by {name}: {end.output[-1500:]}")
    return problems


def _stopped(end: End) -> bool:
    """Whether the program had come so far that signals stop it after a checkpoint."""
    return all(code in (0, 75) for code in end.codes)


def _compare(
    folder: Path, variant: tuple[str, ...], counts: tuple[int, ...], references: References
) -> list[str]:
    if len(set(counts)) == 1:
        reference = references.get(variant, counts[0]).outcome
        other = difference(read_outcome(folder), reference)
    else:
        parts = sessions(folder)
        again = folder.with_name(f"{folder.name}-replayed")
        reference = replay(again, variant, parts)
        other = difference(read_outcome(folder), reference, counts_changed=True)
        if not other:
            shutil.rmtree(again)
    return [f"differs from the undisturbed run: {other}"] if other else []
