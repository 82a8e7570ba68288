"""Search spaces, objectives and the budget: what needs no training."""

import itertools
import math
import time

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from app import config
from app.config.search_section import SearchSection
from app.errors import UserError
from app.search import objective
from app.search.budget import Budget
from app.search.definition import load
from app.search.evolution import island_of, island_sizes
from app.search.space import Parameter, read_space

UNIT = st.floats(0, 1)
BASE = config.load()


def space(**entries):
    return read_space({key.replace("__", "."): entry for key, entry in entries.items()}, BASE)


@given(UNIT, st.sampled_from(["linear", "log"]))
def test_a_range_is_covered_from_end_to_end(u, scale):
    (p,) = space(oialr__cutoff={"range": [0.01, 0.9], "scale": scale}).parameters
    value = p.decode(u)
    expected = 0.01 * 90**u if scale == "log" else 0.01 + u * 0.89
    assert value == pytest.approx(expected)
    assert 0.01 <= value <= 0.9
    assert p.encode(value) == pytest.approx(u, abs=1e-12)
    assert (p.decode(0.0), p.decode(1.0)) == pytest.approx((0.01, 0.9))


@given(UNIT)
def test_integers_have_equal_parts_and_keep_their_value(u):
    (p,) = space(oialr__delay=[3, 7]).parameters
    value = p.decode(u)
    assert type(value) is int
    at_a_boundary = abs(u * 5 - round(u * 5)) < 1e-9
    assert value == min(3 + int(u * 5), 7) or at_a_boundary
    assert p.decode(p.encode(value)) == value


def test_log_integers_are_spread_by_their_exponent():
    (p,) = space(oialr__delay={"range": [10, 1000], "scale": "log"}).parameters
    assert (p.decode(0.0), p.decode(1.0)) == (10, 1000)
    assert p.decode(0.5) == pytest.approx(100, abs=3)


@given(UNIT)
def test_choices_have_equal_parts(u):
    p = Parameter(key="training.gradient_clip", choices=(None, 1.0, 10.0))
    assert p.decode(u) == (None, 1.0, 10.0)[min(int(3 * u), 2)]
    assert p.decode(p.encode(p.decode(u))) == p.decode(u)


def test_a_space_decodes_encodes_and_configures():
    s = space(
        oialr__cutoff=[0.1, 0.3],
        training__gradient_clip={"choices": [None, 1.0]},
        model__arguments__depth=[1, 3],
    )
    values = s.decode([0.5, 0.9, 0.0])
    assert values == {
        "oialr.cutoff": pytest.approx(0.2),
        "training.gradient_clip": 1.0,
        "model.arguments.depth": 1,
    }
    configuration = s.configure(BASE, values)
    assert configuration.oialr.cutoff == pytest.approx(0.2)
    assert configuration.model.arguments == {**BASE.model.arguments, "depth": 1}
    assert s.values_of(configuration) == values
    assert s.decode(s.encode(values)) == values
    assert s.column_types() == {
        "oialr.cutoff": "f8",
        "training.gradient_clip": "S4",
        "model.arguments.depth": "i8",
    }


def test_a_parameter_can_be_bounded_by_another():
    entries = {
        "training__minimum_learning_rate": {
            "range": [5e-6, 1e-2],
            "scale": "log",
            "at_most": "training.learning_rate",
        },
        "training__learning_rate": {"range": [5e-5, 1e-3], "scale": "log"},
    }
    s = space(**entries)
    configuration = s.configure(BASE, s.decode([1.0, 0.0]))
    assert configuration.training.minimum_learning_rate == pytest.approx(5e-5)
    del entries["training__minimum_learning_rate"]["at_most"]
    with pytest.raises(UserError, match=r"minimum_learning_rate: 0\.01 exceeds learning_rate"):
        space(**entries)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_chain_of_bounds_holds_in_any_order(order):
    """It held where each stood behind what bounds it."""
    entries = {
        "training__minimum_learning_rate": {
            "range": [1e-6, 1e-3],
            "at_most": "training.warmup_learning_rate",
        },
        "training__warmup_learning_rate": {
            "range": [1e-5, 1e-2],
            "at_most": "training.learning_rate",
        },
        "training__learning_rate": [1e-4, 1e-1],
    }
    s = space(**{key: entries[key] for key in [list(entries)[i] for i in order]})
    position = [key != "training.learning_rate" for key in s.keys]
    rates = s.configure(BASE, s.decode(position)).training
    assert rates.learning_rate == pytest.approx(1e-4)
    assert rates.warmup_learning_rate == rates.minimum_learning_rate == rates.learning_rate


