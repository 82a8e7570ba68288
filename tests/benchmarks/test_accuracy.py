"""The accuracy harness: studies, cells, their codes, methods that follow others, tables."""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from support.launching import ROOT, environment, launch

from app import config
from app.errors import UserError
from app.recording.store import MetricsStore
from benchmarks.accuracy import Harness, _parse, _study, main
from benchmarks.study import archive, derived
from benchmarks.study.cell import (
    FINGERPRINT_STEPS,
    CellError,
    Code,
    Runner,
    fingerprint,
    present_code,
    read_record,
    write_record,
)
from benchmarks.study.definition import Study, compare, read_study, restrict
from benchmarks.study.figure import draw
from benchmarks.study.plan import Plan, Waiting
from benchmarks.study.table import (
    Row,
    Table,
    as_dict,
    front,
    interval,
    markdown,
    put_into,
    tabulate,
)

STUDIES = sorted((ROOT / "benchmarks" / "accuracy").glob("*.yaml"))
HERE, OTHER = Code(commit="here", digest="1"), Code(commit="other", digest="2")
TINY = {
    "config": "configs/paper/digits_vit.yaml",
    "set": {
        "training.epochs": 6,
        "training.warmup_epochs": 1,
        "data.train_samples": 640,
        "model.arguments": {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2},
    },
    "width": {"model.arguments.embed_dim": 2},
}
STEPS = 60
"""Of the tiny network's training: 640 of the training part's images in batches of 64."""


def study(**changes):
    """Return a study of the tiny network."""
    values = {
        "networks": {"tiny": TINY},
        "methods": {
            "full-rank": {"set": {"oialr.enabled": False}},
            "paper": {"set": {"oialr.delay": "90 %", "oialr.update_interval": 2}},
        },
        "seeds": 2,
    }
    return Study.model_validate({**values, **changes})


