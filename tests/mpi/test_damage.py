"""Damage to metrics.h5: found or without effect, never a hang and never another row."""

import json
import math
import random
import re
import shutil

import h5py
import numpy as np
import pytest
from support.launching import launch, train
from support.metrics_rows import LAYERS, create, spectrum_row, stability_row, train_row
from support.recorders import resume
from support.tiny_run import DISTURBED, TINY, last_checkpoint, metrics

from app.errors import UserError
from app.recording import swmr
from app.recording.store import Follower, MetricsStore, read_rows
from app.reporting.runs import read_run
from app.training.recorder import KEPT

ROWS = 300  # of /train: more than a chunk of 256


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(swmr, "_FIRST_PAUSE", 0)


def fill(path):
    """Write a file with rows in all groups; return it as bytes, and the rows of each group."""
    with create(path) as store:
        for step in range(1, ROWS + 1):
            store.append("train", **train_row(step))
            if step % 10 == 0:
                store.append(
                    "eval", step=step, epoch=1, split="validation", loss=1.0, accuracy=1 / step
                )
                for layer in LAYERS:
                    store.append(f"layers/{layer}/rank", step=step, rank=4, owner=0)
                    store.append(f"layers/{layer}/stability", **stability_row(step))
                    store.append(f"layers/{layer}/spectrum", **spectrum_row(step, 4))
                store.flush()
        counts = store.counts()
    return path.read_bytes(), counts, read_all(path)


def read_all(path):
    reader = Follower(path)
    try:
        layers = reader.layers()
        groups = [
            f"layers/{one.name}/{g}" for one in layers for g in ("rank", "stability", "spectrum")
        ]
        content = {group: reader.rows(group) for group in ["train", "eval", "sessions", *groups]}
        return reader.configuration(), layers, content
    finally:
        reader.close()


def assert_same(mine, theirs):
    assert mine[:2] == theirs[:2]
    assert mine[2].keys() == theirs[2].keys()
    for group, columns in mine[2].items():
        for name, values in columns.items():
            np.testing.assert_array_equal(values, theirs[2][group][name])


