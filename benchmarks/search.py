"""Configurations that searches have found, held against each other over seeds they have not seen.

Every run is a program of its own, ``python -m app.train``. Prints a Markdown table of the final
figures, mean and deviation:

  python benchmarks/search.py full-rank=DIR/best.yaml OIALR=DIR/best.yaml --seeds 10 --jobs 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FIGURES = ("test_accuracy", "trainable_percent", "compression_percent")
FIRST_SEED = 1000
"""Above the seeds of a search, which are the numbers of its evaluations."""


def main() -> None:
    """Train all configurations with all seeds, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configurations", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--folder", type=Path, default=Path("runs/search-seeds"))
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="one seed")
    options = parser.parse_args()
    paths = dict(configuration.split("=", 1) for configuration in options.configurations)
    seeds = range(FIRST_SEED, FIRST_SEED + (1 if options.quick else options.seeds))
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {
            name: [
                pool.submit(_run, path, options.folder / f"{name}-{seed}", seed) for seed in seeds
            ]
            for name, path in paths.items()
        }
        summaries = {name: [run.result() for run in runs] for name, runs in futures.items()}
    if options.json:
        print(json.dumps(summaries))
        return
    print("| training | " + " | ".join(FIGURES) + " |")
    print("| --- " * (1 + len(FIGURES)) + "|")
    for name, rows in summaries.items():
        cells = [_cell([row[figure] for row in rows], figure) for figure in FIGURES]
        print(f"| {name}, {len(rows)} seeds | " + " | ".join(cells) + " |")


def _run(config: str, place: Path, seed: int) -> dict[str, Any]:
    """Train once, or read what is there from an earlier call, and return the summary."""
    if not (place / "summary.json").exists():
        subprocess.run(
            [
                *(sys.executable, "-m", "app.train", "--config", config),
                *(f"run.dir={place}", f"run.seed={seed}", "run.keep_checkpoints=0"),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    summary: dict[str, Any] = json.loads((place / "summary.json").read_text())
    return summary


def _cell(values: list[float], figure: str) -> str:
    scale, digits = (100, 2) if figure == "test_accuracy" else (1, 1)
    mean = statistics.fmean(values) * scale
    if len(values) == 1:
        return f"{mean:.{digits}f} %"
    return f"{mean:.{digits}f} ± {statistics.stdev(values) * scale:.{digits}f} %"


if __name__ == "__main__":
    main()
