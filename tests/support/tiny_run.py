"""A training of seconds that converts and cuts, and what two runs of it must have in common."""

import numpy as np
import torch
from support.launching import ROOT

from app.recording.store import read_rows
from benchmarks._paper import paper_keys

# Of the default configuration the paper's algorithm, without what its recipe sets.
PAPER = list(paper_keys())
# Nine factorized layers; conversion after step 15, cuts after 21 and 27, epochs of 8 steps.
TINY = [
    "training.epochs=4",
    "training.warmup_epochs=1",
    *PAPER,
    "oialr.delay=15",
    "oialr.update_interval=6",
    "oialr.layer_fraction=0.5",
    "oialr.cutoff=0.4",
    "oialr.core_learning_rate_factor=3.0",
    "model.arguments={patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2, proj_drop_rate: 0.1}",
    "data.train_samples=500",
    "data.augmentation=crop",
    "stability.window=2",
    "run.log_interval=5",
]
TIMINGS = {
    "samples_per_second",
    "step_seconds",
    "seconds",
    "factorization_seconds",
    "imbalance",
    "peak_bytes",
}
DISTURBED = ROOT / "tests" / "support" / "workers" / "disturbed.py"


def last_checkpoint(folder):
    path = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return torch.load(path / "state.pt", weights_only=True)


def metrics(folder):
    """Return every row of metrics.h5 but timings and sessions."""
    layers = list(last_checkpoint(folder)["rows"])
    rows = {}
    for group in layers:
        if group != "sessions":
            columns = read_rows(folder / "metrics.h5", group)
            rows |= {f"{group}/{k}": v for k, v in columns.items() if k not in TIMINGS}
    return rows


def assert_same_run(folder, reference):
    mine, theirs = last_checkpoint(folder), last_checkpoint(reference)
    assert mine["position"] == theirs["position"]
    assert mine["model"].keys() == theirs["model"].keys()
    for name, value in mine["model"].items():
        assert torch.equal(value, theirs["model"][name]), name
    mine, theirs = metrics(folder), metrics(reference)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
