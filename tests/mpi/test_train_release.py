"""Releases and target sizes in a run: the configuration, records, resume, and what is told."""

import json

import numpy as np
import pytest
from support.launching import launch, train
from support.tiny_run import PAPER, TINY, assert_same_run

from app import config
from app.errors import UserError
from app.recording.store import read_rows

# Conversion after step 15, a cut after 21, the release after 22 of 32 steps.
RELEASED = [
    *TINY,
    "oialr.release=0.7",
    "oialr.target_size=0.4",
    "oialr.frobenius_decay=0.01",
    "oialr.core_learning_rate_factor=3.0",
    "training.ema_decay=0.9",
]


@pytest.mark.parametrize(("processes", "stops"), [(0, [21, 22]), (2, [22])])
def test_a_stopped_run_is_the_undisturbed_one(tmp_path, processes, stops):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(processes, *RELEASED, f"run.dir={whole}")
    assert "their factors are released after step 22" in result.stdout
    assert "step 22: release of 9 layers" in result.stdout
    assert "above its size" not in result.stdout
    for step in stops:
        resume = ["--resume", stopped] if stopped.exists() else [*RELEASED, f"run.dir={stopped}"]
        train(processes, *resume, f"run.stop_after={step}", code=75)
    train(processes, "--resume", stopped, "run.stop_after=null")
    assert_same_run(stopped, whole)
    events = read_rows(whole / "metrics.h5", "lowrank")
    assert list(events["event"]) == ["convert", "cut", "release"]
    assert list(events["step"]) == [15, 21, 22]
    assert events["compression_percent"][-1] <= 40
    assert events["trainable_percent"][-1] == events["compression_percent"][-1]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["target_size"] == 0.4
    assert 35 < summary["compression_percent"] <= 40
    if not processes:
        pages = launch(0, "-m", "app.report", whole, "--formats", "png")
        assert "report" in pages.stdout + pages.stderr
        table = train(0, "--resume", whole, "--explain").stdout
        assert "two factors" in table
        stability = read_rows(whole / "metrics.h5", "stability")["mean_stability"]
        assert np.isfinite(stability[-1])


def test_the_table_of_explain_shows_steps_after_a_release():
    head, *lines = train(0, *TINY, "oialr.release=25", "--explain").stdout.splitlines()
    assert head.split() == ["layer", "shape", "rows", "rank", "way", "FLOPs", "released"]
    qkv = [line.split() for line in lines if line.startswith("blocks.0-1.attn.qkv")]
    assert [line[3] for line in qkv] == ["3", "8", "16", "32"]
    assert [line[-1] for line in qkv] == ["0.12", "0.33", "0.67", "dense"]


def test_a_run_that_ends_above_its_size_says_so(tmp_path):
    arguments = [*TINY, "oialr.target_size=0.3", f"run.dir={tmp_path}", "oialr.largest_cut=0.1"]
    result = train(0, *arguments)
    assert "the run ends above its size: " in result.stdout
    assert "are stored, above target_size, 0.3" in result.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["oialr.release=1.5"], "oialr.release: 1.5 is no share of the run"),
        (["oialr.release=300"], "oialr.release: must be at least delay, 360, not 300"),
        (["oialr.frobenius_decay=0.1"], "oialr.frobenius_decay: is for the factors"),
        (["oialr.target_size=1.2"], "oialr.target_size: "),
    ],
)
def test_a_mistake_is_told(settings, message):
    with pytest.raises(UserError) as caught:
        config.load(None, [*PAPER, "oialr.delay=360", *settings])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("release", "message"),
    [
        (0.2, "oialr.release: 0.2 of 1200 steps is step 240, before oialr.delay, 360"),
        (1200, "oialr.release: 1200 is not less than the 1200 steps"),
        (0.9999, "oialr.release: 0.9999 is not less than the 1200 steps"),
    ],
)
def test_a_release_that_a_run_cannot_have_is_told(release, message):
    configuration = config.load(None, [*PAPER, "oialr.delay=360", f"oialr.release={release}"])
    with pytest.raises(UserError, match=message):
        configuration.check_steps(1200)


def test_a_share_of_the_run_is_a_step():
    for release, step in ((0.4, 480), (0.3, 360), (500, 500), ("null", None)):
        keys = [*PAPER, "oialr.delay=360", f"oialr.release={release}"]
        configuration = config.load(None, keys)
        configuration.check_steps(1200)
        assert configuration.oialr.step_of("release", 1200) == step