def finish(cell, code, *, accuracy, stored=100, seconds=10.0, ranks=None, validation=None):
    """Put the results of a cell in its folder, as if it had been run."""
    record = {
        "commit": code.commit,
        "digest": code.digest,
        "fingerprints": {code.digest: "same"},
    }
    write_record(cell.place, record)
    summary = {
        "test_accuracy": accuracy,
        "trained_parameters": stored,
        "stored_parameters": stored,
        "stored_bytes": 4 * stored,
        "cpu_seconds": seconds,
        "epochs": 6,
        "steps": 60,
        "tested_step": 60,
        "tested_ranks": ranks or {},
    }
    (cell.place / "summary.json").write_text(json.dumps(summary))
    if validation is not None:
        with MetricsStore.create(
            cell.place / "metrics.h5", configuration="", layers={}, figures=("accuracy",)
        ) as store:
            for step, value in ((50, 0.99), (60, validation)):
                row = {"step": step, "epoch": step // 10, "loss": 1.0, "accuracy": value}
                store.append("eval", split="validation", **row)
            store.append("eval", step=60, epoch=6, split="test", loss=1.0, accuracy=accuracy)


# Studies and their cells


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_names_configurations_that_are_right(path):
    read = read_study(path)
    for name, network in read.networks.items():
        keys = {**read.set, **network.set}
        configuration = config.load(ROOT / network.config, [f"{k}={v}" for k, v in keys.items()])
        assert configuration.run.keep_checkpoints == 1
        for key in network.width:
            section = configuration.model_dump()["model"]["arguments"]
            assert key.removeprefix("model.arguments.") in section or "resnet" in network.config
        assert set(read.methods_for(name)) == set(read.table_rows)


def test_a_study_that_is_not_right_is_told_in_a_line(tmp_path):
    path = tmp_path / "study.yaml"
    networks = "networks: {a: {config: configs/digits_vit.yaml}}\n"
    for text, culprit in (
        ("methods: {full-rank: {}, small: {as_small_as: nothing}}", "there is no method 'nothing'"),
        ("methods: {full-rank: {}}\nrows: [paper]", "rows: there is no method 'paper'"),
        ("methods: {paper: {}}", "baseline: 'full-rank' is not among the methods"),
        ("methods: {full-rank: {sett: {}}}", "methods.full-rank.sett: Extra inputs"),
    ):
        path.write_text(networks + text)
        with pytest.raises(UserError, match=culprit):
            read_study(path)
    path.write_text("networks: {a: {config: c, methods: {fast: {}}}}\nmethods: {full-rank: {}}")
    with pytest.raises(UserError, match=r"networks.a.methods: there is no method 'fast'"):
        read_study(path)
    with pytest.raises(UserError, match="--methods: 'fast' is none of full-rank, paper"):
        restrict(study(), methods=["fast"], networks=[])
    assert restrict(study(), methods=["paper"], networks=[]).table_rows == ["full-rank", "paper"]


def test_shares_become_steps_and_other_keys_their_values(tmp_path):
    methods = {
        "full-rank": {"set": {"oialr.enabled": False}},
        "at once": {
            "set": {"oialr.delay": "0 %", "oialr.update_interval": "33 %", "oialr.cutoff": 0.3}
        },
        "at last": {"extends": "at once", "set": {"oialr.delay": "100 %"}},
        "same": {"set": {"oialr.delay": "50 %", "training.momentum": "= training.weight_decay"}},
    }
    plan = Plan(study(methods=methods), tmp_path, ["oialr.cutoff=0.2"])
    at_once = plan.cell("tiny", "at once", 3, 0.5)
    settings = at_once.settings
    assert settings["oialr"]["delay"] == 1
    assert settings["oialr"]["update_interval"] == round(0.33 * STEPS)
    assert settings["oialr"]["cutoff"] == 0.2  # what is typed counts
    assert settings["training"]["learning_rate"] == 0.5 * 3e-3
    assert settings["run"]["seed"] == 3
    assert plan.cell("tiny", "at last", 3, 1).settings["oialr"]["delay"] == STEPS - 1
    same = plan.cell("tiny", "same", 3, 1).settings["training"]
    assert same["momentum"] == same["weight_decay"]
    # The command line gives the same configuration.
    _, path, *overrides = at_once.arguments
    assert config.load(path, overrides).oialr.delay == 1


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"training.epochs": 12}, 2 * STEPS),
        ({"training.epochs": 3}, STEPS // 2),
        ({"training.batch_size": 128}, STEPS // 2),
        ({"data.train_samples": 320}, STEPS // 2),
    ],
)
def test_shares_are_of_the_steps_that_the_method_itself_has(tmp_path, keys, steps):
    methods = {
        "full-rank": {"set": {"oialr.enabled": False}},
        "mine": {"set": {"oialr.delay": "50 %", "training.learning_rate": 0.25, **keys}},
    }
    cell = Plan(study(methods=methods), tmp_path).cell("tiny", "mine", 0, 2.0)
    assert cell.settings["oialr"]["delay"] == steps // 2
    assert cell.settings["training"]["learning_rate"] == 0.5
    plan = Plan(study(methods=methods), tmp_path, ["training.learning_rate=0.125"])
    assert plan.cell("tiny", "mine", 0, 2.0).settings["training"]["learning_rate"] == 0.25


def test_a_network_may_have_its_own_keys_of_a_method(tmp_path):
    methods = {
        "full-rank": {"set": {"oialr.enabled": False}},
        "late": {"set": {"oialr.delay": "50 %", "oialr.cutoff": 0.3}},
        "wide": {"extends": "late", "set": {"oialr.cutoff": 0.2}},
    }
    networks = {"tiny": {**TINY, "methods": {"late": {"oialr.delay": "10 %"}}}, "other": TINY}
    read = study(methods=methods, networks=networks)
    assert read.keys_of("late", "tiny") == {"oialr.delay": "10 %", "oialr.cutoff": 0.3}
    assert read.keys_of("wide", "tiny") == {"oialr.delay": "10 %", "oialr.cutoff": 0.2}
    assert read.keys_of("wide", "other") == {"oialr.delay": "50 %", "oialr.cutoff": 0.2}
    plan = Plan(read, tmp_path)
    delays = {name: plan.cell(name, "late", 0, 1).settings["oialr"]["delay"] for name in networks}
    assert delays == {"tiny": round(0.1 * STEPS), "other": round(0.5 * STEPS)}


@pytest.mark.parametrize("name", ["finals", "digits"])
def test_the_recipe_of_a_study_is_that_of_the_shipped_configuration(name, tmp_path, monkeypatch):
    """Both name the same numbers, since what is measured is what is shipped."""
    per_epoch = 40
    monkeypatch.setattr(Plan, "_task", lambda *_: SimpleNamespace(steps_per_epoch=per_epoch))
    read = read_study(ROOT / "benchmarks" / "accuracy" / f"{name}.yaml")
    plan = Plan(read, tmp_path)
    for network, definition in read.networks.items():
        settings = plan.cell(network, "recipe", 0, 1).settings
        shipped = config.load(ROOT / "configs" / Path(definition.config).name)
        measured = type(shipped.oialr).model_validate(settings["oialr"])
        steps = settings["training"]["epochs"] * per_epoch
        options = [asdict(one.options(steps)) for one in (measured, shipped.oialr)]
        for one in options:
            one["frobenius_decay"] = one["frobenius_decay"] or 0
            for unused in ("update_interval", "cutoff", "layer_fraction"):  # a release ends them
                del one[unused]
        assert options[0] == options[1], network
        layout = shipped.training.channels_last
        assert settings["training"].get("channels_last", False) == layout, network


def test_a_method_is_the_same_whatever_recipe_the_network_s_configuration_has(tmp_path):
    shared = read_study(ROOT / "benchmarks" / "accuracy" / "digits.yaml").methods
    names = [
        name
        for name, method in shared.items()
        if not method.follows and method.set.get("oialr.enabled", True)
    ]
    settings = []
    for recipe in ("paper/settings", "recipes/transformer", "recipes/convolutional"):
        own = tmp_path / "own.yaml"
        files = [str(ROOT / "configs" / f"{name}.yaml") for name in ("paper/digits_vit", recipe)]
        own.write_text(f"extends: {json.dumps(files)}\noialr: {{delay: 100}}\n")
        networks = {"digits": {**TINY, "config": str(own)}}
        plan = Plan(study(networks=networks, methods=shared), tmp_path)
        settings.append([plan.cell("digits", name, 0, 1.0).settings["oialr"] for name in names])
    assert len(names) > 10
    assert settings == [settings[0]] * 3


def test_an_editor_s_lock_is_no_part_of_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.study.cell.ROOT", tmp_path)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "train.py").write_text("")
    before = present_code().digest
    (tmp_path / "app" / ".#train.py").symlink_to("somebody@elsewhere.7")  # leads nowhere
    assert present_code().digest == before


def test_where_the_data_lie_and_new_options_leave_a_cell_what_it_is(tmp_path):
    one, other = (Plan(study(), tmp_path, [f"data.root={root}"]) for root in ("a", "b"))
    cell = one.cell("tiny", "paper", 0, 1)
    assert (
        cell == other.cell("tiny", "paper", 0, 1)
        or cell.place == other.cell("tiny", "paper", 0, 1).place
    )
    networks = {"tiny": {**TINY, "set": {"training.epochs": 6}}}  # nothing else of data
    places = {
        Plan(study(networks=networks), tmp_path, keys).cell("tiny", "paper", 0, 1).place
        for keys in ([], ["data.root=a"], ["run.name=mine"])
    }
    assert len(places) == 1
    assert "execution" not in cell.settings["oialr"]  # as by default
    assert cell.place != one.cell("tiny", "paper", 1, 1).place
    assert cell.place != one.cell("tiny", "paper", 0, 2).place


def test_an_option_that_the_program_does_not_know_makes_a_method_wait(tmp_path):
    methods = {
        "full-rank": {"set": {"oialr.enabled": False}},
        "later": {"set": {"oialr.delay": "5 %", "oialr.of_tomorrow": 1}},
    }
    plan = Plan(study(methods=methods), tmp_path)
    with pytest.raises(Waiting, match=r"oialr.of_tomorrow: unknown key"):
        plan.cell("tiny", "later", 0, 1)
    lines = markdown(tabulate(plan, "tiny", HERE), "full-rank")
    assert "- later: waiting for oialr.of_tomorrow: unknown key (seeds 0, 1)" in lines
    # A network's own mistake is one.
    wrong = {"tiny": {**TINY, "set": {"training.epochz": 3}}}
    with pytest.raises(UserError, match="epochz: unknown key"):
        Plan(study(networks=wrong), tmp_path).cell("tiny", "full-rank", 0, 1)


def test_the_learning_rate_is_the_best_on_validation_data(tmp_path):
    plan = Plan(study(learning_rates=[0.5, 1.0, 2.0]), tmp_path)
    with pytest.raises(Waiting):
        plan.chosen("tiny", "paper")
    # Neither the best on the test part nor the best of an epoch that is not tested.
    for factor, accuracy, validation in ((0.5, 0.9, 0.7), (1.0, 0.8, 0.8), (2.0, 0.7, 0.75)):
        cell = plan.cell("tiny", "paper", 0, factor)
        with pytest.raises(Waiting):
            plan.chosen("tiny", "paper")
        finish(cell, HERE, accuracy=accuracy, validation=validation)
    assert plan.chosen("tiny", "paper") == 1.0
    # What diverged is no choice, and what has not come to an end yet may be one.
    plan = Plan(study(learning_rates=[0.5, 1.0, 2.0, 4.0]), tmp_path)
    place = plan.cell("tiny", "paper", 0, 4.0).place
    write_record(place, {"fingerprints": {}})
    with pytest.raises(Waiting, match=r"learning rate x 4"):
        plan.chosen("tiny", "paper")
    write_record(place, {"fingerprints": {}, "failed": {"reason": "the loss is nan"}})
    assert plan.chosen("tiny", "paper") == 1.0


def test_a_network_may_have_the_learning_rates_of_a_shorter_training(tmp_path):
    short = {**TINY, "set": {**TINY["set"], "training.epochs": 2}, "seeds": 0}
    networks = {"short": short, "tiny": {**TINY, "rates_of": "short"}}
    read = study(networks=networks, learning_rates=[0.5, 1.0])
    plan = Plan(read, tmp_path)
    assert plan.tuning("tiny", "paper") == plan.tuning("short", "paper")
    for factor, validation in ((0.5, 0.8), (1.0, 0.7)):
        finish(plan.cell("short", "paper", 0, factor), HERE, accuracy=0.5, validation=validation)
    assert plan.chosen("tiny", "paper") == 0.5
    assert read.table_networks == ["tiny"]
    assert list(restrict(read, methods=[], networks=["tiny"]).networks) == ["short", "tiny"]
    with pytest.raises(ValueError, match="rates_of: there is no network 'none'"):
        study(networks={"tiny": {**TINY, "rates_of": "none"}})


def test_configurations_as_they_are_can_be_compared(tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text("extends: %s\ntraining: {epochs: 7}\n" % (ROOT / "configs/digits_vit.yaml"))
    other = str(ROOT / "configs/digits_vit.yaml")
    compared = compare({"a": str(path), "b": other}, "", seeds=2, first_seed=1000)
    assert compared.baseline == "a"
    assert list(compared.seeds_of("best")) == [1000, 1001]
    plan = Plan(compared, tmp_path)
    assert plan.cell("best", "a", 1000, 1).settings["training"]["epochs"] == 7
    assert plan.cell("best", "b", 1000, 1).settings["training"]["epochs"] == 60
    # What a search has found is trained as it is: rounded, its rate might be below the least one.
    path.write_text(
        f"extends: {other}\n"
        "training: {learning_rate: 0.00012345649, minimum_learning_rate: 0.00012345649}\n"
    )
    plan = Plan(compared, tmp_path)
    assert plan.cell("best", "a", 1000, 1).settings["training"]["learning_rate"] == 0.00012345649
    twins = Plan(compare(None, other, seeds=1, first_seed=0), tmp_path)
    assert twins.cell("digits_vit", "full-rank", 0, 1).settings["oialr"]["enabled"] is False


# Methods that follow others


def test_the_narrower_network_is_the_first_that_is_not_smaller():
    sizes = {2: 10, 4: 30, 6: 70}
    for size, width in ((9, 2), (10, 2), (11, 4), (69, 6)):
        assert derived.narrow({"w": 2, "f": 4}, size, lambda v: sizes[v["w"]]) == {
            "w": width,
            "f": 2 * width,
        }


def test_a_narrower_network_stores_as_much_as_the_method_that_it_follows(tmp_path):
    methods = {
        "full-rank": {"set": {"oialr.enabled": False}},
        "paper": {"set": {"oialr.delay": 20}},
        "narrower": {"extends": "full-rank", "as_small_as": "paper"},
    }
    plan = Plan(study(methods=methods), tmp_path)
    with pytest.raises(Waiting, match="the size of tiny, paper, seed 0"):
        plan.cell("tiny", "narrower", 1, 1)
    finish(plan.cell("tiny", "paper", 0, 1), HERE, accuracy=0.5, stored=1500, ranks={"a": 1})
    cell = plan.cell("tiny", "narrower", 1, 1)
    task = plan._tasks("tiny", str(ROOT / "configs/digits_vit.yaml"))
    _, path, *overrides = cell.arguments
    count = derived.parameter_count(config.load(path, overrides), task)
    width = cell.settings["model"]["arguments"]["embed_dim"]
    assert width < 16
    assert count >= 1500
    smaller = [*overrides, f"model.arguments.embed_dim={width - 2}"]
    assert derived.parameter_count(config.load(path, smaller), task) < 1500


def test_the_shortened_training_takes_the_time_of_the_one_that_it_follows(tmp_path):
    assert [derived.shorten(10, ratio) for ratio in (1.0, 0.65, 0.6, 0.01)] == [10, 7, 6, 1]
    methods = {
        "full-rank": {"set": {"oialr.enabled": False}},
        "paper": {"set": {"oialr.delay": 20}},
        "shortened": {"extends": "full-rank", "as_fast_as": "paper"},
    }
    plan = Plan(study(methods=methods), tmp_path)
    for method, seconds in (("full-rank", 12.0), ("paper", 8.0)):
        with pytest.raises(Waiting, match="the CPU time of paper"):
            plan.cell("tiny", "shortened", 1, 1)
        cell = plan.cell("tiny", method, 0, 1)
        finish(cell.alone, HERE, accuracy=0.5, seconds=seconds, ranks={"a": 1})
        finish(cell, HERE, accuracy=0.5, seconds=100.0, ranks={"a": 1})  # beside others
    cell = plan.cell("tiny", "shortened", 1, 1)
    assert cell.settings["training"]["epochs"] == 4  # of 6
    assert plan.time_ratio("tiny", "paper") == pytest.approx(2 / 3)
    assert not [note for note in tabulate(plan, "tiny", HERE).notes if "CPU times" in note]
    place = plan.cell("tiny", "paper", 0, 1).alone.place
    write_record(place, {**read_record(place), "load": 3.0})
    notes = tabulate(plan, "tiny", HERE).notes
    assert "CPU times are of runs beside other work (3.0 cores of it)" in notes


def test_without_a_pair_alone_the_median_of_the_seeds_tells_how_much_is_shortened(tmp_path):
    methods = {
        "full-rank": {"set": {"oialr.enabled": False}},
        "paper": {"set": {"oialr.delay": 20}},
        "shortened": {"extends": "full-rank", "as_fast_as": "paper"},
    }
    plan = Plan(study(methods=methods, seeds=3), tmp_path)
    seconds = {"full-rank": (10.0, 20.0, 10.0), "paper": (6.0, 10.0, 9.0)}
    for method, seed in ((method, seed) for seed in range(3) for method in seconds):
        cell = plan.cell("tiny", method, seed, 1)
        finish(cell, HERE, accuracy=0.5, seconds=seconds[method][seed], ranks={"a": 1})
    # Of a training that early stopping ended after two thirds of its steps, the steps count.
    figures = json.loads((cell.place / "summary.json").read_text())
    (cell.place / "summary.json").write_text(json.dumps({**figures, "steps": 40}))
    assert plan.step_ratio("tiny", "paper") == pytest.approx(0.6)  # of 0.6, 0.5, 1.35
    assert plan.time_ratio("tiny", "paper") is None  # the table tells of pairs alone only
    assert plan.cell("tiny", "shortened", 1, 1).settings["training"]["epochs"] == 4  # of 6
    # Of another machine.
    write_record(cell.place, {**read_record(cell.place), "machine": "another"})
    assert plan.step_ratio("tiny", "paper") == pytest.approx(0.55)
    # Where nothing is saved it is the full-rank training.
    for seed in range(2):
        cell = plan.cell("tiny", "paper", seed, 1)
        finish(cell, HERE, accuracy=0.5, seconds=0.9 * seconds["full-rank"][seed], ranks={"a": 1})
    assert plan.cell("tiny", "shortened", 1, 1) == plan.cell("tiny", "full-rank", 1, 1)
    row = next(row for row in tabulate(plan, "tiny", HERE).rows if row.method == "shortened")
    assert "the same training as full-rank (seeds 0, 1, 2)" in row.notes


def test_stable_ranks_are_settled_where_no_layer_moves():
    moving = [[9.0, 5.0], [7.0, 4.0], [6.95, 3.0], [6.9, 2.95], [6.8, 2.9]]
    assert derived.settled(moving, tolerance=0.1, latest=9) == 3
    assert derived.settled(moving, tolerance=0.1, latest=2) == 2
    assert derived.settled(moving[:3], tolerance=0.1, latest=2) == 2
    assert derived.settled(moving[:3], tolerance=0.1, latest=5) == 2  # the run has ended before


def test_stable_ranks_are_scaled_to_be_full_at_the_beginning():
    """k sum s^2 / s_1^2 over what that was of the random start (arXiv 2305.02538)."""
    generator = torch.Generator().manual_seed(0)
    first, now = (torch.randn(12, 20, generator=generator) for _ in range(2))
    now = now @ torch.diag(torch.linspace(0.1, 3, 20))

    def stable(weight):
        return float(weight.norm() ** 2 / torch.linalg.matrix_norm(weight, 2) ** 2)

    ranks = derived.scaled_stable_ranks({"a": stable(now)}, {"a": stable(first)}, {"a": 12})
    assert ranks == {"a": math.ceil(12 * stable(now) / stable(first))}
    assert derived.scaled_stable_ranks({"a": 9.0}, {"a": 3.0}, {"a": 12}) == {"a": 12}
    assert derived.scaled_stable_ranks({"a": 3.0}, {"a": 3.0}, {"a": 12}) == {"a": 12}


# Running a cell


def test_cells_that_two_networks_share_are_run_once(tmp_path):
    networks = {"tiny": TINY, "other": {**TINY, "rates_of": "tiny"}}
    read = study(networks=networks, learning_rates=[0.5, 1.0])
    asked = []

    class Asked(Runner):
        def run(self, cell, **_):
            asked.append(cell.place)
            return False

    Harness(Plan(read, tmp_path), Asked(HERE), jobs=1).run(time=False)
    assert len(asked) == 4  # two methods with two learning rates
    assert len(set(asked)) == 4


def test_a_method_of_watched_ranks_watches_where_there_are_learning_rates_alone(tmp_path):
    methods = {
        "full-rank": {"set": {"oialr.enabled": False}},
        "watched": {"set": {"oialr.enabled": False, "stability.enabled": True}},
        "ranks": {"stable_ranks_of": "watched"},
    }
    networks = {"small": {**TINY, "seeds": 0}, "big": {**TINY, "rates_of": "small"}}
    networks["big"]["set"] = {**TINY["set"], "training.epochs": 7}
    read = study(
        methods=methods, networks=networks, learning_rates=[0.5, 1.0], rows=["full-rank", "ranks"]
    )
    asked = []

    class Asked(Runner):
        def run(self, cell, **_):
            asked.append((cell.network, cell.method))
            return False

    Harness(Plan(read, tmp_path), Asked(HERE), jobs=1).run(time=False)
    assert ("small", "watched") in asked


def test_ranks_are_watched_where_they_are_asked_for(tmp_path):
    """At all learning rates with the first seed, at the chosen one with the others."""
    methods = {
        "full-rank": {"set": {"oialr.enabled": False}},
        "watched": {"set": {"oialr.enabled": False, "stability.enabled": True}},
        "ranks": {"stable_ranks_of": "watched", "set": {"oialr.delay": 20}},
    }
    read = study(methods=methods, learning_rates=[0.5, 1.0], rows=["full-rank", "ranks"], seeds=3)
    plan, asked = Plan(read, tmp_path), []
    plan._settled = lambda *_: ({}, {})

    class Finishing(Runner):
        def run(self, cell, **_):
            asked.append((cell.method, cell.seed, cell.factor))
            finish(cell, HERE, accuracy=0.5, validation=1 - cell.factor / 4)
            return True

    Harness(plan, Finishing(HERE), jobs=1).run(time=False)
    rest = [one for one in asked if one[0] != "full-rank"]
    first = [("watched", 0, 0.5), ("watched", 0, 1.0), ("ranks", 0, 0.5), ("ranks", 0, 1.0)]
    others = [("watched", 1, 0.5), ("watched", 2, 0.5), ("ranks", 1, 0.5), ("ranks", 2, 0.5)]
    assert rest == [*first, *others]


def test_a_fault_of_the_harness_is_raised(tmp_path):
    class Full(Runner):
        def run(self, cell, **_):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Harness(Plan(study(), tmp_path), Full(HERE), jobs=2).run(time=False)


def test_a_network_for_its_learning_rates_stays_one(monkeypatch):
    path = ROOT / "benchmarks" / "accuracy" / "finals.yaml"
    asked = ["accuracy", "--study", str(path), "--seeds", "5"]
    monkeypatch.setattr(sys, "argv", asked)
    read, _ = _study(_parse())
    seeds = {name: len(list(read.seeds_of(name))) for name in read.networks}
    assert set(seeds.values()) == {0, 5}
    before = read_study(path)
    assert [n for n in seeds if not seeds[n]] == [n for n in seeds if not before.seeds_of(n)]


def test_a_figure_may_be_of_equal_values(tmp_path):
    """Whose mean is off by the last bit."""
    x = 100 * (346 / 360)
    assert statistics.fmean([x] * 3) != x
    row = Row(method="paper", figures={0: x, 1: x, 2: x}, stored=40.0, time=0.5)
    table = Table(network="tiny", figure="accuracy", rows=[row], notes=[])
    draw([table], tmp_path / "fronts.png")
    assert (tmp_path / "fronts.png").exists()


class Pretended(Runner):
    """A runner whose programs leave in a folder what app.train would."""

    def __init__(self, code, *, codes, weight=1.0, step=50):
        super().__init__(code)
        self.step = step
        self.codes = list(codes)
        self.weight = weight
        self.calls = []

    def _call(self, command, log):
        self.calls.append(command[2:])
        code = self.codes.pop(0)
        where = [word for word in command if word.startswith("run.dir=")]
        place = Path(where[0][8:] if where else command[command.index("--resume") + 1])
        (place / "config.yaml").touch()
        if code in (0, 75):
            folder = place / "checkpoints" / f"step-{self.step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"model": {"w": torch.full((2,), self.weight)}}, folder / "state.pt")
        if code == 0:
            (place / "summary.json").write_text('{"steps": 60, "cpu_seconds": 1.0}')
        if code == 1:
            log.write("step 3\nerror: the loss is nan at step 3\ndraw it: ...\n")
            log.flush()
        return code


@pytest.fixture
def cell(tmp_path):
    return Plan(study(), tmp_path).cell("tiny", "paper", 0, 1)


def test_a_cell_is_stopped_for_its_fingerprint_and_goes_on(cell):
    runner = Pretended(HERE, codes=[75, 0])
    assert runner.run(cell)
    begin, resume = runner.calls
    assert begin[-1] == f"run.stop_after={FINGERPRINT_STEPS}"
    assert "--resume" not in begin
    assert resume[-3:] == ["--resume", str(cell.place), "run.stop_after=null"]
    record = read_record(cell.place)
    assert record["commit"] == "here"
    assert record["settings"]["oialr"]["delay"] == 54
    assert record["fingerprints"]["1"]
    assert not runner.run(cell)  # nothing is left to do


def test_a_cell_that_was_stopped_goes_on_where_it_stands(cell):
    for codes, resumed in (([-9], [False]), ([75, -9], [True, True]), ([0], [True])):
        runner = Pretended(HERE, codes=codes)
        if codes[-1]:
            with pytest.raises(CellError, match="exit code -9"):
                runner.run(cell)
        else:
            runner.run(cell)
        assert ["--resume" in call for call in runner.calls] == resumed
    assert cell.finished == cell.place


def test_a_cell_that_somebody_else_has_stopped_is_not_done(cell):
    """Its exit code is that of a run that stops where it was told to."""
    with pytest.raises(CellError, match="exit code 75"):
        Pretended(HERE, codes=[75], step=30).run(cell)
    assert not read_record(cell.place)["fingerprints"]
    (cell.place / "checkpoints" / "step-00000030-1").mkdir()  # stopped within an evaluation
    with pytest.raises(CellError, match="exit code 75"):
        Pretended(HERE, codes=[75, 75]).run(cell)
    assert not cell.finished
    Pretended(HERE, codes=[0]).run(cell)
    assert cell.finished


def test_a_cell_that_was_killed_before_its_fingerprint_was_written_has_that_of_the_first_steps(
    cell, monkeypatch
):
    """Resumed to be stopped at the step where it stands, it would go on to its end."""

    def killed(place):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("benchmarks.study.cell.fingerprint", killed)
        with pytest.raises(KeyboardInterrupt):
            Pretended(HERE, codes=[75]).run(cell)
    assert not read_record(cell.place)["fingerprints"]
    first = fingerprint(cell.place)
    runner = Pretended(HERE, codes=[0], step=60)
    runner.run(cell)
    assert [call[-1] for call in runner.calls] == ["run.stop_after=null"]
    assert read_record(cell.place)["fingerprints"] == {"1": first}


def test_only_what_others_do_makes_a_machine_busy(tmp_path, monkeypatch, capsys):
    """The harness's own last run still is in the load average when the next one begins."""
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 2.0, 2.0))
    plan = Plan(study(seeds=1), tmp_path)
    for busy, told in ((0.1, False), (0.9, True)):
        monkeypatch.setattr("benchmarks.accuracy.busy_cores", lambda busy=busy: busy)
        Harness(plan, Pretended(HERE, codes=[75, 0] * 4), jobs=1).run(time=True)
        alone = plan.cell("tiny", "paper", 0, 1).alone
        assert read_record(alone.place)["load"] == busy
        assert ("the machine is not idle (0.9 cores are busy)" in capsys.readouterr().err) == told
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_no_cell_is_trained_by_a_program_that_has_changed_since_the_study_began(cell):
    with pytest.raises(CellError, match="the program has changed since the study began"):
        Runner(HERE).run(cell)


