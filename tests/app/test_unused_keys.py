"""Keys of the method that have no effect beside others: told, and truly without effect."""

import pytest
import torch
from support.launching import ROOT
from torch import nn

from app import OIALR, config
from app.config.method_section import OIALRSection
from app.errors import UserError
from app.search.definition import load

STEPS = 12
CHANGED = {
    "oialr.cutoff": 0.6,
    "oialr.retained_energy": 0.5,
    "oialr.largest_cut": 0.9,
    "oialr.largest_energy_cut": 0.01,
    "oialr.update_interval": 3,
    "oialr.layer_fraction": 1.0,
    "oialr.core_learning_rate_factor": 7.0,
    "oialr.release_warmup": 3,
    "oialr.factor_learning_rate_factor": 5.0,
    "oialr.stability_threshold": 0.5,
    "oialr.stability_window": 2,
    "oialr.stability_start": 1,
    "oialr.latest_delay": 0.9,
}
"""A value of each key that some others leave without effect, other than its default."""
CASES = {
    "paper": {},
    "by energy": {"retained_energy": 0.8},
    "sized": {"target_size": 0.6},
    "released": {"release": 9},
    "released at the delay": {"release": "delay"},
    "released at the delay, a share": {"release": 0.34, "delay": 0.34},
    "recipe": {"release": "delay", "target_size": 0.6},
    "by stability": {"delay": "stability"},
}


def section(**values):
    keys = {"delay": 4, "update_interval": 2, "cutoff": 0.4, "rank_multiple": 1, **values}
    return OIALRSection(**keys)


def trained(section):
    """Return what a training of a small network ends with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    method = OIALR(model, optimizer, section.options(STEPS))
    for _ in range(STEPS):
        optimizer.zero_grad()
        method.model(torch.randn(8, 12)).square().sum().backward()
        optimizer.step()
        method.step()
    return {name: tensor.clone() for name, tensor in method.model.state_dict().items()}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_what_is_called_unused_changes_nothing(values):
    before = section(**values)
    unused = before.unused(STEPS)
    weights = trained(before)
    for key in unused:
        name = key.removeprefix("oialr.")
        after = trained(section(**{**values, name: CHANGED[key]}))
        assert after.keys() == weights.keys(), key
        assert all(torch.equal(after[each], weights[each]) for each in weights), key


@pytest.mark.parametrize("name", ["cutoff", "update_interval"])
def test_what_is_used_changes_something(name):
    key, values = f"oialr.{name}", CASES["paper"]
    assert key not in section(**values).unused(STEPS)
    weights, after = trained(section()), trained(section(**{name: CHANGED[key]}))
    shapes = [{n: w.shape for n, w in each.items()} for each in (weights, after)]
    assert shapes[0] != shapes[1]


def test_a_key_in_vain_is_told_with_the_reason():
    keys = ("oialr.cutoff=0.4", "oialr.update_interval=0.02")
    assert config.load(None, ()).oialr.told_in_vain(1200) == []
    assert config.load(None, keys).oialr.told_in_vain(1200) == [
        "oialr.update_interval=0.02 has no effect: released at oialr.delay, layers have no core "
        "and no updates",
        "oialr.cutoff=0.4 has no effect: oialr.target_size takes its place",
    ]
    paper = config.load(ROOT / "configs/paper/digits_vit.yaml", keys).oialr
    assert paper.told_in_vain(1200) == []


def test_a_search_over_what_has_no_effect_is_refused(tmp_path):
    space = "space: {oialr.cutoff: [0.1, 0.5], training.learning_rate: [0.001, 0.01]}\n"
    path = tmp_path / "search.yaml"
    for keys, wrong in (
        ("{}", "oialr.cutoff has no effect in any candidate: oialr.target_size takes"),
        ("{target_size: null}", None),
    ):
        path.write_text(f"extends: {ROOT}/configs/digits_vit.yaml\noialr: {keys}\n{space}")
        if wrong is None:
            load(path).check_candidates(1200)
            continue
        with pytest.raises(UserError, match=wrong):
            load(path).check_candidates(1200)
        load(path).check_candidates(1200, resume=True)  # whose space cannot change any more
