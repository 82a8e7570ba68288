"""A run's folder: nothing in it is overwritten, and what is lost in it is told."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from support.launching import train as launched
from support.tiny_run import TINY

from app import config
from app.errors import AgreedUserError, StorageError, UserError
from app.recording.store import read_rows
from app.runtime.processes import start_runtime
from app.runtime.stop_signal import StopSignal
from app.search.definition import STORED
from app.training import run
from app.training.folder import check_free, write_text


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the folder of a run that was stopped after half of its steps."""
    folder = tmp_path_factory.mktemp("run")
    launched(0, *TINY, f"run.dir={folder}", "run.stop_after=16", code=75)
    return folder


@pytest.fixture
def copied(stopped, tmp_path):
    """Return a copy of that folder."""
    return shutil.copytree(stopped, tmp_path / "copy")


def test_a_run_that_keeps_no_checkpoint_says_at_its_stop_that_it_begins_anew(tmp_path):
    keys = ["run.keep_checkpoints=0", "run.stop_after=2", f"run.dir={tmp_path}"]
    result = launched(0, *TINY, *keys, code=75)
    again = f"--resume {tmp_path}, from the first step again (run.keep_checkpoints=0)\n"
    assert again in result.stderr


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


# What a new run finds


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("metrics.h5", "a run"),
        (STORED, "a search"),
        ("summary.json", "the summary of a run or search"),
        ("checkpoints/step-00000004/state.pt", "the checkpoints of a run"),
    ],
)
def test_a_folder_with_a_part_of_a_run_or_search_is_not_free(tmp_path, name, what):
    check_free(tmp_path / "new")
    (tmp_path / "checkpoints").mkdir()
    check_free(tmp_path)  # nothing lies in there
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(UserError, match=f"run.dir: {tmp_path} holds {what} already"):
        check_free(tmp_path)


def test_a_run_that_began_and_ended_while_this_one_was_built_is_left_alone(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    build = run.build

    def built_slowly(*arguments, **options):
        parts = build(*arguments, **options)
        folder.mkdir()
        (folder / "metrics.h5").write_text("another's")
        return parts

    monkeypatch.setattr(run, "build", built_slowly)
    configuration = config.load(None, [*TINY, f"run.dir={folder}"])
    told = f"run.dir: {folder} holds a run already"
    with start_runtime(device="cpu") as runtime, pytest.raises(AgreedUserError, match=told):
        run.train(configuration, runtime, StopSignal(), resume=False)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [
        ("metrics.h5", "another's")
    ]


# What one that goes on finds


def test_checkpoints_that_cannot_be_listed_are_told(copied):
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints").touch()  # as a folder without permission: to glob it is empty
    before = contents(copied)
    result = launched(0, "--resume", copied, "run.stop_after=null", code=2)
    assert result.stderr == (
        f"error: run.dir: cannot read {copied / 'checkpoints'}: Not a directory; whether there are "
        "checkpoints to go on from is not known\n"
    )
    assert contents(copied) == before


def test_records_of_a_run_without_checkpoints_are_kept(copied):
    shutil.rmtree(copied / "checkpoints")
    before = list(read_rows(copied / "metrics.h5", "train")["step"])
    assert before
    result = launched(0, "--resume", copied, "run.stop_after=1", code=75)
    assert "holds no checkpoint: the run begins with its first step again" in result.stderr
    assert list(read_rows(copied / "metrics-before-1.h5", "train")["step"]) == before
    assert list(read_rows(copied / "metrics.h5", "train")["step"]) == [1]


def test_a_finished_run_without_checkpoints_does_not_begin_again(copied):
    shutil.rmtree(copied / "checkpoints")
    (copied / "summary.json").write_text(json.dumps({"epochs": 4}))
    before = contents(copied)
    result = launched(0, "--resume", copied, "training.epochs=6", code=2)
    assert "the run is finished, and none of its checkpoints is there" in result.stderr
    assert contents(copied) == before


def test_a_resume_that_is_refused_for_its_records_leaves_no_trace(copied):
    (copied / "metrics.h5").unlink()
    (copied / "unfinished.json").unlink()
    before = contents(copied)
    launched(0, "--resume", copied, "training.epochs=6", "run.stop_after=null", code=2)
    assert contents(copied) == before


@pytest.mark.parametrize("key", ["training.batch_size=125", "data.train_samples=200"])
def test_epochs_of_another_length_are_refused(copied, key):
    """The learning rates follow steps: at their end they would be 0 for the rest of the run."""
    before = contents(copied)
    result = launched(0, "--resume", copied, key, "run.stop_after=null", code=2)
    assert result.stderr.startswith("error: an epoch has 4 steps now and had 8 when")
    assert "training.accumulation" in result.stderr
    assert contents(copied) == before


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 16])
def test_a_stop_that_the_run_has_behind_it_is_refused(copied, step):
    """It trained to its end, without a word."""
    before = contents(copied)
    result = launched(0, "--resume", copied, f"run.stop_after={step}", code=2)
    assert result.stderr == (
        f"error: run.stop_after: {step}, but the run in {copied} has 16 steps already; give a "
        "later step or null\n"
    )
    assert contents(copied) == before


@pytest.mark.slow
def test_the_stored_stop_that_the_run_has_come_to_stops_it_no_more(copied):
    launched(0, "--resume", copied)
    assert json.loads((copied / "summary.json").read_text())["steps"] == 32


@pytest.mark.parametrize("text", ["", "\n", "# run\n"])
def test_an_empty_configuration_is_not_one_of_defaults(tmp_path, text):
    """A node that failed could leave one, and the run went on with all defaults."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is empty: put the configuration"):
        config.load(path, folder=str(tmp_path))


# What is written


def test_two_that_write_one_file_at_once_meet_no_error(tmp_path, monkeypatch):
    """As the workers of a search do with best.yaml."""
    path, replace, others = tmp_path / "best.yaml", os.replace, ["theirs"]

    def overtaken(source, target):
        if others:
            write_text(path, others.pop())
        replace(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    write_text(path, "mine")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("best.yaml", "mine")]


def test_a_text_has_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    happened, replace = [], os.replace

    def sync(handle):
        happened.append(Path(f"/proc/self/fd/{handle}").read_text())

    def named(source, target):
        happened.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", named)
    write_text(tmp_path / "config.yaml", "run: {}")
    assert happened == ["run: {}", "config.yaml"]


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("before")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*config.yaml: No space left on device"):
        write_text(path, "after")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [
        ("config.yaml", "before")
    ]


# What it comes to


def test_weights_that_the_last_step_made_infinite_are_no_result(tmp_path):
    keys = ["training.epochs=1", "training.batch_size=64", "training.schedule=constant"]
    keys += ["training.optimizer=sgd", "training.learning_rate=1000", "training.momentum=0"]
    keys += ["training.weight_decay=1000", "stability.enabled=false", "oialr.enabled=false"]
    keys += ["training.warmup_epochs=0", "data.train_samples=128"]
    result = launched(0, *TINY, *keys, f"run.dir={tmp_path}", code=1)
    assert "error: the loss is nan on validation data after step 2" in result.stderr
    assert not (tmp_path / "summary.json").exists()
    assert not list(tmp_path.glob("checkpoints/step-*"))
