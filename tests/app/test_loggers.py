"""Loggers: what they are told, and what a run that goes on leaves of it."""

import csv
import logging
import signal
import sys
from types import ModuleType
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
from support.documentation import blocks
from support.launching import launch, train
from support.tiny_run import DISTURBED, TINY

from app import config
from app.errors import UserError
from app.recording.loggers.chosen import Loggers, find_loggers
from app.recording.loggers.csv_files import CsvFiles
from app.recording.loggers.protocol import tags
from app.recording.store import read_rows

LAYER = "blocks.1.mlp.fc1.weight"


def table(path):
    """Return the columns of a CSV file."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return dict(zip(header, zip(*rows, strict=True), strict=True))


def numbers(column):
    return [float(cell) if cell else np.nan for cell in column]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run that was killed after step 23, of which its loggers knew 20, and went on from 16."""
    folder = tmp_path_factory.mktemp("logged")
    arguments = [*TINY, f"run.dir={folder}", "run.loggers=[tensorboard,csv]"]
    launch(0, DISTURBED, "kill", 0, 23, *arguments, code=-signal.SIGKILL)
    assert table(folder / "csv" / "train.csv")["step"][-1] == "20"
    train(0, "--resume", folder)
    return folder


@pytest.mark.slow
def test_tables_are_those_of_the_metrics(logged):
    for group in ("train", "lowrank", "stability"):
        theirs = read_rows(logged / "metrics.h5", group)
        mine = table(logged / "csv" / f"{group}.csv")
        assert mine.keys() == theirs.keys()
        for name, column in mine.items():
            if name == "event":
                assert list(column) == theirs[name].tolist()
            else:
                np.testing.assert_array_equal(numbers(column), theirs[name], err_msg=name)
    evaluations = read_rows(logged / "metrics.h5", "eval")
    for split in ("validation", "test"):
        rows = table(logged / "csv" / f"{split}.csv")
        chosen = evaluations["split"] == split
        np.testing.assert_array_equal(
            numbers(rows["accuracy"]), evaluations["accuracy"][chosen], err_msg=split
        )


@pytest.mark.slow
def test_tables_hold_every_layer(logged):
    for group, column in (("rank", "rank"), ("stability", "stability")):
        rows = table(logged / "csv" / f"layers-{group}.csv")
        of_layer = np.array(rows["layer"]) == LAYER
        theirs = read_rows(logged / "metrics.h5", f"layers/{LAYER}/{group}")
        np.testing.assert_array_equal(np.array(numbers(rows[column]))[of_layer], theirs[column])
    rows = table(logged / "csv" / "layers-spectrum.csv")
    of_layer = np.array(rows["layer"]) == LAYER
    theirs = read_rows(logged / "metrics.h5", f"layers/{LAYER}/spectrum")["singular_values"]
    values = np.array(numbers(rows["singular_value"]))[of_layer]
    np.testing.assert_array_equal(values.astype("f4"), theirs[np.isfinite(theirs)])


def test_tensorboard_reads_each_row_once(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(logged / "tensorboard"), size_guidance={"histograms": 0})
    found.Reload()

    def scalars(tag):
        return [event.step for event in found.Scalars(tag)], [e.value for e in found.Scalars(tag)]

    theirs = read_rows(logged / "metrics.h5", "train")
    steps, losses = scalars("train/loss")
    assert steps == theirs["step"].tolist()
    np.testing.assert_allclose(losses, theirs["loss"], rtol=1e-6)
    steps, ranks = scalars(f"rank/{LAYER}")
    theirs = read_rows(logged / "metrics.h5", f"layers/{LAYER}/rank")
    stability = read_rows(logged / "metrics.h5", f"layers/{LAYER}/stability")
    assert set(zip(theirs["step"].tolist(), theirs["rank"].tolist(), strict=True)) <= set(
        zip(steps, ranks, strict=True)
    )
    assert len(steps) == len(theirs["step"]) + len(stability["step"])  # both tell of the rank
    steps, values = scalars(f"stability/{LAYER}")
    finite = np.isfinite(stability["stability"])
    assert steps == stability["step"][finite].tolist()
    np.testing.assert_allclose(values, stability["stability"][finite], rtol=1e-6)
    assert len(scalars("validation/accuracy")[0]) == 4
    spectra = read_rows(logged / "metrics.h5", f"layers/{LAYER}/spectrum")
    histograms = found.Histograms(f"spectrum/{LAYER}")
    assert [event.step for event in histograms] == spectra["step"].tolist()
    assert histograms[-1].histogram_value.max == pytest.approx(
        np.nanmax(spectra["singular_values"][-1])
    )


