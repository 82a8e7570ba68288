"""Weights that describe themselves: load_state_dict of a prepared network, and files."""

import copy

import pytest
import torch
from support.low_rank import low_rank
from torch import nn

import oialr
from oialr import OIALR, prepare
from oialr.forms import form_of
from tests.support.method_loop import CUT, OPTIMIZERS, batch, make, network, train

OPTIONS = {
    "plain": {"cutoff": 0.4, "layer_fraction": 0.5},
    "cores": {"cutoff": 0.4, "layer_fraction": 0.5, "core_learning_rate_factor": 3.0},
    "release": {"release": 12, "layer_fraction": 1, **CUT, "cutoff": 0.75},
}

SLOW = pytest.mark.slow  # in their number


def stored(kind, steps, **options):
    model, optimizer, method = make(kind, **options)
    train(model, optimizer, method, steps)
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, method)])
    train(model, optimizer, method, 12, first=steps)
    return states, [parameter.detach().clone() for parameter in model.parameters()]


def assert_goes_on(parts, steps, expected):
    train(*parts, 12, first=steps)
    for mine, theirs in zip(parts[0].parameters(), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", pytest.param("momentum", marks=SLOW)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("steps", [4, 9, 14])
@pytest.mark.parametrize(
    "was_trained", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 15))]
)
def test_a_training_goes_on_alike_whatever_the_network_was_before(
    kind, options, steps, was_trained
):
    states, expected = stored(kind, steps, **OPTIONS[options])
    parts = make(kind, seed=9, **OPTIONS[options])
    train(*parts, was_trained)
    order = (0, 2, 1) if options == "release" else (0, 1, 2)
    for i in order:
        parts[i].load_state_dict(states[i])
    assert_goes_on(parts, steps, expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("steps", [4, 9, 14])
def test_weights_come_before_optimizer_and_method(options, steps):
    states, expected = stored("adamw", steps, **OPTIONS[options])
    model = prepare(network(seed=9))
    wrapped = nn.DataParallel(model)
    wrapped.load_state_dict({f"module.{name}": value for name, value in states[0].items()})
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    method = OIALR(wrapped, optimizer, delay=5, update_interval=3, **OPTIONS[options])
    assert method.model is model
    method.load_state_dict(states[2])
    optimizer.load_state_dict(states[1])
    assert_goes_on((model, optimizer, method), steps, expected)


@pytest.mark.slow
def test_an_optimizer_that_begins_with_state_has_none_of_frozen_factors():
    """Adagrad's, which is made of all parameters: its state could not be stored."""
    model = network()
    oialr.compress(model, target_size=0.6, release=False)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2)
    method = OIALR(model, optimizer, delay=5, update_interval=3, cutoff=0.4)
    train(model, optimizer, method, 2)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(optimizer.state_dict()["state"]) == len(held) == len(optimizer.state)


def test_names_of_parameters_stay_in_the_optimizer():
    made = []
    for steps in (0, 6, 20):
        model = network()
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
        method = OIALR(model, optimizer, delay=5, update_interval=3, **OPTIONS["cores"])
        train(model, optimizer, method, steps)
        made.append((model, optimizer))
    for model, optimizer in made:
        model.load_state_dict(made[1][0].state_dict())
        names = [group["param_names"] for group in optimizer.param_groups]
        assert names == [group["param_names"] for group in made[1][1].param_groups]
        optimizer.load_state_dict(made[1][1].state_dict())


def test_a_copy_loads_for_itself():
    model, optimizer, method = make()
    dense = copy.deepcopy(model.state_dict())
    train(model, optimizer, method, 9)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    other = copy.deepcopy(model)
    other.load_state_dict(dense)
    assert form_of(other, "0.weight").rank is None
    now = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(one is two for one, two in zip(held, now, strict=True))


def lacks_a_factor(state):
    del state["0.U"]


def has_another_shape(state):
    state["0.U"] = state["0.U"][:-1]


def is_stored_twice(state):
    state["0.weight"] = torch.zeros(32, 20)


def has_no_shape(state):
    state["0.Vh"] = torch.zeros(())


@pytest.mark.parametrize(
    "damage", [lacks_a_factor, has_another_shape, is_stored_twice, has_no_shape]
)
def test_nothing_is_loaded_of_what_does_not_fit(damage):
    model, optimizer, method = make()
    train(model, optimizer, method, 9)
    state = dict(model.state_dict())
    damage(state)
    for other in (prepare(network(1)), make(seed=1)[0]):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match="nothing has been loaded"):
            other.load_state_dict(state)
        assert list(other.state_dict()) == list(before)
        assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