def test_what_diverged_would_do_so_again_with_the_same_code(cell):
    with pytest.raises(CellError, match="the loss is nan at step 3"):
        Pretended(HERE, codes=[1]).run(cell)
    with pytest.raises(CellError, match="the loss is nan at step 3"):
        Pretended(HERE, codes=[]).run(cell)
    assert not cell.finished


@pytest.mark.parametrize(("weight", "same"), [(1.0, True), (2.0, False)])
def test_a_cell_of_another_commit_goes_on_if_its_first_steps_are_the_same(cell, weight, same):
    with pytest.raises(CellError):
        Pretended(OTHER, codes=[75, -9]).run(cell)
    runner = Pretended(HERE, codes=[75, 0], weight=weight)
    if same:
        runner.run(cell)
        assert len(runner.calls) == 2
        assert set(read_record(cell.place)["fingerprints"]) == {"1", "2"}
    else:
        with pytest.raises(CellError, match=f"commit other .*delete {cell.place}"):
            runner.run(cell)
    assert [path.name for path in cell.place.parent.iterdir()] == [cell.place.name]


def test_a_cell_that_never_came_to_its_fingerprint_begins_anew_with_another_code(cell):
    with pytest.raises(CellError):
        Pretended(OTHER, codes=[-9]).run(cell)
    Pretended(HERE, codes=[75, 0]).run(cell)
    assert read_record(cell.place)["commit"] == "here"


