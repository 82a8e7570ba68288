"""python -m app.report: what is read, compared, drawn, and shown while a run goes on."""

import io
import itertools
import json
import statistics
from dataclasses import replace
from datetime import datetime, timedelta
from html.parser import HTMLParser
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from rich.console import Console
from support.closed_folders import close

from app import config, report
from app.errors import UserError
from app.recording.schema import LOWRANK, STABILITY
from app.recording.store import MetricsStore
from app.reporting import comparison, curves, drawing, layer_maps
from app.reporting import report as whole_report
from app.reporting.comparison import _figures
from app.reporting.events import event_table
from app.reporting.follow import _layers, follow, show, time_left
from app.reporting.reference import REFERENCE_CURVES
from app.reporting.runs import (
    LayerSeries,
    Run,
    _in_gaps,
    check_patterns,
    choose_layers,
    read_run,
    read_spectra,
)
from app.reporting.spectra import spectra

STEPS_PER_EPOCH = 10
LAYERS = {
    "patch.weight": (8, 4),
    "blocks.10.fc.weight": (6, 6),
    "blocks.2.fc.weight": (4, 6),
    "position": (5, 6),
}


def stability_of(place, epoch):
    """A value of its own for every layer and epoch."""
    return 1 - (place + 1) / (20 + epoch)


def row(columns, **values):
    """Fill the columns that a test does not care about."""
    defaults = {"i": 0, "f": np.nan, "S": ""}
    return {column.name: defaults[column.dtype[0]] for column in columns} | values


class Writer:
    """Writes a run of some epochs as a training does."""

    def __init__(self, folder, *overrides, layers=LAYERS):
        folder.mkdir(parents=True)
        configuration = config.load(None, [f"run.dir={folder}", "training.epochs=8", *overrides])
        self.folder = folder
        self.layers = layers
        self.low_rank = configuration.oialr.enabled
        self.store = MetricsStore.create(
            folder / "metrics.h5",
            configuration=config.to_yaml(configuration),
            layers=layers,
            not_averaged={"position"},
        )
        self.store.append(
            "sessions",
            started="2026-01-01T00:00:00+00:00",
            process_count=2,
            first_step=0,
            versions="torch 2.13.0",
            command="train",
        )

    def epoch(self, epoch, *, measured=True):
        if epoch:
            for step in range((epoch - 1) * STEPS_PER_EPOCH + 1, epoch * STEPS_PER_EPOCH + 1):
                self.store.append(
                    "train",
                    step=step,
                    epoch=epoch,
                    loss=1 / step,
                    learning_rate=0.1,
                    samples_per_second=100.0,
                    step_seconds=0.25,
                )
            self.store.append(
                "eval",
                step=epoch * STEPS_PER_EPOCH,
                epoch=epoch,
                split="validation",
                loss=1 / epoch,
                accuracy=1 - 1 / (1 + epoch),
            )
        if self.low_rank and epoch == 6:
            self.event(epoch * STEPS_PER_EPOCH)
        if measured:
            for place, name in enumerate(self.layers):
                self.measure(place, name, epoch)
        self.store.flush()

    def event(self, step):
        values = {"step": step, "event": "convert", "trainable_percent": 40.0, "seconds": 0.5}
        self.store.append("lowrank", **row(LOWRANK, compression_percent=90.0, **values))
        self.store.append("layers/patch.weight/rank", step=step, rank=2, owner=0)
        self.store.append("layers/patch.weight/spectrum", step=step, singular_values=[9.0] * 4)

    def measure(self, place, name, epoch):
        full = min(self.layers[name])
        rank = 2 if self.low_rank and epoch >= 6 and name == "patch.weight" else full
        self.store.append(
            f"layers/{name}/stability",
            **row(
                STABILITY,
                epoch=epoch,
                step=epoch * STEPS_PER_EPOCH,
                stability=stability_of(place, epoch) if epoch >= 5 else np.nan,
                mixing_similarity=0.9 if epoch >= 5 else np.nan,
                rank=rank,
                numerical_rank=rank,
                effective_rank=rank / 2,
            ),
        )
        values = np.arange(rank, 0, -1) * (1.0 + epoch)
        step = epoch * STEPS_PER_EPOCH
        self.store.append(f"layers/{name}/spectrum", step=step, singular_values=values)

    def finish(self, **figures):
        self.store.close()
        summary = {"test_accuracy": 0.5, "epochs": 8, "steps": 80, "seconds": 1.0, **figures}
        (self.folder / "summary.json").write_text(json.dumps(summary))


def write_run(folder, *overrides, epochs=8, finished=True, figures=None, **options):
    writer = Writer(folder, *overrides, **options)
    for epoch in range(epochs + 1):
        writer.epoch(epoch)
    if finished:
        writer.finish(**(figures or {}))
    writer.store.close()
    return folder


def test_a_finished_run_that_is_trained_on_is_not_finished(tmp_path):
    folder = write_run(tmp_path / "run")
    assert read_run(folder).is_finished
    (folder / "unfinished.json").write_text("{}")  # as when it is resumed for more epochs
    run = read_run(folder)
    assert run.state().startswith("not finished: in epoch 8")
    assert not any(name.startswith("test") for name in _figures(run))


def test_sizes_stand_beside_an_accuracy_as_those_of_the_tested_weights(tmp_path):
    """Which early stopping may have taken from before the last cut."""
    sizes = {"trainable_percent": 70.0, "compression_percent": 110.0}
    finished = _figures(read_run(write_run(tmp_path / "finished", figures=sizes)))
    assert (finished["trainable, %"], finished["compression, %"]) == (70.0, 110.0)
    others = _figures(read_run(write_run(tmp_path / "others", finished=False)))
    assert (others["trainable, %"], others["compression, %"]) == (40.0, 90.0)


