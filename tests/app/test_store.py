"""metrics.h5: schema, readers beside the writer, kill -9, resume."""

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launching import ROOT, TIMEOUT, environment
from support.metrics_rows import create, spectrum_row, train_row
from support.recorders import resume

from app.errors import StorageError, UserError
from app.recording import store as module
from app.recording.schema import run_groups
from app.recording.store import Follower, LostFileError, MetricsStore, open_for_reading, read_rows


def test_schema_is_the_documented_one(tmp_path):
    path = tmp_path / "metrics.h5"
    create(path).close()
    text = (ROOT / "docs" / "metrics.md").read_text()
    with open_for_reading(path) as file:
        assert file.attrs["schema_version"] == 1
        assert file.attrs["config"] == b"run: {}\n"
        assert list(file["layers/conv.weight"].attrs["shape"]) == [8, 3, 3, 3]
        for name in ("sessions", "train", "eval", "lowrank"):
            for column, dataset in file[name].items():
                assert f"`/{name}`" in text
                assert f"`{column}`" in text
                assert dataset.attrs["description"]
        assert "`/stability`" in text
        groups = [file["layers/conv.weight"][name] for name in ("rank", "stability", "spectrum")]
        for group in [file["stability"], *groups]:
            for column, dataset in group.items():
                unit = dataset.attrs["unit"].decode()
                assert f"| `{column}` | {dataset.dtype} | {unit} |" in text, column
        assert file["layers/conv.weight/spectrum/singular_values"].shape == (0, 8)
        assert file["layers/blocks.0.fc.weight/spectrum/singular_values"].shape == (0, 4)


def test_layers_keep_the_order_of_the_network_over_a_resume(tmp_path):
    path = tmp_path / "metrics.h5"
    layers = {"patch.weight": (8, 3), "blocks.10.weight": (4, 4), "blocks.2.weight": (6, 4)}
    options = {"configuration": "run: {name: a}\n", "layers": layers}
    MetricsStore.create(path, not_averaged={"patch.weight"}, **options).close()
    MetricsStore.resume(path, counts={}).close()
    reader = Follower(path)
    found = [(layer.name, layer.shape, layer.averaged) for layer in reader.layers()]
    assert found == [(name, shape, name != "patch.weight") for name, shape in layers.items()]
    assert reader.configuration() == "run: {name: a}\n"
    assert "layers/patch.weight/rank" in reader
    assert "layers/other" not in reader
    reader.close()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["closed", "killed", "running"])