def bounded(by, **entries):
    """A parameter that is bounded by a key."""
    return {"training.learning_rate": {"range": [1e-4, 1e-2], "at_most": by}, **entries}


MISTAKES = [
    ({"oialr.cutof": [0.1, 0.2]}, r"oialr\.cutof: unknown key; did you mean oialr\.cutoff\?"),
    ({"oialr.cutoff": [0.1, 1.5]}, r"oialr\.cutoff: .*less than 1 \(got 1\.5\)"),
    ({"oialr.cutoff": [0.0, 0.5]}, r"oialr\.cutoff: .*greater than 0"),
    ({"oialr.cutoff": [0.5, 0.1]}, r"oialr\.cutoff: .*must ascend"),
    ({"oialr.cutoff": 0.5}, r"oialr\.cutoff: expected \[low, high\]"),
    ({"oialr.cutoff": [0.1, 0.2, 0.3]}, r"oialr\.cutoff: range: .*at most 2 items"),
    ({"oialr.cutoff": {"range": [0.1, 0.2], "scal": "log"}}, r"oialr\.cutoff: scal: "),
    ({"oialr.cutoff": {"range": [0, 0.2], "scale": "log"}}, "must be positive"),
    ({"oialr.cutoff": {"range": [0.1, 0.2], "choices": [1, 2]}}, "give a range or choices"),
    ({"training.epochs": [1.5, 20]}, r"training\.epochs: the range .* integer ends"),
    ({"oialr.delay": [1.5, 20]}, r"oialr\.delay: 1\.5 is no share of the run"),
    ({"training.optimizer": {"choices": ["adam", "adamww"]}}, "did you mean adamw"),
    ({"training.epochs": [4, 80]}, r"training\.warmup_epochs: 5.* must be less than epochs, 4"),
    ({"run.seed": [0, 5]}, r"run\.seed is no hyperparameter"),
    ({"training.learning_rate": {"range": [1, 2], "at_most": "a.b"}}, r"at_most: a\.b: unknown"),
    (
        bounded("training.gradient_clip"),
        r"at_most: training\.gradient_clip can be null, which is no",
    ),
    (bounded("training.optimizer"), r"at_most: training\.optimizer can be adamw, which is no num"),
    (bounded("training.compile"), r"at_most: training\.compile can be false, which is no number"),
    (bounded("model.arguments"), r"at_most: model\.arguments can be \{.*\}, which is no number"),
    (
        bounded("training.gradient_clip", **{"training.gradient_clip": {"choices": [1.0, None]}}),
        r"learning_rate: at_most: training\.gradient_clip can be null, .*; name a key that always",
    ),
    (
        bounded("training.learning_rate"),
        r"at_most: training\.learning_rate is bounded by training\.learning_rate; take one",
    ),
    (
        bounded(
            "training.warmup_learning_rate",
            **{
                "training.warmup_learning_rate": {
                    "range": [1e-5, 1e-2],
                    "at_most": "training.learning_rate",
                }
            },
        ),
        r"at_most: training\.(warmup_)?learning_rate is bounded by .* is bounded by .*; take one",
    ),
    ({}, "expected parameters such as"),
    (None, "expected parameters such as"),
]


