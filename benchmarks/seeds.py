r"""Configurations held against each other over several seeds.

By default two that differ in ``oialr.enabled`` alone:

  python benchmarks/seeds.py --config configs/fashion_mnist_vit.yaml --seeds 3 data.root=DATA

or any others, such as the best of two searches, over seeds that those have not seen:

  python benchmarks/seeds.py --first-seed 1000 \
      --compare full-rank=runs/a/best.yaml --compare OIALR=runs/b/best.yaml

Every run is a program of its own, ``python -m app.train``; one that is in the folder already, of
the same configuration, is resumed or read and not repeated. Prints a Markdown table of the final
figures, mean and deviation.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from anywhere as a script

from app import config
from app.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

FIGURES = {
    "test_accuracy": lambda value: f"{100 * value:.2f} %",
    "test_mse": lambda value: f"{value:.4f}",
    "test_mae": lambda value: f"{value:.4f}",
    "trainable_percent": lambda value: f"{value:.1f} %",
    "compression_percent": lambda value: f"{value:.1f} %",
}
"""Figures of a summary, of which a task has some, and how they are printed."""


def main() -> None:
    """Run all configurations with all seeds, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="configs/digits_vit.yaml")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="one of several configurations, in place of --config",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    compared: dict[str, Sequence[str]] = {}
    for named in options.compare:
        name, separator, path = named.partition("=")
        if not separator or name in compared:
            parser.error(f"--compare {named}: expected NAME=PATH with a name of its own")
        compared[name] = (path,)
    compared = compared or {
        "full-rank": (options.config, "oialr.enabled=false"),
        "OIALR": (options.config, "oialr.enabled=true"),
    }
    overrides = list(options.overrides)
    if options.quick:
        overrides += ["training.epochs=2", "training.warmup_epochs=1", "oialr.delay=20"]
    first = options.first_seed
    seeds = range(first, first + (1 if options.quick else options.seeds))
    try:
        work = {
            (name, seed): _prepare(options.folder, name, seed, *arguments, *overrides)
            for seed in seeds
            for name, arguments in compared.items()
        }
    except UserError as error:
        parser.error(str(error))
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {key: pool.submit(_run, *run) for key, run in work.items()}
    summaries = {name: [runs[name, seed].result() for seed in seeds] for name in compared}
    if options.json:
        print(json.dumps(summaries))
        return
    some_summary = next(iter(summaries.values()))[0]
    figures = [figure for figure in FIGURES if figure in some_summary]
    print("| training | " + " | ".join(figures) + " |")
    print("| --- " * (1 + len(figures)) + "|")
    tried = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {first}"
    for name, rows in summaries.items():
        cells = [_cell([row[figure] for row in rows], figure) for figure in figures]
        print(f"| {name}, {tried} | " + " | ".join(cells) + " |")


def _prepare(
    folder: Path, name: str, seed: int, path: str, *overrides: str
) -> tuple[Path, list[str]]:
    """Return a run's folder, which tells its configuration, and its arguments.

    Raises:
        UserError: the configuration is not right.
    """
    overrides += (f"run.seed={seed}",)
    text = config.to_yaml(config.load(path, overrides))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    place = folder / f"{Path(path).stem}-{name}-{seed}-{digest}"
    return place, ["--config", path, *overrides, f"run.dir={place}"]


def _run(place: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Train once, or read what is there from an earlier call, and return the summary."""
    if (place / "config.yaml").exists():
        arguments = ["--resume", str(place)]
    if not (place / "summary.json").exists():
        subprocess.run(
            [sys.executable, "-m", "app.train", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    summary: dict[str, Any] = json.loads((place / "summary.json").read_text())
    return summary


def _cell(values: list[float], figure: str) -> str:
    mean = FIGURES[figure](statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {FIGURES[figure](statistics.stdev(values))}"


if __name__ == "__main__":
    main()