@pytest.mark.slow
def test_another_order_is_one_clear_line():
    states, _ = stored("adamw", 14, **OPTIONS["cores"])
    optimizer = make("adamw", seed=9, **OPTIONS["cores"])[1]
    with pytest.raises(ValueError, match=r"does not fit the network.*before that of the optimizer"):
        optimizer.load_state_dict(states[1])
    assert not optimizer.state_dict()["state"]

    model = prepare(network(seed=9))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    model.load_state_dict(states[0])
    with pytest.raises(ValueError, match=r"not among the optimizer's parameters.*make it after"):
        OIALR(model, optimizer, delay=5, update_interval=3)

    model = network(seed=9)
    options = {"delay": 5, "update_interval": 3, "exclude": ["0"]}
    OIALR(model, OPTIMIZERS["adamw"](model.parameters()), **options)
    with pytest.raises(ValueError, match=r"0\.weight is stored low-rank.*stays dense here: exc"):
        model.load_state_dict(states[0])
    assert list(model.state_dict()) == list(network().state_dict())


@pytest.mark.slow
def test_a_released_network_asks_for_the_state_of_its_method():
    states, _ = stored("adamw", 14, **OPTIONS["release"])
    model, optimizer, method = make("adamw", seed=9, **OPTIONS["release"])
    model.load_state_dict(states[0])
    with pytest.raises(ValueError, match="load the method's state too"):
        train(model, optimizer, method, 5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.convolution = nn.Conv2d(8, 16, 3, groups=2)
        self.one = nn.Linear(24, 24)
        self.two = nn.Linear(24, 24)
        self.two.bias = self.one.bias

    def forward(self, x):
        y = self.attention(x, x, x)[0]
        return self.two(self.one(y)).sum() + self.convolution(x.reshape(1, 8, 6, -1)).sum()


@pytest.mark.parametrize("projection", ["packed", "separate"])
def test_files(tmp_path, projection):
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(2, 4, 24)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    OIALR_options = {"delay": 1, "update_interval": 1, "attention_projection": projection}
    method = OIALR(model, optimizer, **OIALR_options, cut_at_conversion=True, cutoff=0.6)
    model(x).backward()
    optimizer.step()
    method.step()
    assert method.ranks()["convolution.weight"] < 8
    file = tmp_path / "network.safetensors"
    oialr.save(nn.DataParallel(model), file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    other = oialr.load(Tied(), file)
    assert list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(other(x), model(x))
    with pytest.raises(ValueError, match="does not fit the network: the file lacks"):
        oialr.load(network(), file)

    written = file.read_bytes()
    for damaged in (written[:-3], written[:-3] + b"abc", written[:40], b"", b"\x00" * 200):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"network\.safetensors is damaged"):
            oialr.load(other, file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        oialr.load(other, tmp_path / "other")
    with pytest.raises(OSError, match=r"missing"):
        oialr.save(other, tmp_path / "missing" / "network")
    other.one.register_buffer("spectrum", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"one\.spectrum: safetensors cannot store .*complex128"):
        oialr.save(other, file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    del other.one.spectrum
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"was not written by oialr\.save"):
        oialr.load(other, file)
    assert torch.equal(other(x), model(x))


def test_two_looks_at_one_memory_are_stored(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(6, 4, 1))
    model[1].weight = nn.Parameter(model[0].weight[..., None])
    oialr.save(model, tmp_path / "network.safetensors")
    other = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(6, 4, 1))
    oialr.load(other, tmp_path / "network.safetensors")
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(other[1].weight, model[1].weight)


@pytest.mark.parametrize("rank", [None, 3])
def test_what_is_one_in_the_network_must_be_one_in_the_file(tmp_path, rank):
    def build(is_tied):
        torch.manual_seed(0)
        first = nn.Linear(24, 24)
        return nn.Sequential(first, first if is_tied else nn.Linear(24, 24), nn.Linear(24, 2))

    untied, tied = build(False), build(True)
    if rank:
        untied = low_rank(untied, rank / 24)
    oialr.save(untied, tmp_path / "network.safetensors")
    before = copy.deepcopy(tied.state_dict())
    with pytest.raises(ValueError, match=r"0\..* and 1\..* are one in the network, and two there"):
        oialr.load(tied, tmp_path / "network.safetensors")
    assert all(torch.equal(tied.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_network_without_memory_is_refused(tmp_path):
    oialr.save(network(), tmp_path / "network.safetensors")
    with torch.device("meta"):
        empty = network()
    with pytest.raises(ValueError, match=r"no memory on the device meta, such as for .*to_empty"):
        oialr.load(empty, tmp_path / "network.safetensors")


@pytest.mark.slow
def test_a_file_keeps_what_a_release_has_made_and_the_optimizer_follows(tmp_path):
    model, optimizer, method = make("adamw", **OPTIONS["release"])
    train(model, optimizer, method, 14)
    oialr.save(model, tmp_path / "network")
    parts = make("adamw", seed=3)
    oialr.load(parts[0], tmp_path / "network")
    x = batch(0)[0]
    assert torch.equal(parts[0](x), model(x))
    trained = {id(p) for p in parts[0].parameters() if p.requires_grad}
    assert {id(p) for group in parts[1].param_groups for p in group["params"]} == trained
