"""A delay by stability: each layer is converted when its basis has stood still."""

import copy
import io

import pytest
import torch
from support.method_loop import OPTIMIZERS, batch, network
from torch import nn

from oialr import OIALR, Options
from oialr.errors import DivergedError
from oialr.layers.base import FactoredLayer
from oialr.placement.processes import Processes
from oialr.stability.standstill import Standstill

BOTH = ["0.weight", "2.weight"]
# Windows of two intervals of two steps from step 4 on: they end after steps 8, 12, 16 and so on.
WINDOWS = {
    "delay": "stability",
    "update_interval": 2,
    "stability_window": 3,
    "stability_start": 3,
    "stability_threshold": 0.9,
    "latest_delay": 30,
    "layer_fraction": 0.5,
    "cutoff": 0.2,
}


def make(seed=0, kind="momentum", **options):
    model = network(seed)
    optimizer = OPTIMIZERS[kind](model.parameters())
    return model, optimizer, OIALR(model, optimizer, **{**WINDOWS, **options})


def train(model, optimizer, method, steps, *, first=0, moving=13):
    """Train; before step ``moving`` the second layer is anywhere else after every step."""
    events = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step + 1 < moving and not isinstance(model[2], FactoredLayer):
            generator = torch.Generator().manual_seed(step)
            with torch.no_grad():
                model[2].weight.normal_(std=0.2, generator=generator)
        if event := method.step():
            events.append((event.step, event.kind, [layer.name for layer in event.layers]))
    return events


@pytest.mark.slow
def test_each_layer_is_converted_when_it_has_stood_still():
    model, optimizer, method = make()
    events = train(model, optimizer, method, 18)
    # The last half of the layers has the first turn, counted from the first conversion on: of it
    # nothing is low-rank after step 10. The window that ends after step 16 is the first in which
    # the second layer has stood still.
    assert [(step, names) for step, _, names in events] == [
        (8, BOTH[:1]),
        (12, BOTH[:1]),
        (14, BOTH[:1]),
        (16, BOTH),
        (18, BOTH),
    ]
    assert [kind for _, kind, _ in events if kind == "convert"] == ["convert"] * 2
    assert events[0][1] == events[3][1] == "convert"
    assert method.step_count - method.steps_since_conversion == 16


@pytest.mark.slow
def test_nothing_is_converted_before_a_window_after_the_start():
    model, optimizer, method = make(stability_start=7, stability_threshold=1e-6)
    events = train(model, optimizer, method, 16, moving=0)
    assert events[0] == (12, "convert", BOTH)  # from step 8 on


@pytest.mark.slow
def test_what_moves_is_converted_at_the_latest_bound():
    model, optimizer, method = make(latest_delay=13)
    due = []
    for step in range(16):
        before = method.step_count
        events = train(model, optimizer, method, 1, first=step, moving=99)
        due += [(before + 1, names) for _, kind, names in events if kind == "convert"]
    assert due == [(8, BOTH[:1]), (14, BOTH)]


@pytest.mark.slow
@pytest.mark.parametrize("latest", [13, 14])
def test_the_conversion_that_is_certain_is_told_before(latest):
    model, optimizer, method = make(latest_delay=latest)
    told = []
    for step in range(16):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            if not isinstance(model[2], FactoredLayer):
                generator = torch.Generator().manual_seed(step)
                model[2].weight.normal_(std=0.2, generator=generator)
        if method.conversion_due:
            told.append(method.step_count)
        method.step()
    assert told == [14]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize("method_first", [True, False])
@pytest.mark.parametrize("steps", [5, 8, 10, 13, 16])
def test_a_resumed_training_goes_on_bit_for_bit(steps, method_first, kind):
    """Before the first conversion, between two, and after them; within windows and at their ends.

    The states go through a file, as those of a checkpoint.
    """
    model, optimizer, method = make(kind=kind)
    train(model, optimizer, method, steps)
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (model, method, optimizer)], file)
    file.seek(0)
    weights, its_state, state = torch.load(file, weights_only=True)
    expected = train(model, optimizer, method, 20 - steps, first=steps)
    other, its_optimizer, its_method = make(seed=1, kind=kind)
    loads = [(its_method, its_state), (other, weights)]
    for thing, stored in [*(loads if method_first else loads[::-1]), (its_optimizer, state)]:
        thing.load_state_dict(stored)
    assert train(other, its_optimizer, its_method, 20 - steps, first=steps) == expected
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert method.step_count - method.steps_since_conversion == 16
    assert its_method.steps_since_conversion == method.steps_since_conversion


@pytest.mark.slow
def test_a_state_does_not_change_with_the_training():
    model, optimizer, method = make()
    train(model, optimizer, method, 9)
    state = method.state_dict()
    stored = copy.deepcopy(state)
    train(model, optimizer, method, 6, first=9)
    window, before = (each["turns"]["window"] for each in (state, stored))
    assert window["began"] == before["began"] == 8
    ((name, weight),), ((_, weight_before),) = window["weights"], before["weights"]
    assert name == "2.weight"
    assert torch.equal(weight, weight_before)


