"""The harness of faults: it finds what it looks for, and a short form of it runs here."""

import json
import os
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import torch
from support.launching import ROOT, environment, launch
from support.machine import need

from benchmarks.trials.comparison import Outcome, difference
from benchmarks.trials.damages import copy_with_links, damage
from benchmarks.trials.data_damages import DataDamages, Format
from benchmarks.trials.programs import End

REPLAYED = ROOT / "tests" / "support" / "workers" / "replayed.py"
FAULTS = (sys.executable, "-m", "benchmarks.faults")
TIMEOUT = 1500  # seconds; two minutes on two cores that nobody else uses


def outcome(loss=0.5, weight=1.0, rows=3):
    state = {"state.pt": {"model": {"w": torch.tensor([weight, torch.nan])}, "seconds": weight}}
    losses = np.full(rows, loss)
    train = {"step": np.arange(rows), "loss": losses}
    return Outcome(state, {"train": train, "eval": {"step": np.arange(2), "loss": losses[:2]}})


def test_one_differing_bit_is_a_difference():
    assert difference(outcome(), outcome()) is None
    beside = np.nextafter(1.0, 2.0, dtype=np.float32)
    assert difference(outcome(weight=float(beside)), outcome()) == "checkpoint: /state.pt/model/w"
    assert difference(outcome(loss=np.nextafter(0.5, 1)), outcome()) == "metrics.h5: train/loss"
    assert difference(outcome(rows=2), outcome()) == "metrics.h5: train/step"


@pytest.mark.slow
def test_a_session_that_ends_the_last_epoch_alone_is_replayed(tmp_path):
    """Two processes were stopped after the last step, one evaluates and writes the checkpoint."""
    launch(0, REPLAYED, tmp_path)


def test_lost_rows_may_be_missing_and_no_others_there():
    assert difference(outcome(rows=2), outcome(), lost_rows=True) is None
    assert "not" in difference(outcome(rows=4), outcome(), lost_rows=True)
    twice = outcome()
    twice.rows["train"]["step"][:] = 1
    assert difference(twice, outcome(), lost_rows=True) == "metrics.h5: train has rows twice"


def test_a_copy_keeps_files_that_are_one(tmp_path):
    """Otherwise damage to what checkpoints share is never tried."""
    folder, copied = tmp_path / "folder", tmp_path / "copied"
    (folder / "first").mkdir(parents=True)
    (folder / "first" / "part").write_text("content")
    os.link(folder / "first" / "part", folder / "other")
    (folder / "alone").write_text("content")
    copy_with_links(folder, copied)
    assert (copied / "first" / "part").samefile(copied / "other")
    numbers = {path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
    assert len(numbers) == 4
    assert (copied / "alone").read_text() == (copied / "other").read_text() == "content"


def test_stabilities_may_be_unknown_where_bases_are_lost():
    mine, theirs = outcome(), outcome()
    for each, value in ((mine, np.nan), (theirs, 0.5)):
        steps = np.arange(2)
        each.rows["stability"] = {"step": steps, "mean_stability": np.array([np.nan, value])}
        each.state["process-00000-stability-epochs-00000001.pt"] = {"weight": value}
    assert difference(mine, theirs) is not None
    assert difference(mine, theirs, lost_bases=True) is None
    mine.rows["stability"]["step"] = np.arange(3)
    assert difference(mine, theirs, lost_bases=True) == "metrics.h5: stability/step"


def test_an_evaluation_by_other_processes_may_differ_by_rounding():
    beside = outcome(loss=np.nextafter(0.5, 1))
    beside.rows["train"] = outcome().rows["train"]
    assert difference(beside, outcome()) == "metrics.h5: eval/loss"
    assert difference(beside, outcome(), counts_changed=True) is None


def test_damages_are_of_every_kind_and_follow_from_the_seed(tmp_path):
    path = tmp_path / "file"
    seen = []
    for _ in range(2):
        chance, kinds = Random(0), {}
        for _ in range(60):
            path.write_bytes(bytes(range(256)) * 64)
            kinds[damage(path, chance).partition(" ")[0]] = path.exists() and path.read_bytes()
        seen.append(kinds)
    assert seen[0] == seen[1]
    assert set(seen[0]) == {"bit", "zeros", "noise", "end", "moved", "empty", "gone"}


@pytest.mark.parametrize(
    ("codes", "output", "judged"),
    [
        ((2, 2), "error: data.root: /data/ant-1.png is damaged\n", "refused in one line"),
        ((2,), "error: data.root: /data cannot be read\n", "unexplained"),
        ((2,), "error: ant-1.png\nerror: ant-1.png\n", "unexplained"),
        ((2, 1), "error: data.root: /data/ant-1.png is damaged\n", "unexplained"),
        ((1,), "Traceback ...\nerror: ant-1.png\n", "unexplained"),
        ((0,), "", "a file less"),
    ],
)
def test_a_damaged_data_file_is_named_in_one_line_by_all(tmp_path, codes, output, judged):
    form = Format(name="PNG", write=print, arguments=(), may_lack_files=True)
    end = End(codes=codes, output=output, hung=False, orphans=0)
    found, problem = DataDamages(tmp_path)._judge(form, tmp_path / "ant-1.png", end, tmp_path)
    assert found == judged
    assert bool(problem) == (judged == "unexplained")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills by /proc")
def test_nothing_is_unexplained(tmp_path):
    need("cc")
    ended = subprocess.run(
        [*FAULTS, "--quick", "--json", "--folder", tmp_path / "faults"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document["unexplained"] == []
    assert document["kills"]["runs"] == 4
    assert document["damages"]["damages"] == 60
    assert document["damaged data"]["damages"] == 7
    assert document["full disks"]["runs"] == 4