def test_the_examples_of_the_document_run(tmp_path, ending):
    folder = tmp_path / "runs" / "example"
    folder.mkdir(parents=True)
    env = {
        **environment(),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
    }
    arguments = {"capture_output": True, "text": True, "timeout": 60, "cwd": tmp_path, "env": env}
    writer = subprocess.Popen(
        [sys.executable, "-c", EXAMPLE, ending, folder / "metrics.h5"],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert writer.stdout.readline() == b"written\n"
        if ending != "running":
            writer.communicate("", timeout=TIMEOUT)
            assert bool(writer.returncode) == (ending == "killed")
        text = (ROOT / "docs" / "metrics.md").read_text()
        examples = [part.split("```")[0] for part in text.split("```python\n")[1:]]
        results = [
            subprocess.run([sys.executable, "-c", example], check=True, **arguments).stdout
            for example in examples
        ]
    finally:
        writer.kill()
        writer.communicate()
    plain, tables = results
    assert plain.splitlines() == [
        "[1 2 3] [1.         0.5        0.33333333]",
        "[10 64] [0.3 0.6 0.9]",
    ]
    assert [line.split() for line in tables.splitlines()] == [
        ["epoch", "accuracy"],
        ["2", "3", "0.75"],
        ["1", "2", "0.50"],
        ["0", "1", "0.25"],
        ["layer", "blocks.0.attn.proj.weight", "blocks.0.attn.qkv.weight"],
        ["epoch"],
        ["1", "0.3", "0.3"],
        ["2", "0.6", "0.6"],
        ["3", "0.9", "0.9"],
    ]


EXAMPLE = """
import os, signal, sys
from support.metrics_rows import stability_row, train_row
from app.recording.store import MetricsStore
qkv, proj, head = "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight", "head.weight"
layers = {qkv: (192, 64), proj: (64, 64), head: (10, 64)}
store = MetricsStore.create(sys.argv[2], configuration="{}", layers=layers)
for epoch in range(1, 4):
    store.append("train", **train_row(epoch))
    store.append("eval", step=epoch, epoch=epoch, split="validation", loss=1.0, accuracy=epoch / 4)
    for layer in layers:
        store.append(f"layers/{layer}/stability", **stability_row(epoch))
store.append("eval", step=3, epoch=3, split="test", loss=1.0, accuracy=0.7)
store.flush()
print("written", flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "running":
    sys.stdin.read()
store.close()
"""


def test_other_figures_of_merit(tmp_path):
    path = tmp_path / "metrics.h5"
    with create(path, figures=("mse", "mae")) as store:
        store.append("eval", step=3, epoch=1, split="test", loss=0.5, mse=0.5, mae=0.4)
    assert list(read_rows(path, "eval")) == ["epoch", "loss", "mae", "mse", "split", "step"]


def test_rows_are_padded_cut_and_decoded(tmp_path):
    path = tmp_path / "metrics.h5"
    with create(path) as store:
        store.append("layers/conv.weight/spectrum", **spectrum_row(1, 3))
        store.append(
            "sessions",
            started="2026-01-01T00:00:00+00:00",
            process_count=2,
            first_step=0,
            versions="ä" * 300,
            command="train",
        )
    values = read_rows(path, "layers/conv.weight/spectrum")["singular_values"]
    np.testing.assert_array_equal(values, [[3, 2, 1, *[np.nan] * 5]])
    rows = read_rows(path, "sessions")
    assert rows["started"][0] == "2026-01-01T00:00:00+00:00"
    assert rows["versions"][0] == "ä" * 126 + "..."


def test_wrong_columns_are_our_own_mistake(tmp_path):
    with create(tmp_path / "metrics.h5") as store:
        with pytest.raises(AssertionError):
            store.append("train", step=1)
        with pytest.raises(AssertionError):
            store.append("train", **train_row(1), more=1)


def test_rows_appear_with_the_flush_to_a_reader_that_is_there(tmp_path):
    path = tmp_path / "metrics.h5"
    with create(path) as store, open_for_reading(path) as reader:
        store.append("train", **train_row(1))
        store.append("train", **train_row(2))
        steps = reader["train/step"]
        steps.refresh()
        assert len(steps) == 0
        store.flush()
        steps.refresh()
        assert list(steps) == [1, 2]
        assert store.counts()["train"] == 2


def test_a_plain_open_of_a_running_file_fails_in_another_process(tmp_path):
    path = tmp_path / "metrics.h5"
    program = "import h5py, sys; h5py.File(sys.argv[1], 'r', swmr=sys.argv[2] == 'swmr')"
    with create(path):
        for mode, fails in (("swmr", False), ("plain", True)):
            result = subprocess.run(
                [sys.executable, "-c", program, path, mode],
                capture_output=True,
                check=False,
                timeout=TIMEOUT,
            )
            assert bool(result.returncode) == fails, result.stderr


KILLED = """
import os, signal, sys
from support.metrics_rows import create, train_row
store = create(sys.argv[1])
for step in range(1, 8):
    store.append("train", **train_row(step))
store.flush()
store.append("train", **train_row(8))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_loses_nothing_that_was_flushed(tmp_path):
    path = tmp_path / "metrics.h5"
    env = {
        **environment(),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
    }
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, path], env=env, cwd=ROOT, check=False, timeout=TIMEOUT
    )
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(OSError, match=r"."):
        h5py.File(path, "r")
    assert list(read_rows(path, "train")["step"]) == list(range(1, 8))
    with MetricsStore.resume(path, counts={"train": 5}) as store:
        store.append("train", **train_row(6))
    assert list(read_rows(path, "train")["step"]) == list(range(1, 7))


@pytest.mark.slow
@given(rows=st.integers(0, 12), kept=st.integers(0, 12), more=st.integers(0, 5))
@settings(max_examples=25)
def test_resume_keeps_what_is_asked_for_nothing_twice_nothing_missing(
    tmp_path_factory, rows, kept, more
):
    kept = min(rows, kept)
    path = tmp_path_factory.mktemp("resume") / "metrics.h5"
    group = "layers/blocks.0.fc.weight/spectrum"
    with create(path) as store:
        for step in range(1, rows + 1):
            store.append("train", **train_row(step))
            store.append(group, **spectrum_row(step, 2))
    with MetricsStore.resume(path, counts={"train": kept, group: kept}) as store:
        for step in range(kept + 1, kept + more + 1):
            store.append("train", **train_row(step))
            store.append(group, **spectrum_row(step, 2))
    for name in ("train", group):
        assert list(read_rows(path, name)["step"]) == list(range(1, kept + more + 1))
    with open_for_reading(path) as file:
        assert file.attrs["config"] == b"run: {}\n"
        assert list(file["layers/conv.weight"].attrs["shape"]) == [8, 3, 3, 3]
        assert file["train/loss"].attrs["unit"] == b"1"
        assert file["train/loss"].maxshape == (None,)


def test_the_configuration_is_that_of_the_last_resume(tmp_path):
    """A run that was trained on for more epochs was averaged with those of fewer."""
    path = tmp_path / "metrics.h5"
    create(path).close()
    before = Follower(path).configuration()
    MetricsStore.resume(path, counts={}).close()
    assert Follower(path).configuration() == before
    resume(path, {}, configuration="run: {seed: 7}\n").close()
    assert Follower(path).configuration() == "run: {seed: 7}\n" != before


def test_resume_while_a_reader_holds_the_old_file(tmp_path):
    path = tmp_path / "metrics.h5"
    with create(path) as store:
        store.append("train", **train_row(1))
    with open_for_reading(path) as reader:
        with MetricsStore.resume(path, counts={"train": 1}) as store:
            store.append("train", **train_row(2))
        assert list(reader["train/step"]) == [1]
    assert list(read_rows(path, "train")["step"]) == [1, 2]


def test_a_failed_resume_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.h5"
    with create(path) as store:
        store.append("train", **train_row(1))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"train has 1 rows, but the checkpoint knows of 2"):
        MetricsStore.resume(path, counts={"train": 2})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        MetricsStore.resume(path, counts={"train": 1})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.h5"]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.h5: no such file"):
        read_rows(tmp_path / "gone.h5", "train")
    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    with pytest.raises(UserError, match=r"text\.h5: not a readable HDF5 file"):
        read_rows(text, "train")
    foreign = tmp_path / "foreign.h5"
    h5py.File(foreign, "w", libver="latest").close()
    with pytest.raises(UserError, match=r"foreign\.h5: an HDF5 file, but not the metrics"):
        read_rows(foreign, "train")
    create(tmp_path / "metrics.h5").close()
    with pytest.raises(UserError, match="no group test"):
        read_rows(tmp_path / "metrics.h5", "test")
    for column in ("train/step", "train/step/first"):
        with pytest.raises(UserError, match=f"no group {column}$"):
            read_rows(tmp_path / "metrics.h5", column)
    message = r"layers/conv\.weight has no columns of its own; read one of layers/conv\.weight/ra"
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / "metrics.h5", "layers/conv.weight")


@pytest.mark.slow
def test_a_large_network_has_a_small_file(tmp_path):
    path = Path(tmp_path / "metrics.h5")
    layers = {f"layers.{i}.weight": (2048, 512) for i in range(174)}
    MetricsStore.create(path, configuration="x" * 100_000, layers=layers).close()
    assert path.stat().st_size < 1_500_000
    with open_for_reading(path) as file:
        assert len(file.attrs["config"]) == 100_000


def test_another_schema_is_named(tmp_path):
    path = tmp_path / "metrics.h5"
    create(path).close()
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 2
    with pytest.raises(UserError, match="schema_version is 2, not 1"):
        read_rows(path, "train")


@pytest.mark.parametrize("size", [20, 100, 10_000, -1])
def test_a_truncated_file_is_named_and_does_not_hang(tmp_path, size):
    path = tmp_path / "metrics.h5"
    with create(path) as store:
        store.append("train", **train_row(1))
    os.truncate(path, size % path.stat().st_size)
    with pytest.raises(UserError, match=r"metrics\.h5: .*truncated"):
        open_for_reading(path)
    with pytest.raises(UserError, match=r"metrics\.h5: .*truncated"):
        MetricsStore.resume(path, counts={})


def test_rows_of_a_group_that_is_not_there_are_missed(tmp_path):
    path = tmp_path / "metrics.h5"
    create(path).close()
    with pytest.raises(UserError, match="layers/other/rank has 0 rows, but the checkpoint knows"):
        MetricsStore.resume(path, counts={"layers/other/rank": 1})
    MetricsStore.resume(path, counts={"layers/other/rank": 0}).close()


def test_uneven_columns_count_to_the_shortest(tmp_path):
    path = tmp_path / "metrics.h5"
    with create(path) as store:
        store.append("train", **train_row(1))
    with h5py.File(path, "r+") as file:  # as in the middle of a flush
        file["train/step"].resize(2, axis=0)
    assert {len(values) for values in read_rows(path, "train").values()} == {1}
    with pytest.raises(UserError, match="train has 1 rows"):
        MetricsStore.resume(path, counts={"train": 2})


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
def test_what_another_node_has_removed_is_lost(tmp_path, number):
    """A file server says so of an open file, in its own words."""

    class Removed:
        def stat(self):
            raise OSError(number, os.strerror(number))

    with MetricsStore.create(tmp_path / "metrics.h5", configuration="", layers={}) as store:
        store._path, path = Removed(), store._path
        with pytest.raises(LostFileError, match="removed, moved or replaced"):
            store.flush()
        store._path = path


def test_what_is_written_before_a_disk_is_full_is_not_written_again(tmp_path, monkeypatch):
    path = tmp_path / "metrics.h5"
    store = MetricsStore.create(path, configuration="", layers={})
    groups = {name: run_groups(["accuracy"])[name] for name in ("train", "stability")}
    for group, columns in groups.items():
        store.append(group, **{column.name: 1 for column in columns})
    append, full = module.append, {"stability"}

    def failing(dataset, values, start):
        if any(name in dataset.name for name in full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(dataset, values, start)

    monkeypatch.setattr(module, "append", failing)
    with pytest.raises(StorageError, match="No space left"):
        store.flush()
    assert store.length("train") == store.length("stability") == 1
    full.clear()
    store.close()
    for group in groups:
        assert list(read_rows(path, group)["step"]) == [1]


def test_a_fraction_is_no_integer(tmp_path):
    store = create(tmp_path / "metrics.h5")
    store.append("layers/conv.weight/rank", step=1, rank=1.5, owner=0)
    with pytest.raises(TypeError):
        store.flush()


def test_a_new_file_replaces_one_that_is_read_or_nothing_happens(tmp_path, monkeypatch):
    path = tmp_path / "metrics.h5"
    with create(path) as store:
        store.append("train", **train_row(1))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            create(path)
    assert path.read_bytes() == before
    with open_for_reading(path) as reader, create(path):
        assert list(reader["train/step"]) == [1]
        assert len(read_rows(path, "train")["step"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.h5"]


# For each number on stdin: follow /train until it has so many rows, and check each of them.
FOLLOWER = """
import sys
from app.recording.store import Follower
follower = Follower(sys.argv[1])
print("open", flush=True)
seen = 0
for line in sys.stdin:
    while seen < int(line):
        rows = follower.rows("train", seen)
        steps = list(range(seen + 1, seen + len(rows["step"]) + 1))
        assert rows["step"].tolist() == steps, (seen, rows)
        assert rows["loss"].tolist() == [1 / step for step in steps], rows
        seen += len(steps)
    print(seen, flush=True)
"""


@contextmanager
def follower_process(path):
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )
    watchdog = threading.Timer(60, process.kill)  # ends a readline that waits in vain
    watchdog.start()
    try:
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def ask(process, rows):
    process.stdin.write(f"{rows}\n")
    process.stdin.flush()


def test_a_follower_in_another_process_sees_each_row_once_over_a_resume(tmp_path):
    path = tmp_path / "metrics.h5"
    with create(path) as store, follower_process(path) as follower:
        ask(follower, 200)
        for step in range(1, 201):
            store.append("train", **train_row(step))
            store.flush()
        assert follower.stdout.readline() == "200\n"
        store.close()
        with MetricsStore.resume(path, counts={"train": 150}) as resumed:
            ask(follower, 220)
            for step in range(151, 221):
                resumed.append("train", **train_row(step))
                resumed.flush()
            assert follower.stdout.readline() == "220\n"


def test_a_follower_waits_for_the_rows_it_has(tmp_path):
    path = tmp_path / "metrics.h5"
    with create(path) as store:
        for step in range(1, 4):
            store.append("train", **train_row(step))
        store.flush()
        follower = Follower(path)
        assert list(follower.rows("train", 1)["step"]) == [2, 3]
    with MetricsStore.resume(path, counts={"train": 1}) as store:
        assert list(follower.rows("train", 3)["step"]) == []
        for step in range(2, 5):
            store.append("train", **train_row(step))
        store.flush()
        assert list(follower.rows("train", 3)["step"]) == [4]
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        follower.rows("train", 4)
    follower.close()


def test_a_layer_may_have_a_slash_in_its_name(tmp_path):
    layers = {"towers.a/b.weight": (4, 3), "head.weight": (2, 4)}
    with MetricsStore.create(tmp_path / "metrics.h5", configuration="", layers=layers):
        pass
    follower = Follower(tmp_path / "metrics.h5")
    assert {layer.name: layer.shape for layer in follower.layers()} == layers
    assert len(follower.rows("layers/towers.a/b.weight/stability")["step"]) == 0
    follower.close()
