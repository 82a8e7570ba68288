r"""How do several methods compare over seeds, in accuracy, size and time of training?

A study names networks with data, methods and seeds; docs/accuracy.md describes its file:

  python -m benchmarks.accuracy --study benchmarks/accuracy/digits.yaml --jobs 2
  python -m benchmarks.accuracy --study benchmarks/accuracy/screening.yaml --jobs 2 data.root=DATA
  python -m benchmarks.accuracy --study benchmarks/accuracy/screening.yaml --time data.root=DATA

Without one, a configuration and its full-rank twin are compared, or any others, such as the best of
two searches, over seeds that those have not seen. Twins on the digits take two minutes a seed:

  python -m benchmarks.accuracy --seeds 5
  python -m benchmarks.accuracy --config configs/fashion_mnist_vit.yaml --seeds 3 data.root=DATA
  python -m benchmarks.accuracy --first-seed 1000 \
      --compare full-rank=runs/a/best.yaml --compare OIALR=runs/b/best.yaml

Every cell is a program of its own, ``python -m app.train``, in a folder of its own. One that is
finished is read and not repeated, one that was stopped goes on: start the same command again.
Prints Markdown tables, and leaves them in the study's folder with a figure of the fronts.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.errors import UserError
from benchmarks.study import archive, definition
from benchmarks.study.cell import (
    IDLE,
    Cell,
    CellError,
    Runner,
    busy_cores,
    diverged,
    present_code,
    read_record,
)
from benchmarks.study.definition import Study
from benchmarks.study.figure import draw
from benchmarks.study.plan import Plan, Waiting
from benchmarks.study.table import as_dict, markdown, parts_around, put_into, tabulate

QUICK = ("training.epochs=2", "training.warmup_epochs=1")
Arguments = tuple[str, str, int, float]
"""Network, method, seed and factor of the learning rate: what names a cell."""


def main() -> None:
    """Run what is left to run, print the tables."""
    options = _parse()
    study, name = _study(options)
    if options.into:
        if options.quick or options.methods or options.networks:
            raise UserError("--into: a document takes a whole study, without --quick and choices")
        parts_around(options.into, name)  # which is told before the trainings
    folder = (options.folder or Path("runs") / "accuracy") / name
    overrides = [*options.overrides, *(QUICK if options.quick else ())]
    plan = Plan(study, cells := folder.parent / "cells", overrides)
    if options.archive:
        options.archive = archive.check(options.archive)
        archive.unpack(options.archive, cells)
    code = present_code()
    runner = Runner(code)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = False
    try:
        if not options.table:
            harness = Harness(plan, runner, jobs=options.jobs)
            harness.run(time=options.time)
            failed = harness.failed
    except BaseException:
        runner.stop()
        raise
    finally:
        if options.archive:
            archive.pack(options.archive, cells, plan.ended())
    tables = [tabulate(plan, network, code) for network in study.table_networks]
    text = "\n".join(line for table in tables for line in markdown(table, study.baseline))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text)
    draw(tables, folder / "fronts.png")
    document = {table.network: as_dict(table) for table in tables}
    (folder / "table.json").write_text(json.dumps(document, indent=1) + "\n")
    if options.into:
        put_into(options.into, name, text)
    print(json.dumps(document) if options.json else text)
    sys.exit(1 if failed else 0)


class Harness:
    """Runs the cells of a study in the order in which they need each other."""

    def __init__(self, plan: Plan, runner: Runner, *, jobs: int) -> None:
        """Run nothing yet.

        Args:
            plan: of the study.
            runner: of single cells.
            jobs: cells at the same time.
        """
        self._plan = plan
        self._runner = runner
        self._jobs = jobs
        self.failed = False
        """Whether a cell failed that may come to an end another time."""
        self._told: set[str] = set()

    def run(self, *, time: bool) -> None:
        """Bring all cells to their end; those that wait for something are told.

        Args:
            time: run one cell of every method with the machine to itself as well.
        """
        study = self._plan.study
        pairs = [(n, m) for n in study.networks for m in study.methods_for(n)]
        # First those that others follow, and the baseline, which tells what time is.
        pairs.sort(key=lambda pair: bool(study.methods[pair[1]].follows))
        for follows in (False, True):
            wave = [pair for pair in pairs if bool(study.methods[pair[1]].follows) == follows]
            if len(study.learning_rates) > 1:
                tuning = [a for n, m in wave for a in self._plan.tuning(n, m)]
                self._run_all(self._watched(tuning))
                self._run_all(tuning)
            self._run_all(self._watched(self._with_all_seeds(wave)))
            if time:
                self._run_alone(wave)
            self._run_all(self._with_all_seeds(wave))
        self._compare_codes(pairs)

    def _watched(self, cells: Iterable[Arguments]) -> Iterator[Arguments]:
        """Give the cells that tell the ranks of others: of the same seeds and learning rates."""
        for network, method, seed, factor in cells:
            if watched := self._plan.study.methods[method].stable_ranks_of:
                yield network, watched, seed, factor

    def _with_all_seeds(self, pairs: Iterable[tuple[str, str]]) -> Iterator[Arguments]:
        for network, method in pairs:
            try:
                factor = self._plan.chosen(network, method)
            except Waiting as waiting:
                self._wait(network, method, waiting)
                continue
            for seed in self._plan.study.seeds_of(network):
                yield network, method, seed, factor

    def _run_alone(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Run one cell of each, with the machine to itself as far as this program is concerned."""
        study = self._plan.study
        timed = {study.baseline, *(study.methods if study.timed is None else study.timed)}
        for network, method in pairs:
            if method not in timed:
                continue
            try:
                factor = self._plan.chosen(network, method)
            except Waiting as waiting:
                self._wait(network, method, waiting)
                continue
            cell = self._made((network, method, study.first_seed, factor))
            if cell is None or cell.alone.finished:
                continue
            if (load := busy_cores()) > IDLE:
                _say(
                    f"the machine is not idle ({load:.1f} cores are busy): CPU times are of little "
                    "worth"
                )
            self._try(cell.alone, load=load)

    def _run_all(self, cells: Iterable[Arguments]) -> None:
        """Run cells, several at the same time."""
        futures = []
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                # Made here and not in the threads: the plan reads data and configurations. Networks
                # that share their learning rates ask for the same cells.
                for arguments in dict.fromkeys(cells):
                    if (cell := self._made(arguments)) and not cell.finished:
                        futures.append(pool.submit(self._try, cell))
                for future in futures:
                    future.result()
            except BaseException:
                self._runner.stop()
                pool.shutdown(cancel_futures=True)
                raise

    def _made(self, arguments: Arguments) -> Cell | None:
        try:
            return self._plan.cell(*arguments)
        except Waiting as waiting:
            self._wait(*arguments[:2], waiting)
            return None

    def _wait(self, network: str, method: str, waiting: Waiting) -> None:
        """Tell once what a method waits for."""
        line = f"{network}, {method}: waiting for {waiting}"
        if line not in self._told:
            self._told.add(line)
            _say(line)

    def _try(self, cell: Cell, load: float | None = None) -> None:
        """Run a cell and tell how it ended."""
        try:
            if self._runner.run(cell, load=load):
                _say(f"{cell}: {_ending(cell)}")
        except CellError as error:
            _say(f"{cell}: {error}")
            self.failed |= diverged(cell, self._runner.code) is None

    def _compare_codes(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Take the first steps of cells that another code made: one for each method and code."""
        for network, method in pairs:
            compared = set()
            for _, _, seed, factor in self._with_all_seeds([(network, method)]):
                cell = self._made((network, method, seed, factor))
                if cell is None or (place := cell.finished) is None:
                    continue
                record = read_record(place)
                digest = record.get("digest")
                if digest in compared or digest == self._runner.code.digest:
                    continue
                compared.add(digest)
                try:
                    same = self._runner.agrees(cell, place)
                except CellError as error:
                    _say(f"{cell}: cannot be compared with commit {record['commit']}: {error}")
                    continue
                _say(
                    f"{cell}: commit {record['commit']} takes {'the same' if same else 'other'} "
                    "first steps"
                )


def _ending(cell: Cell) -> str:
    summary = cell.summary()
    assert summary is not None
    figures = [f"{key} {value:.4f}" for key, value in summary.items() if key.startswith("test_")]
    return f"{', '.join(figures)}, {summary['cpu_seconds']:.1f} CPU seconds"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _study(options: argparse.Namespace) -> tuple[Study, str]:
    """Return the study that was asked for, and its name."""
    if options.study:
        study, name = definition.read_study(options.study), options.study.stem
        update: dict[str, Any] = {}
        if options.seeds:
            update["seeds"] = options.seeds
            update["networks"] = {
                name: network.model_copy(update={"seeds": network.seeds and None})
                for name, network in study.networks.items()
            }
        if options.first_seed is not None:
            update["first_seed"] = options.first_seed
        study = study.model_copy(update=update)
    else:
        name = "compared"
        compared: dict[str, str] = {}
        for named in options.compare:
            key, separator, path = named.partition("=")
            if not separator or key in compared:
                raise UserError(f"--compare {named}: expected NAME=PATH with a name of its own")
            compared[key] = path
        study = definition.compare(
            compared,
            options.config,
            seeds=options.seeds or 5,
            first_seed=options.first_seed or 0,
        )
    if options.quick:
        quick = {"seeds": 1, "learning_rates": [1.0]}
        study = study.model_copy(update=quick)
    return definition.restrict(study, methods=options.methods, networks=options.networks), name


def _document(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return path


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", type=Path, metavar="PATH", help="YAML file of a study")
    parser.add_argument("--config", default="configs/digits_vit.yaml", metavar="PATH")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="one of several configurations, in place of --config; the first is the baseline",
    )
    parser.add_argument("--seeds", type=int, help="how many; as the study says, or 5")
    parser.add_argument("--first-seed", type=int)
    parser.add_argument("--methods", nargs="+", default=[], help="these and the baseline only")
    parser.add_argument("--networks", nargs="+", default=[], help="these only")
    parser.add_argument("--jobs", type=int, default=1, help="cells at the same time")
    parser.add_argument(
        "--time",
        action="store_true",
        help="also run a cell of each method with nothing beside it, for its CPU time",
    )
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument(
        "--into",
        type=_document,
        metavar="PATH",
        help="a document, such as docs/results.md: the tables are put between <!-- study NAME --> "
        "and <!-- end -->",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="PATH",
        help="a file of finished cells: those in it are read and not repeated, others join them",
    )
    parser.add_argument("--folder", type=Path, help="of all studies (runs/accuracy)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
