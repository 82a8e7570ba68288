"""Factorized attention computes what nn.MultiheadAttention computes."""

import copy
import pickle
from typing import get_args

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from app import OIALR
from oialr.convert import factorize_layer, get_layer, to_dense
from oialr.layer_survey import survey
from oialr.layers.attention import FactoredAttention
from oialr.layers.base import FactoredLayer
from oialr.layers.cost import Way, cheapest_way, multiply_adds
from oialr.linalg.svd import economy_svd
from oialr.options import Execution
from oialr.placement.processes import Processes
from oialr.stability.tracker import BasisTracker

KEEP = {"keep_first_layer": False, "keep_last_layer": False, "minimum_rank_fraction": 0.01}
E, HEADS, N, L, S = 16, 4, 3, 5, 6


def converted(model, rank=None, execution="auto", **options):
    """Return a copy of a network in which all that can be is factorized, and the reports."""
    model = copy.deepcopy(model)
    reports = [r for r in survey(model, **KEEP, **options) if r.stays_dense is None]
    for report in reports:
        weight = model.get_parameter(report.name)
        U, s, Vh = economy_svd(weight.reshape(report.stack_shape))
        r = rank or s.shape[-1]
        factors = U[..., :r], torch.diag_embed(s[..., :r]), Vh[..., :r, :]
        layer = factorize_layer(model, report.name, *(factor.contiguous() for factor in factors))
        layer.execution = execution
    return model, reports


class Holder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(E, HEADS, **options)
        with torch.no_grad():  # biases of nn.MultiheadAttention start at zero
            for parameter in self.attn.parameters():
                if parameter.dim() == 1:
                    parameter.normal_()
        self.double()

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def inputs(kind="cross", *, batch_first=False, kdim=E, vdim=E, batch=N):
    """Return query, key and value: one for all, two that share an input, or all different."""
    generator = torch.Generator().manual_seed(0)

    def tensor(length, width):
        shape = (batch, length, width) if batch_first else (length, batch, width)
        shape = (length, width) if kind == "unbatched" else shape
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    query, key, value = tensor(L, E), tensor(S, kdim), tensor(S, vdim)
    shared = {"self": (query,) * 3, "memory": (query, key, key)}
    if kind == "position":  # positions are added for query and key alone
        shared["position"] = (query, query, tensor(L, E))
    return shared.get(kind, (query, key, value))


def pull(model, arguments, **call):
    """Return output, weights and the gradients of distinct inputs after a backward."""
    out, weights = model(*arguments, **call)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    loss = (out * target).sum()
    if weights is not None:
        target = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
        loss = loss + (weights * target).sum()
    distinct = {id(x): x for x in arguments}.values()
    for x in distinct:
        x.grad = None
    loss.backward()
    return out, weights, [x.grad for x in distinct]


def assert_twins(model, arguments, projection="packed", execution="auto", **call):
    """Compare a network with its conversion: output, weights and every gradient."""
    model.zero_grad()
    twin, reports = converted(model, execution=execution, attention_projection=projection)
    assert reports
    assert type(twin.attn) is FactoredAttention
    torch.manual_seed(5)
    expected = pull(model, arguments, **call)
    torch.manual_seed(5)
    torch.testing.assert_close(pull(twin, arguments, **call), expected)
    dense = dict(model.named_parameters())
    factorized = {report.name for report in reports}
    for report in reports:
        layer = get_layer(twin, report.name)
        G = dense[report.name].grad.reshape(report.stack_shape)
        torch.testing.assert_close(layer.core.grad, layer.U.mT @ G @ layer.Vh.mT)
    others = {name: p.grad for name, p in twin.named_parameters() if name in dense}
    assert {*others, *factorized} == set(dense)
    torch.testing.assert_close(others, {name: dense[name].grad for name in others})
    return twin, reports


