"""oialr.truncation: runs whose full-rank weights are cut by what layers compute."""

from dataclasses import replace

import pytest
from support.launching import train
from support.tiny_run import PAPER, TINY, assert_same_run

from app import config
from app.errors import UserError
from app.recording.store import read_rows
from app.runtime.processes import start_runtime
from app.training.build import build
from app.training.recorder import Recorder
from app.training.training_step import TrainingStep

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


def test_padding_of_an_empty_share_is_not_looked_at() -> None:
    configuration = config.load(None, [*TINY, *CUT])
    with start_runtime(device="cpu") as runtime:
        parts = build(configuration, runtime)
        steps = TrainingStep(parts)
        for batch in (batch for epoch in range(2) for batch in parts.task.train_batches(epoch)):
            last = parts.position.step == 14
            steps.take(replace(batch, count=0) if last else batch, start=0.0)
            if last:
                break
            parts.method.step()
        moments = parts.method._inputs._moments
        assert len(moments._rows) == len(parts.method.layers)
        assert not any(moments._rows.values())
        assert not any(moment.any() for moment in moments._moments.values())


@pytest.mark.parametrize("truncation", ["weights", "outputs"])
def test_a_spectrum_that_is_recorded_is_one_of_the_weight(tmp_path, truncation) -> None:
    """And not of its product with the root of the inputs' moment, which is on another scale."""
    configuration = config.load(None, [*TINY, *CUT, f"oialr.truncation={truncation}"])
    path = tmp_path / "metrics.h5"
    with start_runtime(device="cpu") as runtime:
        parts = build(configuration, runtime)
        method, steps, event = parts.method, TrainingStep(parts), None
        recorder = Recorder.create(path, configuration="", layers=parts.layers, figures=())
        for batch in (batch for epoch in range(2) for batch in parts.task.train_batches(epoch)):
            steps.take(batch, start=0.0)
            if event := method.step():
                break
        shares = {"trainable_percent": 1.0, "compression_percent": 1.0, "gradient_bytes": 0}
        recorder.event(event, model=parts.model, **shares)
        recorder.close()
    for layer in event.layers:
        assert layer.weighted == (truncation == "outputs")
        assert len(read_rows(path, f"layers/{layer.name}/rank")["step"]) == 1
        spectra = read_rows(path, f"layers/{layer.name}/spectrum")["step"]
        assert len(spectra) == (truncation == "weights")


def test_a_run_without_a_cut_of_full_rank_weights_is_refused(tmp_path) -> None:
    said = train(0, *TINY, "oialr.truncation=outputs", f"run.dir={tmp_path / 'run'}", code=2)
    assert "oialr.truncation: 'outputs' is for cuts of full-rank weights" in said.stderr


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        (["oialr.delay=0.4", "oialr.release=0.4"], False),
        (["oialr.delay=480", "oialr.release=0.4"], False),  # the run tells whether they are one
        (["oialr.delay=0.4", "oialr.release=480"], False),
        (["oialr.delay=0.4", "oialr.release=0.5"], True),
        (["oialr.delay=480", "oialr.release=481"], True),
        (["oialr.delay=480", "oialr.release=0.4", "oialr.cut_at_conversion=true"], False),
        (["oialr.delay=0.4", "oialr.release=0.5", "oialr.cut_at_conversion=true"], False),
    ],
)
def test_shares_of_the_run_are_held_against_each_other_like_steps(keys, refused) -> None:
    keys = [*PAPER, "oialr.truncation=outputs", *keys]
    if refused:
        with pytest.raises(UserError, match=r"oialr\.truncation: 'outputs' is for cuts of full"):
            config.load(None, keys)
    else:
        assert config.load(None, keys).oialr.options(1200).truncation == "outputs"


def test_a_share_and_a_step_that_are_two_are_refused_when_the_steps_are_known() -> None:
    keys = [*PAPER, "oialr.truncation=outputs", "oialr.delay=480", "oialr.release=0.5"]
    with pytest.raises(ValueError, match="'outputs' is for cuts of full-rank weights"):
        config.load(None, keys).oialr.options(1200)


def test_bases_of_bfloat16_between_equal_shares_are_refused() -> None:
    keys = [*PAPER, "oialr.delay=0.5", "oialr.release=0.5", "oialr.frozen_dtype=bfloat16"]
    with pytest.raises(UserError, match=r"oialr\.frozen_dtype: is for bases that are frozen"):
        config.load(None, keys)