def test_a_table_is_cut_at_the_checkpoint(tmp_path):
    def begin(first_step):
        return CsvFiles(tmp_path, configuration={}, first_step=first_step)

    written = begin(None)
    for step in (1, 2, 3):
        written.scalars("train", step, {"loss": 1 / step, "event": 'a "kind", b'})
        written.scalars("test", step, {"loss": 0.5})
        written.spectrum("a.weight", step, np.array([2.0, 1.0], "f4"))
    written.close()
    with (tmp_path / "csv" / "train.csv").open("a") as file:
        file.write("1")  # of 10: a row that was not finished
    again = begin(2)
    again.scalars("train", 3, {"loss": np.nan, "event": ""})
    again.close()
    read = table(tmp_path / "csv" / "train.csv")
    assert read == {
        "step": ("1", "2", "3"),
        "loss": ("1.0", "0.5", ""),
        "event": ('a "kind", b', 'a "kind", b', ""),
    }
    assert table(tmp_path / "csv" / "test.csv")["step"] == ("1",)  # of step 2 comes another one
    assert table(tmp_path / "csv" / "layers-spectrum.csv")["step"] == ("1", "1", "2", "2")
    begin(None).close()
    assert not list((tmp_path / "csv").iterdir())


def test_names_of_a_row():
    row = {"stability": 0.5, "rank": 3, "mixing_similarity": np.nan, "event": "cut"}
    assert tags("lowrank", row) == {"lowrank/stability": 0.5, "lowrank/rank": 3}
    assert tags("stability", row, "a.weight") == {"stability/a.weight": 0.5, "rank/a.weight": 3}


class Fragile:
    """A logger of somebody else."""

    told: ClassVar = []

    def __init__(self, folder, *, configuration, first_step):
        if first_step == 7:
            raise ConnectionError("no server\nat all")
        self.told.append((folder, configuration, first_step))

    def scalars(self, group, step, values, *, layer=None):
        self.told.append((group, step, dict(values), layer))
        if step == 2:
            raise OSError("the line is dead")

    def spectrum(self, layer, step, singular_values):
        self.told.append((layer, step))

    def flush(self):
        self.told.append(("flush",))

    def close(self):
        self.told.append(("close",))


def test_a_logger_that_fails_gets_nothing_more(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Fragile, "told", [])
    found = find_loggers([f"{__name__}:Fragile", "csv"])
    loggers = Loggers.begin(found, tmp_path, configuration={"run": {}}, first_step=None)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            loggers.scalars("train", step, {"loss": 1.0})
        loggers.close()
    assert Fragile.told == [
        (tmp_path, {"run": {}}, None),
        ("train", 1, {"loss": 1.0}, None),
        ("train", 2, {"loss": 1.0}, None),
    ]
    (record,) = caplog.records
    assert f"{__name__}:Fragile failed and gets nothing more: OSError: the line is dead" in (
        record.getMessage()
    )
    assert table(tmp_path / "csv" / "train.csv")["step"] == ("1", "2", "3")
    with pytest.raises(UserError, match="cannot begin: ConnectionError: no server at all"):
        Loggers.begin(found, tmp_path, configuration={}, first_step=7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:Logger", "Logger cannot be imported .* No module named 'nowhere'"),
        ("app.errors:Nothing", "has no attribute 'Nothing'"),
        ("app.errors:UserError", "is no logger: it lacks scalars, spectrum, flush, close"),
    ],
)
def test_what_cannot_be_a_logger_is_refused(name, message):
    with pytest.raises(UserError, match=f"^run.loggers: .*{message}"):
        find_loggers([name])


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"run\.loggers: tensorboard cannot be imported .*tensorb"):
        find_loggers(["csv", "tensorboard"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[tensorbord]", "did you mean tensorboard"),
        ("[wandb]", "'wandb' is not one of tensorboard, csv, nor a package.module:Class"),
        ("[csv, csv]", "given twice"),
    ],
)
def test_names_are_checked_before_anything_starts(value, message):
    with pytest.raises(UserError, match=rf"^run\.loggers: .*{message}"):
        config.load(None, [f"run.loggers={value}"])


def test_nothing_is_imported_that_nobody_asked_for():
    program = (
        "import sys; from app.recording.loggers.chosen import find_loggers; "
        "find_loggers(['csv']); assert not {'tensorboard', 'wandb', 'mlflow'} & set(sys.modules)"
    )
    launch(0, "-c", program)


EXAMPLES = [block for block in blocks() if block.page == "docs/loggers.md" and block.language]


@pytest.mark.parametrize(("package", "kind"), [("wandb", "Wandb"), ("mlflow", "MLflow")])
def test_the_examples_are_loggers(package, kind, tmp_path, monkeypatch):
    """Against stand-ins: both were tried with the packages themselves."""
    stand_in = Mock()
    monkeypatch.setitem(sys.modules, package, stand_in)
    (block,) = [block for block in EXAMPLES if f"import {package}\n" in block.text]
    mine = ModuleType("mine")
    exec(block.text, mine.__dict__)
    monkeypatch.setitem(sys.modules, "mine", mine)
    loggers = Loggers.begin(
        find_loggers([f"mine:{kind}"]), tmp_path, configuration={}, first_step=None
    )
    loggers.scalars("train", 3, {"loss": 0.5})
    loggers.spectrum("a.weight", 3, np.ones(2))
    loggers.flush()
    loggers.close()
    if package == "wandb":
        run = stand_in.init.return_value
        run.log.assert_any_call({"train/loss": 0.5, "step": 3})
        run.finish.assert_called_once()
    else:
        stand_in.log_metrics.assert_called_once_with({"train/loss": 0.5}, step=3)
        stand_in.end_run.assert_called_once()
