"""The options are said once: dataclass, constructor, configuration and command line agree."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from support.tiny_run import PAPER
from torch import nn

from app import config
from app.config.method_section import DEFAULTS, NOT_FOR_A_RUN, SHARES, OIALRSection
from app.errors import UserError
from oialr import OIALR, Options
from oialr.options import choices, described, kinds

FIELDS = {each.name: each for each in dataclasses.fields(Options)}
NEEDED = {"delay": 4, "update_interval": 2}


@pytest.mark.parametrize("name", FIELDS)
def test_an_option_has_one_default_and_one_text(name):
    each, text = FIELDS[name], FIELDS[name].metadata["text"]
    assert text.endswith(".")
    parameter = inspect.signature(OIALR).parameters[name]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    if each.default is not dataclasses.MISSING:
        assert parameter.default == each.default
    if name in NOT_FOR_A_RUN:
        assert name not in OIALRSection.model_fields
        return
    key = OIALRSection.model_fields[name]
    assert key.description.startswith(text)
    if name not in DEFAULTS:
        default = key.get_default()
        assert (tuple(default) if isinstance(default, list) else default) == each.default
    assert f"oialr.{name}=" in config.describe_keys(config.load())


def test_the_section_has_the_options_and_a_switch():
    assert set(OIALRSection.model_fields) == set(FIELDS) - NOT_FOR_A_RUN | {"enabled"}


RANGES = [(name, *pair) for name, each in FIELDS.items() for pair in each.metadata.items()][:]


@pytest.mark.parametrize(("name", "bound", "value"), [each for each in RANGES if each[1] != "text"])
def test_a_bound_holds_for_the_library_and_the_application(name, bound, value):
    """Just beyond it both refuse; at it both or none."""
    step = 1 if kinds()[name] is int else 1e-3
    beyond = value - step if bound in ("gt", "ge") else value + step
    if bound in ("gt", "lt"):
        beyond = value
    with pytest.raises(ValueError, match=f"^{name} must be "):
        Options(**{**NEEDED, name: beyond})
    if name in SHARES:
        beyond = -1
    with pytest.raises(Exception, match=rf"oialr\.{name}"):
        config.build({"oialr": {"release": 2000, name: beyond}})


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"ge": 1}, "at least 1"),
        ({"gt": 0}, "positive"),
        ({"gt": 0, "lt": 1}, "in (0, 1)"),
        ({"ge": 0, "le": 1}, "in [0, 1]"),
        ({"gt": 0, "le": 1000}, "in (0, 1000]"),
    ],
)
def test_a_range_in_words(bounds, words):
    assert described(bounds) == words


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cutoff": "0.1"}, r"cutoff must be in \(0, 1\), not '0.1'"),
        ({"include": "blocks.*"}, "include must be a list of patterns, not 'blocks"),
        ({"frozen_dtype": "int8"}, "frozen_dtype must be bfloat16, or None, not 'int8'"),
        ({"execution": "fast"}, "execution must be one of auto, factored, folded, dense"),
    ],
)
def test_another_kind_of_value_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Options(**NEEDED, **wrong)


def test_words_beside_other_values_are_said_too():
    assert choices(kinds()["execution"]) == ("auto", "factored", "folded", "dense")
    assert choices(kinds()["frozen_dtype"]) == ("bfloat16",)
    assert choices(kinds()["release"]) == ()
    text = config.describe_keys(config.load(None, [*PAPER, "oialr.frozen_dtype=bfloat16"]))
    assert "  oialr.frozen_dtype=bfloat16  (default: null)\n" in text
    assert "      Or bfloat16.\n" in text
    with pytest.raises(Exception, match=r"oialr\.frozen_dtype: 'float16' is not one of bfloat16"):
        config.load(None, ["oialr.frozen_dtype=float16"])


def test_a_delay_is_a_step_a_share_or_by_stability():
    keys = ["oialr.delay=stability", "oialr.release=0.9", "oialr.stability_window=0.04"]
    section = config.load(None, keys).oialr
    assert section.step_of("delay", 1000) is None
    options = section.options(1000, warmup=120)
    assert options.delay == "stability"
    # Of the default, half of the run.
    assert (options.latest_delay, options.stability_window) == (500, 40)
    assert options.stability_start == 120
    assert section.options(1000).stability_start == 0
    assert config.load(None, ["oialr.delay=7"]).oialr.options(1000, warmup=120).delay == 7
    for wrong in ("stable", "-1", "true", "null", "[1]"):
        with pytest.raises(
            Exception, match=r"oialr\.delay: should be greater than 0, or stability"
        ):
            config.load(None, [f"oialr.delay={wrong}"])
    assert "Or stability." in config.describe_keys(config.load())
    configuration = config.load(None, [*PAPER, "oialr.delay=stability", "oialr.latest_delay=1200"])
    with pytest.raises(
        Exception,
        match=r"oialr\.latest_delay: 1200 is step 1500 in whole .* not less than the 1200",
    ):
        configuration.check_steps(1200)
    configuration.check_steps(1501)
    keys = ["oialr.delay=stability", "oialr.latest_delay=30", "oialr.update_interval=40"]
    with pytest.raises(Exception, match=r"oialr\.latest_delay: must be at least 40"):
        config.load(None, [*PAPER, *keys])


def test_what_a_share_and_a_step_are_is_told_when_the_steps_are_known():
    for key, keys in (
        ("truncation", ["oialr.truncation=outputs", "oialr.delay=480", "oialr.release=0.5"]),
        ("frozen_dtype", ["oialr.frozen_dtype=bfloat16", "oialr.delay=480", "oialr.release=0.4"]),
    ):
        configuration = config.load(None, [*PAPER, *keys])
        with pytest.raises(UserError, match=rf"^oialr\.{key}: "):
            configuration.check_steps(1200)


@pytest.mark.parametrize("name", ["delay", "update_interval", "release", "rank_multiple"])
def test_steps_are_whole_numbers(name):
    """No step is 70.5: the network stayed full-rank without a word."""
    numbers = {"delay": 60, "update_interval": 20}
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number, at least 1.*not 70\.5"):
        Options(**{**numbers, name: 70.5})
    for value in (70.0, np.int64(70), np.float32(70)):
        found = getattr(Options(**{**numbers, name: value}), name)
        assert (found, type(found)) == (70, int)  # what checkpoints hold, and lengths are
    assert type(Options(**numbers, cutoff=np.float64(0.2)).cutoff) is float


def test_a_release_may_follow_the_delay():
    for delay, step in (("0.4", 400), ("7", 7)):
        section = config.load(None, [f"oialr.delay={delay}", "oialr.release=delay"]).oialr
        assert section.step_of("release", 1000) == step
        options = section.options(1000)
        assert (options.delay, options.release) == (step, step)
    with pytest.raises(Exception, match=r"oialr\.release: 'delay' is that of all layers, and with"):
        config.load(None, ["oialr.delay=stability", "oialr.release=delay"])
    with pytest.raises(Exception, match=r"oialr\.frozen_dtype: is for bases that are frozen"):
        config.load(None, ["oialr.release=delay", "oialr.frozen_dtype=bfloat16"])
    with pytest.raises(Exception, match=r"oialr\.delay: 1000 is not less than the 1000 steps"):
        config.load(None, ["oialr.delay=1000", "oialr.release=delay"]).check_steps(1000)
    for wrong in ("late", "-1", "true", "[1]"):
        with pytest.raises(Exception, match=r"oialr\.release: should be greater than 0, or delay"):
            config.load(None, [f"oialr.release={wrong}"])
    assert config.load(None, [*PAPER, "oialr.release=null"]).oialr.release is None
    assert "Or delay" in config.describe_keys(config.load())


def test_keywords_replace_options():
    options = Options(**NEEDED, cutoff=0.3)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    method = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.1), options, cutoff=0.4)
    assert method.options == dataclasses.replace(options, cutoff=0.4)
    with pytest.raises(TypeError, match="cutof"):
        OIALR(model, torch.optim.SGD(model.parameters(), lr=0.1), **NEEDED, cutof=0.4)


def test_shares_are_of_the_runs_steps():
    keys = ["oialr.delay=0.2", "oialr.update_interval=0.03", "oialr.release=0.5"]
    section = config.load(None, [*PAPER, *keys]).oialr
    options = section.options(1001)
    assert (options.delay, options.update_interval, options.release) == (200, 30, 500)
    assert section.options(3).update_interval == 1
    keys = ["oialr.delay=10", "oialr.release=3", "oialr.update_interval=0.05"]
    with pytest.raises(Exception, match="release: must be at least delay, 10, not 3"):
        config.load(None, [*PAPER, *keys])
    configuration = config.load(None, [*PAPER, "oialr.delay=0.5", "oialr.release=400"])
    configuration.check_steps(800)
    with pytest.raises(Exception, match=r"oialr\.release: 400 of 900 steps is step 400, before"):
        configuration.check_steps(900)


def test_a_share_is_the_nearest_step():
    section = config.load(None, [*PAPER, "oialr.delay=0.29", "oialr.release=0.578"]).oialr
    assert 0.29 * 100 < 29  # in floating point
    assert [section.step_of(name, 100) for name in ("delay", "release")] == [29, 58]


@pytest.mark.parametrize(("steps", "fits"), [(8, True), (6, False)])
def test_the_latest_delay_is_before_the_last_step(steps, fits):
    keys = ["oialr.delay=stability", "oialr.update_interval=3", "oialr.latest_delay=5"]
    configuration = config.load(None, [*PAPER, *keys])
    if fits:
        configuration.check_steps(steps)
    else:
        with pytest.raises(UserError, match=r"^oialr\.latest_delay: 5 is step 6 in whole steps"):
            configuration.check_steps(steps)
