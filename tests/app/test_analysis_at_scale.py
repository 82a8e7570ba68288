"""An analysis of what does not fit into memory, and takes long: one weight after another."""

import errno
import weakref

import numpy as np
import pytest
import torch
from support.checkpoint_files import save_series

from app import analyze
from app.analysis import estimate, measuring, portions, run, unfinished
from app.analysis.checkpoint import as_module as as_it_is
from app.errors import UserError
from app.recording.store import Follower, read_rows
from oialr.layer_survey import LayerReport
from oialr.layers.reading import MatrixReading
from oialr.placement.processes import Processes


def all_rows(metrics):
    """Everything that was measured, by the path in the file; without the time that it took."""
    follower = Follower(metrics)
    names = [layer.name for layer in follower.layers()]
    follower.close()
    groups = [f"layers/{name}/{kind}" for name in names for kind in ("stability", "spectrum")]
    found = {group: read_rows(metrics, group) for group in [*groups, "stability"]}
    del found["stability"]["seconds"]
    return {f"{group}/{c}": v for group, columns in found.items() for c, v in columns.items()}


def assert_bit_equal(metrics, expected):
    one, two = all_rows(metrics), all_rows(expected)
    assert one.keys() == two.keys()
    for name, values in two.items():
        np.testing.assert_array_equal(one[name], values, err_msg=name)


def interrupt(monkeypatch, *, after, error=KeyboardInterrupt, before=lambda: None):
    """Let an analysis end when some portions of the weights are measured."""
    measured = []

    def measure(layers, *arguments, **options):
        if len(measured) == after:
            before()
            if error:
                raise error
        measured.append([layer.name for layer in layers])
        return measuring.measure(layers, *arguments, **options)

    monkeypatch.setattr(run, "measure", measure)
    return measured


def test_an_analysis_that_was_killed_goes_on_and_gives_the_same(tmp_path, capsys, monkeypatch):
    folder = save_series(tmp_path / "run")
    broken = torch.load(folder / "model-2.pt")
    broken["fc4.weight"][0, 0] = torch.inf
    torch.save(broken, folder / "model-2.pt")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert analyze.main([str(folder), "--window", "1", "--output", str(whole)]) == 2
    assert sorted(path.name for path in whole.iterdir()) == ["metrics.h5"]
    command = [str(folder), "--window", "1", "--output", str(part)]
    first = interrupt(monkeypatch, after=2)
    with pytest.raises(KeyboardInterrupt):
        analyze.main(command)
    assert "interrupted: the same command goes on" in capsys.readouterr().err
    assert len(first) == 2
    assert not (part / "metrics.h5").exists()
    capsys.readouterr()
    # What was found out of the values is not found out again.
    monkeypatch.setattr(run, "find_damage", None)
    second = interrupt(monkeypatch, after=99)
    assert analyze.main(command) == 2
    captured = capsys.readouterr()
    assert "model-2.pt: fc4.weight holds NaN or infinity" in captured.err
    done = {name for portion in first for name in portion}
    assert f"5 weights, {len(done)} of them measured before" in captured.out
    assert done.isdisjoint(name for portion in second for name in portion)
    assert sorted(path.name for path in part.iterdir()) == ["metrics.h5"]
    assert_bit_equal(part / "metrics.h5", whole / "metrics.h5")


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path, monkeypatch, caplog):
    folder = save_series(tmp_path / "run")
    command = [str(folder), "--output", str(tmp_path / "out")]
    interrupt(monkeypatch, after=2)
    with pytest.raises(KeyboardInterrupt):
        analyze.main([*command, "--window", "1"])
    kept = sorted((tmp_path / "out" / "unfinished").glob("part-*"))
    assert len(kept) == 2
    for options, message in (
        (["--window", "2"], "--window is another one"),
        (["--window", "1", "--exclude", "fc3*"], "--include, --exclude or --not-averaged choose"),
    ):
        with pytest.raises(UserError, match=f"another analysis was begun .{message}"):
            analyze.main([*command, *options])
    weights = torch.load(folder / "model-1.pt")
    torch.save({name: weight + 1 for name, weight in weights.items()}, folder / "model-1.pt")
    with pytest.raises(UserError, match="the checkpoints are others, or were changed since"):
        analyze.main([*command, "--window", "1"])
    torch.save(weights, folder / "model-1.pt")
    # A damaged file of ours costs its weights' time alone.
    kept[0].write_bytes(kept[0].read_bytes()[:-100])
    interrupt(monkeypatch, after=99)
    assert analyze.main([*command, "--window", "1"]) == 0
    assert "part-000000.rows is damaged" in caplog.text
    whole = tmp_path / "whole"
    analyze.main([str(folder), "--window", "1", "--output", str(whole)])
    assert_bit_equal(tmp_path / "out" / "metrics.h5", whole / "metrics.h5")


def test_parts_without_their_plan_are_not_relied_on_and_other_files_are_left(tmp_path, monkeypatch):
    folder = save_series(tmp_path / "run")
    command = [str(folder), "--window", "1"]
    interrupt(monkeypatch, after=2)
    with pytest.raises(KeyboardInterrupt):
        analyze.main(command)
    begun = folder / "analysis" / "unfinished"
    (begun / "plan.json").write_text("[]")
    (begun / "notes.txt").write_text("somebody's own")
    again = interrupt(monkeypatch, after=99)
    assert analyze.main(command) == 0
    assert sum(map(len, again)) == 5
    assert [path.name for path in begun.iterdir()] == ["notes.txt"]


