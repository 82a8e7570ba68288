"""What becomes of runs that meet kills, damages and full disks, bit for bit?

  python -m benchmarks.faults                       # half an hour on two cores
  python -m benchmarks.faults --hours 8 --seed 100  # again and again, with other seeds
  python -m benchmarks.faults --quick               # two minutes

A run that was killed at random moments, stopped by signals, or that met a full disk is gone on
with, and must come to the checkpoint and the rows of the run that nothing disturbed, in every bit.
A damaged file must be named, or make no difference. What is neither is unexplained: it is printed,
its folder stays, and the exit code is 1. Moments, signals and places follow from the seed; where a
kill hits a program follows from the machine, too. docs/reliability.md tells what was found.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

PRELOADED = "OIALR_FAULTS_PRELOADED"
"""Set in the environment of the second start of this program: its folder."""
Trial = Callable[[], dict[str, Any]]
"""Returns counts by kind, and problems, a list of sentences."""


def main() -> int:
    """Try all faults, print what became of them."""
    options = _parse()
    if PRELOADED not in os.environ:
        _start_anew(options.folder or Path(tempfile.mkdtemp(prefix="faults-")))
    folder = Path(os.environ[PRELOADED])
    from benchmarks.trials import programs

    programs.prepare()
    begin = time.monotonic()
    totals: dict[str, Counter[str]] = {}
    unexplained: list[str] = []
    for kind, trial in _trials(options, folder):
        result = trial()
        totals.setdefault(kind, Counter()).update(result["counts"])
        unexplained += result["problems"]
        for problem in result["problems"]:
            print(f"unexplained: {problem}", file=sys.stderr, flush=True)
        counted = {name: dict(sorted(counts.items())) for name, counts in totals.items()}
        (folder / "progress.json").write_text(json.dumps(counted, indent=1))
    document = {
        "seed": options.seed,
        "seconds": round(time.monotonic() - begin, 1),
        **{kind: dict(sorted(counts.items())) for kind, counts in totals.items()},
        "unexplained": unexplained,
    }
    print(json.dumps(document) if options.json else _table(document))
    if unexplained:
        return 1
    if not options.folder:
        shutil.rmtree(folder)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=56, help="runs that are killed")
    parser.add_argument("--kills", type=int, default=7, help="at most, of each run")
    parser.add_argument("--mpirun-runs", type=int, default=3, help="more runs, under mpirun")
    parser.add_argument("--damages", type=int, default=1200, help="damages to files")
    parser.add_argument("--data-damages", type=int, default=210, help="damages to data files")
    parser.add_argument("--full-disks", type=int, default=60, help="runs with too little room")
    parser.add_argument("--hours", type=float, help="repeat with the following seeds so long")
    parser.add_argument(
        "--folder", type=Path, help="where runs live, and progress.json; default: a temporary one"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="a few of each, in two minutes")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.kills, options.mpirun_runs = 4, 4, 0
        options.damages, options.data_damages, options.full_disks = 60, 7, 4
    return options


def _start_anew(folder: Path) -> None:
    """Start this program again, with one thread and, where there is a compiler, with full disks.

    The preloaded library does nothing without the variables that a trial sets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), PRELOADED: str(folder.resolve())}
    compiler = shutil.which("cc")
    if compiler and sys.platform.startswith("linux"):
        library = folder.resolve() / "full_disk.so"
        source = ROOT / "tests" / "support" / "full_disk.c"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        variables["LD_PRELOAD"] = str(library)
    arguments = [sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]]
    os.execve(sys.executable, arguments, {**os.environ, **variables})


def _trials(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Trial]]:
    """Give the trials one by one, with what they count as: a round, or as many as there is time."""
    end = time.monotonic() + 3600 * (options.hours or 0)
    seed = options.seed
    while True:
        home = folder / f"seed-{seed}"
        home.mkdir()
        yield from _round(options, home, seed)
        shutil.rmtree(home / "references", ignore_errors=True)
        seed += 1
        if time.monotonic() > end:
            return


def _round(options: argparse.Namespace, home: Path, seed: int) -> Iterator[tuple[str, Trial]]:
    """Give all trials of a seed, the kinds evenly mixed."""
    from benchmarks.trials.damages import Damages
    from benchmarks.trials.data_damages import DataDamages
    from benchmarks.trials.full_disks import full_disk_run
    from benchmarks.trials.kills import kill_run
    from benchmarks.trials.runs import References

    references = References(home / "references")
    damages, data_damages = Damages(home, references), DataDamages(home)
    trials: list[tuple[float, str, Trial]] = []

    def add(kind: str, count: int, make: Callable[[int, Random], Trial]) -> None:
        trials.extend(
            (i / count, kind, make(i, Random(f"{seed} {kind} {i}"))) for i in range(count)
        )

    def killed(i: int, chance: Random, *, mpirun: bool) -> Trial:
        return partial(
            kill_run,
            home / f"killed-{'under-mpirun-' if mpirun else ''}{i}",
            chance,
            references,
            counts=((1,), (2,), (2,), (1, 2, 3))[i % 4] if not mpirun else (2,),
            kills=min(options.kills, 3) if mpirun else options.kills,
            mpirun=mpirun,
        )

    add("kills", options.runs, partial(killed, mpirun=False))
    add("kills under mpirun", options.mpirun_runs, partial(killed, mpirun=True))
    add("damages", options.damages, lambda _, chance: partial(damages.next, chance))
    add(
        "damaged data",
        options.data_damages,
        lambda _, chance: partial(data_damages.next, chance),
    )
    if "LD_PRELOAD" in os.environ:
        add(
            "full disks",
            options.full_disks,
            lambda i, chance: partial(full_disk_run, home / f"full-{i}", chance, references),
        )
    for _, kind, trial in sorted(trials, key=lambda one: one[0]):
        yield kind, trial


def _table(document: dict[str, Any]) -> str:
    lines = ["| trials | what | count |", "| --- | --- | --- |"]
    for kind, counts in document.items():
        if isinstance(counts, dict):
            lines += [f"| {kind} | {what} | {count} |" for what, count in counts.items()]
    lines.append(f"\n{len(document['unexplained'])} unexplained, {document['seconds']} s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
