"""Conversions by stability in a run: several of them, records, resume; with bases in bfloat16."""

import numpy as np
import torch
from support.launching import train
from support.tiny_run import TINY, assert_same_run, last_checkpoint

from app.recording.store import read_rows

# Windows of 3 steps from the end of the warm-up, step 8, on: they begin after step 9, and the first
# layers can be converted after step 12; the last ones are after step 21.
STABLE = [
    *TINY,
    "oialr.delay=stability",
    "oialr.update_interval=3",
    "oialr.latest_delay=20",
    "oialr.stability_threshold=0.998",
    "oialr.frozen_dtype=bfloat16",
    "training.warmup_after_conversion=2",
]


def test_a_run_that_stops_between_two_conversions_is_the_undisturbed_one(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(2, *STABLE, f"run.dir={whole}")
    words = "9 layers turn low-rank each when its basis stands still, after step 21 at the latest"
    assert words in result.stdout
    train(2, *STABLE, f"run.dir={stopped}", "run.stop_after=16", code=75)
    train(2, "--resume", stopped, "run.stop_after=null")
    assert_same_run(stopped, whole)
    events = read_rows(whole / "metrics.h5", "lowrank")
    steps = events["step"][np.equal(events["event"], "convert")]
    assert len(steps) > 2
    assert steps[0] >= 12
    assert steps[0] <= 16 < steps[-1] <= 21
    rates = read_rows(whole / "metrics.h5", "train")
    rate = dict(zip(rates["step"], rates["learning_rate"], strict=True))
    for step in steps:  # the warm-up begins anew
        assert rate[step + 1] < 0.6 * rate[step + 2]
    weights = last_checkpoint(whole)["model"]
    frozen = {key for key in weights if key.endswith((".U", ".Vh"))}
    assert len(frozen) == 18
    assert {weights[key].dtype for key in frozen} == {torch.bfloat16}
    assert {weights[key].dtype for key in weights.keys() - frozen} == {torch.float32}