def test_series_hold_each_layer_and_means_leave_tokens_out(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    series = run.series("stability")
    assert [layer.name for layer in series.layers] == list(LAYERS)
    epochs = np.array([5, 6, 7, 8])
    expected = [[stability_of(place, epoch) for epoch in epochs] for place in range(4)]
    np.testing.assert_array_equal(series.values, expected)
    np.testing.assert_array_equal(run.axis(series.steps), epochs)
    assert run.axis.label == "epoch"
    np.testing.assert_allclose(series.mean(), np.mean(expected[:3], axis=0))


def test_a_layer_that_is_measured_less_often_is_averaged_where_it_is(tmp_path):
    writer = Writer(tmp_path / "run", "oialr.enabled=false")
    for epoch in range(7):
        writer.epoch(epoch)
    writer.epoch(7, measured=False)
    writer.measure(0, "patch.weight", 7)
    writer.store.close()
    series = read_run(tmp_path / "run").series("stability")
    assert np.isnan(series.values[1:, -1]).all()
    assert series.mean()[-1] == stability_of(0, 7)


@pytest.mark.filterwarnings("error")
def test_what_is_missing_is_a_gap(tmp_path):
    """Of the epochs 0 to 12 the seventh and eighth are gone, and the tenth has no reference."""
    writer = Writer(tmp_path / "run", "oialr.enabled=false", layers={"a.weight": (4, 4)})
    epochs = [*range(7), 9, 10, 11, 12]
    for epoch in epochs:
        values = dict.fromkeys(("step", "epoch"), epoch) | {"rank": 4, "numerical_rank": 4}
        known = epoch >= 2 and epoch != 10
        values |= dict.fromkeys(("stability", "effective_rank"), 0.9 if known else np.nan)
        writer.store.append("layers/a.weight/stability", **row(STABILITY, **values))
    writer.store.close()
    run = read_run(tmp_path / "run")
    series = run.series("stability")
    assert series.steps.tolist() == list(range(2, 13))
    missing = [False] * 5 + [True, True, False, True, False, False]
    assert np.isnan(series.values[0]).tolist() == missing
    # The map has these columns, of equal width, and the curve is broken; 9 stands alone.
    with drawing.style():
        drawn = layer_maps.stability_map(run, "stability", 0.8, None)
    top, bottom = drawn.figure.axes[:2]
    assert np.isnan(np.ma.filled(top.collections[0].get_array(), np.nan)).tolist() == [missing]
    edges = top.collections[0].get_coordinates()[0, :, 0]
    np.testing.assert_allclose(edges, np.arange(1.5, 13))
    assert np.isnan(bottom.lines[0].get_ydata()).tolist() == missing
    assert bottom.lines[0].get_markevery() == [7]
    other = curves.other_measures(run, "measures").figure.axes
    line = next(a for a in other if a.get_ylabel().startswith("effective")).lines[0]
    assert np.isnan(line.get_ydata()).tolist() == missing
    [group] = comparison.group_runs([run])
    mean = curves.means([group], None).figure.axes[0].lines[0]
    assert np.isnan(mean.get_ydata()).tolist() == missing


@pytest.mark.parametrize(
    ("steps", "missing"),
    [
        ([1, 2, 3, 9, 10], [4, 8]),
        ([2, 4, 6, 10, 12], [8]),
        ([10, 20, 30, 47, 57], [38]),  # less than two of the usual distances
        ([10, 20, 30, 34], []),  # the end of a run
        ([1, 10, 100, 1000], []),  # no usual distance
        ([1, 9], []),
    ],
)
def test_steps_of_a_gap(steps, missing):
    assert sorted(set(_in_gaps(np.array(steps)).tolist())) == missing


def test_ranks_hold_from_event_to_event(tmp_path):
    series = read_run(write_run(tmp_path / "run")).relative_ranks()
    assert series.steps.tolist() == list(range(0, 90, 10))
    np.testing.assert_array_equal(series.values[0], [1] * 6 + [0.5] * 3)
    assert (series.values[1:] == 1).all()


def test_ranks_are_in_percent_of_the_full_rank_also_where_no_checkpoint_has_it(tmp_path):
    writer = Writer(tmp_path / "run")
    for epoch in (6, 7):
        for place, name in enumerate(LAYERS):
            writer.measure(place, name, epoch)
    writer.store.close()

    def numerical_rank():
        figure = curves.other_measures(read_run(tmp_path / "run"), "measures").figure
        axes = next(a for a in figure.axes if a.get_ylabel().startswith("numerical"))
        # The lower end of the band: a tenth of the way from the lowest to the median.
        return axes.collections[0].get_paths()[0].vertices[:, 1].min()

    run = read_run(tmp_path / "run")
    np.testing.assert_array_equal(run.relative_ranks().values[0], [0.5, 0.5])
    assert "percent of the full rank." in layer_maps.rank_map(run, "rank").caption
    told = dict(zip(*(c._cells for c in _layers(run).columns[::3]), strict=True))
    assert told["patch.weight"] == "4"  # what --follow says that its rank is of
    assert numerical_rank() == pytest.approx(60)  # of 50, 100, 100
    with h5py.File(tmp_path / "run" / "metrics.h5", "r+") as file:  # of an earlier version
        for name in LAYERS:
            del file[f"layers/{name}"].attrs["full_rank"]
    assert numerical_rank() == 100
    caption = curves.other_measures(read_run(tmp_path / "run"), "measures").caption
    assert "the largest rank recorded, since this older file" in caption


def test_the_spectrum_of_a_step_is_the_last_one(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    [(steps, values)] = read_spectra(run, ["patch.weight"])
    assert steps.tolist() == list(range(0, 90, 10))
    np.testing.assert_array_equal(values[6], [14, 7, np.nan, np.nan])  # not the event's nines


def test_layers_are_chosen_by_pattern_or_at_even_distances(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert choose_layers(run, [], count=2) == ["patch.weight", "blocks.2.fc.weight"]
    assert choose_layers(run, [], count=9) == list(LAYERS)[:3]
    assert choose_layers(run, ["blocks.*"], count=9) == list(LAYERS)[1:3]
    with pytest.raises(UserError, match=r"--layers: 'x\*' matches no .*such as patch\.weight"):
        check_patterns([run], ["blocks.*", "x*"])


@pytest.mark.slow
def test_a_pattern_may_be_of_one_of_two_networks(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", layers={"patch.weight": (8, 4)})]
    output = tmp_path / "out"
    report.main([*map(str, runs), "--layers", "blocks.*", "--output", str(output)])
    assert {path.stem for path in (output / "figures").glob("spectra*.png")} == {"spectra-1-a"}


def test_runs_are_grouped_by_all_but_seed_folder_and_name(tmp_path):
    runs = [
        read_run(write_run(tmp_path / f"{seed}-{enabled}", f"run.seed={seed}", f"run.name=n{seed}",
                           f"oialr.enabled={enabled}", epochs=1))
        for enabled in ("true", "false")
        for seed in (0, 1)
    ]  # fmt: skip
    groups = comparison.group_runs(runs)
    assert [group.label for group in groups] == ["oialr.enabled=true", "oialr.enabled=false"]
    assert [group.runs for group in groups] == [runs[:2], runs[2:]]
    assert groups[1].differing == {"oialr.enabled": "false"}
    [group] = comparison.group_runs(runs[:2])
    assert group.differing == {}


def runs_of_two_configurations(folder, *, names=("one", "two"), folders=("a", "b")):
    """Runs that differ in more keys than a legend has room for."""
    overrides = [
        ["model.arguments.depth=2", "training.learning_rate=0.1", "oialr.cutoff=0.3"],
        ["training.learning_rate=0.2", "oialr.cutoff=0.4"],
    ]
    return [
        read_run(write_run(folder / place, f"run.name={name}", f"run.seed={seed}", *keys, epochs=1))
        for seed, (place, name, keys) in enumerate(zip(folders, names, overrides, strict=True))
    ]


def test_where_keys_are_too_long_for_a_label_run_name_or_folder_are_the_label(tmp_path):
    def labels(number, **options):
        runs = runs_of_two_configurations(tmp_path / str(number), **options)
        return [group.label for group in comparison.group_runs(runs)]

    runs = runs_of_two_configurations(tmp_path / "runs")
    groups = comparison.group_runs(runs)
    assert [group.label for group in groups] == ["one", "two"]
    assert groups[0].differing["model.arguments.depth"] == "2"
    assert groups[1].differing["oialr.cutoff"] == "0.4"
    assert labels(1, names=("same", "same")) == ["a", "b"]
    long = "x" * 50
    [first, second] = labels(2, names=(f"{long}1", f"2{long}"))
    assert len(first) == len(second) == comparison.LONGEST_LABEL
    assert first != second
    # What is left of them must tell them apart.
    alike = (f"{long}1{long}", f"{long}2{long}")
    assert labels(3, names=alike, folders=alike) == ["configuration 1", "configuration 2"]


def test_seeds_of_a_configuration_are_named_by_what_their_folders_share(tmp_path):
    runs = [
        *runs_of_two_configurations(tmp_path, names="nm", folders=("low-9", "full-9")),
        *runs_of_two_configurations(tmp_path, names="op", folders=("low-10", "full-10")),
    ]
    assert [group.label for group in comparison.group_runs(runs)] == ["low", "full"]


def test_final_figures_are_means_with_the_deviation_of_a_sample(tmp_path):
    accuracies = [0.9, 0.8, 0.94]
    runs = [
        read_run(
            write_run(
                tmp_path / str(seed),
                f"run.seed={seed}",
                figures={"test_accuracy": accuracy},
            )
        )
        for seed, accuracy in enumerate(accuracies)
    ]
    runs.append(read_run(write_run(tmp_path / "open", epochs=3, finished=False)))
    table = comparison.final_figures(comparison.group_runs(runs))
    (_, finished, cells), (_, unfinished, others) = table.rows
    place = table.columns.index("test accuracy")
    mean, deviation = statistics.fmean(accuracies), statistics.stdev(accuracies)
    assert cells[place] == f"{mean:.4f} ± {deviation:.4f}"
    assert others[place] == "-"
    assert finished == "3 runs, finished"
    assert unfinished == "1 run, not finished: in epoch 3 of 8, step 30"
    assert cells[table.columns.index("trainable, %")] == "40.0 ± 0.0"
    assert others[table.columns.index("trainable, %")] == "100.0"
    assert others[table.columns.index("epochs")] == "3"
    assert others[table.columns.index("best validation accuracy")] == "0.7500"
    assert others[table.columns.index("epoch of the best validation accuracy")] == "3"


def test_the_best_validation_figure_is_the_highest_accuracy_or_the_least_error(tmp_path):
    writer = Writer(tmp_path / "run")
    for epoch, accuracy, loss in ((1, 0.5, 0.7), (2, 0.9, 0.6), (3, 0.8, 0.2)):
        values = {"step": epoch, "epoch": epoch, "accuracy": accuracy, "loss": loss}
        writer.store.append("eval", split="validation", **values)
        writer.store.append("eval", split="test", **{**values, "accuracy": 1.0})
    writer.store.close()
    run = read_run(writer.folder)

    def best(run):
        figures = comparison.final_figures(comparison.group_runs([run]))
        [(_, _, cells)] = figures.rows
        return dict(zip(figures.columns, cells, strict=True))

    assert best(run)["best validation accuracy"] == "0.9000"
    assert best(run)["epoch of the best validation accuracy"] == "2"
    errors = {**run.evaluation, "mse": run.evaluation.pop("accuracy")}
    assert best(replace(run, evaluation=errors))["best validation mse"] == "0.5000"
    # Of a figure of somebody's own it is not known which way is better.
    errors["own"] = errors.pop("mse")
    found = best(replace(run, evaluation=errors))
    assert "best validation own" not in found
    assert found["last validation own"] == "0.8000"


def test_what_is_learned_is_drawn_over_seconds_and_over_stored_size(tmp_path):
    low = read_run(write_run(tmp_path / "low"))
    full = read_run(write_run(tmp_path / "full", "oialr.enabled=false"))
    [seconds, size] = curves.costs(comparison.group_runs([low, full])).figure.axes
    assert seconds.get_xlabel() == "seconds of training"
    # Ten steps of a quarter of a second in each epoch; half a second for the event of the sixth.
    x, y = seconds.get_lines()[0].get_data()
    np.testing.assert_allclose(x, [2.5, 5, 7.5, 10, 12.5, 15.5, 18, 20.5])
    np.testing.assert_allclose(y, 1 - 1 / np.arange(2, 10))
    np.testing.assert_allclose(seconds.get_lines()[2].get_xdata(), np.arange(1, 9) * 2.5)
    np.testing.assert_allclose(size.get_lines()[0].get_xdata(), [100] * 5 + [90] * 3)
    np.testing.assert_allclose(size.get_lines()[2].get_xdata(), [100] * 8)
    # A dot tells the end, which is not the last place to the right.
    assert size.get_lines()[1].get_xdata().tolist() == [90]


@pytest.mark.slow
def test_training_loss_learning_rate_and_throughput_are_drawn(tmp_path):
    groups = comparison.group_runs([read_run(write_run(tmp_path / "run"))])
    drawn = {axes.get_ylabel(): axes for axes in curves.learning(groups).figure.axes}
    loss = drawn["training loss"].get_lines()[0]
    np.testing.assert_array_equal(loss.get_xdata(), range(1, 9))
    np.testing.assert_allclose(loss.get_ydata()[0], np.mean(1 / np.arange(1, 11)))
    assert drawn["learning rate"].get_lines()[0].get_ydata().tolist() == [0.1] * 80
    drawn = {axes.get_ylabel(): axes for axes in curves.seconds(groups).figure.axes}
    assert drawn["samples\nper second"].get_lines()[0].get_ydata().tolist() == [100] * 8


def test_epochs_and_numbers_of_singular_values_have_whole_ticks(tmp_path):
    run = read_run(write_run(tmp_path / "run", epochs=6))
    groups = comparison.group_runs([run])
    for drawn in (
        curves.learning(groups),
        curves.seconds(groups),
        curves.other_measures(run, "measures"),
        layer_maps.stability_map(run, "stability", 0.8, None),
        spectra(run, ["patch.weight"], "spectra", (0, 6)),
    ):
        axes = drawn.figure.axes[:2]
        for ticks in (axes[-1].get_xticks(), axes[0].get_xticks()):
            assert np.array_equal(ticks, np.round(ticks)), drawn.name


@pytest.mark.slow
def test_the_runs_of_a_page_have_common_colours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [write_run(tmp_path / "a", epochs=8), write_run(tmp_path / "b", epochs=5)]
    drawn = []

    def keep(drawing, *_):
        drawn.append(drawing)
        return []

    monkeypatch.setattr(whole_report, "save", keep)
    monkeypatch.setattr(Run, "series", mixed(Run.series))
    assert report.main([*map(str, folders), "--formats", "svg"]) == 0

    def colours(kind):
        return [
            axes.collections[0].norm if kind == "mixing" else axes.get_ylim()
            for drawing in drawn
            if drawing.name.startswith(f"{kind}-")
            for axes in drawing.figure.axes[:: 1 if kind == "mixing" else -1][:1]
        ]

    assert [(norm.vmin, norm.vmax) for norm in colours("mixing")] == [(0.2, 1)] * 2
    assert colours("spectra") == [(0, 8)] * 2  # of the bar


def mixed(series):
    """Let the mixing of one run fall deeper than that of the other."""

    def changed(run, column):
        found = series(run, column)
        if column == "mixing_similarity" and run.name == "a":
            return replace(found, values=found.values - 0.65)
        return found

    return changed


def test_events_are_a_table(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    table = event_table(run)
    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        "step": "60",
        "epoch": "6",
        "event": "convert",
        "layers": "1",
        "sum of ranks": "2",
        "trainable, %": "40.0",
        "stored, %": "90.0",
        "seconds": "0.5",
    }
    assert "epoch" not in event_table(replace(run, by_steps=True)).columns
    assert event_table(read_run(write_run(tmp_path / "full", "oialr.enabled=false"))) is None


@pytest.mark.slow
def test_names_and_settings_of_the_users_are_shown_as_they_stand(tmp_path):
    script = "<script>alert(1)</script>"
    layers = {f"{script}.weight": (6, 6), "patch.weight": (8, 4)}
    folders = [
        write_run(tmp_path / f"<b>{cutoff}", f"run.name={script}", f"oialr.cutoff={cutoff}",
                  f"model.arguments.note={script}{cutoff}", layers=layers)
        for cutoff in (0.1, 0.2)
    ]  # fmt: skip
    output = tmp_path / "out"
    assert report.main([*map(str, folders), "--output", str(output), "--formats", "svg"]) == 0
    page = Page(output / "report.html")
    assert not {"script", "b"} & set(page.tags)
    assert page.text.count("&lt;script&gt;alert(1)") > 4
    assert "<table>" in page.text
    for file in (output / "figures").iterdir():
        assert "<script" not in file.read_text()


def test_the_stability_map_is_that_of_the_paper(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    with drawing.style():
        drawn = layer_maps.stability_map(run, "stability", 0.8, REFERENCE_CURVES["vit_b16"])
        drawn.figure.canvas.draw()
    top, bottom = drawn.figure.axes[:2]
    [mesh] = top.collections
    np.testing.assert_array_equal(mesh.get_array(), run.series("stability").values)
    assert mesh.get_clim() == (0.8, 1)
    low, high = top.get_ylim()
    assert low > high  # the first layer at the top
    assert [label.get_text() for label in top.get_yticklabels()] == [
        name.removesuffix(".weight") for name in LAYERS
    ]
    mean, conversion, reference = bottom.lines
    assert set(conversion.get_xdata()) == {6}
    np.testing.assert_allclose(mean.get_ydata(), run.series("stability").mean())
    np.testing.assert_array_equal(reference.get_xdata()[:2], [5, 10])
    np.testing.assert_array_equal(reference.get_ydata()[:2], [0.8669, 0.7552])
    assert bottom.get_xlim() == pytest.approx((4.5, 8.5))
    assert "not averaged" in drawn.caption


def test_the_colours_of_a_map_take_in_nearly_all_values_of_all_runs():
    def measured(lowest):
        values = np.linspace(lowest, 1, 100)[None]
        series = LayerSeries(layers=[], steps=np.arange(100), values=values)
        return SimpleNamespace(series=lambda _: series)

    runs = [measured(0.9), measured(0.55)]
    assert layer_maps.floor(runs[:1], "stability") == 0.8  # the paper's
    assert layer_maps.floor(runs, "stability") == 0.5


@pytest.mark.parametrize("limits", [(0.15, 8), (1.3, 3.5), (0.2, 0.7), (0.02, 1.9), (1e-4, 2)])
def test_numbers_of_a_small_logarithmic_axis_do_not_overlap(limits):
    with drawing.style():
        figure, [[axes, _], *_] = drawing.new_figure([2.3] * 3, columns=2, share_x=False)
        axes.set_yscale("log")
        axes.set_ylim(*limits)
        drawing.few_powers(axes)
        figure.canvas.draw()
    labels = [*axes.get_yticklabels(), *axes.get_yticklabels(minor=True)]
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    boxes = [box for box in boxes if axes.bbox.y0 <= (box.y0 + box.y1) / 2 <= axes.bbox.y1]
    assert len(boxes) >= 2
    for below, above in itertools.pairwise(sorted(boxes, key=lambda box: box.y0)):
        assert above.y0 >= below.y1 - 0.5


@pytest.mark.slow
def test_names_of_174_layers_do_not_overlap(tmp_path):
    name = "layer{}.{}.downsample_projection.conv.weight"
    layers = {name.format(i // 60, i % 60): (2, 2) for i in range(174)}
    writer = Writer(tmp_path / "run", "oialr.enabled=false", layers=layers)
    for epoch in (0, 5, 6):
        for place, name in enumerate(layers):
            writer.measure(place / 174, name, epoch)
    writer.store.close()
    run = read_run(tmp_path / "run")
    with drawing.style():
        drawn = layer_maps.stability_map(run, "stability", 0.8, None)
        drawn.figure.canvas.draw()
    labels = drawn.figure.axes[0].get_yticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) > 30
    for above, below in itertools.pairwise(boxes):
        assert above.y0 >= below.y1 - 0.5
    assert max(box.x1 - box.x0 for box in boxes) < 0.4 * drawn.figure.bbox.width


def test_what_stays_full_rank_has_no_rank_map_and_no_events(tmp_path):
    run = read_run(write_run(tmp_path / "run", "oialr.enabled=false"))
    assert layer_maps.rank_map(run, "rank") is None
    [group] = comparison.group_runs([run])
    drawn = curves.seconds([group])
    labels = [axes.get_ylabel() for axes in drawn.figure.axes]
    assert labels == ["samples\nper second", "step, ms"]
    [line] = drawn.figure.axes[1].lines
    np.testing.assert_allclose(line.get_ydata(), 250)


def test_trained_parameters_are_drawn_as_steps(tmp_path):
    [group] = comparison.group_runs([read_run(write_run(tmp_path / "run"))])
    drawn = curves.learning([group])
    [line] = next(a for a in drawn.figure.axes if a.get_ylabel() == "trainable, %").lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 100], [6, 100], [6, 40], [8, 40]])


def test_columns_and_groups_of_other_versions_are_drawn(tmp_path):
    folder = write_run(tmp_path / "run")
    with h5py.File(folder / "metrics.h5", "r+") as file:
        for name in LAYERS:
            count = len(file[f"layers/{name}/stability/step"])
            group = file[f"layers/{name}/stability"]
            group["novelty"] = np.full(count, 1e-6)
        if "stability" in file:
            del file["stability"]
        group = file.create_group("stability")
        group["step"] = [50, 60]
        group["seconds"] = [0.25, 0.5]
    run = read_run(folder)
    labels = [a.get_ylabel() for a in curves.other_measures(run, "measures").figure.axes]
    assert "novelty" in labels
    [group] = comparison.group_runs([run])
    drawn = curves.seconds([group])
    [line] = next(a for a in drawn.figure.axes if a.get_ylabel() == "measurement, s").lines
    np.testing.assert_array_equal(line.get_xydata(), [[5, 0.25], [6, 0.5]])


def test_the_largest_singular_values_are_in_sight(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    drawn = spectra(run, ["patch.weight", "position"], "spectra", (0, 8))
    axes = drawn.figure.axes[0]
    assert axes.get_ylim()[1] >= 4 * 9
    assert len(axes.lines) == 9
    assert axes.get_title() == "patch"


@pytest.mark.slow
def test_a_reference_beside_another_window_is_noted(tmp_path, capsys):
    folders = [write_run(tmp_path / str(n), f"stability.window={n}") for n in (5, 2)]
    for folder in folders:
        assert report.main([str(folder), "--formats", "svg", "--reference", "vit_b16"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "--reference" in line]
    assert len(notes) == 1
    assert "has a window of 5 epochs, and this run compares with 2 epochs before" in notes[0]


def analysis_of(folder, **section):
    """A run as an analysis leaves it."""
    write_run(folder, "oialr.enabled=false")
    values = {"checkpoints": ["x"], "window": 5, **section}
    with h5py.File(folder / "metrics.h5", "r+") as file:
        file.attrs["config"] = np.bytes_(json.dumps({"analysis": values}).encode())
    return folder


def drawn_by(monkeypatch):
    """Keep the drawings of a report instead of writing them."""
    drawn = {}
    monkeypatch.setattr(whole_report, "save", lambda d, *_: drawn.setdefault(d.name, d) and [])
    return drawn


def test_a_reference_beside_an_analysis_is_held_against_its_span(tmp_path):
    for name, section, told in (
        ("same", {"position": "epoch", "window": 1, "span": 5}, None),
        ("other", {"position": "epoch", "window": 1, "span": 10}, "with 10 epochs before"),
        ("older", {"position": "epoch", "window": 5}, "with 5 checkpoints before"),
        ("places", {"position": "epoch", "window": 2, "span": None}, "with 2 checkpoints before"),
    ):
        folder = analysis_of(tmp_path / name, **section)
        notes = whole_report._missing([read_run(folder)], "vit_b16")
        assert len(notes) == (told is not None)
        assert told is None or notes[0].endswith(f"this run compares {told}")


@pytest.mark.slow
def test_what_counts_other_times_is_not_on_one_axis(tmp_path, capsys, monkeypatch):
    drawn = drawn_by(monkeypatch)
    epochs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    steps = str(analysis_of(tmp_path / "steps", position="number in the name", span=50))
    assert report.main([steps, *epochs, "--output", str(tmp_path / "out")]) == 0
    [note] = [line for line in capsys.readouterr().err.splitlines() if "together" in line]
    assert "steps: its axis is 'number in the name', that of the other runs 'epoch': it is" in note
    axes = drawn["means"].figure.axes
    assert len(axes[0].lines) == 2
    assert axes[-1].get_xlabel() == "epoch"
    # The colours of the spectra end where its own times do.
    bars = {name: d.figure.axes[-1] for name, d in drawn.items() if name.startswith("spectra-")}
    assert [bar.get_ylabel() for bar in bars.values()] == ["number in the name", "epoch", "epoch"]
    assert [bar.get_ylim() for bar in bars.values()] == [(0, 80), (0, 8), (0, 8)]
    # What is counted alike is drawn together, and of others the first.
    drawn.clear()
    same = str(analysis_of(tmp_path / "same", position="epoch", span=5))
    assert report.main([steps, same, "--output", str(tmp_path / "out")]) == 0
    assert "means" not in drawn
    assert "same: its axis is 'epoch', that" in capsys.readouterr().err


def test_spectra_are_those_of_averaged_layers_and_a_single_value_is_a_dot(tmp_path):
    layers = {"position": (5, 6), "row.weight": (1, 4), "fc.weight": (4, 4)}
    writer = Writer(tmp_path / "run", layers=layers)
    for place, name in enumerate(layers):
        writer.measure(place, name, 5)
    writer.store.close()
    run = read_run(tmp_path / "run")
    assert choose_layers(run, [], count=6) == ["row.weight", "fc.weight"]
    assert choose_layers(run, ["pos*"], count=6) == ["position"]
    drawn = spectra(run, ["row.weight", "fc.weight"], "spectra", (0, 8))
    assert [axes.lines[0].get_marker() for axes in drawn.figure.axes[:2]] == ["o", ""]


def test_long_names_of_layers_do_not_overlap_above_their_spectra(tmp_path):
    layers = {f"stages.3.blocks.{i}.token_mixer.conv_reparametrized.weight": (4, 4) for i in (0, 1)}
    writer = Writer(tmp_path / "run", "oialr.enabled=false", layers=layers)
    for place, name in enumerate(layers):
        writer.measure(place, name, 5)
    writer.store.close()
    with drawing.style():
        drawn = spectra(read_run(tmp_path / "run"), list(layers), "spectra", (0, 8))
        drawn.figure.canvas.draw()
    left, right = (axes.title.get_window_extent() for axes in drawn.figure.axes[:2])
    assert left.x1 < right.x0


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_what_has_no_averaged_layer_and_no_singular_value_is_drawn(tmp_path):
    writer = Writer(tmp_path / "run", layers={"position": (5, 6), "zero": (2, 2)})
    for epoch in (4, 5):
        writer.measure(0, "position", epoch)
        writer.store.append("layers/zero/spectrum", step=epoch, singular_values=[0.0, 0.0])
        writer.store.append("layers/zero/rank", step=epoch, rank=2, owner=0)
    writer.store.close()
    with h5py.File(tmp_path / "run" / "metrics.h5", "r+") as file:
        file["layers/zero"].attrs["averaged"] = False
    report.main([str(tmp_path / "run")])
    names = {path.stem for path in (tmp_path / "run" / "report" / "figures").glob("*.png")}
    assert {"stability", "spectra"} <= names
    assert "measures" not in names


class Page(HTMLParser):
    """What a page refers to."""

    def __init__(self, path):
        super().__init__()
        self.images, self.tags, self.addresses = [], [], []
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(attributes)
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]


@pytest.mark.slow
def test_the_page_of_two_configurations_needs_nothing_else(tmp_path, capsys):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    folders = [
        write_run(tmp_path / name, f"run.seed={seed}", f"oialr.enabled={enabled}", epochs=epochs,
                  finished=finished)
        for name, seed, enabled, epochs, finished in (
            ("<low>-0", 0, "true", 8, True),
            ("low-1", 1, "true", 8, True),
            ("full-0", 0, "false", 3, False),
        )
    ]  # fmt: skip
    output = tmp_path / "out" / "report"
    arguments = [*map(str, folders), "--output", str(output), "--formats", "pdf"]
    assert report.main([*arguments, "--reference", "resnetrs101"]) == 0
    assert dict(mpl.rcParams) == before
    captured = capsys.readouterr()
    assert "full-0: no basis stability was recorded yet" in captured.err
    page = Page(output / "report.html")
    assert str(output / "report.html") in captured.out
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(a.startswith(("data:image/svg+xml;base64,", "#")) for a in page.addresses)
    assert "url(" not in page.text
    assert all(len(image["alt"]) > 40 for image in page.images)
    assert "&lt;low&gt;-0" in page.text
    assert "<low>" not in page.text
    assert "1 run, not finished: in epoch 3 of 8, step 30" in page.text
    names = {path.name for path in (output / "figures").iterdir()}
    for stem in ("learning", "means", "seconds", "stability-2-low-1", "rank-2-low-1",
                 "spectra-3-full-0"):  # fmt: skip
        assert f"{stem}.pdf" in names
    assert len(names) == len(page.images)
    assert (output / "figures" / "means.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_a_run_without_an_evaluation_puts_all_on_steps(tmp_path):
    finished = write_run(tmp_path / "finished")
    writer = Writer(tmp_path / "young", "run.seed=1")
    writer.epoch(0)
    figures = {"loss": 1.0, "learning_rate": 0.1, "samples_per_second": 1.0, "step_seconds": 1.0}
    writer.store.append("train", step=5, epoch=1, **figures)
    writer.store.close()
    report.main([str(finished), str(writer.folder), "--output", str(tmp_path / "both")])
    page = (tmp_path / "both" / "report.html").read_text()
    assert "Curves by optimizer step of" in page
    assert "by epoch" not in page
    assert "step or epoch" not in page


def test_a_single_run_has_its_report_in_its_folder(tmp_path):
    folder = write_run(tmp_path / "run")
    assert report.main([str(folder / "metrics.h5"), "--formats", "png,svg"]) == 0
    assert (folder / "report" / "report.html").exists()
    assert (folder / "report" / "figures" / "mixing.svg").exists()
    assert (folder / "report" / "figures" / "mixing.png").exists()


@pytest.mark.parametrize("name", ["metrics-before-1", "metrics-damaged"])
def test_a_file_that_is_kept_beside_metrics_is_reported_as_itself(tmp_path, name):
    """As the program leaves them: summary, spectra and report of the folder are another run's."""
    folder = write_run(tmp_path / "run", "oialr.enabled=false")
    other = write_run(tmp_path / "other", "oialr.enabled=false", epochs=5, finished=False,
                      layers={"patch.weight": (3, 3)})  # fmt: skip
    kept = (other / "metrics.h5").rename(folder / f"{name}.h5")
    run = read_run(kept)
    assert (run.name, run.summary) == (f"run-{name}", None)
    assert run.state() == "not finished: in epoch 5 of 8, step 50"
    [(steps, values)] = read_spectra(run, ["patch.weight"])
    assert (steps[-1], values.shape[1]) == (50, 3)
    assert report.main([str(folder), "--formats", "svg"]) == 0
    page = (folder / "report" / "report.html").read_bytes()
    assert report.main([str(kept), "--formats", "svg"]) == 0
    assert (folder / "report" / "report.html").read_bytes() == page
    assert "not finished" in (folder / f"report-{name}" / "report.html").read_text()
    # Both are of one folder, and not the same.
    both = [str(kept), str(folder / "metrics.h5")]
    assert report.main([*both, "--formats", "svg", "--output", str(tmp_path / "out")]) == 0
    with pytest.raises(UserError, match="given twice"):
        report.main([*both, str(folder)])


def empty_run(folder):
    Writer(folder).store.close()
    return folder


@pytest.mark.slow
def test_bad_input_is_one_line_with_culprit_and_cure(tmp_path):
    run = str(write_run(tmp_path / "run", epochs=1))
    bare = tmp_path / "bare"
    bare.mkdir()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "metrics.h5").write_text("text")
    damaged = write_run(tmp_path / "damaged", epochs=1)
    (damaged / "summary.json").write_text("{")
    file = tmp_path / "file"
    file.write_text("")
    empty = empty_run(tmp_path / "empty")
    taken = tmp_path / "taken"
    (taken / "report.html").mkdir(parents=True)
    for arguments, message in (
        ([str(bare)], r"bare/metrics\.h5: no such file; a run's metrics are in its folder"),
        ([str(tmp_path / "gone")], r"gone/metrics\.h5: no such file"),
        ([str(foreign)], r"foreign/metrics\.h5: not a readable HDF5 file"),
        ([str(empty)], r"empty/metrics\.h5: nothing is recorded yet; try again"),
        ([str(damaged)], r"damaged/summary\.json: not readable as JSON"),
        ([run, run], "run: given twice"),
        ([run, "--formats", "png,jpg"], "--formats: 'jpg' is not one of png, pdf, svg"),
        ([run, "--reference", "bert"], "--reference: invalid choice: 'bert'"),
        ([run, "--layers", "none"], "--layers: 'none' matches no measured layer"),
        ([run, "--output", str(file)], r"--output: cannot write to .*file"),
        ([run, "--output", str(taken)], r"--output: cannot write .*taken/report\.html: Is a dir"),
        ([run, str(empty), "--follow"], "--follow: shows one run, 2 were given"),
        ([run, "--follow", "--interval", "0"], "--interval: 0.0 is not a positive number"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            report.main(arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_what_is_no_run_is_skipped_by_name(tmp_path, capsys):
    """As with runs/*, where all kinds of folders lie."""
    write_run(tmp_path / "run")
    empty_run(tmp_path / "empty")
    (tmp_path / "bare").mkdir()
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.yaml").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.h5").write_text("nothing")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    target = tmp_path / "report"
    assert report.main([*paths, "--output", str(target), "--formats", "png"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert [line.removeprefix(f"note: skipped: {tmp_path}/").split(": ")[0] for line in told] == [
        "bare/metrics.h5",
        "damaged/metrics.h5",
        "empty/metrics.h5",
        "search",
    ]
    assert "Run run" in (target / "report.html").read_text()
    with pytest.raises(UserError, match=r"bare/metrics\.h5: no such file.* \(and 3 more\)"):
        report.main([path for path in paths if not path.endswith("run")])


def test_what_another_user_has_closed_is_skipped_by_name(tmp_path, monkeypatch):
    for name in ("open", "closed", "summary"):
        write_run(tmp_path / name)
    opened = io.open

    def open_others(path, *arguments, **options):
        if str(path) == str(tmp_path / "summary" / "summary.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    close(tmp_path / "closed", monkeypatch)
    monkeypatch.setattr(io, "open", open_others)
    found, notices = whole_report._read_runs([tmp_path / n for n in ("open", "closed", "summary")])
    assert [run.path for run in found] == [tmp_path / "open"]
    cure = "Permission denied; have it opened to this user, or name another path"
    assert notices == [
        f"skipped: {tmp_path / 'closed' / 'metrics.h5'}: {cure}",
        f"skipped: {tmp_path / 'summary' / 'summary.json'}: {cure}",
    ]


def test_a_run_can_be_followed_before_its_folder_is_there(tmp_path):
    def wait(_):
        writer = Writer(tmp_path / "run")
        writer.epoch(0)
        writer.epoch(1)
        writer.finish()

    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True)
    follow(tmp_path / "run", interval=1, console=console, wait=wait)
    assert f"waiting for {tmp_path / 'run' / 'metrics.h5'}" in out.getvalue()
    assert f"{tmp_path / 'run'}: finished" in out.getvalue()


def test_following_ends_with_the_run(tmp_path):
    writer = Writer(tmp_path / "run")
    for epoch in range(6):
        writer.epoch(epoch)
    out = io.StringIO()
    looks = []

    def wait(interval):
        looks.append(interval)
        writer.epoch(5 + len(looks))
        if len(looks) == 3:
            writer.finish()

    follow(tmp_path / "run", interval=1.5, console=Console(file=out, width=120), wait=wait)
    assert looks == [1.5] * 3
    shown = out.getvalue()
    assert "finished" in shown
    assert " 8    80 " in shown
    assert f"{stability_of(1, 8):.4f}" in shown
    assert "last event: convert at step 60, trainable 40.0 %" in shown
    assert shown.index("position") < shown.index("blocks.2.fc.weight") < shown.index("patch")


def test_a_run_can_be_followed_before_its_first_step(tmp_path):
    writer = Writer(tmp_path / "run", "stability.enabled=false")
    seen = []

    def wait(_):
        seen.append(read_run(tmp_path / "run").state())
        writer.epoch(1, measured=False)
        writer.finish()

    out = io.StringIO()
    follow(tmp_path / "run", interval=1, console=Console(file=out, width=120), wait=wait)
    assert seen == ["not finished: no step yet"]
    assert "finished; loss 0.1000" in out.getvalue()


def test_following_ends_with_an_interrupt(tmp_path):
    writer = Writer(tmp_path / "run")
    writer.epoch(0)
    writer.epoch(1)

    def wait(_):
        raise KeyboardInterrupt

    out = io.StringIO()
    follow(tmp_path / "run", interval=1, console=Console(file=out, width=120), wait=wait)
    assert "not finished: in epoch 1 of 8, step 10" in out.getvalue()
    assert " left at this pace" in " ".join(out.getvalue().split())
    assert "loss over epochs: training  validation" in out.getvalue()


@pytest.mark.slow
def test_a_link_beside_what_it_leads_to_counts_once(tmp_path):
    """As with runs/*, where runs/latest lies."""
    write_run(tmp_path / "run")
    (tmp_path / "latest").symlink_to("run")
    for paths in ([tmp_path / "latest"], [tmp_path / "latest", tmp_path / "run"]):
        assert report.main([*map(str, paths), "--formats", "png"]) == 0
        page = tmp_path / "run" / "report" / "report.html"
        assert "Run run" in page.read_text()
        page.unlink()


@pytest.mark.slow
def test_the_time_that_a_run_needs(tmp_path):
    started = datetime.fromisoformat("2026-01-01T00:00:00+00:00").timestamp()
    writer = Writer(tmp_path / "run")
    writer.epoch(0)
    assert time_left(read_run(tmp_path / "run"), written=started) is None
    writer.epoch(1)
    writer.epoch(2)
    # 20 of 80 steps in 100 s.
    run = read_run(tmp_path / "run")
    assert time_left(run, written=started + 100) == timedelta(seconds=300)
    writer.store.append(
        "sessions",
        started="2026-01-01T01:00:00+00:00",
        process_count=2,
        first_step=20,
        versions="",
        command="",
    )
    writer.store.flush()
    assert time_left(read_run(tmp_path / "run"), written=started + 3600) is None
    writer.epoch(3)  # 10 steps of this session in 20 s, 50 are left
    run = read_run(tmp_path / "run")
    assert time_left(run, written=started + 3620) == timedelta(seconds=100)
    lost = replace(run, train={name: values[:0] for name, values in run.train.items()})
    assert time_left(lost, written=started + 3620) is None
    assert show(lost, written=started + 3620)
    writer.finish()
    assert time_left(read_run(tmp_path / "run"), written=started + 3620) is None