@pytest.mark.parametrize("release", [5, 10])
def test_a_release_converts_what_waits(release):
    model, optimizer, method = make(release=release, largest_cut=0.9, latest_delay=None)
    events = train(model, optimizer, method, release + 4, moving=99)
    assert events[-1] == (release, "release", BOTH)
    assert len(events) == (1 if release == 5 else 2)
    assert {method.state_dict()["released"].get(name) for name in BOTH} <= {
        "factors",
        "dense",
        None,
    }
    assert method.steps_since_release == 4
    assert method.step_count - method.steps_since_conversion == release
    assert not method.event_due


@pytest.mark.slow
def test_a_target_size_is_met_after_several_conversions():
    options = {"release": 22, "target_size": 0.6, "rank_multiple": 1}
    model, optimizer, method = make(**options)
    events = train(model, optimizer, method, 24)
    assert [step for step, kind, _ in events if kind == "convert"] == [8, 16]
    assert method.missed_target() is None
    assert method.compression_percent() > 50


@pytest.mark.slow
def test_ranks_of_what_is_updated_beside_a_conversion_follow_the_target():
    options = {"target_size": 0.3, "rank_multiple": 1, "update_interval": 4, "latest_delay": 12}
    options |= {"layer_fraction": 1, "cutoff": 1e-9}
    model, optimizer, method = make(**options)
    events = train(model, optimizer, method, 12, moving=99)
    assert events == [(8, "convert", BOTH[:1]), (12, "convert", BOTH)]
    assert method.ranks()["0.weight"] < 20 == method.layers[0].full_rank


def test_stability_is_that_of_the_paper():
    """The mean cosine similarity of the columns of U Vh, by torch's SVD; of a stack the mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, groups=2), nn.Linear(12, 20), nn.Linear(20, 4))
    model = model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = OIALR(model, optimizer, delay=1, update_interval=1).layers
    earlier = {r: r.reading.to_matrix(model.get_parameter(r.name).detach()) for r in layers}
    later = {r: w + 0.1 * torch.randn_like(w) for r, w in earlier.items()}
    expected = {}
    for report, weight in later.items():
        stacks = [w.reshape(-1, *w.shape[-2:]) for w in (earlier[report], weight)]
        bases = [u @ v for u, _, v in (torch.linalg.svd(w, full_matrices=False) for w in stacks)]
        k = min(weight.shape[-2:])
        expected[report.name] = float((bases[0] * bases[1]).sum((1, 2)).mean() / k)
    assert len(expected) == 2
    for name, value in expected.items():
        assert 0.1 < value < 0.999
        for threshold, still in ((value - 1e-9, True), (value + 1e-9, False)):
            watch = Standstill(Processes(), threshold=threshold, window=2)
            assert watch.look(4, earlier) == []
            assert watch.look(5, later) == []
            assert (name in watch.look(6, later)) == still


def test_a_weight_that_diverged_is_named():
    model, optimizer, method = make()
    train(model, optimizer, method, 7)
    optimizer.step()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"0\.weight holds NaN or infinity at step 8"):
        method.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": "stable"}, "delay must be at least 1, or stability, not 'stable'"),
        ({"latest_delay": None}, "latest_delay must be set, or release, where delay is stability"),
        ({"latest_delay": 5}, "latest_delay must be at least 6, the first window's end"),
        ({"stability_threshold": 1.1}, r"stability_threshold must be in \(0, 1\], not 1.1"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**{**WINDOWS, **options})


@pytest.mark.parametrize(
    ("bounds", "last"),
    [
        ({}, None),
        ({"latest_delay": 9}, None),  # after step 10
        ({"latest_delay": 8}, 8),
        ({"latest_delay": 7}, 8),
        ({"latest_delay": None, "release": 9}, None),
        ({"latest_delay": None, "release": 8}, 8),
        ({"latest_delay": 9, "release": 7}, 7),
    ],
)
def test_it_is_told_that_no_layer_can_be_found_stable(bounds, last, caplog):
    """The first window begins after step 4 and ends after step 8: then it is too late."""
    model, optimizer, method = make(stability_threshold=1e-6, **bounds)
    words = method.options.conversion_in_words()
    if last is None:
        assert not caplog.messages
    else:
        (told,) = caplog.messages
        assert "the first window ends after step 8 (" in told
        assert f"all layers are converted after step {last} (" in told
        assert words.endswith(f"after step {last} at the latest")
    found = train(model, optimizer, method, 10, moving=99)
    assert next(iter(found))[0] == (last or 8)


@pytest.mark.parametrize("steps", [6, 9])
def test_the_delay_can_change_until_layers_are_converted(steps):
    model, optimizer, method = make()
    train(model, optimizer, method, steps)
    state = method.state_dict()
    _, _, other = make(delay=15)
    if steps == 6:
        other.load_state_dict(state)
        assert other.steps_since_conversion is None  # it is to come
        return
    with pytest.raises(ValueError, match="delay: cannot change from stability to 15 after step 9"):
        other.load_state_dict(state)
