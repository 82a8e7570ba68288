"""What grows in a long run, and by how much: rows, memory, and how growth is told from chance."""

import itertools

import numpy as np
import pytest
import torch
from support.metrics_rows import LAYERS
from support.recorders import SCHEMA, Layer, resume

from app.recording.columns import create_group
from app.recording.schema import layer_groups, run_groups
from app.recording.store import read_rows
from app.recording.swmr import new_file
from app.recording.thinning import DENSE, is_recorded
from app.training.recorder import Recorder
from benchmarks.growth import _growth


def test_spectra_become_rarer_as_a_run_gets_longer():
    recorded = [number for number in range(1, 10_001) if is_recorded(number)]
    assert recorded[:DENSE] == list(range(1, DENSE + 1))
    assert len(recorded) == 295
    gaps = [(later - earlier) / later for earlier, later in itertools.pairwise(recorded)]
    assert max(gaps[DENSE:]) < 2 / DENSE
    for doubling in range(7):
        first = DENSE << doubling
        assert sum(first < number <= 2 * first for number in recorded) == DENSE / 2


class Row:
    """A measurement of a layer, as the recorder asks for it."""

    averaged, rank, reference_rank, numerical_rank = True, 4, 4, 4
    stability = mixing_similarity = effective_rank = stable_rank = orthonormality_error = 0.5
    singular_values = torch.ones(4)

    def __init__(self, name):
        self.name = name


@pytest.mark.slow
def test_a_resumed_run_records_the_spectra_of_the_uninterrupted_one(tmp_path):
    layers = [Layer(name) for name in LAYERS]
    rows = [Row(name) for name in LAYERS]
    for name, stops in (("whole", [200]), ("parts", [70, 131, 200])):
        path = tmp_path / name
        recorder = Recorder.create(path, **{**SCHEMA, "layers": layers})
        epoch = 0
        for stop in stops:
            while epoch < stop:
                epoch += 1
                recorder.stability(rows, epoch=epoch, step=epoch, seconds=0.0)
            counts, kept = recorder.counts(), recorder.kept()
            recorder.stability(rows, epoch=epoch, step=0, seconds=0.0)  # lost by a kill
            recorder.close()
            recorder = resume(path, counts, kept)
        recorder.close()
    for layer in LAYERS:
        whole, parts = (
            read_rows(tmp_path / name, f"layers/{layer}/spectrum") for name in ("whole", "parts")
        )
        assert whole["step"].tolist() == parts["step"].tolist()
        assert whole["step"].tolist() == [n for n in range(1, 201) if is_recorded(n)]
        assert len(read_rows(tmp_path / "whole", f"layers/{layer}/stability")["step"]) == 200


def test_a_file_that_grows_keeps_one_chunk_of_each_column_in_memory(tmp_path):
    with new_file(tmp_path / "metrics.h5") as file:
        for name, columns in {**run_groups(["accuracy"]), **layer_groups((768, 768))}.items():
            create_group(file, name, columns, None)
    with file:
        datasets = [file[name][column] for name in file for column in file[name]]
        assert len(datasets) > 30
        for dataset in datasets:
            slots, size, _ = dataset.id.get_access_plist().get_chunk_cache()
            assert 8 * slots + size <= 2**13
            # Larger ones are written whole, and not wanted again.
            rows, bytes_of_one = dataset.chunks[0], dataset.dtype.itemsize
            assert rows == 1 or rows * bytes_of_one * int(np.prod(dataset.shape[1:])) <= size


def looks(memory, handles=lambda i: 9):
    return [{"KiB": memory(i), "handles": handles(i), "threads": 3} for i in range(100)]


def test_what_comes_at_once_is_told_and_is_no_slope():
    doubled = _growth(looks(lambda i: 5000 + 4000 * (i > 70)), 1, "evaluation")
    assert doubled["KiB at once"] == 4000
    assert doubled["KiB more for each evaluation"] == pytest.approx(0, abs=1e-9)
    assert doubled["flat"]
    growing = _growth(looks(lambda i: 5000 + 3 * i + 4000 * (i > 70)), 1, "evaluation")
    assert growing["KiB more for each evaluation"] == pytest.approx(3, rel=0.05)
    assert not growing["flat"]


def test_growth_is_the_slope_after_caches_have_filled():
    filling = _growth(looks(lambda i: 5000 + 80 * min(i, 40)), 10, "event")
    assert filling["KiB more for each event"] == 0
    assert filling["flat"]
    growing = _growth(looks(lambda i: 5000 + 4 * i + i % 2), 2, "evaluation")
    assert abs(growing["KiB more for each evaluation"] - 2) < 0.01
    assert not growing["flat"]
    passing = _growth(looks(lambda i: 5000, handles=lambda i: 9 + (i % 7 == 1)), 1, "event")
    assert (passing["handles more"], passing["flat"]) == (0, True)
    leaking = _growth(looks(lambda i: 5000, handles=lambda i: 9 + i // 70), 1, "event")
    assert (leaking["handles more"], leaking["flat"]) == (1, False)