def test_a_checkpoint_that_goes_meanwhile_costs_nothing_that_was_measured(tmp_path, monkeypatch):
    folder = save_series(tmp_path / "run")
    aside = tmp_path / "aside.pt"
    command = [str(folder), "--window", "1"]
    interrupt(
        monkeypatch, after=2, error=None, before=lambda: (folder / "model-1.pt").rename(aside)
    )
    with pytest.raises(UserError, match=r"model-1\.pt was removed or changed during the analysis"):
        analyze.main(command)
    aside.rename(folder / "model-1.pt")
    again = interrupt(monkeypatch, after=99)
    assert analyze.main(command) == 0
    assert 0 < sum(map(len, again)) < 5


def test_a_full_disk_is_one_line_and_costs_nothing_that_was_measured(tmp_path, monkeypatch, capsys):
    folder = save_series(tmp_path / "run")
    with monkeypatch.context() as context:
        context.setattr(unfinished.os, "fsync", raise_full)
        assert analyze.main([str(folder), "--window", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --output: cannot write ")
    assert "No space left on device" in line
    assert analyze.main([str(folder), "--window", "1"]) == 0


def raise_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_more_than_one_portion_of_one_checkpoint_is_in_memory(tmp_path, monkeypatch):
    folder = save_series(tmp_path / "run")
    seen = []

    def as_module(weights, device):
        assert all(module() is None for module in seen)
        module = as_it_is(weights, device)
        assert len(list(module.parameters())) == 1
        seen.append(weakref.ref(module))
        return module

    monkeypatch.setattr(portions, "LARGEST", 40)
    monkeypatch.setattr(measuring, "as_module", as_module)
    assert analyze.main([str(folder), "--window", "1"]) == 0
    assert len(seen) == 4 * 5


def weight_of(m, n, *, groups=1, name="fc.weight"):
    return LayerReport(
        name=name, reading=MatrixReading((groups * m, n), groups=groups), is_linear_map=True,
        stays_dense="only measured",
    )  # fmt: skip


def test_weights_are_divided_by_size_and_by_what_they_take():
    layers = [weight_of(2 + i, 3, name=str(i)) for i in range(9)]
    for count in (1, 2, 8):
        divided = portions.divide(layers, count)
        costs = [sum(map(portions.operations, portion)) for portion in divided]
        assert costs == sorted(costs, reverse=True)
        assert len(divided) >= min(4 * count, 9)
        names = sorted(layer.name for portion in divided for layer in portion)
        assert names == [layer.name for layer in layers]
        assert [p for part in portions.rounds(divided, count) for p in part] == divided
    # Two of 4096 x 4096 do not come together, though they are a small share of all.
    large = [weight_of(4096, 4096, name=str(i)) for i in range(40)]
    assert [len(portion) for portion in portions.divide(large, 1)] == [1] * 40
    assert portions.operations(weight_of(3, 5, groups=2)) == 2 * 5 * 9


def test_the_estimate_adds_up_what_was_measured_on_pieces(monkeypatch):
    class Runtime:
        processes, device = Processes(), torch.device("cpu")

    seconds = {(4096, 4096): 20.0, (11008, 4096): 30.0}
    monkeypatch.setattr(estimate, "_PIECES", 2)
    monkeypatch.setattr(estimate, "_time", lambda shape, _: seconds[shape])
    layers = [weight_of(4096, 4096), weight_of(4096, 4096), weight_of(11008, 4096)]
    others = [weight_of(64, 32), weight_of(11008, 4096, groups=2)]
    speed = estimate.measure_speed([*layers, *others], checkpoint_count=3, runtime=Runtime())
    assert [speed.seconds(layer) for layer in layers] == [20.0, 20.0, 30.0]
    ratio = (20 / 4096**3 + 30 / (11008 * 4096**2)) / 2
    assert [speed.seconds(x) for x in others] == [pytest.approx(64 * 32**2 * ratio), 60.0]
    # Two at a time take as long as the slower one.
    together = [[[layers[2]], [layers[0]]], [[layers[1]]]]
    told = estimate.estimate(together, speed, checkpoint_count=3, references=2)
    assert told.seconds == 3 * (30 + 20)
    basis, mixing = 4 * 11008 * 4096, 4 * 4096**2
    assert told.bytes > basis + 2 * (basis + mixing)
    assert "about 0:02:30, up to" in str(told)
    # What takes no minute is not worth a measurement.
    monkeypatch.setattr(estimate, "_time", None)
    small = estimate.measure_speed([weight_of(64, 32)], checkpoint_count=3, runtime=Runtime())
    told = estimate.estimate([[[weight_of(64, 32)]]], small, checkpoint_count=3, references=2)
    assert str(told).startswith("less than a minute")


def test_the_time_of_a_matrix_is_that_of_a_piece_times_the_cube_of_its_scale(monkeypatch):
    pieces = []
    clock = iter([10.0, 10.5] * 2)
    monkeypatch.setattr(estimate, "measure_dense", lambda stack: pieces.append(tuple(stack.shape)))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
    assert estimate._time((3072, 1536), torch.device("cpu")) == 0.5 * 8
    assert estimate._time((64, 32), torch.device("cpu")) == 0.5
    assert pieces == [(1, 1536, 768), (1, 64, 32)]


def test_a_dry_run_tells_what_it_would_take_and_leaves_nothing(tmp_path, capsys):
    folder = save_series(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    assert analyze.main([str(folder), "--dry-run"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = "4 checkpoints, 5 weights, ordered by number in the name 0 ... 3, less than a"
    assert line.startswith(f"dry run, nothing is measured: {told}")
    assert "GiB of memory" in line
    assert sorted(tmp_path.rglob("*")) == before
