"""How accurate is a trained network that is cut to a size, without any training after it?

  python -m benchmarks.compression RUN        # a minute; a run that was trained full-rank
  python -m benchmarks.compression RUN data.root=DATA --sizes 0.35 0.2
  python -m benchmarks.compression --quick    # an untrained network; half a minute

By its weights, and by what its layers compute of some samples of the validation part
(`oialr.compress` without and with `inputs`). The figures are those of the test part, or of the part
that is named.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from app import config
from app.errors import UserError
from app.runtime.processes import Runtime, start_runtime
from app.training.build import Parts, build
from app.training.trained import figures_of, read_configuration, samples_of, trained
from oialr import compress

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "data.train_samples=256",
    "model.arguments={patch_size: 4, embed_dim: 64, depth: 1, num_heads: 2}",
]


@contextmanager
def opened(run: Path | None, overrides: list[str], runtime: Runtime) -> Iterator[Parts]:
    """Give the parts of a run with its trained weights; without a run those of a small start."""
    if run is None:
        default = config.load(ROOT / "configs" / "digits_vit.yaml", [*SMALL, *overrides])
        yield build(default, runtime, check_steps=False)
        return
    with trained(read_configuration(run, overrides), runtime) as (parts, _):
        yield parts


def measure(
    parts: Parts,
    sizes: list[float],
    part: str,
    samples: int,
    **options: Any,
) -> list[dict[str, object]]:
    """Return a row of figures for the network as it is, and for each size and way.

    Args:
        parts: of the run.
        sizes: shares of the network's parameters.
        part: of the data, that figures are of.
        samples: that layers are looked at with.
        options: of :func:`oialr.compress`.
    """
    rows: list[dict[str, object]] = [
        {"size": 1.0, "cut by": "not cut", **figures_of(parts, parts.model.eval(), part)}
    ]
    inputs = samples_of(parts, samples)
    for size in sizes:
        outputs = f"outputs of {len(inputs)} samples"
        for way, batches in (("weights", []), (outputs, inputs.split(128))):
            model = copy.deepcopy(parts.model)
            compress(
                model,
                target_size=size,
                inputs=batches,
                **options,
            )
            rows.append({"size": size, "cut by": way, **figures_of(parts, model.eval(), part)})
    return rows


def main() -> None:
    """Measure what is asked for, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="folder of a full-rank run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5, 0.35, 0.2, 0.1])
    parser.add_argument("--part", choices=("test", "validation"), default="test")
    parser.add_argument("--samples", type=int, default=512, help="for looking at layers, at most")
    parser.add_argument("--convolutions", choices=("matrix", "spatial"), default="matrix")
    parser.add_argument("--rank-multiple", type=int, default=1, help="ranks are multiples of it")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="of a small network as it begins")
    options = parser.parse_intermixed_args()
    if options.run is not None and "=" in options.run.name:  # as --quick data.root=DATA
        options.run, options.overrides = None, [str(options.run), *options.overrides]
    if options.run is None and not options.quick:
        parser.error("no run; see --help")
    run = None if options.quick else options.run
    sizes = [0.5] if options.quick else options.sizes
    try:
        with (
            start_runtime(device="auto") as runtime,
            opened(run, options.overrides, runtime) as parts,
            torch.no_grad(),
        ):
            rows = measure(
                parts,
                sizes,
                options.part,
                options.samples,
                convolutions=options.convolutions,
                rank_multiple=options.rank_multiple,
            )
    except (UserError, ValueError) as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else value for value in row.values())
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
