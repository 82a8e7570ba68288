"""What grows in a long run: memory, handles, threads, metrics.h5?

  python -m benchmarks.growth            # half an hour on two cores; evaluations are the most
  python -m benchmarks.growth --quick    # half a minute

Events: the method on a small network, alone and under mpirun, with an event after every step.
Evaluations: a search of short trainings, whose processes are looked at from outside. metrics.h5: a
file of many epochs and layers, with the rows that a run writes; its size, the seconds until a
reader has it open with its layers, and what the writer holds.

Memory is looked at often, and what is told is the slope of a straight line through the second half
of it: caches are full by then, and a single page more or less at an end does not count. What comes
at once, from one look to the next more than all the rest, is told by itself and is not part of the
slope, since a table that doubles would be taken for a growth that goes on. The slope is in KiB of
resident memory for each event, evaluation or epoch, and is called flat where it is no more than
FLAT; handles and threads are to be as many at the end as in the middle.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.recording.store import Follower, MetricsStore
from app.recording.thinning import is_recorded
from app.runtime.launch import read_launch
from benchmarks._mpirun import mpirun
from benchmarks._tables import table

ROOT = Path(__file__).resolve().parents[1]
FLAT = {"event": 0.1, "evaluation": 1.5, "epoch": 0.1}
"""KiB for each. What an evaluation leaves is its individual, of about 1 KiB, which is the search's
result; the others leave nothing, and the bound is what chance does to a few thousand of them."""
LOOKS = 200
"""At memory, at least, over all events or epochs."""
SEARCH = f"""
extends: {ROOT}/configs/paper/digits_vit.yaml
training: {{epochs: 1, warmup_epochs: 0, batch_size: 50}}
data: {{train_samples: 100}}
model:
  arguments: {{patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}}
stability: {{enabled: false}}
oialr: {{delay: 1, update_interval: 1}}
search: {{train_best: false}}
space:
  training.learning_rate: {{range: [1.0e-3, 1.0e-2], scale: log}}
"""


def main() -> None:
    """Measure what is asked for, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--evaluations", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=10_000, help="of metrics.h5; one each")
    parser.add_argument("--layers", type=int, default=174)
    parser.add_argument("--width", type=int, default=768, help="singular values of a layer")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    options = parser.parse_args()
    if options.quick:
        options.events, options.evaluations, options.epochs, options.layers = 300, 6, 300, 20
    if read_launch().launcher != "alone":
        _events_here(options.events)
        return
    document: dict[str, Any] = {}
    for count in options.processes:
        if options.events:
            document[f"{options.events} events, {count} processes"] = _events(options, count)
        if options.evaluations:
            name = f"{options.evaluations} evaluations, {count} processes"
            document[name] = _evaluations(options, count)
    if options.epochs:
        name = f"metrics.h5 of {options.epochs} epochs, {options.layers} layers"
        document[name] = _file(options.epochs, options.layers, options.width)
    print(json.dumps(document) if options.json else table(document))


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _resources(process: int | str = "self") -> dict[str, int]:
    """Return what a process holds: resident memory in KiB, open handles, threads."""
    place = Path(f"/proc/{process}")
    pages = int((place / "statm").read_text().split()[1])
    return {
        "KiB": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        "handles": len(list((place / "fd").iterdir())),
        "threads": len(list((place / "task").iterdir())),
    }


