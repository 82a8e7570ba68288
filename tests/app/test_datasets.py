"""Reading image sets in their official layouts, cutting them into parts, and what can go wrong."""

import gzip
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.image_sets import (
    TEST,
    TRAIN,
    expect_small_sets,
    images_of,
    labels_of,
    write_cifar,
    write_idx,
    write_mnist,
)

from app import config
from app.config.settings import Configuration, DataSection
from app.data.datasets import ImageSet, download, load
from app.data.formats import read_cifar, read_idx
from app.data.official import OfficialSet
from app.data.sets import DATA_SETS
from app.data.splitting import split_off
from app.errors import UserError
from app.training import build
from oialr.compatibility import import_torchvision


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_small_sets(monkeypatch)


def check_parts(parts: ImageSet, shape: tuple[int, ...], classes: int) -> None:
    """Labels are with their images, and no image is lost or repeated."""
    seen = []
    for part in (parts.train, parts.validation, parts.test):
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int64
        assert part.images.shape == (len(part.labels), *shape)
        flat = part.images.reshape(len(part.labels), -1)
        np.testing.assert_array_equal(flat[:, 0], part.labels)
        seen.append(flat[:, 1].tolist())
    assert parts.classes == classes
    assert sorted(seen[0] + seen[1]) == list(range(TRAIN))
    assert seen[2] == list(range(TEST))
    assert seen[0] != sorted(seen[0])  # in random order: the first ones are a fair sample


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        (name, source.torchvision)
        for name, source in DATA_SETS.items()
        if isinstance(source, OfficialSet) and source.label_key is None
    ],
)
def test_idx_sets(tmp_path: Path, name: str, folder: str, pack: bool) -> None:
    write_mnist(tmp_path, folder, pack=pack)
    check_parts(load(DataSection(name=name, root=str(tmp_path))), (1, 28, 28), 10)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_sets(tmp_path: Path, name: str, classes: int) -> None:
    write_cifar(tmp_path, name)
    check_parts(load(DataSection(name=name, root=str(tmp_path))), (3, 32, 32), classes)


def test_cifar_pickled_by_python_3(tmp_path: Path) -> None:
    images = images_of(labels_of(3, 10), 3072)
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": images, "labels": [0, 7, 4]}, protocol=4))
    read, labels = read_cifar(path, label_key="labels")
    np.testing.assert_array_equal(read.reshape(3, -1), images)
    assert labels.tolist() == [0, 7, 4]


def test_a_packed_file_is_read_no_further_than_its_header_announces(tmp_path: Path) -> None:
    """A thousandth of it on the disk, a packed file of zeros could fill any memory."""
    path = tmp_path / "images.gz"
    header = bytes([0, 0, 8, 1, 0, 0, 0, 4])
    with gzip.open(path, "wb") as file:
        file.write(header + bytes(4))
    assert read_idx(path, dimensions=1).tolist() == [0] * 4
    with gzip.open(path, "wb") as file:
        file.write(header + bytes(10**7))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"holds more bytes of data, its header announces \[4\]"):
        read_idx(path, dimensions=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12))
    with pytest.raises(
        ValueError, match=r"holds 0 bytes of data, its header announces \[4294967295"
    ):
        read_idx(path, dimensions=3)


@pytest.mark.parametrize("label", [10**30, -(2**64)])
def test_labels_beyond_all_integers(tmp_path: Path, label: int) -> None:
    path = tmp_path / "batch"
    images = images_of(labels_of(2, 10), 3072)
    path.write_bytes(pickle.dumps({"data": images, "labels": [label, 0]}, protocol=4))
    with pytest.raises(ValueError, match="'labels' holds labels of more than 64 bits"):
        read_cifar(path, label_key="labels")


def test_digits_are_cut_as_documented() -> None:
    from sklearn.datasets import load_digits

    parts = load(DataSection())
    sizes = [len(part.labels) for part in (parts.train, parts.validation, parts.test)]
    assert sizes == [1257, 180, 360]
    everything = np.concatenate(
        [part.images for part in (parts.train, parts.validation, parts.test)]
    )
    official = load_digits().images  # 0 to 16
    assert everything.shape[1:] == (1, 8, 8)
    assert everything.dtype == np.uint8
    assert sorted(everything.reshape(-1, 64).tolist()) == sorted(official.reshape(-1, 64).tolist())
    frequencies = np.bincount(np.concatenate([parts.train.labels, parts.test.labels])) / 1617
    for part in (parts.train, parts.validation, parts.test):
        counts = np.bincount(part.labels, minlength=10)
        assert np.abs(counts - frequencies * len(part.labels)).max() < 2


