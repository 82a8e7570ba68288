"""oialr.convolutions: a run whose kernels are read by their directions."""

import json

import pytest
from support.launching import train

from app.recording.store import Follower, read_rows


@pytest.mark.slow
def test_a_run_records_and_resumes_it(tmp_path) -> None:
    keys = ["data.train_samples=200", "training.epochs=4", "training.warmup_epochs=1"]
    keys += ["model.name=cifar_resnet", "model.arguments={depth: 8}", "oialr.delay=4"]
    keys += ["oialr.update_interval=4", "oialr.layer_fraction=1", "oialr.convolutions=spatial"]
    keys += ["stability.interval=1", "stability.window=1"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(1, *keys, f"run.dir={whole}")
    # Before the conversion, too: bases are kept, and figures have the width of the reading.
    train(1, *keys, f"run.dir={parted}", "run.stop_after=2", code=75)
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