# Tables


def test_the_interval_is_that_of_students_t():
    values = [0.4, -0.1, 0.9, 0.3]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((high - low) / 2)
    assert math.isnan(interval([0.4]))


def test_the_front_is_what_none_beats():
    points = [(1.0, 5.0), (2.0, 7.0), (2.0, 6.0), (3.0, 7.0), (0.5, 4.0), (4.0, 8.0)]
    assert front(points) == [(0.5, 4.0), (1.0, 5.0), (2.0, 7.0), (4.0, 8.0)]
    errors = [(1.0, 0.5), (2.0, 0.6), (3.0, 0.4)]
    assert front(errors, better=-1) == [(1.0, 0.5), (3.0, 0.4)]


def test_weights_of_before_the_release_do_not_count(tmp_path):
    """Early stopping ended the first run before its release, at any size; the second after it."""
    note = "the tested weights, of step 60, are those of before the release (seeds 0)"
    for release, epochs, notes in (
        (60, 6, [note]),
        (59, 6, []),
        (1.0 - 1e-9, 6, [note]),
        (0.75, 6, []),
        (0.75, 12, [note]),  # of 120 steps, of which the run has taken 60
        ("delay", 6, []),
    ):
        keys = {"oialr.delay": 10, "oialr.release": release, "training.epochs": epochs}
        methods = {
            "full-rank": {"set": {"oialr.enabled": False}},
            "mine": {"set": keys},
        }
        plan = Plan(study(methods=methods), tmp_path)
        finish(plan.cell("tiny", "full-rank", 0, 1), HERE, accuracy=0.5, stored=200)
        finish(plan.cell("tiny", "mine", 0, 1), HERE, accuracy=0.5, stored=50, ranks={"a": 3})
        _, mine = tabulate(plan, "tiny", HERE).rows
        assert [n for n in mine.notes if "weights" in n] == notes


