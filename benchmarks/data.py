"""How many images per second do the data pipelines give, against torchvision's plain loader?

  python -m benchmarks.data            # half a minute on one core
  python -m benchmarks.data --quick    # ten seconds

Two pipelines: a folder of JPEG files (500 x 375 pixels, made for the purpose), read for training at
160 pixels against torchvision's ImageFolder; and a CIFAR-10 in memory, augmented in batches,
against torchvision's CIFAR10 with the same augmentation image by image. All of it runs in this
process in one thread, and the seconds are those of its CPU, so that other work on the machine
matters little; those of a GPU are wall time.
"""

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app import config
from app.compatibility import let_timm_posterize
from app.data import build_task
from oialr.compatibility import import_torchvision

Batches = Callable[[], Iterable[Any]]
CPU = torch.device("cpu")
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def main() -> None:
    """Measure both pipelines and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=512, help="JPEG files")
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts")
    parser.add_argument("--device", default="cpu", help="of the CIFAR-10 in memory")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="few images, once")
    options = parser.parse_args()
    if options.quick:
        options.images, options.repeats = 128, 1
    torch.set_num_threads(1)
    import_torchvision()
    with tempfile.TemporaryDirectory() as folder:
        rows = [*_files(Path(folder), options), *_memory(Path(folder), options)]
    if options.json:
        print(json.dumps(rows))
        return
    print("| pipeline | images/s per core | plain loader | ratio |")
    print("| --- | --- | --- | --- |")
    for row in rows:
        plain, ours = row["plain_images_per_second"], row["images_per_second"]
        print(f"| {row['pipeline']} | {ours:.0f} | {plain:.0f} | {ours / plain:.2f} |")


def _files(folder: Path, options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Measure the image folder: decoding, random crop to 160 pixels, flip."""
    from timm.data import rand_augment_transform
    from timm.data.random_erasing import RandomErasing
    from torch.utils.data import DataLoader
    from torchvision import datasets
    from torchvision import transforms as t

    _write_jpegs(folder, options.images)
    let_timm_posterize()
    augment = rand_augment_transform(RAND_AUGMENT, {"translate_const": 72})
    erase = RandomErasing(0.25, mode="pixel", device="cpu")
    for name, pixels, tensors, data in (
        ("files, crop 160", [], [], {}),
        ("with RandAugment", [augment], [], {"random_augment": RAND_AUGMENT}),
        ("with erasing", [], [erase], {"random_erasing": 0.25}),
        ("with mixup and CutMix, plain without", [], [], {"mixup": 0.2, "cutmix": 1.0}),
    ):
        crop = [t.RandomResizedCrop(160), t.RandomHorizontalFlip()]
        normalized = [t.ToTensor(), t.Normalize(MEAN, STD)]
        transform = t.Compose([*crop, *pixels, *normalized, *tensors])
        images = datasets.ImageFolder(str(folder / "train"), transform)
        loader: DataLoader[Any] = DataLoader(images, batch_size=64, shuffle=True)
        section = {"name": "image_folder", "root": str(folder), "image_size": 160, "workers": 0}
        task = _task({**section, **data})
        ours, reference = _rates(
            partial(task.train_batches, 0), partial(iter, loader), options.repeats
        )
        yield _row(name, ours, reference)


def _memory(folder: Path, options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Measure CIFAR-10: random crop of the padded image, flip."""
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets
    from torchvision import transforms as t

    _write_cifar(folder)
    transform = t.Compose(
        [
            t.RandomCrop(32, padding=4),
            t.RandomHorizontalFlip(),
            t.ToTensor(),
            t.Normalize(MEAN, STD),
        ]
    )
    whole = _Unchecked(datasets.CIFAR10)(str(folder), transform=transform)
    some = Subset(whole, range(2_000 if options.quick else 10_000))
    loader: DataLoader[Any] = DataLoader(some, batch_size=512, shuffle=True)
    device = torch.device(options.device)
    for name, data in (
        ("CIFAR-10 in memory, crop and flip", {}),
        ("with mixup and CutMix, plain without", {"mixup": 0.2, "cutmix": 1.0}),
    ):
        task = _task(
            {"name": "cifar10", "root": str(folder), "augmentation": "crop_flip", **data},
            batch_size=512,
            device=device,
        )
        ours, reference = _rates(
            partial(task.train_batches, 0), partial(iter, loader), options.repeats, device
        )
        yield _row(f"{name}, on {device.type}", ours, reference)


def _task(data: dict[str, Any], *, batch_size: int = 64, device: torch.device = CPU) -> Any:
    configuration = config.build({"data": data, "training": {"batch_size": batch_size}})
    return build_task(configuration, process_index=0, process_count=1, device=device)


def _rates(
    ours: Batches, plain: Batches, repeats: int, device: torch.device = CPU
) -> tuple[float, float]:
    """Measure both in turns; the fastest of each counts."""
    rates = [(_rate(ours, device), _rate(plain, CPU)) for _ in range(repeats)]
    return max(rate for rate, _ in rates), max(rate for _, rate in rates)


def _rate(batches: Batches, device: torch.device) -> float:
    """Return images per second of an epoch."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start, images = clock(), 0
    for batch in batches():
        images += len(batch[0] if isinstance(batch, list) else batch.inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (clock() - start)


def _row(name: str, ours: float, plain: float) -> dict[str, Any]:
    return {
        "pipeline": name,
        "images_per_second": ours,
        "plain_images_per_second": plain,
        "ratio": ours / plain,
    }


def _write_jpegs(folder: Path, count: int) -> None:
    """Write train/ and val/ of one class each, of smooth images with some noise."""
    from PIL import Image

    random = np.random.default_rng(0)
    for part, size in (("train", count), ("val", 4)):
        place = folder / part / "class"
        place.mkdir(parents=True)
        for number in range(size):
            coarse = random.integers(256, size=(12, 16, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((500, 375)), dtype=np.int16)
            noisy = smooth + random.integers(-12, 13, size=smooth.shape)
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            image.save(place / f"{number}.jpg", quality=90)


def _write_cifar(folder: Path) -> None:
    """Write random images in the layout of CIFAR-10."""
    random = np.random.default_rng(0)
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {
            "data": random.integers(256, size=(10_000, 3072), dtype=np.uint8),
            "labels": random.integers(10, size=10_000).tolist(),
        }
        (place / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": [str(i) for i in range(10)]}
    (place / "batches.meta").write_bytes(pickle.dumps(meta))


def _Unchecked(kind: Any) -> Any:  # noqa: N802 - it returns a class
    """Return torchvision's data set without the comparison of checksums: the images are ours."""

    class Unchecked(kind):
        def _check_integrity(self) -> bool:
            return True

        def _load_meta(self) -> None:
            self.classes = [str(i) for i in range(10)]

    return Unchecked


if __name__ == "__main__":
    main()
