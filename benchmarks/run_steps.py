"""What does a step take at the ranks that a run has ended with, over the full-rank network's?

  python -m benchmarks.run_steps RUN [RUN ...]    # a minute or two for each run, on one core
  python -m benchmarks.run_steps --quick          # seconds; without a run a small network

Both networks take steps of the run's own configuration in turn, on the same batch, in CPU seconds
of one thread, and the figures are medians. The sum is what the whole run takes by that: the share
of its steps before the release, and of the others as much as such a step takes. Of runs that were
released at their delay. The numbers of the weights are not needed, since time depends on shapes
alone. Neither network is compiled, or averaged.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from app import config
from app.config.settings import Configuration
from app.errors import UserError
from app.runtime.host_memory import keep_freed_memory
from app.runtime.processes import start_runtime
from app.training.build import Parts, build
from app.training.optimizer import Schedule, build_optimizer
from app.training.training_step import TrainingStep
from oialr.convert import factorize_layer
from oialr.factor_steps import FactorSteps
from oialr.layer_survey import survey
from oialr.parameter_groups import TwinGroups

QUICK = [
    "model.arguments={patch_size: 4, embed_dim: 32, depth: 1, num_heads: 2}",
    *("data.train_samples=128", "training.batch_size=32", "oialr.delay=0.5"),
]
FULL_RANK = [
    *("oialr.enabled=false", "stability.enabled=false"),
    *("training.compile=false", "training.ema_decay=null"),
]
QUICK_RANKS = {"blocks.0.mlp.fc1.weight": 8, "blocks.0.mlp.fc2.weight": 8}


def released(parts: Parts, ranks: Mapping[str, int | None], configuration: Configuration) -> Parts:
    """Give the layers of a full-rank network two factors of these ranks, of random numbers."""
    model, training = parts.model, configuration.training
    options = configuration.oialr.options(parts.steps, warmup=0)
    factors: dict[str, torch.nn.Parameter] = {}
    for layer in survey(model, options, minimum_rank_fraction=options.minimum_rank_fraction):
        if (r := ranks.get(layer.name)) is not None:
            *stack, m, n = layer.stack_shape
            A, B = torch.randn(*stack, m, r) / r**0.5, torch.randn(*stack, r, n) / n**0.5
            factored = factorize_layer(model, layer.name, A, B)
            factors |= {f"{layer.name}.{name}": getattr(factored, name) for name in "AB"}
    optimizer = build_optimizer(model, training)
    # Of the method its decay alone takes part in such steps.
    groups = TwinGroups(optimizer, factors)
    FactorSteps(
        optimizer, groups, options=options, steps_since_release=lambda: options.release_warmup
    )
    for name, factor in factors.items():
        groups.move(optimizer, "factors", name, factor)
    schedule = Schedule(
        optimizer,
        training,
        steps=parts.steps,
        steps_per_epoch=parts.task.steps_per_epoch,
        since_conversion=lambda: None,
    )
    return replace(parts, model=model, optimizer=optimizer, schedule=schedule)


def measure(
    path: Path | None, overrides: Sequence[str], ranks: Mapping[str, int | None], *, rounds: int
) -> tuple[float, float, float]:
    """Return the CPU seconds of a full-rank step and of a low-rank one, and the share before."""
    configuration = config.load(path, overrides)
    dense = config.load(path, [*overrides, *FULL_RANK])
    with start_runtime(device="cpu") as runtime:
        parts = [build(dense, runtime, initial=False) for _ in range(2)]
        before, release = (
            configuration.oialr.step_of(name, parts[0].steps) for name in ("delay", "release")
        )
        if before is None or before != release:
            raise UserError(f"{path}: is no run that was released at its delay")
        parts[1] = released(parts[1], ranks, configuration)
        batch = next(iter(parts[0].task.train_batches(0)))
        steps = [TrainingStep(each) for each in parts]
        times: list[list[float]] = [[], []]
        for _ in range(rounds + 1):
            for step, taken in zip(steps, times, strict=True):
                start = time.process_time()
                step.take(batch, start=0.0)
                taken.append(time.process_time() - start)
        full, low = (statistics.median(taken[1:]) for taken in times)
        return full, low, before / parts[0].steps


def main() -> None:
    """Measure each run, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="few steps; without a run a small one")
    options = parser.parse_args()
    if not options.runs and not options.quick:
        parser.error("name the folders of runs, or --quick")
    torch.set_num_threads(1)
    keep_freed_memory()  # as app.train does
    rows: list[dict[str, Any]] = []
    for run in options.runs or [None]:
        rounds = 2 if options.quick else 20
        if run is None:
            full, low, share = measure(None, QUICK, QUICK_RANKS, rounds=rounds)
        else:
            if not (run / "summary.json").exists():
                parser.error(f"{run}: is no folder of a finished run")
            ranks = json.loads((run / "summary.json").read_text())["tested_ranks"]
            try:
                full, low, share = measure(run / "config.yaml", [], ranks, rounds=rounds)
            except UserError as error:
                parser.error(str(error))
        name, ratio = run.name if run else "quick", low / full
        figures = {"seconds": full, "ratio": ratio, "before": share}
        rows.append({"run": name, **figures, "sum": share + (1 - share) * ratio})
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("| run | step full-rank, s | after the release | steps before | sum |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        ratios = " | ".join(f"{row[key]:.2f}" for key in ("ratio", "before", "sum"))
        print(f"| {row['run']} | {row['seconds']:.4f} | {ratios} |")


if __name__ == "__main__":
    main()