def _growth(seen: Sequence[dict[str, int]], each: float, kind: str) -> dict[str, Any]:
    """Tell how what a process holds has grown over the second half.

    Args:
        seen: what it held, at equal distances.
        each: number of events, evaluations or epochs between two of them.
        kind: which of FLAT.
    """
    half = seen[len(seen) // 2 :]
    memory = np.array([one["KiB"] for one in half])
    steps = np.diff(memory)
    at_once = int(steps.max(initial=0))
    if at_once > steps.sum() - at_once:
        memory[int(steps.argmax()) + 1 :] -= at_once
    else:
        at_once = 0
    slope = float(np.polyfit(each * np.arange(len(half)), memory, 1)[0])
    # The fewest, since a look may come in the middle of something that is open for a moment.
    middle = (len(half) + 1) // 2
    more = {
        name: min(one[name] for one in half[-middle:]) - min(one[name] for one in half[:middle])
        for name in ("handles", "threads")
    }
    return {
        "MiB in the middle": round(half[0]["KiB"] / 1024, 1),
        "MiB at the end": round(half[-1]["KiB"] / 1024, 1),
        f"KiB more for each {kind}": round(slope, 3),
        "KiB at once": at_once,
        **{f"{name} more": count for name, count in more.items()},
        "flat": slope <= FLAT[kind] and max(more.values()) <= 0,
    }


def _events(options: argparse.Namespace, count: int) -> dict[str, Any]:
    command = mpirun(count, "-m", "benchmarks.growth", "--events", str(options.events))
    output = subprocess.run(
        command, env=_environment(), stdout=subprocess.PIPE, check=True, text=True
    ).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def _events_here(events: int) -> None:
    """Take steps with an event after each; process 0 prints what it holds more. Under mpirun."""
    import torch

    from app import OIALR
    from app.runtime.processes import start_runtime

    torch.set_num_threads(1)
    with start_runtime(device="cpu", timeout=600) as runtime:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(40, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 48),
            torch.nn.Linear(48, 8),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        method = OIALR(model, optimizer, delay=1, update_interval=1, processes=runtime.processes)
        batch = torch.randn(16, 40)
        seen = []
        each = max(1, events // LOOKS)
        for number in range(events):
            if number % each == 0:
                seen.append(_resources())
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            assert method.step()
        if runtime.is_first:
            print(json.dumps(_growth(seen, each, "event")))


def _evaluations(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Search with one worker of some processes, and look at its first process."""
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        folder = Path(name)
        (folder / "search.yaml").write_text(SEARCH)
        arguments = [
            *("-m", "app.search", "--config", str(folder / "search.yaml")),
            *(f"run.dir={folder / 'run'}", f"search.evaluations={options.evaluations}"),
            f"search.processes_per_worker={count}",
        ]
        process = subprocess.Popen(
            mpirun(count, *arguments),
            cwd=ROOT,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        seen: dict[str, list[dict[str, int]]] = {}
        assert process.stdout
        for line in process.stdout:
            # Not after the last: the search is already coming to its end.
            if (done := re.match(r"(\d+)/(\d+)  number ", line)) and done[1] != done[2]:
                for who, number in _worker(folder / "run").items():
                    seen.setdefault(who, []).append(_resources(number))
        if process.wait() or not seen:
            raise RuntimeError(f"the search ended with {process.returncode}")
        return {
            f"{what}, {who}": figure
            for who, looks in seen.items()
            for what, figure in _growth(looks, 1, "evaluation").items()
        }


def _worker(folder: Path) -> dict[str, str]:
    """Return the process numbers of a search: of its first, and of those that mpirun has beside."""
    first = json.loads(next(folder.glob(".lease-*")).read_text())["process"]
    parent = Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[1]
    beside = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    others = sorted((number for number in beside if number != str(first)), key=int)
    return {"process 0": str(first), **{f"process {i}": n for i, n in enumerate(others, 1)}}


def _file(epochs: int, layers: int, width: int) -> dict[str, Any]:
    """Write what a run of so many epochs writes, with an event after every epoch."""
    chance = np.random.default_rng(0)
    names = {f"blocks.{i}.weight": (width, width) for i in range(layers)}
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        path = Path(folder) / "metrics.h5"
        spectrum = chance.random(width)
        seen, each = [], max(1, epochs // LOOKS)
        with MetricsStore.create(path, configuration="{}", layers=names) as store:
            for epoch in range(1, epochs + 1):
                _append_epoch(store, names, epoch, chance, spectrum)
                if epoch % 100 == 0:
                    store.flush()
                if epoch % each == 0:
                    seen.append(_resources())
        size = path.stat().st_size
        start = time.perf_counter()
        reader = Follower(path)
        found = len(reader.layers())
        opened = time.perf_counter() - start
        stability = len(reader.rows("stability")["step"])
        reader.close()
        assert (found, stability) == (layers, epochs)
    figures = {"MB": round(size / 1e6, 1), "seconds to open": round(opened, 3)}
    return {**figures, **_growth(seen, each, "epoch")}


def _append_epoch(
    store: MetricsStore,
    names: dict[str, tuple[int, int]],
    epoch: int,
    chance: np.random.Generator,
    spectrum: np.ndarray,
) -> None:
    """Add the rows of an epoch of 20 steps, with one event and one measurement."""
    place = {"epoch": epoch, "step": 20 * epoch}
    for step in range(20 * epoch - 19, 20 * epoch + 1):
        values = chance.random(4)
        keys = ("loss", "learning_rate", "samples_per_second", "step_seconds")
        store.append("train", step=step, epoch=epoch, **dict(zip(keys, values, strict=True)))
    store.append("eval", **place, split="validation", loss=chance.random(), accuracy=0.5)
    mean = {"mean_stability": chance.random(), "mean_mixing_similarity": chance.random()}
    store.append("stability", **place, **mean, layers=len(names), seconds=0.1)
    for name in names:
        store.append(f"layers/{name}/rank", step=20 * epoch, rank=7, owner=0)
        keys = ("stability", "mixing_similarity", "effective_rank", "stable_rank")
        figures = dict(zip(keys, chance.random(4), strict=True))
        ranks = {"rank": 7, "reference_rank": 7, "numerical_rank": 7, "orthonormality_error": 1e-7}
        store.append(f"layers/{name}/stability", **place, **figures, **ranks)
        for number in (2 * epoch - 1, 2 * epoch):
            if is_recorded(number):
                store.append(f"layers/{name}/spectrum", step=20 * epoch, singular_values=spectrum)


if __name__ == "__main__":
    main()
