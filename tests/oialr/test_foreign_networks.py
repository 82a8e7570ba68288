"""Networks that do with their layers what nobody foresaw: kept full-rank, taken along, or told."""

import copy
import io
import pickle
from functools import partial
from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from app import OIALR
from oialr.convert import get_layer, to_dense
from oialr.layer_survey import survey
from oialr.layers.base import FactoredLayer
from oialr.placement.processes import Processes

OPTIONS = {"delay": 2, "update_interval": 2, "layer_fraction": 1, "cutoff": 0.4, "rank_multiple": 1}


class Network(nn.Module):
    """Two layers of each kind, called through whatever hangs on them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.hidden = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.hidden(self.conv(x).flatten(2).mT)
        return self.head(self.attention(x, x, x)[0].mean(1))


LAYERS = ["conv.weight", "hidden.weight", "attention.in_proj_weight", "attention.out_proj.weight"]


def make(model=None, **options):
    model = model or Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, OIALR(model, optimizer, **{**OPTIONS, **options})


def backward(model, step=0):
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(8, 4, 5, 5, generator=generator)).square().mean().backward()


def train(model, optimizer, method, steps):
    events = []
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        events.append(method.step())
    return [event for event in events if event]


def is_dense(model, name):
    return not isinstance(get_layer(model, name), FactoredLayer)


def own_forward(layer):
    original = type(layer).forward
    layer.forward = MethodType(original, layer)


THINGS = {
    "has a forward of its own": own_forward,
    "holds the module lora_A": lambda layer: setattr(layer, "lora_A", nn.Linear(16, 2)),
    "holds the parameter gain": lambda layer: setattr(layer, "gain", nn.Parameter(torch.ones(1))),
    "holds the buffer mask": lambda layer: layer.register_buffer("mask", torch.ones(1)),
    "holds the attribute scale": lambda layer: setattr(layer, "scale", torch.ones(1)),
    "holds the attribute hook": lambda layer: setattr(layer, "hook", print),
    "holds the attribute thing": lambda layer: setattr(layer, "thing", object()),
    "holds the attribute several": lambda layer: setattr(layer, "several", [1, 2]),
    "has hooks": lambda layer: layer.register_forward_hook(lambda *_: None),
    "has hooks, which": lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
    "not trained": lambda layer: layer.requires_grad_(requires_grad=False),
}
PLACES = {
    "conv": ["conv.weight"],
    "hidden": ["hidden.weight"],
    "attention": ["attention.in_proj_weight", "attention.out_proj.weight"],
    "attention.out_proj": ["attention.in_proj_weight", "attention.out_proj.weight"],
}
CASES = [
    (reason, place)
    for reason in THINGS
    for place in PLACES
    if not (reason == "not trained" and place == "attention.out_proj")  # no obstacle for in_proj
]


@pytest.mark.parametrize(("reason", "place"), CASES)
def test_what_is_put_on_a_layer_keeps_it_full_rank(reason, place):
    model = Network()
    THINGS[reason](model.get_submodule(place))
    model, optimizer, method = make(model)
    reasons = {report.name: report.stays_dense for report in method.survey}
    assert all(reason in reasons[name] for name in PLACES[place])
    train(model, optimizer, method, 2)
    assert {name for name in LAYERS if is_dense(model, name)} == set(PLACES[place])


@pytest.mark.parametrize(("reason", "place"), CASES)
def test_what_is_put_on_it_during_the_delay_does_so_too_with_a_warning(reason, place, caplog):
    model, optimizer, method = make()
    train(model, optimizer, method, 1)
    THINGS[reason](model.get_submodule(place))
    (event, *_) = train(model, optimizer, method, 3)
    assert event.kind == "convert"
    assert {name for name in LAYERS if is_dense(model, name)} == set(PLACES[place])
    assert {layer.name for layer in event.layers} == set(LAYERS) - set(PLACES[place])
    told = [r.getMessage() for r in caplog.records if "keeps its full-rank" in r.getMessage()]
    assert len(told) == len(PLACES[place])  # once each, though there was an update too
    assert all(reason in line for line in told)


def test_what_one_process_finds_keeps_a_layer_full_rank_on_all(caplog):
    class Partner(Processes):
        """Somewhere else the second layer carries a hook."""

        def maximum(self, values):
            values = values.clone()
            values[-1, LAYERS.index("hidden.weight")] = 1
            return values

    model, optimizer, method = make(processes=Partner())
    train(model, optimizer, method, 2)
    assert [name for name in LAYERS if is_dense(model, name)] == ["hidden.weight"]
    assert "hidden.weight keeps its full-rank weight: another process finds" in caplog.text


HOOKS = {
    "gradient": lambda core, call: core.register_hook(call),
    "accumulated": lambda core, call: core.register_post_accumulate_grad_hook(call),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("options", [{}, {"target_size": 0.5}], ids=str)
def test_a_core_with_hooks_stays_with_a_warning(hook, options, caplog):
    """A cut or a release made another parameter, and who clips gradients so clipped no more."""
    options = {"release": 8, **options}
    model, optimizer, method = make(**options)
    train(model, optimizer, method, 3)
    core, calls = model.hidden.core, []
    handle = HOOKS[hook](core, lambda _: calls.append(1))
    ranks = method.ranks()
    events = train(model, optimizer, method, 6)
    assert {event.kind for event in events} >= {"cut", "release"}
    for event in events:
        assert {layer.name for layer in event.layers} == set(LAYERS) - {"hidden.weight"}
    assert model.hidden.core is core
    assert len(calls) == 6
    assert method.ranks()["hidden.weight"] == ranks["hidden.weight"]
    released = method.state_dict()["released"]
    assert [name for name in LAYERS if not released[name]] == ["hidden.weight"]
    (line,) = [r.getMessage() for r in caplog.records if "keeps its" in r.getMessage()]
    assert line == (
        "hidden.weight keeps its present core: has hooks, which its replacement would lose"
    )
    states = copy.deepcopy([part.state_dict() for part in (model, optimizer, method)])
    other, other_optimizer, other_method = make(**options)
    for part, state in zip((other, other_optimizer, other_method), states, strict=True):
        part.load_state_dict(state)
    assert other_method.state_dict() == method.state_dict()
    assert all(map(torch.equal, other.parameters(), model.parameters()))
    train(other, other_optimizer, other_method, 2)
    low_rank = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"hidden.weight cannot be dense as it was stored.*hooks"):
        model.load_state_dict(Network().state_dict())
    assert list(model.state_dict()) == list(low_rank)
    handle.remove()
    model.load_state_dict(Network().state_dict())


def test_hooks_that_one_process_finds_keep_a_core_on_all(caplog):
    class Partner(Processes):
        """Somewhere else the core of the second layer has hooks, from step 3 on."""

        def maximum(self, values):
            values = values.clone()
            values[-1, LAYERS.index("hidden.weight")] = int(method.step_count > 2)
            return values

    model, optimizer, method = make(processes=Partner())
    train(model, optimizer, method, 3)
    ranks = method.ranks()
    train(model, optimizer, method, 1)
    changed = [name for name, rank in method.ranks().items() if rank < ranks[name]]
    assert changed == [name for name in LAYERS if name != "hidden.weight"]
    assert "hidden.weight keeps its present core: another process finds" in caplog.text


def test_a_core_is_cut_when_its_hook_is_gone():
    model, optimizer, method = make()
    train(model, optimizer, method, 3)
    rank, handle = model.hidden.rank, model.hidden.core.register_hook(lambda _: None)
    train(model, optimizer, method, 1)
    assert model.hidden.rank == rank
    handle.remove()
    train(model, optimizer, method, 2)
    assert model.hidden.rank < rank


def test_a_layer_turns_low_rank_when_its_hook_is_gone(caplog):
    model, optimizer, method = make(include=["hidden"])
    handle = model.hidden.register_forward_hook(lambda *_: None)
    (event,) = train(model, optimizer, method, 2)
    assert not event.layers
    assert not event.shapes_changed
    assert "hidden.weight keeps its full-rank weight: has hooks" in caplog.text
    handle.remove()
    (event,) = train(model, optimizer, method, 2)
    assert event.shapes_changed
    assert not is_dense(model, "hidden.weight")


def test_attention_that_would_call_another_output_projection_stays_full_rank():
    model = Network()
    projection = model.attention.out_proj
    model.attention.out_proj = nn.Sequential(projection)
    model.attention.out_proj.weight, model.attention.out_proj.bias = None, None
    reasons = {report.name: report.stays_dense for report in survey(model)}
    assert "Sequential would be called otherwise" in reasons["attention.in_proj_weight"]
    alone = nn.MultiheadAttention(16, 2)
    reasons = {report.stays_dense for report in survey(alone, keep_last_layer=False)}
    assert reasons == {"the model itself is this layer, and nothing holds it"}


PLAIN = {"flag": True, "number": 2.5, "name": "a", "nothing": None, "shape": (1, (2, "b"))}


def test_plain_values_go_along_and_come_back():
    model = Network()
    layers = [model.conv, model.hidden, model.attention, model.attention.out_proj]
    for layer in layers:
        layer._is_hf_initialized = True  # as transformers does, on every module
        layer.count = np.int64(3)
        for key, value in PLAIN.items():
            setattr(layer, key, value)
    model, optimizer, method = make(model)
    train(model, optimizer, method, 4)
    assert not any(is_dense(model, name) for name in LAYERS)
    for _ in range(2):
        for layer in (model.conv, model.hidden, model.attention, model.attention.out_proj):
            assert layer._is_hf_initialized is True
            assert layer.count == 3
            assert {key: getattr(layer, key) for key in PLAIN} == PLAIN
        to_dense(model)
    assert not {"reading", "execution", "recompute"} & set(model.conv.__dict__)
    assert set(model.conv.__dict__) == set(layers[0].__dict__) - {"_replaced_name"}


def test_a_twin_is_a_layer_of_the_type_and_the_attributes_of_before():
    kinds = {
        "linear": nn.Linear(12, 16),
        **{
            f"conv{d}": kind(8, 16, 3, stride=2, padding=1, groups=2, padding_mode="reflect")
            for d, kind in {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.items()
        },
    }
    dense = copy.deepcopy(nn.ModuleDict(kinds))
    model = nn.ModuleDict(kinds)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    method = OIALR(model, optimizer, delay=1, update_interval=1, keep_last_layer=False)
    optimizer.step()
    method.step()
    for name, layer in dense.items():
        twin = model[name]
        for same in (twin, copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
            assert isinstance(same, type(layer))
            assert isinstance(same, FactoredLayer)
            assert type(same) is type(twin)
            for key, value in layer.__dict__.items():
                if not key.startswith(("_parameters", "_modules")):
                    assert getattr(same, key) == value
        assert repr(twin).startswith(f"Factored{type(layer).__name__}(")
    assert {report.is_linear_map for report in survey(model)} == {False}


@pytest.mark.slow
def test_a_parent_that_asks_for_the_type_or_convolves_itself_goes_on():
    class Parent(Network):
        def forward(self, x):
            assert isinstance(self.hidden, nn.Linear)
            x = self.conv._conv_forward(x, self.conv.weight, self.conv.bias).flatten(2).mT
            x = nn.functional.linear(x, self.hidden.weight, self.hidden.bias)
            return self.head(self.attention(x, x, x)[0].mean(1))

    model, optimizer, method = make(Parent())
    train(model, optimizer, method, 1)
    backward(model)
    optimizer.step()
    x = torch.ones(2, 4, 5, 5)
    expected = model(x)
    assert method.step().kind == "convert"
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    other, other_optimizer, other_method = make()
    train(model, optimizer, method, 4)
    train(other, other_optimizer, other_method, 2)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert model.hidden.core.grad is not None
    assert model.conv.core.grad is not None


WRITES = {
    "initialization": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "clamp": lambda layer: layer.weight.data.clamp_(-1, 1),
    "copy": lambda layer: layer.weight.detach().copy_(torch.ones(16, 16)),
    "item": lambda layer: layer.weight.data.__setitem__(0, 1.0),
    "row": lambda layer: layer.weight.data[0].zero_(),
    "product": lambda layer: layer.weight.__imul__(2),
    "view": lambda layer: layer.weight.data.view(-1).fill_(0),
    "data": lambda layer: setattr(layer.weight, "data", torch.ones(16, 16)),
    "reset": lambda layer: layer.reset_parameters(),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_formed_weight_raises(write):
    model, optimizer, method = make()
    train(model, optimizer, method, 2)
    for layer in (model.hidden, model.attention.out_proj):
        before = layer.weight.detach().clone()
        with torch.no_grad(), pytest.raises(RuntimeError, match="formed anew at every access"):
            WRITES[write](layer)
        assert torch.equal(layer.weight, before)
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = nn.Parameter(torch.ones(16, 16))
        with pytest.raises(AttributeError):
            layer.weight = torch.ones(16, 16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="formed anew"):
        nn.init.zeros_(model.attention.in_proj_weight)


def test_a_formed_weight_can_be_read_copied_and_stored():
    model, optimizer, method = make()
    train(model, optimizer, method, 2)
    weight = model.hidden.weight
    for same in (weight.clone(), copy.deepcopy(weight.detach()), weight * 1):
        assert type(same) is torch.Tensor
        torch.testing.assert_close(same, model.hidden.form_weight())
        same.data.zero_()
    loaded = pickle.loads(pickle.dumps(weight.detach()))
    assert type(loaded) is torch.Tensor
    torch.testing.assert_close(loaded, weight)
    model.hidden.core.grad = None
    weight.square().sum().backward()
    torch.testing.assert_close(model.hidden.core.grad, 2 * model.hidden.core.detach())


READS = {
    "itself": lambda layer: layer.weight,
    "detached": lambda layer: layer.weight.detach(),
    "data": lambda layer: layer.weight.data,
    "contiguous": lambda layer: layer.weight.contiguous(),
    "cpu": lambda layer: layer.weight.cpu(),
    "rows": lambda layer: layer.weight.data[:8],
    "view": lambda layer: layer.weight.detach().view(-1),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("is_trained", [True, False])
def test_a_parameter_of_a_formed_weight_is_an_ordinary_one(read, is_trained):
    """It was of the guarded type: no training, no load, and no parameter any more once copied."""
    model, optimizer, method = make()
    train(model, optimizer, method, 2)
    value = READS[read](model.hidden)
    holder = nn.Module()
    holder.weight = nn.Parameter(value, is_trained)
    file = io.BytesIO()
    torch.save(holder, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for each in (holder, copy.deepcopy(holder), loaded):
        (parameter,) = each.parameters()
        assert (type(parameter), parameter.requires_grad) == (nn.Parameter, is_trained)
        assert torch.equal(parameter, value)
    holder.load_state_dict({"weight": torch.ones(value.shape)})
    nn.init.zeros_(holder.weight)
    if is_trained:
        holder.weight.sum().backward()
        for foreach in (False, True):
            torch.optim.SGD(holder.parameters(), lr=1.0, foreach=foreach).step()
    assert holder.weight.unique().item() == (-2 if is_trained else 0)
    before = model.hidden.form_weight()
    with pytest.raises(RuntimeError, match="formed anew"):  # the guard has not gone
        READS["detached"](model.hidden).zero_()
    assert torch.equal(model.hidden.weight, before)


class Holding(Network):
    """A network that calls one of its layers by another way than its children."""

    def __init__(self, way, name):
        super().__init__()
        layer = getattr(self, name)
        match way:
            case "list":
                self.held = [layer]
            case "attribute":
                object.__setattr__(self, "held", layer)
            case "method":
                self.held = layer.forward
            case "partial":
                self.held = partial(layer)
        self.name = name

    def forward(self, x):
        called = self.held[0] if isinstance(self.held, list) else self.held
        x = called(x) if self.name == "conv" else self.conv(x)
        x = x.flatten(2).mT
        x = called(x) if self.name == "hidden" else self.hidden(x)
        attention = called if self.name == "attention" else self.attention
        return self.head(attention(x, x, x)[0].mean(1))


@pytest.mark.parametrize("way", ["list", "attribute", "method", "partial"])
@pytest.mark.parametrize("name", ["conv", "hidden", "attention"])
def test_a_layer_that_was_replaced_raises_when_it_is_called_after_all(way, name):
    model, optimizer, method = make(Holding(way, name))
    train(model, optimizer, method, 2)
    with pytest.raises(RuntimeError, match=rf"^{name} was replaced in the network"):
        model(torch.ones(2, 4, 5, 5))


def test_a_layer_that_was_replaced_raises_when_its_weight_is_read_or_set():
    model, optimizer, method = make()
    held = [model.conv, model.hidden, model.attention, model.attention.out_proj]
    names = ["conv", "hidden", "attention", "attention.out_proj"]
    train(model, optimizer, method, 2)
    twins = [model.get_submodule(name) for name in names]
    to_dense(model)
    for layers in (held, twins):
        for name, layer in zip(names, layers, strict=True):
            key = "in_proj_weight" if name == "attention" else "weight"
            with pytest.raises(RuntimeError, match=f"^{name} was replaced in the network"):
                getattr(layer, key)
            with pytest.raises(RuntimeError, match=f"^{name} was replaced in the network"):
                setattr(layer, key, nn.Parameter(torch.ones(1)))
            assert isinstance(copy.deepcopy(layer), type(layer))
    same = pickle.loads(pickle.dumps(held[1]))
    with pytest.raises(RuntimeError, match=r"^hidden was replaced"):
        same(torch.ones(16))
    with pytest.raises(RuntimeError, match=r"^attention was replaced"):
        twins[2](*[torch.ones(1, 2, 16)] * 3)
    model(torch.ones(2, 4, 5, 5))


class Bare(Network):
    """Its hidden layer is applied by a weight from a list, or penalized by it."""

    def __init__(self):
        super().__init__()
        self.weights = [self.hidden.weight]

    def forward(self, x):
        x = nn.functional.linear(self.conv(x).flatten(2).mT, self.weights[0], self.hidden.bias)
        return self.head(self.attention(x, x, x)[0].mean(1))


@pytest.mark.slow
def test_a_bare_weight_that_is_trained_after_its_replacement_is_told():
    model, optimizer, method = make(Bare())
    train(model, optimizer, method, 2)
    with pytest.raises(RuntimeError, match=r"^hidden\.weight was replaced by an event"):
        train(model, optimizer, method, 1)
    model.weights = []
    model.forward = MethodType(Network.forward, model)
    assert train(model, optimizer, method, 4)  # it can go on


@pytest.mark.slow
def test_a_core_that_no_step_of_an_interval_reaches_is_told(caplog):
    class Copied(Network):
        """Applies a copy of its weight that somebody else brings up to date."""

        copied = None

        def forward(self, x):
            weight = self.hidden.weight if self.copied is None else self.copied
            x = nn.functional.linear(self.conv(x).flatten(2).mT, weight, self.hidden.bias)
            return self.head(self.attention(x, x, x)[0].mean(1))

    model, optimizer, method = make(Copied(), update_interval=4)
    train(model, optimizer, method, 1)
    model.copied = model.hidden.weight.detach()
    train(model, optimizer, method, 4)
    assert not caplog.records
    train(model, optimizer, method, 9)
    (record,) = caplog.records  # once
    assert "no gradient has reached the core of hidden.weight" in record.getMessage()


@pytest.mark.slow
def test_a_core_that_is_trained_after_a_cut_is_told():
    model, optimizer, method = make()
    train(model, optimizer, method, 2)
    penalized = list(model.parameters())
    (event,) = train(model, optimizer, method, 2)
    assert event.kind == "cut"
    sum(parameter.abs().sum() for parameter in penalized if parameter.requires_grad).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="was replaced by an event"):
        method.step()


@pytest.mark.slow
def test_layers_that_skip_steps_and_lists_that_only_hold_are_no_reason_to_complain(caplog):
    class Dropped(Network):
        calls = 0

        def forward(self, x):
            self.calls += 1
            x = self.conv(x).flatten(2).mT
            if self.calls % 4 == 0:
                x = self.hidden(x)
            return self.head(self.attention(x, x, x)[0].mean(1))

    model, optimizer, method = make(Dropped(), delay=4, update_interval=4)
    cached = list(model.parameters())
    train(model, optimizer, method, 24)
    assert not caplog.records
    assert not is_dense(model, "hidden.weight")
    assert all(parameter.requires_grad for parameter in cached)


def strange_state(model, optimizer):
    optimizer.state[model.attention.out_proj.weight]["mystery"] = torch.ones(3)


def no_longer_held(model, optimizer):
    parameters = optimizer.param_groups[0]["params"]
    weight = model.attention.out_proj.weight
    parameters[:] = [parameter for parameter in parameters if parameter is not weight]


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(model, _):
    parametrize.register_parametrization(model.attention.out_proj, "weight", Doubled())


def test_a_weight_that_is_computed_from_another_stays_full_rank(caplog):
    model, optimizer, method = make()
    train(model, optimizer, method, 1)
    parametrize.register_parametrization(model.hidden, "weight", nn.Identity())
    train(model, optimizer, method, 1)
    assert "hidden.weight keeps its full-rank weight: is no parameter of" in caplog.text
    assert [name for name in LAYERS if is_dense(model, name)] == ["hidden.weight"]


def taken_away(model, _):
    model.attention.out_proj = nn.Identity()


@pytest.mark.parametrize("spoil", [parametrized, taken_away])
def test_a_weight_that_is_gone_is_named_before_any_layer_is_converted(spoil):
    model, optimizer, method = make()
    train(model, optimizer, method, 1)
    backward(model)
    optimizer.step()
    spoil(model, optimizer)
    with pytest.raises(ValueError, match=r"^attention\.out_proj\.weight is no parameter of the"):
        method.step()
    assert all(is_dense(model, name) for name in LAYERS[:3])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (strange_state, r"'mystery' of attention\.out_proj\.weight is of no known kind"),
        (no_longer_held, r"attention\.out_proj\.weight is not among the optimizer's parameters"),
    ],
)
def test_a_network_is_never_left_half_converted(spoil, message):
    model, optimizer, method = make()
    train(model, optimizer, method, 1)
    backward(model)
    optimizer.step()
    held = list(optimizer.param_groups[0]["params"])
    weight = model.attention.out_proj.weight
    spoil(model, optimizer)
    for _ in range(2):  # the event stays due
        with pytest.raises(ValueError, match=message):
            method.step()
        assert all(is_dense(model, name) for name in LAYERS)
    optimizer.state[weight].pop("mystery", None)
    optimizer.param_groups[0]["params"][:] = held
    assert method.step().kind == "convert"
    assert not any(is_dense(model, name) for name in LAYERS)


def test_a_stored_rank_is_not_given_to_a_layer_that_cannot_have_it():
    model, optimizer, method = make()
    train(model, optimizer, method, 2)
    other, _, other_method = make()
    other.hidden.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"hidden\.weight cannot turn low-rank .* has hooks"):
        other_method.load_state_dict(method.state_dict())
    assert all(is_dense(other, name) for name in LAYERS)


@pytest.mark.slow
def test_a_core_that_somebody_froze_stays_frozen_when_it_is_cut():
    model, optimizer, method = make()
    train(model, optimizer, method, 3)
    core = model.hidden.core.requires_grad_(requires_grad=False)
    core.grad = None
    (event,) = train(model, optimizer, method, 1)
    assert event.kind == "cut"
    assert model.hidden.core is not core
    assert not model.hidden.core.requires_grad


class Marked(nn.Linear):
    """A type by name alone, with what plain values a class may have."""

    is_special = True
    note: str


class Nested(Marked):
    pass


class Kernel(nn.Conv2d):
    pass


class Mixin:
    def helps(self):
        return 1


class Helped(Mixin, nn.Linear):
    pass


class Scaled(nn.Linear):
    scale = torch.ones(1)


class Computed(nn.Linear):
    @property
    def width(self):
        return self.in_features


@pytest.mark.parametrize("kind", [Marked, Nested, Kernel])
def test_a_type_by_name_alone_is_factorized_and_stays_of_that_type(kind):
    torch.manual_seed(0)
    layer = kind(4, 16, 3) if kind is Kernel else kind(16, 16)
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(2, 4, 5, 5) if kind is Kernel else torch.randn(2, 16)
    model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = OIALR(model, optimizer, delay=1, update_interval=1)
    assert [report.name for report in method.layers] == ["0.weight"]
    optimizer.step()
    expected = model(x)
    method.step()
    for twin in (model[0], copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        assert isinstance(twin, kind)
        assert isinstance(twin, FactoredLayer)
        assert getattr(twin, "is_special", True)
    torch.testing.assert_close(model(x), expected)
    to_dense(model)
    assert type(model[0]) is kind
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", [Helped, Scaled, Computed])
def test_a_type_that_adds_more_than_plain_values_stays_full_rank_with_its_full_name(kind):
    model = nn.Sequential(kind(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    report = survey(model)[0]
    assert report.stays_dense == f"weight of {__name__}.{kind.__name__} is never factorized"


class Conv1D(nn.Module):
    """As of transformers: a linear layer with a transposed weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))


def test_a_network_of_which_little_is_factorized_says_so_once(caplog):
    layers = [Conv1D(48), nn.Linear(24, 32), nn.Linear(16, 2)]
    _, _, method = make(nn.Sequential(*layers))
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("only 25 % of the parameters are factorized. 74 % stay full-rank: ")
    assert f"weight of {__name__}.Conv1D is never factorized; 1 % stay full-rank: the " in message
    assert [report.name for report in method.layers] == ["1.weight"]


@pytest.mark.parametrize(
    "options", [{"exclude": ["0"]}, {"include": ["1"]}, {"exclude": ["1"], "include": ["3", "1"]}]
)
def test_what_the_user_leaves_out_does_not_count_as_little(options, caplog):
    layers = [nn.Linear(48, 48), nn.Linear(24, 32), nn.Linear(16, 2), nn.Linear(20, 20)]
    make(nn.Sequential(*layers), keep_last_layer=False, **options)
    assert not caplog.records
