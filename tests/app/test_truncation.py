"""oialr.truncation: runs whose full-rank weights are cut by what layers compute."""

import pytest
from support.launching import train
from support.tiny_run import TINY, assert_same_run

CUT = ["oialr.release=15", "oialr.target_size=0.6", "oialr.truncation=outputs"]


@pytest.mark.slow
def test_a_run_that_is_resumed_in_the_step_before_the_cut_changes_no_bit(tmp_path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    keys = [*TINY, *CUT, "training.accumulation=2"]
    said = train(2, *keys, f"run.dir={whole}")
    assert "own spectra" not in said.stdout + said.stderr
    train(2, *keys, f"run.dir={parted}", "run.stop_after=14", code=75)
    train(2, "--resume", parted)
    assert_same_run(parted, whole)


def test_a_run_without_a_cut_of_full_rank_weights_is_refused(tmp_path) -> None:
    said = train(0, *TINY, "oialr.truncation=outputs", f"run.dir={tmp_path / 'run'}", code=2)
    assert "oialr.truncation: 'outputs' is for cuts of full-rank weights" in said.stderr
