"""Full-rank against low-rank training of one configuration, over several seeds.

Every run is a program of its own, ``python -m app.train``; two are compared that differ in
``oialr.enabled`` alone. Prints a Markdown table of the final figures, mean and deviation.
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

FIGURES = {
    "test_accuracy": lambda value: f"{100 * value:.2f} %",
    "test_mse": lambda value: f"{value:.4f}",
    "test_mae": lambda value: f"{value:.4f}",
    "trainable_percent": lambda value: f"{value:.1f} %",
    "compression_percent": lambda value: f"{value:.1f} %",
}
"""Figures of a summary, of which a task has some, and how they are printed."""


def main() -> None:
    """Run all seeds of both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default="configs/digits_vit.yaml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    seeds = 1 if options.quick else options.seeds
    overrides = list(options.overrides)
    if options.quick:
        overrides += ["training.epochs=2", "training.warmup_epochs=1", "oialr.delay=20"]
    work = [(seed, low_rank) for seed in range(seeds) for low_rank in (False, True)]
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [
            pool.submit(_run, options.config, options.folder, seed, low_rank, overrides)
            for seed, low_rank in work
        ]
        results = [future.result() for future in futures]
    summaries: dict[str, list[dict[str, Any]]] = {"full-rank": [], "OIALR": []}
    for (_, low_rank), summary in zip(work, results, strict=True):
        summaries["OIALR" if low_rank else "full-rank"].append(summary)
    if options.json:
        print(json.dumps(summaries))
        return
    figures = [figure for figure in FIGURES if figure in results[0]]
    print("| training | " + " | ".join(figures) + " |")
    print("| --- " * (1 + len(figures)) + "|")
    for name, rows in summaries.items():
        cells = [_cell([row[figure] for row in rows], figure) for figure in figures]
        print(f"| {name}, {len(rows)} seeds | " + " | ".join(cells) + " |")


def _run(
    config: str, folder: Path, seed: int, low_rank: bool, overrides: list[str]
) -> dict[str, Any]:
    """Train once, or read what is there from an earlier call, and return the summary."""
    place = folder / f"{Path(config).stem}-{'oialr' if low_rank else 'full-rank'}-{seed}"
    if not (place / "summary.json").exists():
        subprocess.run(
            [
                *(sys.executable, "-m", "app.train", "--config", config, *overrides),
                *(f"run.dir={place}", f"run.seed={seed}", f"oialr.enabled={str(low_rank).lower()}"),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
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