def test_a_table_pairs_seeds_and_counts_what_is_low_rank_alone(tmp_path):
    plan = Plan(study(seeds=3), tmp_path)
    for seed, accuracy in ((0, 0.5), (1, 0.6), (2, 0.7)):
        finish(plan.cell("tiny", "full-rank", seed, 1), HERE, accuracy=accuracy, stored=200)
    for seed, accuracy, ranks in ((0, 0.52, {"a": 3}), (1, 0.63, {"a": 3}), (2, 0.9, {"a": None})):
        cell = plan.cell("tiny", "paper", seed, 1)
        finish(cell, HERE, accuracy=accuracy, stored=50, ranks=ranks)
    table = tabulate(plan, "tiny", HERE)
    full, paper = table.rows
    assert full.mean == pytest.approx(60)
    assert paper.differences == pytest.approx([2, 3])
    assert paper.stored == 25
    assert paper.notes == ["the tested weights, of step 60, are full-rank (seeds 2)"]
    lines = markdown(table, "full-rank")
    half = interval([2.0, 3.0])
    assert (
        f"| paper | 57.50 ± 7.78 (2) | +2.50 ± {half:.2f} | 25.0 % | 25.0 % | 200 |  | 1 |" in lines
    )
    assert "- made at commit here" in lines
    document = json.loads(json.dumps(as_dict(table)))
    assert [row["front_of_size"] for row in document["rows"]] == [True, True]