def damages(content, count):
    """Yield copies of a file with a flipped bit, a block of zeros, or an end that is missing."""
    chance = random.Random(0)
    for number in range(count):
        damaged = bytearray(content)
        kind = number % 3
        if kind == 0:
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        elif kind == 1:
            start = chance.randrange(len(content) // 4096) * 4096
            damaged[start : start + 4096] = bytes(min(4096, len(content) - start))
        else:
            start = chance.randrange(len(content) - 512)
            damaged[start : start + 512] = chance.randbytes(512)
        yield bytes(damaged)


def test_every_damage_is_named_or_without_effect(tmp_path):
    path = tmp_path / "metrics.h5"
    content, _, rows = fill(path)
    found = 0
    for damaged in damages(content, 90):
        path.write_bytes(damaged)
        try:
            read = read_all(path)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017
            found += 1
        else:
            assert_same(read, rows)
    assert found > 40


def test_a_damaged_file_is_followed_by_a_new_one_with_what_is_left(tmp_path, caplog):
    content, counts, rows = fill(tmp_path / "metrics.h5")
    told = 0
    for number, damaged in enumerate(damages(content, 60)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "metrics.h5"
        path.write_bytes(damaged)
        caplog.clear()
        store = resume(path, counts)
        store._append("train", **train_row(ROWS + 1))
        store.close()
        _, _, after = read_all(path)
        assert after["train"]["step"][-1] == ROWS + 1
        names = sorted(file.name for file in folder.iterdir())
        if not caplog.messages:
            assert names == ["metrics.h5"]
        else:
            (line,) = caplog.messages
            assert names == ["metrics-damaged.h5", "metrics.h5"]
            assert (folder / "metrics-damaged.h5").read_bytes() == damaged
            told += 1
        for group, columns in after.items():
            for name, values in columns.items():
                left = len(values) - (group == "train")
                np.testing.assert_array_equal(values[:left], rows[2][group][name][:left])
                if caplog.messages and left < counts[group]:
                    assert "which are lost" in line
                else:
                    assert left == counts[group]
    assert told > 40


def test_a_run_goes_on_after_damage_to_its_metrics(tmp_path):
    """Zeros in bytes 4096 to 8191 stood still for ever."""
    arguments = [*TINY, f"run.dir={tmp_path}", "run.log_interval=1"]
    train(0, *arguments, "run.stop_after=16", code=75)
    path = tmp_path / "metrics.h5"
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)
    result = launch(0, "-m", "app.report", tmp_path, code=2)
    assert result.stderr.startswith(f"error: {path}: not a readable HDF5 file (")
    assert result.stderr.count("\n") == 1
    assert last_checkpoint(tmp_path)["rows"]["eval"] == 1
    result = train(0, "--resume", tmp_path, "run.stop_after=null")
    assert f"WARNING: {path} is damaged (" in result.stderr
    assert (tmp_path / "metrics-damaged.h5").read_bytes() == content
    assert read_rows(path, "eval")["epoch"].tolist() == [1, 2, 3, 4, 4]


def damage_in_place(path):
    """Flip a bit of the file's content, where several names may lead to."""
    with path.open("r+b") as file:
        middle = file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(middle)
        file.write(bytes([byte ^ 1]))


def part_of(folder, process, epoch):
    return folder / f"process-{process:05d}-stability-epochs-{epoch:08d}.pt"


def test_damage_that_all_checkpoints_share_costs_bases_alone(tmp_path):
    """A part is one file for all of them: none could be read, and the run was lost."""
    damaged, whole = tmp_path / "damaged", tmp_path / "whole"
    train(0, *TINY, f"run.dir={damaged}", "run.stop_after=20", code=75)
    shutil.copytree(damaged, whole)
    first, newest = sorted((damaged / "checkpoints").glob("step-*"))
    assert part_of(first, 0, 2).samefile(part_of(newest, 0, 2))
    damage_in_place(part_of(newest, 0, 2))
    result = train(0, "--resume", damaged, "run.stop_after=null")
    told = f"WARNING: {newest}: {part_of(newest, 0, 2).name} is damaged ("
    assert result.stderr.count(told) == 1
    assert "used without the bases of stability that were in there" in result.stderr
    train(0, "--resume", whole, "run.stop_after=null")
    rows = metrics(damaged), metrics(whole)
    for name, values in rows[1].items():
        if "stability" not in name:
            np.testing.assert_array_equal(rows[0][name], values, err_msg=name)
    # Of the window of two epochs, that of epoch 2 is the one that epoch 4 is compared with.
    means = [each["stability/mean_stability"].tolist() for each in rows]
    assert means[0][:4] == pytest.approx(means[1][:4], abs=0, nan_ok=True)
    assert [math.isnan(each[4]) for each in means] == [True, False]


def test_damage_to_one_process_bases_leaves_all_alike(tmp_path):
    """It is stopped in the evaluation, and the others do not measure again at the epoch's end."""
    folder = tmp_path / "run"
    arguments = [*TINY, f"run.dir={folder}", "run.keep_checkpoints=1"]
    launch(2, DISTURBED, "evaluation", 1, 16, *arguments, code=75)
    (newest,) = (folder / "checkpoints").glob("step-*")
    damage_in_place(part_of(newest, 1, 2))
    result = train(2, "--resume", folder)
    assert result.stderr.count(f"{part_of(newest, 1, 2).name} is damaged (") == 1
    stability = read_rows(folder / "metrics.h5", "stability")
    assert stability["step"].tolist() == [0, 8, 16, 24, 32]
    rows = metrics(folder)
    layers = {name for name in rows if re.fullmatch(r"layers/.*/stability/stability", name)}
    lost = {name for name in layers if math.isnan(rows[name][4])}
    assert 0 < len(lost) < len(layers)  # those of one of two owners


def test_rows_that_a_checkpoint_holds_are_not_lost(tmp_path, caplog):
    path = tmp_path / "metrics.h5"
    _, counts, (_, _, rows) = fill(path)
    first = resume(path, counts)
    first.session(process_count=3, first_step=7)
    counts, kept = first.counts(), first.kept()
    first.close()
    assert set(kept) == set(KEPT)
    sessions = read_rows(path, "sessions")
    path.write_bytes(bytes(4096))
    resume(path, counts, kept).close()
    assert "-damaged.h5, and a new one goes on without 30 of the 30 rows of layers/" in caplog.text
    assert " of eval" not in caplog.text
    for name, values in rows["eval"].items():
        np.testing.assert_array_equal(read_rows(path, "eval")[name], values)
    for name, values in sessions.items():
        np.testing.assert_array_equal(read_rows(path, "sessions")[name], values)
    assert read_run(tmp_path).evaluation["split"].tolist() == ["validation"] * 30


def test_the_rows_before_a_damaged_chunk_are_kept(tmp_path, caplog):
    path = tmp_path / "metrics.h5"
    content, counts, _ = fill(path)
    with h5py.File(path, "r") as file:
        place = file["train/loss"].id.get_chunk_info(1)
        assert place.chunk_offset == (256,)
    damaged = bytearray(content)
    damaged[place.byte_offset + 8] ^= 1
    path.write_bytes(damaged)
    resume(path, counts).close()
    assert read_rows(path, "train")["step"].tolist() == list(range(1, 257))
    assert "without 44 of the 300 rows of train, which are lost" in caplog.text


def test_damaged_files_get_names_of_their_own(tmp_path):
    path = tmp_path / "metrics.h5"
    for _ in range(3):
        path.write_text("no HDF5")
        resume(path, {}).close()
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {
        "metrics.h5",
        "metrics-damaged.h5",
        "metrics-damaged-1.h5",
        "metrics-damaged-2.h5",
    }


@pytest.mark.parametrize("failures", [1, 7, 8])
def test_a_failure_that_passes_is_no_damage(failures):
    """A reader meets chunks that the writer has written by half."""
    outcomes = iter([OSError("wrong checksum")] * failures + ["rows"] * 8)

    def read():
        outcome = next(outcomes)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    if failures < 8:
        assert swmr.patiently(read) == "rows"
    else:
        with pytest.raises(OSError, match="wrong checksum"):
            swmr.patiently(read)


def test_all_values_have_checksums_also_after_a_resume(tmp_path):
    path = tmp_path / "metrics.h5"
    create(path).close()
    without = []

    def visit(name, node):
        if isinstance(node, h5py.Dataset) and not node.fletcher32:
            without.append(name)

    for _ in range(2):
        with h5py.File(path, "r") as file:
            file.visititems(visit)
        MetricsStore.resume(path, counts={}).close()
    assert not without


def test_a_file_without_checksums_gets_them(tmp_path):
    """Files of earlier versions go on."""
    path = tmp_path / "metrics.h5"
    create(path).close()
    with h5py.File(path, "r+") as file:
        unit = file["train/loss"].attrs["unit"]
        del file["train/loss"]
        old = file["train"].create_dataset("loss", data=[0.5], maxshape=(None,), chunks=(256,))
        old.attrs["unit"] = unit
    MetricsStore.resume(path, counts={}).close()
    with h5py.File(path, "r") as file:
        assert file["train/loss"].fletcher32


def test_a_damaged_summary_is_made_anew(tmp_path):
    """It was a traceback of the JSON reader."""
    train(0, *TINY, f"run.dir={tmp_path}")
    path = tmp_path / "summary.json"
    whole = path.read_text()
    for damaged in ("", whole[:50], "[]", whole.replace("epochs", "epocht")):
        path.write_text(damaged)
        result = train(0, "--resume", tmp_path)
        assert f"WARNING: {path} is damaged (" in result.stderr
        mine, theirs = (json.loads(text) for text in (path.read_text(), whole))
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    assert read_rows(tmp_path / "metrics.h5", "eval")["split"].tolist().count("test") == 1


def test_a_run_that_goes_on_with_other_values_says_so(tmp_path):
    """A digit of config.yaml that a disk has changed made another run, without a word."""
    train(0, *TINY, f"run.dir={tmp_path}", "run.stop_after=8", code=75)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("cutoff: 0.4", "cutoff: 0.5"))
    result = train(0, "--resume", tmp_path, "run.stop_after=10", "run.seed=8", code=75)
    line = (
        "WARNING: the configuration differs from the checkpoint's: oialr.cutoff is 0.5 and was "
        "0.4, run.seed is 8 and was 0"
    )
    assert line in result.stderr.splitlines()
    result = train(0, "--resume", tmp_path, "run.stop_after=12", code=75)
    assert "differs" not in result.stderr
