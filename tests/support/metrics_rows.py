"""A metrics.h5 of two layers, and rows for it."""

import numpy as np

from app.recording.store import MetricsStore

LAYERS = {"conv.weight": (8, 3, 3, 3), "blocks.0.fc.weight": (16, 4)}


def create(path, **options):
    return MetricsStore.create(path, configuration="run: {}\n", layers=LAYERS, **options)


def train_row(step):
    return {
        "step": step,
        "epoch": 1,
        "loss": 1 / step,
        "learning_rate": 0.1,
        "samples_per_second": 10.0,
        "step_seconds": 0.5,
    }


def stability_row(epoch):
    return {
        "epoch": epoch,
        "step": epoch,
        "stability": round(0.3 * epoch, 1),
        "mixing_similarity": 0.9,
        "rank": 64,
        "reference_rank": 64,
        "numerical_rank": 64,
        "effective_rank": 60.0,
        "stable_rank": 20.0,
        "orthonormality_error": np.nan,
    }


def spectrum_row(step, count):
    return {"step": step, "singular_values": np.arange(count, 0, -1)}
