"""The application itself on a GPU: short trainings on the digits, as a user starts them.

It needs what the application needs: pydantic, PyYAML, h5py, rich, scikit-learn. Rows tell exit
code, seconds and final figures of each run, and whether a run that was stopped and resumed ended
with the figures of the one that was not, by torch's deterministic algorithms.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._paper import paper_keys
from benchmarks.gpu.measuring import Results, choose_device, command_line

NEEDED = ("pydantic", "yaml", "h5py", "rich", "sklearn", "timm")
SHORT = ("training.epochs=12", "oialr.delay=60", "oialr.update_interval=40")
DRY = (
    "training.epochs=3",
    "training.warmup_epochs=1",
    "oialr.delay=15",
    "oialr.update_interval=10",
)
DETERMINISTIC = ("training.deterministic=true",)
"""What a resumed run needs to end with the same bits on a GPU."""
RUNS: dict[str, tuple[str, ...]] = {
    "deterministic": DETERMINISTIC,
    "float32": (),
    "bfloat16": ("training.precision=bfloat16",),
    "float16": ("training.precision=float16", "training.gradient_clip=1.0"),
    "compiled": ("training.compile=true", "training.precision=bfloat16"),
    "full-rank": ("oialr.enabled=false",),
    "background": ("stability.background_steps=5",),
}


def run(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run one training and tell how it ended."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "app.train", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    summary = folder / "summary.json"
    return {
        "exit_code": done.returncode,
        "seconds": time.perf_counter() - start,
        "last_lines": (done.stderr or done.stdout)[-600:],
        "summary": json.loads(summary.read_text()) if summary.exists() else None,
    }


def main() -> None:
    """Run all trainings, one after another."""
    parser = command_line(__doc__)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    device = choose_device(dry_run=options.dry_run)
    results = Results("application", options.output, device)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        results.add(run="none", not_run=f"{', '.join(missing)} is not installed here")
        return
    # The paper's algorithm has more events than the recipe.
    length, middle = (DRY, 35) if options.dry_run else (SHORT, 140)
    common = ["run.keep_checkpoints=1", f"distributed.device={device.type}"]
    short = [*paper_keys(), *length, *common]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key in options.runs:
            if results.seconds > 0.7 * options.seconds and not options.dry_run:
                print(f"{key}: no time is left")
                continue
            mine = folder / key
            results.add(run=key, **run([*short, *RUNS[key], f"run.dir={mine}"], mine))
        mine = folder / "stopped"
        first = run([*short, *DETERMINISTIC, f"run.stop_after={middle}", f"run.dir={mine}"], mine)
        results.add(run="stopped", **first)
        results.add(run="resumed", **run(["--resume", str(mine)], mine))
        if all((folder / key / "summary.json").exists() for key in ("deterministic", "stopped")):
            undisturbed, resumed = (
                json.loads((folder / key / "summary.json").read_text())["test_loss"]
                for key in ("deterministic", "stopped")
            )
            results.add(run="difference of a resumed run", test_loss=abs(undisturbed - resumed))


if __name__ == "__main__":
    main()