CONSTRUCTORS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    {"kdim": 10, "vdim": 12},
    {"kdim": 10, "vdim": 12, "bias": False, "batch_first": True},
    {"kdim": 10, "add_bias_kv": True},
]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("projection", ["packed", "separate"])
@pytest.mark.parametrize("options", CONSTRUCTORS, ids=str)
@pytest.mark.parametrize("kind", ["self", "memory", "cross", "unbatched"])
def test_every_constructor_option(kind, options, projection, need_weights):
    widths = {key: options[key] for key in ("kdim", "vdim") if key in options}
    if widths and kind in {"self", "memory"}:
        kind = "cross"
    arguments = inputs(kind, batch_first=options.get("batch_first", False), **widths)
    assert_twins(Holder(**options), arguments, projection, need_weights=need_weights)


@pytest.mark.parametrize("execution", get_args(Way))
@pytest.mark.parametrize("projection", ["packed", "separate"])
@pytest.mark.parametrize("kind", ["self", "memory", "position", "cross", "unequal"])
def test_every_way_of_applying_a_projection(kind, projection, execution):
    options = {"kdim": 10, "vdim": 24} if kind == "unequal" else {}
    arguments = inputs("cross" if kind == "unequal" else kind, **options)
    assert_twins(Holder(**options), arguments, projection, execution)


@pytest.mark.parametrize("execution", get_args(Execution))
@pytest.mark.parametrize(
    ("kind", "projection", "products"),
    [  # rows of the input and of the weight that it meets
        ("self", "packed", [(N * L, 3 * E)]),
        ("memory", "packed", [(N * L, E), (N * S, 2 * E)]),
        ("self", "separate", [(N * L, E)] * 3),
    ],
)
def test_a_projection_takes_the_way_that_costs_least(kind, projection, products, execution):
    r = E  # factored costs more than rebuilding the weight
    twin, _ = converted(Holder(), r, execution, attention_projection=projection)
    expected = 0
    for rows, m in products:
        way = cheapest_way(rows, m, E, r) if execution == "auto" else execution
        expected += multiply_adds(way, rows=rows, m=m, n=E, r=r)
    layer = twin.attn.in_proj
    with FlopCounterMode(display=False) as counter:
        outputs = layer(inputs(kind), (None, None, None))
        torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    assert counter.get_total_flops() / 2 == pytest.approx(expected)


def boolean(*shape):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(shape, generator=generator) < 0.4
    mask[..., 0] = False  # every query keeps a key
    return mask


def floating(*shape):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