def test_cut_is_the_same_every_time(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = DataSection(name="mnist", root=str(tmp_path))
    np.testing.assert_array_equal(load(data).train.images, load(data).train.images)


@pytest.mark.slow
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=80), data=st.data())
def test_split_takes_every_class_in_proportion(labels: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(labels)))
    array = np.array(labels)
    rest, taken = split_off(array, size)
    assert len(taken) == size
    assert sorted([*rest, *taken]) == list(range(len(labels)))
    for label in range(5):
        expected = size * np.mean(array == label)
        assert abs(np.sum(array[taken] == label) - expected) < 1


def test_validation_fraction_and_train_samples(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = DataSection(name="mnist", root=str(tmp_path), validation_fraction=0.25)
    whole = load(data)
    assert (len(whole.train.labels), len(whole.validation.labels)) == (30, 10)
    part = load(data.model_copy(update={"train_samples": 12}))
    np.testing.assert_array_equal(part.train.images, whole.train.images[:12])
    np.testing.assert_array_equal(part.validation.images, whole.validation.images)
    with pytest.raises(UserError, match=r"^data\.train_samples: 31 exceeds the 30 .* of mnist$"):
        load(data.model_copy(update={"train_samples": 31}))


@pytest.mark.parametrize(
    ("name", "missing"), [("mnist", "t10k-labels-idx1-ubyte"), ("cifar10", "data_batch_3")]
)
def test_missing_file(tmp_path: Path, name: str, missing: str) -> None:
    folder = write_mnist(tmp_path) if name == "mnist" else write_cifar(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(UserError) as caught:
        load(DataSection(name=name, root=str(tmp_path)))
    message = str(caught.value)
    assert message.startswith(f"data.root: {folder / missing} not found; set data.download=true")
    assert message.endswith(f" into {folder}")
    assert "\n" not in message


def truncate(path: Path, size: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def replace_start(path: Path, start: bytes) -> None:
    path.write_bytes(start + path.read_bytes()[len(start) :])


LABELS = labels_of(TRAIN, 10)
IMAGES_FILE, LABELS_FILE = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (IMAGES_FILE, truncate, r"holds 31260 bytes of data, its header announces \[40, 28, 28\]"),
        (IMAGES_FILE, lambda p: p.write_bytes(b""), "is not an idx file of bytes in 3"),
        (
            IMAGES_FILE,
            lambda p: p.write_bytes(b"\0\0\x08\3\0"),
            "ends after 5 bytes, within its he",
        ),
        (IMAGES_FILE, lambda p: replace_start(p, b"\0\0\x0d\3"), "begins with '00000d03' and not"),
        (IMAGES_FILE, lambda p: write_idx(p, LABELS), "begins with '00000801' and not '00000803'"),
        (IMAGES_FILE, lambda p: write_idx(p, images_of(LABELS, 8, 8)), r"images \(40, 1, 8, 8\)"),
        (IMAGES_FILE, lambda p: write_idx(p, images_of(LABELS[:9], 28, 28)), r"images \(9, 1, 28"),
        (LABELS_FILE, lambda p: write_idx(p, LABELS[:39]), "holds 39 labels, expected 40"),
        (LABELS_FILE, lambda p: write_idx(p, LABELS + 1), r"labels that are not in \[0, 10\)"),
    ],
)
def test_damaged_idx(
    tmp_path: Path, file: str, damage: Callable[[Path], None], message: str
) -> None:
    path = write_mnist(tmp_path) / file
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        load(DataSection(name="mnist", root=str(tmp_path)))
    assert str(caught.value).startswith(f"data.root: {path} ")
    assert "remove it and set data.download=true, or put an intact copy" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [truncate, lambda p: replace_start(p, b"no"), lambda p: replace_start(p, b"\xff" * 99)],
)
def test_damaged_gzip(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = write_mnist(tmp_path, pack=True) / f"{IMAGES_FILE}.gz"
    damage(path)
    with pytest.raises(UserError, match="cannot be read") as caught:
        load(DataSection(name="mnist", root=str(tmp_path)))
    assert str(caught.value).startswith(f"data.root: {path} ")


def test_damage_inside_a_gzip_stream(tmp_path: Path) -> None:
    path = write_mnist(tmp_path, pack=True) / f"{IMAGES_FILE}.gz"
    content = bytearray(path.read_bytes())
    content[10:110] = b"\xff" * 100  # after the header: no such kind of block
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        read_idx(path, dimensions=3)


DATA = images_of(labels_of(8, 10), 3072)


class Harmful:
    """What an attacker would put into a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([1], "is not a dictionary with 'data' and 'labels'"),
        ({"data": DATA}, "is not a dictionary with 'data' and 'labels'"),
        ({"data": DATA[:, :3000], "labels": [0] * 8}, "not an array of bytes, 3072 per image"),
        ({"data": DATA.astype(float), "labels": [0] * 8}, "not an array of bytes"),
        ({"data": DATA.tolist(), "labels": [0] * 8}, "not an array of bytes"),
        ({"data": DATA, "labels": ["cat"] * 8}, "'labels' is not a list of integers"),
        ({"data": DATA, "labels": [0] * 7}, "holds 7 labels, expected 8"),
        ({"data": DATA[:7], "labels": [0] * 7}, r"holds images \(7, 3, 32, 32\)"),
        ({"data": DATA, "labels": [0] * 7 + [10]}, r"labels that are not in \[0, 10\)"),
        ({"data": DATA, "labels": [0] * 7 + [-1]}, r"labels that are not in \[0, 10\)"),
        ({"data": DATA, "labels": Harmful()}, "mkdir does not belong into a data set"),
    ],
)
def test_damaged_cifar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: Any, message: str
) -> None:
    path = write_cifar(tmp_path) / "data_batch_2"
    path.write_bytes(pickle.dumps(entry, protocol=4))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load(DataSection(name="cifar10", root=str(tmp_path)))
    assert str(caught.value).startswith(f"data.root: {path} ")
    assert not (tmp_path / "harm").exists()


def test_truncated_cifar(tmp_path: Path) -> None:
    path = write_cifar(tmp_path) / "test_batch"
    truncate(path)
    with pytest.raises(UserError, match="cannot be read") as caught:
        load(DataSection(name="cifar10", root=str(tmp_path)))
    assert str(caught.value).startswith(f"data.root: {path} ")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Calls of a stand-in for torchvision's CIFAR10, which writes the files."""
    import_torchvision()
    import torchvision.datasets

    calls: list[tuple[str, bool]] = []

    def fake(root: str, *, download: bool) -> None:
        calls.append((root, download))
        write_cifar(Path(root))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    return calls


def configuration(name: str, root: Path, **data: Any) -> Configuration:
    return config.build({"data": {"name": name, "root": str(root), **data}})


def test_download_once_and_only_if_asked(tmp_path: Path, downloads: list[tuple[str, bool]]) -> None:
    download(configuration("cifar10", tmp_path))
    assert downloads == []
    wanted = configuration("cifar10", tmp_path, download=True)
    with pytest.raises(UserError, match="not found"):  # reading never downloads
        load(wanted.data)
    assert downloads == []
    download(wanted)
    assert downloads == [(str(tmp_path), True)]
    assert load(wanted.data).classes == 10
    download(wanted)
    assert len(downloads) == 1


def test_nodes_that_share_a_folder_do_not_download_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two on the first node and two on the second, which looks when process 0 is done."""
    wanted = configuration("cifar10", tmp_path, download=True)
    turns: list[list[int]] = []
    for index, local_index in enumerate((0, 1, 0, 1)):
        own: list[int] = []

        def agree(function: Callable[[], None], own: list[int] = own) -> None:
            own.append(0)
            function()

        def count(found: Configuration, own: list[int] = own) -> None:
            assert found is wanted
            own[-1] += 1

        monkeypatch.setattr(build, "download", count)
        processes = SimpleNamespace(agree=agree)
        runtime: Any = SimpleNamespace(
            is_first=index == 0, local_index=local_index, processes=processes
        )
        build._download(wanted, runtime)
        turns.append(own)
    assert turns == [[1, 0], [0, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("error", [RuntimeError("no\nmirror"), OSError("no mirror")])
def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import_torchvision()
    import torchvision.datasets

    def fail(root: str, *, download: bool) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    folder = tmp_path / "MNIST" / "raw"
    with pytest.raises(UserError, match=r"^data\.download: mnist could not .*\(no mirror\)") as c:
        download(configuration("mnist", tmp_path, download=True))
    assert str(c.value).endswith(f"t10k-labels-idx1-ubyte (or the same as .gz) into {folder}")


def test_nothing_to_download(tmp_path: Path) -> None:
    download(configuration("digits", tmp_path, download=True))
    with pytest.raises(UserError, match=r"^data\.download: image_folder .* put train/ and val/"):
        download(configuration("image_folder", tmp_path, download=True))
