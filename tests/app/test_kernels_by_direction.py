"""oialr.convolutions: a run whose kernels are read by their directions, and its full-rank twin."""

import json

import pytest
from support.launching import train

from app import config
from app.errors import UserError
from app.recording.store import Follower, read_rows
from app.runtime.processes import start_runtime
from app.training.build import build, readings_of
from app.training.state import check_records

SMALL = ["data.train_samples=200", "training.epochs=4", "training.warmup_epochs=1"]
SMALL += ["model.name=cifar_resnet", "model.arguments={depth: 8}", "oialr.delay=4"]
SMALL += ["oialr.update_interval=4", "oialr.layer_fraction=1", "oialr.convolutions=spatial"]
SMALL += ["stability.interval=1", "stability.window=1"]


def test_the_full_rank_twin_is_measured_by_the_same_matrices() -> None:
    """So that its stability, ranks and spectra can be drawn beside those of the low-rank run."""
    with start_runtime(device="cpu") as runtime:
        low, full = (
            build(config.load(None, [*SMALL, f"oialr.enabled={enabled}"]), runtime)
            for enabled in ("true", "false")
        )
    assert low.method is not None
    assert full.method is None
    readings = {layer.name: layer.reading for layer in full.layers}
    assert readings == {layer.name: layer.reading for layer in low.layers}
    assert readings["blocks.1.convolution1.weight"].matrix_shape == (3 * 32, 3 * 16)

    # Earlier versions have recorded it as other matrices, in rows of other widths.
    check_records(full, {"readings": readings_of(full.configuration)})
    with pytest.raises(UserError, match=r"add oialr\.attention_projection=packed .*=matrix to go"):
        check_records(full, {})
    check_records(low, {})


@pytest.mark.slow
def test_a_full_rank_run_keeps_its_matrices(tmp_path) -> None:
    keys = [*SMALL, "oialr.enabled=false", f"run.dir={tmp_path}", "run.stop_after=2"]
    train(0, *keys, code=75)
    changed = train(0, "--resume", tmp_path, "oialr.convolutions=matrix", code=2)
    assert changed.stderr.rstrip().endswith("oialr.convolutions=spatial to go on")
    train(0, "--resume", tmp_path, "run.stop_after=5", code=75)
    name = "layers/blocks.1.convolution1.weight"
    spectrum = read_rows(tmp_path / "metrics.h5", f"{name}/spectrum")["singular_values"]
    assert spectrum.shape == (2, 3 * 16)
    assert read_rows(tmp_path / "metrics.h5", f"{name}/stability")["reference_rank"][-1] == 3 * 16


@pytest.mark.slow
def test_a_run_records_and_resumes_it(tmp_path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(1, *SMALL, f"run.dir={whole}")
    # Before the conversion, too: bases are kept, and figures have the width of the reading.
    train(1, *SMALL, f"run.dir={parted}", "run.stop_after=2", code=75)
    stopped = train(1, "--resume", parted, "oialr.convolutions=matrix", code=2)
    assert "convolutions" in stopped.stderr.splitlines()[-1]
    train(1, "--resume", parted, "run.stop_after=6", code=75)
    stopped = train(1, "--resume", parted, "oialr.convolutions=matrix", code=2)
    assert "convolutions" in stopped.stderr.splitlines()[-1]
    train(1, "--resume", parted)
    one, other = (json.loads((path / "summary.json").read_text()) for path in (whole, parted))
    for key in ("test_loss", "stored_parameters", "tested_ranks"):
        assert one[key] == other[key]
    name = "blocks.1.convolution1.weight"
    spectrum = read_rows(whole / "metrics.h5", f"layers/{name}/spectrum")["singular_values"]
    assert spectrum.shape[1] == 3 * 16  # of a kernel (32, 16, 3, 3)
    assert (spectrum[-1][: other["tested_ranks"][name]] > 0).all()
    layers = {layer.name: layer.shape for layer in Follower(whole / "metrics.h5").layers()}
    assert layers[name] == (32, 16, 3, 3)