CAUSAL = torch.ones(L, S, dtype=torch.bool).triu(1)
MASKS = [
    {"attn_mask": boolean(L, S)},
    {"attn_mask": floating(L, S)},
    {"attn_mask": boolean(N * HEADS, L, S)},
    {"attn_mask": floating(N * HEADS, L, S)},
    {"key_padding_mask": boolean(N, S)},
    {"key_padding_mask": floating(N, S)},
    {"attn_mask": boolean(L, S), "key_padding_mask": boolean(N, S)},
    {"attn_mask": floating(N * HEADS, L, S), "key_padding_mask": floating(N, S)},
    {"attn_mask": CAUSAL, "is_causal": True},
    {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": boolean(N, S)},
    {"average_attn_weights": False},
]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("call", MASKS, ids=", ".join)
def test_every_mask(call, options, need_weights):
    if call.get("is_causal") and options and not need_weights:
        options = {"add_bias_kv": True}
    assert_twins(Holder(**options), inputs(), need_weights=need_weights, **call)


def test_masks_of_input_without_a_batch():
    call = {"attn_mask": boolean(HEADS, L, S), "key_padding_mask": boolean(S)}
    assert_twins(Holder(), inputs("unbatched"), **call)


def test_a_query_without_a_key_is_treated_alike():
    mask = boolean(L, S)
    mask[1] = True
    twin, _ = converted(Holder())
    for need_weights in (True, False):
        call = {"attn_mask": mask, "need_weights": need_weights}
        out, expected = twin(*inputs(), **call), Holder()(*inputs(), **call)
        torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_same_numbers(need_weights):
    model = Holder(dropout=0.4)
    assert_twins(model, inputs(), need_weights=need_weights)
    model.eval()
    twin, _ = assert_twins(model, inputs(), need_weights=need_weights)
    torch.testing.assert_close(twin(*inputs()), twin(*inputs()), rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [True, False])
def test_an_empty_batch(need_weights, batch_first):
    arguments = inputs(batch_first=batch_first, batch=0)
    assert_twins(Holder(batch_first=batch_first), arguments, need_weights=need_weights)


@pytest.mark.parametrize("projection", ["packed", "separate"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("call", [{}, {"attn_mask": floating(L, S).float()}], ids=", ".join)
def test_autocast(call, need_weights, projection):
    model = Holder(add_bias_kv=True).float()
    twin, _ = converted(model, attention_projection=projection)
    arguments = [x.detach().float().requires_grad_() for x in inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights, gradients = pull(twin, arguments, need_weights=need_weights, **call)
        expected, expected_weights, expected_gradients = pull(
            model, arguments, need_weights=need_weights, **call
        )
    assert out.dtype == expected.dtype
    if need_weights:
        assert weights.dtype == expected_weights.dtype
        torch.testing.assert_close(weights, expected_weights, atol=0.05, rtol=0.05)
    for mine, theirs in zip([out, *gradients], [expected, *expected_gradients], strict=True):
        # A handful of roundings to 8 bits, against the scale of the result.
        error = (mine.float() - theirs.float()).abs().max()
        assert error < 16 * 2**-8 * theirs.float().abs().max()


def test_mistakes_in_a_call():
    twin, _ = converted(Holder())
    with pytest.raises(ValueError, match="is_causal"):
        twin(*inputs(), is_causal=True)
    with pytest.raises(ValueError, match=r"attn_mask has the shape \(6, 5\); needed is \(5, 6\)"):
        twin(*inputs(), attn_mask=boolean(S, L))
    with pytest.raises(ValueError, match=r"key_padding_mask has the shape .* needed is \(3, 6\)"):
        twin(*inputs(), key_padding_mask=boolean(S, N))


@pytest.mark.parametrize(
    ("options", "projection", "names", "shapes"),
    [
        ({}, "packed", ["in_proj_weight"], [(48, 16)]),
        ({}, "separate", ["in_proj_weight"], [(3, 16, 16)]),
        (
            {"kdim": 10, "vdim": 12},
            "separate",
            ["q_proj_weight", "k_proj_weight", "v_proj_weight"],
            [(16, 16), (16, 10), (16, 12)],
        ),
    ],
)
def test_dense_names_stay_the_names(options, projection, names, shapes):
    model = Holder(add_bias_kv=True, **options)
    twin, reports = converted(model, rank=4, attention_projection=projection)
    names = [*(f"attn.{name}" for name in names), "attn.out_proj.weight"]
    assert [report.name for report in reports] == names
    assert [report.stack_shape for report in reports] == [*shapes, (16, 16)]
    for report in reports:
        layer = get_layer(twin, report.name)
        assert isinstance(layer, FactoredLayer)
        assert layer.rank == 4
        assert layer.reading.shape == report.shape == model.get_parameter(report.name).shape
    biases = {r.name: r for r in survey(model, **KEEP) if "bias" in r.name}
    assert set(biases) == {"attn.bias_k", "attn.bias_v"}
    assert not any(r.is_linear_map for r in biases.values())
    assert all("is never factorized" in r.stays_dense for r in biases.values())
    rows = BasisTracker(survey(model, **KEEP), Processes(), window=1).measure(model, 0)
    assert [row.name for row in rows if row.averaged] == names


def test_copies_pickles_state_dicts_and_the_way_back():
    model = Holder(add_bias_kv=True, kdim=10, vdim=12).eval()
    arguments = inputs(kdim=10, vdim=12)
    twin, _ = converted(model, rank=3)
    other, _ = converted(Holder(add_bias_kv=True, kdim=10, vdim=12).eval(), rank=3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(twin.state_dict())
    dense = to_dense(copy.deepcopy(twin))
    for same in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), other, dense):
        torch.testing.assert_close(pull(same, arguments), pull(twin, arguments))
        assert not same.attn.training
    assert type(dense.attn) is nn.MultiheadAttention
    assert type(dense.attn.out_proj) is type(model.attn.out_proj)
    assert list(dense.state_dict()) == list(model.state_dict())
    bias = twin.attn.in_proj_bias
    assert to_dense(twin).attn.in_proj_bias is bias


def test_only_a_part_is_factorized():
    model = Holder(kdim=2, vdim=12)
    arguments = inputs(kdim=2, vdim=12)
    for exclude in (["attn"], ["attn.out_proj"]):
        twin, reports = converted(model, exclude=exclude)
        torch.testing.assert_close(pull(twin, arguments), pull(model, arguments))
        assert (len(reports) == 1) == (exclude == ["attn"])
        assert type(twin.attn) is FactoredAttention
    reasons = {r.name: r.stays_dense for r in survey(Holder(kdim=1), **KEEP)}
    assert "too small" in reasons["attn.k_proj_weight"]
    assert_twins(Holder(kdim=1), inputs(kdim=1))


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


def test_attention_that_a_release_makes_dense_is_what_a_loaded_network_has():
    """To the last bit: a run that is resumed computes what the one before computed."""
    torch.manual_seed(0)
    model, x = SelfAttention(), torch.randn(3, 5, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"delay": 1, "update_interval": 1, "cutoff": 1e-9, "release": 3}
    method = OIALR(model, optimizer, **options, **KEEP)
    kinds, called = [], []
    for step in range(4):
        if step == 1:  # before the conversion it would keep the layer full-rank
            model.attn.register_forward_hook(lambda *_: called.append(1))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if event := method.step():
            kinds.append((event.kind, type(model.attn)))
    assert kinds[0] == ("convert", FactoredAttention)
    assert kinds[-1] == ("release", nn.MultiheadAttention)
    assert called == [1] * 3
    other = SelfAttention()
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        one.zero_grad()
        one(x).square().mean().backward()
    assert torch.equal(model(x), other(x))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_the_output_projection_of_a_foreign_attention_stays_dense():
    class Own(nn.MultiheadAttention):
        pass

    reasons = [r.stays_dense for r in survey(nn.Sequential(Own(16, 2)), **KEEP)]
    assert "Own is never factorized" in reasons[0]
    assert "NonDynamicallyQuantizableLinear is never factorized" in reasons[1]


def test_first_and_last_layer_of_attention():
    model = nn.Sequential(nn.MultiheadAttention(16, 2, kdim=12))
    kept = {**KEEP, "keep_first_layer": True, "keep_last_layer": True}
    reasons = [report.stays_dense for report in survey(model, **kept)]
    assert all("first" in reason for reason in reasons[:3])
    assert "last" in reasons[3]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_transformer_encoder_layer(training, gradient, mask, norm_first):
    torch.manual_seed(0)
    arguments = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    model = nn.Sequential(nn.TransformerEncoderLayer(E, HEADS, 32, **arguments))
    model = model.double().train(training)
    twin, reports = converted(model)
    assert len(reports) == 4
    call = {
        "none": {},
        "causal": {"src_mask": torch.ones(L, L, dtype=torch.bool).triu(1), "is_causal": True},
        "padding": {"src_key_padding_mask": boolean(N, L)},
    }[mask]
    x = inputs("self", batch_first=True)[0]
    with torch.set_grad_enabled(gradient):
        torch.testing.assert_close(twin[0](x, **call), model[0](x, **call))
    if gradient:
        grads = []
        for network in (model, twin):
            x.grad = None
            network[0](x, **call).square().sum().backward()
            grads.append((x.grad, network[0].linear1.bias.grad, network[0].norm1.weight.grad))
        torch.testing.assert_close(grads[1], grads[0])
    assert any(layer.core.grad is not None for layer in factored(twin)) == gradient


def factored(model):
    return [module for module in model.modules() if isinstance(module, FactoredLayer)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_with_nested_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    twin, _ = converted(model)
    padding = torch.arange(L) >= torch.tensor([[5], [3], [2]])
    x = torch.randn(N, L, E)
    with torch.no_grad():
        out = twin(x, src_key_padding_mask=padding)
        expected = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("projection", ["packed", "separate"])
def test_nested_tensors(projection):
    model = Holder(batch_first=True).eval()
    twin, _ = converted(model, attention_projection=projection)
    (x, *_) = inputs("self", batch_first=True)
    nested = torch.nested.nested_tensor([x[0].detach(), x[1, :3].detach()])
    with torch.no_grad():
        out, _ = twin(nested, nested, nested, need_weights=False)
        expected, _ = model(nested, nested, nested, need_weights=False)
    torch.testing.assert_close(out.unbind(), expected.unbind())
    with pytest.raises(AssertionError, match="NestedTensor"):  # as of the dense twin
        twin(nested, nested, nested)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def make(kind="adamw", **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 24, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(E, 3)).double()
    optimizer = OPTIMIZERS[kind](model.parameters())
    options = {"delay": 3, "update_interval": 2, "layer_fraction": 1, "cutoff": 0.5, **options}
    return model, optimizer, OIALR(model, optimizer, **options)


def train(model, optimizer, method, steps, first=0):
    events = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, L, E, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        y = x[:, 0, :3].argmax(1)
        nn.functional.cross_entropy(model(x)[:, 0], y).backward()
        optimizer.step()
        events.append(method.step() if method else None)
    return [event for event in events if event]


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["packed", "separate"])
def test_the_method_on_attention(projection):
    model, optimizer, method = make(attention_projection=projection)
    names = [layer.name for layer in method.layers]
    assert names[:2] == ["0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight"]
    tracker = BasisTracker(method.survey, Processes(), window=1)
    tracker.measure(model, 0)
    train(model, optimizer, method, 3)
    assert method.converted
    rows = {row.name: row for row in tracker.measure(model, 1)}
    assert 0.9 < rows[names[0]].stability <= 1
    events = train(model, optimizer, method, 10, first=3)
    assert any(event.kind == "cut" for event in events)
    assert [layer.name for layer in events[-1].layers] == names
    core = get_layer(model, names[0]).core
    r = method.ranks()[names[0]]
    assert r < 16
    assert core.shape == ((3, r, r) if projection == "separate" else (r, r))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    rows = {row.name: row for row in tracker.measure(model, 2)}
    assert rows[names[0]].rank == r


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["packed", "separate"])
def test_sgd_with_momentum_does_not_feel_a_rotation_of_attention(projection):
    options = {"attention_projection": projection}
    model, optimizer, method = make("momentum", cutoff=1e-9, **options)
    other, other_optimizer, other_method = make("momentum", update_interval=10**6, **options)
    assert len(train(model, optimizer, method, 9)) == 4
    train(other, other_optimizer, other_method, 9)
    for report in method.layers:
        mine, theirs = (get_layer(m, report.name).weight for m in (model, other))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["packed", "separate"])
def test_state_dict_rebuilds_attention(projection):
    model, optimizer, method = make(attention_projection=projection)
    train(model, optimizer, method, 8)
    saved = copy.deepcopy((method.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, method, 5, first=8)
    other, other_optimizer, other_method = make(attention_projection=projection)
    other_method.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    other_optimizer.load_state_dict(saved[2])
    train(other, other_optimizer, other_method, 5, first=8)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
