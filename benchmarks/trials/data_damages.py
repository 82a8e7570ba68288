"""Damage to files of every data format: refused in one line, or the figures of the whole data.

Formats without checksums cannot tell a changed value from a right one: a damage that leaves their
files well-formed is counted apart. Where a format has checksums, other figures are unexplained.
"""

import csv
import dataclasses
import gzip
import pickle
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.trials import programs
from benchmarks.trials.comparison import Outcome, difference, read_outcome
from benchmarks.trials.damages import damage
from benchmarks.trials.runs import expect_success

TRAIN, TEST = 40, 20
"""Samples of the sets that are made, in place of the official sizes."""
HOURS = 20 * 30 * 24
"""Of a series: what the official parts take."""
_COMMON = (
    "oialr.enabled=false",
    "stability.enabled=false",
    "training.epochs=1",
    "training.warmup_epochs=0",
    "training.batch_size=16",
    "distributed.device=cpu",
    "distributed.timeout=60",
)
_RESNET = ("model.name=cifar_resnet", "model.arguments={depth: 8, width: 4}")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of data, and a training on a small set in it."""

    name: str
    write: Callable[[Path], None]
    """Makes the set below a folder."""
    arguments: Sequence[str]
    config: str = "paper/digits_vit"
    has_checksums: bool = False
    may_lack_files: bool = False
    """What is in the folder is the set."""


def data_formats() -> list[Format]:
    """Return the formats that the application reads; the official image sets are made small."""
    from app.data.official import OfficialSet
    from app.data.sets import DATA_SETS

    for name, source in DATA_SETS.items():
        if isinstance(source, OfficialSet):
            DATA_SETS[name] = dataclasses.replace(source, train_size=TRAIN, test_size=TEST)
    lenet = ("data.name=mnist", "model.name=lenet5", "model.arguments={}")
    folder = ("data.name=image_folder", "data.image_size=32", "data.workers=0", *_RESNET)
    series = (
        *("data.name=etth1", "data.input_length=24", "data.horizon=6", "data.train_samples=64"),
        *("model.name=autoformer", "training.batch_size=512"),
        "model.arguments={width: 16, heads: 2, feed_forward: 32, label_length: 6}",
    )
    return [
        Format(name="idx", write=_mnist, arguments=lenet),
        Format(name="idx.gz", write=_packed_mnist, arguments=lenet, has_checksums=True),
        Format(name="CIFAR-10", write=_cifar10, arguments=("data.name=cifar10", *_RESNET)),
        Format(name="CIFAR-100", write=_cifar100, arguments=("data.name=cifar100", *_RESNET)),
        Format(
            name="PNG",
            write=lambda root: _images(root, "png"),
            arguments=folder,
            has_checksums=True,
            may_lack_files=True,
        ),
        Format(
            name="JPEG",
            write=lambda root: _images(root, "jpg"),
            arguments=folder,
            may_lack_files=True,
        ),
        Format(name="ETT", write=_series, arguments=series, config="paper/ettm2_autoformer"),
    ]


class DataDamages:
    """Damages data files one by one, and trains on them."""

    def __init__(self, folder: Path) -> None:
        """Make data and reference runs when the first damage comes."""
        self._folder = folder
        self._formats: list[Format] = []
        self._whole: dict[tuple[str, int], Outcome] = {}
        """What undisturbed runs came to, by format and number of processes."""
        self._number = 0

    def next(self, chance: Random) -> dict[str, Any]:
        """Try one damage; see kill_run. The formats take their turns."""
        self._formats = self._formats or data_formats()
        format_ = self._formats[self._number % len(self._formats)]
        self._number += 1
        count = chance.choice((1, 1, 1, 2))
        if (format_.name, count) not in self._whole:
            self._prepare(format_, count)
        data, run = self._folder / "data", self._folder / "data-run"
        for place in (data, run):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self._folder / format_.name, data)
        file = chance.choice(sorted(path for path in data.rglob("*") if path.is_file()))
        what = damage(file, chance)
        end = self._train(format_, data, run, count)
        outcome, problem = self._judge(format_, file, end, run)
        if problem:
            kept = self._folder / f"damaged-data-{self._number}"
            shutil.copytree(data, kept)
            problem = f"{kept.name}: {what}, {count} processes: {problem}"
        counts = {"damages": 1, f"{format_.name}: {outcome}": 1}
        return {"counts": counts, "problems": [problem] if problem else []}

    def _prepare(self, format_: Format, count: int) -> None:
        root, run = self._folder / format_.name, self._folder / f"{format_.name}-{count}"
        if not root.exists():
            root.mkdir()
            format_.write(root)
        expect_success(self._train(format_, root, run, count))
        self._whole[format_.name, count] = read_outcome(run)

    def _train(self, format_: Format, data: Path, run: Path, count: int) -> programs.End:
        config = str(programs.ROOT / "configs" / f"{format_.config}.yaml")
        places = (f"data.root={data}", f"run.dir={run}")
        arguments = ["--config", config, *_COMMON, *format_.arguments, *places]
        output = run.with_name(f"{run.name}.txt")
        return programs.start(arguments, count=count, output=output).wait()

    def _judge(
        self, format_: Format, file: Path, end: programs.End, run: Path
    ) -> tuple[str, str | None]:
        """Return what became of a damage, and a problem if that is not explained."""
        if end.hung or end.orphans or "Traceback" in end.output:
            return "unexplained", end.output[-2500:] or "hangs"
        if any(end.codes):
            named = len(end.errors) == 1 and file.name.removesuffix(".gz") in end.errors[0]
            if named and set(end.codes) == {2}:
                return "refused in one line", None
            return "unexplained", f"exit codes {end.codes}: {end.output[-2500:]}"
        if format_.may_lack_files and not file.exists():
            return "a file less", None
        whole = self._whole[format_.name, len(end.codes)]
        if not difference(read_outcome(run), whole):
            return "no effect", None
        if format_.has_checksums:
            return "unexplained", f"other figures, and nothing said: {end.output[-2500:]}"
        return "other values, well-formed", None


def _labels(size: int, classes: int) -> np.ndarray:
    return np.arange(size) * 7 % classes


def _pixels(size: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(size).integers(256, size=(size, *shape), dtype=np.uint8)


def _mnist(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, size in (("train", TRAIN), ("t10k", TEST)):
        for name, array in (
            (f"{part}-images-idx3-ubyte", _pixels(size, 28, 28)),
            (f"{part}-labels-idx1-ubyte", _labels(size, 10).astype(np.uint8)),
        ):
            sizes = struct.pack(f">{array.ndim}I", *array.shape)
            (folder / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def _packed_mnist(root: Path) -> None:
    _mnist(root)
    for path in sorted((root / "MNIST" / "raw").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()


def _cifar(folder: Path, files: Sequence[tuple[str, int]], key: str, classes: int) -> None:
    folder.mkdir(parents=True)
    for name, size in files:
        entries = {"data": _pixels(size, 3 * 32 * 32), key: _labels(size, classes).tolist()}
        (folder / name).write_bytes(pickle.dumps(entries, protocol=4))


def _cifar10(root: Path) -> None:
    files = [*((f"data_batch_{i}", TRAIN // 5) for i in range(1, 6)), ("test_batch", TEST)]
    _cifar(root / "cifar-10-batches-py", files, "labels", 10)


def _cifar100(root: Path) -> None:
    files = [("train", TRAIN), ("test", TEST)]
    _cifar(root / "cifar-100-python", files, "fine_labels", 100)


def _images(root: Path, suffix: str) -> None:
    from PIL import Image

    for part, size in (("train", 8), ("val", 4)):
        for label in ("ant", "bee"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for number, pixels in enumerate(_pixels(size, 40, 50, 3)):
                Image.fromarray(pixels).save(folder / f"{label}-{part}-{number}.{suffix}")


def _series(root: Path) -> None:
    folder = root / "ETT-small"
    folder.mkdir()
    hours = np.arange(HOURS)
    times = np.datetime_as_string(np.datetime64("2016-07-01T00") + hours, unit="s")
    noise = np.random.default_rng(0).normal(scale=0.2, size=(HOURS, 7))
    values = np.sin(2 * np.pi * hours / 24)[:, None] + np.arange(7) + noise
    with (folder / "ETTh1.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["date", "HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"])
        for time, row in zip(times, values, strict=True):
            writer.writerow([time.replace("T", " "), *(f"{value:.4f}" for value in row)])