@pytest.mark.parametrize(("entries", "message"), MISTAKES, ids=lambda v: str(v)[:40])
def test_a_mistake_in_the_space_is_named(entries, message):
    with pytest.raises(UserError, match=message) as caught:
        read_space(entries, BASE)
    assert str(caught.value).startswith("space: ")


def test_a_pair_of_parameters_that_contradict_each_other_is_found():
    with pytest.raises(UserError, match=r"warmup_epochs: 9\.0 must be less than epochs, 8"):
        space(training__warmup_epochs=[1, 9], training__epochs=[8, 80])


def test_parameters_of_the_method_need_the_method():
    base = config.load(None, ["oialr.enabled=false"])
    with pytest.raises(UserError, match=r"oialr\.cutoff has no effect"):
        read_space({"oialr.cutoff": [0.1, 0.2]}, base)


def test_a_definition_is_its_base_with_its_own_sections_and_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "training: {epochs: 7, batch_size: 32}\noialr: {delay: 9}\n"
    )
    path = tmp_path / "find.yaml"
    path.write_text(
        "extends: base.yaml\ntraining: {epochs: 8}\nspace: {oialr.cutoff: [0.1, 0.2]}\n"
    )
    definition = load(path, ["oialr.delay=11", "search.evaluations=4"])
    assert definition.base.training.epochs == 8
    assert definition.base.training.batch_size == 32
    assert definition.base.oialr.delay == 11
    assert definition.base.run.name == "find"
    assert definition.base.search.evaluations == 4
    stored = tmp_path / "search.yaml"
    stored.write_text(definition.to_yaml())
    again = load(stored)
    assert again.base == definition.base
    assert again.space.parameters == definition.space.parameters

    several = load(stored, ["search.generations=10", "search.evaluations=null"]).counted(8)
    stored.write_text(several.to_yaml())
    by_others = load(stored).counted(4).base.search
    assert (by_others.evaluations, by_others.generations) == (80, None)
    fewer = load(stored, ["search.generations=10", "search.evaluations=30"]).counted(8)
    assert fewer.base.search.evaluations == 30
    assert fewer.base.search.generations is None
    assert load(stored, ["search.evaluations=5"]).counted(8).base.search.evaluations == 5
    forever = load(stored, ["search.evaluations=null", "search.hours=1"])
    assert forever.counted(8).base.search.evaluations is None

    candidate = definition.candidate(5, {"oialr.cutoff": 0.15}, tmp_path / "5")
    assert candidate.oialr.cutoff == 0.15
    assert candidate.run.seed == definition.base.run.seed + 5
    assert candidate.run.keep_checkpoints == 0
    best = definition.best(5, {"oialr.cutoff": 0.15})
    assert best.run.dir is None
    assert best.run.seed == candidate.run.seed
    assert best.run.keep_checkpoints == 2


def test_a_definition_names_what_is_wrong(tmp_path):
    path = tmp_path / "find.yaml"
    path.write_text("extends: gone.yaml\nspace: {oialr.cutoff: [0.1, 0.2]}\n")
    with pytest.raises(UserError, match=r"cannot read .*gone\.yaml"):
        load(path)
    path.write_text("trainin: {epochs: 3}\nspace: {oialr.cutoff: [0.1, 0.2]}\n")
    with pytest.raises(UserError, match="trainin: unknown key; did you mean training"):
        load(path)
    path.write_text("search: {evaluations: null}\nspace: {oialr.cutoff: [0.1, 0.2]}\n")
    with pytest.raises(UserError, match=r"search\.evaluations: null, and there is no other limit"):
        load(path)


@pytest.mark.parametrize("name", ["digits", "digits_full_rank", "cifar10_vit"])
def test_shipped_searches_are_sound(name):
    load(config.DEFAULT_CONFIGURATION.parent / "search" / f"{name}.yaml")