def test_cells_of_several_commits_stand_in_a_table_where_their_fingerprints_agree(tmp_path):
    plan = Plan(study(seeds=2), tmp_path)
    for method, code in (("full-rank", HERE), ("paper", OTHER)):
        for seed in range(2):
            ranks = {"a": 1} if method == "paper" else None
            finish(plan.cell("tiny", method, seed, 1), code, accuracy=0.5, ranks=ranks)
    # One tells of all seeds, unless another one tells otherwise.
    for seed, compared, count in ((0, None, 0), (0, "another", 0), (0, "same", 2), (1, "other", 0)):
        place = plan.cell("tiny", "paper", seed, 1).place
        if compared:
            record = read_record(place)
            record["fingerprints"][HERE.digest] = compared
            write_record(place, record)
        table = tabulate(plan, "tiny", HERE)
        assert len(table.rows[1].figures) == count
        notes = " ".join(table.notes)
        if count:
            assert notes == "made at commits here, other, which take the same first 50 steps"
        else:
            assert "2 of paper left out: made at commit other" in notes


def test_tables_are_put_into_a_document_in_place_of_the_old_ones(tmp_path):
    path = tmp_path / "results.md"
    path.write_text(
        "Head\n\n<!-- study a -->\nold\n<!-- end -->\n\n<!-- study b -->\n<!-- end -->\n"
    )
    put_into(path, "a", "| new |\n")
    put_into(path, "b", "| other |\n")
    put_into(path, "a", "| newer |\n")
    assert path.read_text() == (
        "Head\n\n<!-- study a -->\n\n| newer |\n\n<!-- end -->\n\n"
        "<!-- study b -->\n\n| other |\n\n<!-- end -->\n"
    )
    with pytest.raises(UserError, match=r"it has no line <!-- study c -->, then <!-- end -->"):
        put_into(path, "c", "")


def test_a_table_of_errors_counts_downwards():
    rows = [
        Row(method="a", figures={0: 0.2, 1: 0.3}, stored=100.0),
        Row(method="b", figures={0: 0.1}, stored=100.0, differences=[-0.1]),
    ]
    table = Table(network="n", figure="mse", rows=rows, notes=[])
    assert [row["front_of_size"] for row in as_dict(table)["rows"]] == [False, True]
    assert "| b | 0.1000 (1) | -0.1000 |" in "\n".join(markdown(table, "a"))


# Cells in a file


def test_an_archive_gives_another_machine_the_same_tables(tmp_path):
    """Learning rates that were chosen, times, what diverged and another code's steps included."""
    read = study(rows=["full-rank", "paper"], seeds=2, learning_rates=[0.5, 1.0])
    path = tmp_path / "cells.jsonl"
    here, there = (Plan(read, tmp_path / name) for name in ("here", "there"))
    for method, ranks in (("full-rank", None), ("paper", {"a": 1})):
        for factor, validation in ((0.5, 0.8), (1.0, 0.7)):
            cell = here.cell("tiny", method, 0, factor)
            finish(cell, OTHER, accuracy=validation, validation=validation, ranks=ranks)
        for cell in (here.cell("tiny", method, 1, 0.5), here.cell("tiny", method, 0, 0.5).alone):
            finish(cell, OTHER, accuracy=0.8, validation=0.8, ranks=ranks)
        record = read_record(place := here.cell("tiny", method, 0, 0.5).place)
        record["fingerprints"][HERE.digest] = record["fingerprints"][OTHER.digest]
        write_record(place, record)
    place = here.cell("tiny", "paper", 0, 1.0).place  # no choice any more
    (place / "summary.json").unlink()
    write_record(place, {**read_record(place), "failed": {"digest": "1", "reason": "nan"}})
    archive.pack(path, tmp_path / "here", here.ended())
    lines = path.read_text().splitlines()
    assert len(lines) == 8
    archive.unpack(path, tmp_path / "there")
    tables = [tabulate(plan, "tiny", HERE) for plan in (here, there)]
    assert tables[0] == tables[1]
    assert there.chosen("tiny", "paper") == 0.5
    assert len(tables[1].rows[1].figures) == 2
    assert tables[1].rows[1].time == 1
    # What the file knows of other codes is learnt of cells that are there, too.
    place = there.cell("tiny", "full-rank", 1, 0.5).place
    record = read_record(place)
    write_record(place, {**record, "fingerprints": {OTHER.digest: "same", "3": "same"}})
    archive.pack(path, tmp_path / "there", [place])
    archive.unpack(path, tmp_path / "here")
    learnt = read_record(here.cell("tiny", "full-rank", 1, 0.5).place)["fingerprints"]
    assert learnt == {OTHER.digest: "same", "3": "same"}
    lines = path.read_text().splitlines()
    # What is there counts more than the file, and the file keeps what a part of a study adds to.
    (other := there.cell("tiny", "paper", 1, 0.5).place / "summary.json").write_text("{}")
    archive.unpack(path, tmp_path / "there")
    assert other.read_text() == "{}"
    part = Plan(restrict(read, methods=["full-rank"], networks=[]), tmp_path / "here")
    archive.pack(path, tmp_path / "here", part.ended())
    assert path.read_text().splitlines() == lines


def test_an_archive_brings_the_ranks_that_a_watched_run_has_told(tmp_path, monkeypatch):
    methods = {
        "full-rank": {"set": {"oialr.enabled": False}},
        "watched": {"set": {"oialr.enabled": False, "stability.enabled": True}},
        "ranks": {"stable_ranks_of": "watched", "set": {"oialr.delay": 1, "oialr.release": 1}},
    }
    read = study(methods=methods, rows=["full-rank", "ranks"], seeds=1)
    here, there = (Plan(read, tmp_path / name) for name in ("here", "there"))

    def measured(_, names):
        return [dict.fromkeys(names, value) for value in (8.0, 4.0, 3.95, 3.9)]

    monkeypatch.setattr(derived, "read_stable_ranks", measured)
    watched = here.cell("tiny", "watched", 0, 1)
    finish(watched, HERE, accuracy=0.5, validation=0.5)
    cell = here.cell("tiny", "ranks", 0, 1)
    finish(cell, HERE, accuracy=0.5, validation=0.5, ranks={"a": 1})
    assert cell.settings["oialr"]["delay"] == 2 * STEPS // 6
    assert set(cell.ranks.values()) == {2, 8}  # full ranks of 4 and 16, times 3.95 / 8
    archive.pack(path := tmp_path / "cells.jsonl", tmp_path / "here", here.ended())
    archive.unpack(path, tmp_path / "there")
    found = there.cell("tiny", "ranks", 0, 1)
    assert (found.ranks, found.settings) == (cell.ranks, cell.settings)
    assert found.finished
    # Of other layers than the method's, they are none.
    place = there.cell("tiny", "watched", 0, 1).place
    settled = {"ranks": {"epoch": 2, "ranks": {"a": 1}}}
    write_record(place, {**read_record(place), "settled": settled})
    with pytest.raises(Waiting, match="to watch it again"):
        there.cell("tiny", "ranks", 0, 1)