def test_losses_are_ordered_and_finite():
    plain = SearchSection()
    assert objective.error({"accuracy": 0.75, "loss": 9.0}) == 0.25
    assert objective.error({"mse": 0.5, "mae": 0.6, "loss": 0.4}) == 0.5
    figures = {"error": 0.25, "trainable_percent": 40.0, "step_seconds": 0.1}
    assert objective.loss(plain, **figures) == 0.25
    priced = SearchSection(trainable_price=0.5, step_price=2.0)
    assert objective.loss(priced, **figures) == pytest.approx(0.25 + 0.2 + 0.2)
    bounded = SearchSection(trainable_bound=20.0)
    worst_inside = objective.loss(bounded, **{**figures, "error": 1.0, "trainable_percent": 20.0})
    outside = objective.loss(bounded, **figures)
    further = objective.loss(bounded, **{**figures, "trainable_percent": 41.0})
    failed = objective.loss(bounded, **{**figures, "error": math.nan})
    assert worst_inside == 1.0
    assert worst_inside < outside < further < failed < math.inf


def test_medians_are_over_enough_finished_curves():
    curves = [[5.0, 4.0], [4.0, 1.0], [3.0, 2.0], [2.0], [1.0, 3.0], [9.0, 9.0]]
    assert objective.medians(curves) == [3.5, 3.0]
    assert objective.medians(curves[:5]) == [3.0, math.inf]
    assert objective.medians([]) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_pareto_front_is_what_nothing_dominates(points):
    array = np.array(points, float).reshape(-1, 2)
    front = {tuple(point) for point in array[objective.pareto_front(array)]}
    expected = {
        p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
    }
    assert front == expected
    assert len(objective.pareto_front(array)) == len(expected)


def test_what_is_given_up_loses_against_all_that_ends_within_bounds():
    """Though its error at that epoch, without the price of steps, is smaller than their losses."""
    section = SearchSection(trainable_bound=30.0, step_price=2.0)
    figures = {"error": 0.05, "trainable_percent": 20.0, "step_seconds": 0.06}
    whole = objective.loss(section, **figures)
    given_up = [objective.loss_of_hopeless(value) for value in (0.12, 0.15, 1e30)]
    out_of_bounds = objective.loss(section, **{**figures, "trainable_percent": 31.0})
    assert 0.12 < whole < given_up[0] < given_up[1] < given_up[2] <= out_of_bounds


def budget(limit=6, finished=(), deadline=math.inf, store=None):
    return Budget(store or dist.HashStore(), finished=finished, limit=limit, deadline=deadline)


def test_a_budget_hands_out_every_number_once():
    store = dist.HashStore()
    both = [budget(store=store), budget(store=store)]
    numbers = [both[i % 2].claim() for i in range(9)]
    assert numbers == [0, 1, 2, 3, 4, 5, None, None, None]


def test_a_budget_fills_the_holes_of_a_killed_session_first():
    b = budget(limit=8, finished={0, 2, 5})
    assert [b.claim() for _ in range(6)] == [1, 3, 4, 6, 7, None]
    assert budget(limit=3, finished={0, 2, 5}).claim() is None
    unlimited = budget(limit=None, finished={1})
    assert [unlimited.claim() for _ in range(3)] == [0, 2, 3]


def test_a_budget_ends_by_time_and_by_request():
    assert budget(deadline=time.monotonic()).claim() is None
    b = budget()
    assert b.claim() == 0
    assert not b.stopped()
    b.stop()
    assert b.stopped()
    assert b.claim() is None


@given(st.integers(1, 40), st.integers(1, 9))
def test_islands_share_the_workers(workers, islands):
    islands = min(workers, islands)
    sizes = island_sizes(workers, islands)
    assert sizes.sum() == workers
    assert sizes.max() - sizes.min() <= 1
    owners = [island_of(worker, workers, islands) for worker in range(workers)]
    np.testing.assert_array_equal(np.bincount(owners, minlength=islands), sizes)
    assert owners == sorted(owners)