def test_what_is_finished_counts_more_than_what_was_begun_or_failed(tmp_path):
    path, cells = tmp_path / "cells.jsonl", tmp_path / "cells"
    plan = Plan(study(seeds=1), cells)
    finish(cell := plan.cell("tiny", "paper", 0, 1), OTHER, accuracy=0.5, validation=0.5)
    archive.pack(path, cells, [cell.place])
    text = path.read_text()
    assert (before := path.stat()).st_size
    # It failed here: what another machine has finished stays, and comes back.
    shutil.rmtree(cell.place)
    write_record(cell.place, {"fingerprints": {}, "failed": {"digest": "1", "reason": "nan"}})
    archive.pack(path, cells, plan.ended())
    assert path.read_text() == text
    assert path.stat().st_ino == before.st_ino  # nothing new was written
    # It was begun here.
    write_record(cell.place, {"fingerprints": {}})
    (cell.place / "checkpoints").mkdir()
    archive.unpack(path, cells)
    assert cell.finished
    assert read_record(cell.place)["commit"] == "other"
    assert [each.name for each in cell.place.parent.iterdir()] == [cell.place.name]
    # What diverged elsewhere is no reason to leave out what was begun here.
    write_record(failed := tmp_path / "failed" / "x", {"fingerprints": {}, "failed": {}})
    archive.pack(path, failed.parent, [failed])
    write_record(cells / "x", {"fingerprints": {"1": "begun"}})
    archive.unpack(path, cells)
    assert read_record(cells / "x") == {"fingerprints": {"1": "begun"}}


def test_times_of_two_machines_are_not_divided(tmp_path):
    plan = Plan(study(seeds=1), tmp_path)
    for method, seconds in (("full-rank", 10.0), ("paper", 5.0)):
        cell = plan.cell("tiny", method, 0, 1).alone
        finish(cell, HERE, accuracy=0.5, seconds=seconds)
    assert plan.time_ratio("tiny", "paper") == 0.5
    assert not any("CPU times are of" in note for note in tabulate(plan, "tiny", HERE).notes)
    write_record(cell.place, {**read_record(cell.place), "commit": "later"})
    told = "CPU times are of several commits: full-rank here, paper later"
    assert told in tabulate(plan, "tiny", HERE).notes
    write_record(cell.place, {**read_record(cell.place), "machine": "another"})
    assert plan.time_ratio("tiny", "paper") is None
    # The first cells name no machine; what is sure to be the same is the same code's.
    record = read_record(cell.place)
    del record["machine"]
    for digest, ratio in ((HERE.digest, 0.5), (OTHER.digest, None)):
        write_record(cell.place, {**record, "digest": digest})
        assert plan.time_ratio("tiny", "paper") == ratio


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "{",
        '{"place": 5, "cell": {}, "summary": null}',
        '{"place": "", "cell": {}, "summary": null}',
        '{"place": "../a", "cell": {}, "summary": null}',
        '{"place": "/a", "cell": {}, "summary": null}',
        '{"place": "a", "cell": 3, "summary": null}',
        '{"place": "a", "cell": {}, "summary": 3}',
    ],
)
def test_a_line_of_an_archive_that_is_no_cell_is_named(tmp_path, text):
    path = tmp_path / "cells.jsonl"
    path.write_text(f"{text}\n")
    with pytest.raises(UserError, match=r"--archive .*cells\.jsonl: line 1 is no cell"):
        archive.unpack(path, tmp_path / "cells")
    assert not (tmp_path / "cells").exists()


def test_an_archive_is_a_file(tmp_path):
    (link := tmp_path / "link").symlink_to(tmp_path / "file")
    assert archive.check(link) == tmp_path / "file"
    for path in (tmp_path, tmp_path / "none" / "file", Path(os.devnull)):
        with pytest.raises(UserError, match="is no file, or would lie in no folder"):
            archive.check(path)
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        archive.check(link)


# The whole


@pytest.mark.slow
def test_a_study_is_run_once_and_read_ever_after(tmp_path):
    """Shorter than the steps of a fingerprint, so that each cell is one program."""
    path = tmp_path / "small.yaml"
    short = {**TINY, "set": {**TINY["set"], "training.epochs": 2}}
    path.write_text(json.dumps(study(seeds=1, networks={"tiny": short}).model_dump()))
    arguments = ("--study", path, "--folder", tmp_path / "runs", "--json")
    command = ("-m", "benchmarks.accuracy", *arguments)
    document = json.loads(launch(0, *command, cwd=tmp_path).stdout)
    full, paper = document["tiny"]["rows"]
    assert 0 < paper["mean"] <= 100
    assert full["stored"] == 100
    assert paper["stored_parameters"] != full["stored_parameters"]
    for place in (tmp_path / "runs" / "cells" / "tiny").iterdir():
        (found,) = read_record(place)["fingerprints"].values()
        assert found == fingerprint(place)
        said = (place / "log.txt").read_text().splitlines()
        assert len(said) == len(set(said))  # what was printed is kept beside it
        assert said[-1] in (place / "output.txt").read_text()
    for name in ("table.md", "table.json", "fronts.png"):
        assert (tmp_path / "runs" / "small" / name).stat().st_size
    again = launch(0, *command, "--archive", tmp_path / "cells.jsonl", cwd=tmp_path)
    assert json.loads(again.stdout) == document
    assert again.stderr == ""
    shutil.rmtree(tmp_path / "runs")
    third = launch(0, *command, "--archive", tmp_path / "cells.jsonl", cwd=tmp_path)
    assert json.loads(third.stdout) == document
    assert third.stderr == ""


def test_a_mistake_is_a_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accuracy", "--compare", "nothing"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --compare nothing: expected NAME=PATH")
    assert done.stderr.count("\n") == 1
    assert np.size(list(tmp_path.iterdir())) == 0


def test_a_document_without_a_place_is_told_before_the_trainings(tmp_path, monkeypatch):
    path = tmp_path / "results.md"
    path.write_text("<!-- study other -->\n<!-- end -->\n")
    digits = str(ROOT / "benchmarks" / "accuracy" / "digits.yaml")
    for arguments, message in (
        ([], "it has no line <!-- study digits -->"),
        (["--networks", "ViT of width 64, digits"], "--into: a document takes a whole study"),
    ):
        monkeypatch.setattr(sys, "argv", ["", "--study", digits, "--into", str(path), *arguments])
        with pytest.raises(UserError, match=message):
            main()
