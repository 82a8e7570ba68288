"""Convolutions of every kind, groups, patterns and ties: from the single layer to the method."""

import copy
import pickle
from unittest.mock import Mock

import pytest
import torch
from support.convolutions import KEEP, OPTIONS, convolution, pull
from torch import nn

from app import OIALR
from oialr.convert import factorize_layer, get_layer, to_dense
from oialr.layer_survey import survey
from oialr.layers.base import FactoredLayer
from oialr.linalg.svd import economy_svd
from oialr.options import RankRule
from oialr.placement import factorization
from oialr.placement.assignment import make_plan
from oialr.placement.buckets import MatrixInfo
from oialr.placement.costs import Costs
from oialr.placement.factorization import Factorizer
from oialr.placement.processes import Processes
from oialr.schedule import kept_rank
from oialr.stability.tracker import BasisTracker


def twin_of(layer, rank=None):
    """Return the factorized twin of a layer, all groups cut to a rank."""
    model = nn.Sequential(copy.deepcopy(layer))
    (report,) = survey(model, **KEEP)
    assert report.stays_dense is None, report.stays_dense
    U, s, Vh = economy_svd(model[0].weight.reshape(report.stack_shape))
    r = rank or s.shape[-1]
    return factorize_layer(
        model,
        report.name,
        U[..., :r].contiguous(),
        torch.diag_embed(s[..., :r]),
        Vh[..., :r, :].contiguous(),
    )


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_convolution_equals_its_dense_twin(dimensions, options):
    layer, x = convolution(dimensions, **options)
    twin = twin_of(layer)
    assert twin.groups == layer.groups
    torch.testing.assert_close(pull(twin, x), pull(layer, x))
    torch.testing.assert_close(twin.form_weight(), layer.weight)
    G = layer.weight.grad.reshape(*twin.U.shape[:-1], -1)
    torch.testing.assert_close(twin.core.grad, twin.U.mT @ G @ twin.Vh.mT)
    if layer.bias is not None:
        torch.testing.assert_close(twin.bias.grad, layer.bias.grad)
    assert twin.U.grad is None
    assert twin.Vh.grad is None


LAYERS = {
    "linear": lambda: (nn.Linear(12, 16).double(), torch.randn(3, 5, 12).double()),
    **{
        f"{d}d, {groups} groups": lambda d=d, groups=groups: convolution(d, groups=groups)
        for d in (1, 2, 3)
        for groups in (1, 2)
    },
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


def test_an_empty_batch(layer_and_input):
    layer, x = layer_and_input
    twin = twin_of(layer)
    torch.testing.assert_close(pull(twin, x[:0]), pull(layer, x[:0]))
    assert not twin.core.grad.any()


def test_input_without_a_batch(layer_and_input):
    layer, x = layer_and_input
    torch.testing.assert_close(pull(twin_of(layer), x[0]), pull(layer, x[0]))


def test_a_volume_without_a_batch_whose_depth_is_fastest():
    layer, x = convolution(3)
    x = x[0].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert x.is_contiguous(memory_format=torch.channels_last)  # as a batch of images would be
    torch.testing.assert_close(pull(twin_of(layer), x), pull(layer, x))


def test_non_contiguous_input(layer_and_input):
    layer, x = layer_and_input
    x = x.expand(2, *x.shape).transpose(0, 1)[:, 1].mT.contiguous().mT
    assert not x.is_contiguous()
    torch.testing.assert_close(pull(twin_of(layer), x), pull(layer, x))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_channels_last(dimensions, groups):
    layer, x = convolution(dimensions, groups=groups, padding=1)
    memory = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    twin = twin_of(layer.to(memory_format=memory))
    x = x.to(memory_format=memory)
    torch.testing.assert_close(pull(twin, x), pull(layer, x))
    if dimensions == 2:  # torch's own 3-d convolution gives the layout up with some kernels
        assert twin(x).is_contiguous(memory_format=memory)


def test_autocast(layer_and_input):
    layer, x = layer_and_input
    layer, x = layer.float(), x.float()
    twin = twin_of(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (out, gradient), (expected, expected_gradient) = pull(twin, x), pull(layer, x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert twin.core.grad.dtype == torch.float32
    # Three products of 8-bit mantissas in place of one, against the scale of the result; without
    # AVX-512 the sums of convolutions are rounded too.
    for mine, theirs in ((out, expected), (gradient, expected_gradient)):
        error = (mine.float() - theirs.float()).abs().max()
        assert error < 16 * 2**-8 * theirs.float().abs().max()


def test_copies_pickles_and_state_dicts(layer_and_input):
    layer, x = layer_and_input
    twin = twin_of(layer, rank=2).eval()
    expected = pull(twin, x)
    other = twin_of(layer.apply(lambda m: m.reset_parameters()), rank=2)
    other.load_state_dict(twin.state_dict())
    for same in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), other, twin.to_dense()):
        torch.testing.assert_close(pull(same, x), expected)
    dense = twin.to_dense()
    assert type(dense) is type(layer)
    assert repr(dense) == repr(layer)
    assert dense.bias is twin.bias
    assert not dense.training
    assert "rank=2" in str(twin)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(16, 16, 3, groups=16), "depthwise"),
        (nn.Conv2d(16, 64, 3, groups=16), "depthwise"),
        (nn.Conv2d(16, 16, 1, groups=8), "too small"),
        (nn.ConvTranspose2d(16, 16, 3, groups=16), "depthwise"),
        (nn.Embedding(16, 16), "Embedding is never factorized"),
        (nn.Bilinear(4, 4, 4), "Bilinear is never factorized"),
    ],
)
def test_what_stays_dense_has_a_reason(layer, reason):
    report = survey(nn.Sequential(layer), **KEEP)[0]
    assert reason in report.stays_dense
    assert report.groups == 1 or "depthwise" not in reason


def test_a_stack_has_one_rank_the_largest_that_a_matrix_keeps():
    rule = RankRule(cutoff=0.5, largest_cut=0.99, minimum_rank_fraction=0, rank_multiple=1)
    s = torch.tensor([[8.0, 5, 1, 1], [1, 0.9, 0.6, 0.1]])
    assert [kept_rank(row, rule, full_rank=4) for row in s] == [2, 3]
    assert kept_rank(s, rule, full_rank=4) == 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, groups=4),
        nn.Tanh(),
        nn.Conv2d(24, 24, 3, groups=24),
        nn.Flatten(2),
        nn.Conv1d(24, 16, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(16 * 4, 3),
    ).double()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=3e-2, momentum=0.9),
}


def make(kind="adamw", **options):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    options = {"delay": 3, "update_interval": 2, "layer_fraction": 1, "cutoff": 0.3, **options}
    return model, optimizer, OIALR(model, optimizer, **options)


def train(model, optimizer, method, steps, first=0):
    events = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 4, 7, 7, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        y = x.mean((2, 3))[:, :3].argmax(1)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        events.append(method.step() if method else None)
    return [event for event in events if event]


GROUPED = {"2.weight": (4, 6, 36), "6.weight": (2, 8, 36)}


@pytest.mark.slow
def test_the_method_on_groups():
    model, optimizer, method = make()
    reports = {report.name: report for report in method.layers}
    assert list(reports) == ["0.weight", "2.weight", "6.weight"]
    assert {name: reports[name].stack_shape for name in GROUPED} == GROUPED
    convert, *updates = train(model, optimizer, method, 12)
    assert any(event.kind == "cut" for event in updates)
    assert {layer.name: layer.previous_rank for layer in convert.layers} == {
        "0.weight": 16,
        "2.weight": 6,
        "6.weight": 8,
    }
    for layer in updates[-1].layers:
        assert layer.singular_values.shape == (layer.previous_rank,)
    for name, (g, m, n) in GROUPED.items():
        layer, r = get_layer(model, name), method.ranks()[name]
        shapes = [tuple(factor.shape) for factor in (layer.U, layer.core, layer.Vh)]
        assert shapes == [(g, m, r), (g, r, r), (g, r, n)]
        identity = torch.eye(r, dtype=torch.float64).expand(g, r, r)
        torch.testing.assert_close(layer.U.mT @ layer.U, identity)
        torch.testing.assert_close(layer.Vh @ layer.Vh.mT, identity)
        assert optimizer.state[layer.core]["exp_avg"].shape == (g, r, r)
    dense = sum(p.numel() for p in network().parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert method.trainable_percent() == pytest.approx(100 * trained / dense)
    expected = model(torch.ones(1, 4, 7, 7).double())
    to_dense(model)
    assert not any(isinstance(module, FactoredLayer) for module in model.modules())
    torch.testing.assert_close(model(torch.ones(1, 4, 7, 7).double()), expected)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_conversion_of_groups_leaves_the_function(kind):
    model, optimizer, method = make(kind)
    dense, dense_optimizer, _ = make(kind)
    train(model, optimizer, method, 3)
    train(dense, dense_optimizer, None, 3)
    assert method.converted
    for name, shape in GROUPED.items():
        layer, weight = get_layer(model, name), get_layer(dense, name).weight
        torch.testing.assert_close(layer.form_weight(), weight)
        if kind == "momentum":
            M = dense_optimizer.state[weight]["momentum_buffer"].reshape(shape)
            expected = layer.U.mT @ M @ layer.Vh.mT
            mine = optimizer.state[layer.core]["momentum_buffer"]
            torch.testing.assert_close(mine, expected.detach())


@pytest.mark.slow
def test_sgd_with_momentum_does_not_feel_a_rotation_of_groups():
    model, optimizer, method = make("momentum", cutoff=1e-9)
    other, other_optimizer, other_method = make("momentum", update_interval=10**6)
    assert len(train(model, optimizer, method, 9)) == 4
    train(other, other_optimizer, other_method, 9)
    for name in GROUPED:
        mine, theirs = get_layer(model, name).weight, get_layer(other, name).weight
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 8])
def test_state_dict_rebuilds_groups(steps):
    model, optimizer, method = make()
    train(model, optimizer, method, steps)
    saved = copy.deepcopy((method.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, method, 5, first=steps)
    other, other_optimizer, other_method = make()
    other_method.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    other_optimizer.load_state_dict(saved[2])
    train(other, other_optimizer, other_method, 5, first=steps)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_sent_of_a_stack_arrives(monkeypatch):
    sent = {}

    class Pair(Processes):
        """Two processes, one after the other; the first owns everything."""

        def __init__(self, index):
            super().__init__()
            self.index, self.count = index, 2

        def gather(self, value):
            return [value, value]

        def start_broadcast(self, tensor, owner):
            if owner == self.index:
                sent.setdefault(owner, []).append(tensor.clone())
            else:
                tensor.copy_(sent[owner].pop(0))
            return Mock()

    def first_owns_all(shapes, nodes, **_):
        return make_plan(shapes, [0], mode="owner", costs=Costs(), can_split=False)

    monkeypatch.setattr(factorization, "make_plan", first_owns_all)
    matrices = [torch.randn(3, 5, 4), torch.randn(6, 7)]
    infos = [
        MatrixInfo(shape=tuple(matrix.shape), dtype=matrix.dtype, device=matrix.device)
        for matrix in matrices
    ]
    mine, theirs = (
        {
            i: factors
            for i, factors, _ in Factorizer(Pair(index)).factorize(infos, matrices.__getitem__)
        }
        for index in (0, 1)
    )
    for i in (0, 1):
        torch.testing.assert_close(theirs[i], mine[i], rtol=0, atol=0)
        U, s, Vh = theirs[i]
        torch.testing.assert_close(U @ torch.diag_embed(s) @ Vh, matrices[i])


@pytest.mark.slow
def test_the_stability_of_groups_is_measured_matrix_by_matrix():
    model, optimizer, method = make(cutoff=0.6)
    tracker = BasisTracker(method.survey, Processes(), window=1)
    tracker.measure(model, 0)
    basis = {}
    for name, shape in GROUPED.items():
        U, _, Vh = economy_svd(get_layer(model, name).weight.reshape(shape))
        basis[name] = U @ Vh
    train(model, optimizer, method, 3)
    resumed = BasisTracker(method.survey, Processes(), window=1)
    resumed.load_state_dicts([tracker.state_dicts()])
    rows = {row.name: row for row in resumed.measure(model, 1)}
    for name, shape in GROUPED.items():
        U, s, Vh = economy_svd(get_layer(model, name).weight.reshape(shape))
        cosines = (basis[name] * (U @ Vh)).sum((1, 2)) / min(shape[1:])
        assert rows[name].stability == pytest.approx(cosines.mean().item())
        assert 0 < rows[name].mixing_similarity < 1
        assert rows[name].rank == rows[name].numerical_rank == rows[name].reference_rank
        torch.testing.assert_close(rows[name].singular_values, s.amax(0).detach())
    train(model, optimizer, method, 4, first=3)
    rows = {row.name: row for row in resumed.measure(model, 2)}
    assert rows["6.weight"].rank == method.ranks()["6.weight"] < 8
    assert set(rows) == {r.name for r in method.survey}


def small():
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(16, 16),
            "blocks": nn.ModuleList(
                nn.ModuleDict({"attn": nn.Linear(16, 16), "mlp": nn.Linear(16, 16)})
                for _ in range(2)
            ),
            "head": nn.Linear(16, 16),
        }
    )


@pytest.mark.parametrize(
    ("patterns", "factorized"),
    [
        ({}, ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "head"]),
        ({"include": ["*.attn"]}, ["blocks.0.attn", "blocks.1.attn"]),
        ({"exclude": ["head", "blocks.0.*"]}, ["blocks.1.attn", "blocks.1.mlp"]),
        ({"include": ["blocks.*"], "exclude": ["*.mlp"]}, ["blocks.0.attn", "blocks.1.attn"]),
    ],
)
def test_include_and_exclude(patterns, factorized):
    reports = survey(small(), **KEEP, **patterns)
    names = [r.name.removesuffix(".weight") for r in reports if r.stays_dense is None]
    assert names == factorized


def test_a_pattern_is_named_in_the_reason():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = OIALR(
        model,
        optimizer,
        delay=1,
        update_interval=1,
        include=["blocks.*", "head"],
        exclude=["*.mlp"],
        keep_last_layer=False,
    )
    reasons = {report.name: report.stays_dense for report in method.survey}
    assert reasons["blocks.1.mlp.weight"] == "excluded by oialr.exclude pattern '*.mlp'"
    assert "Embedding" in reasons["embedding.weight"]
    reports = survey(model, **KEEP, include=["blocks.*"])
    assert reports[-1].stays_dense == "matches no pattern of oialr.include"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    patterns = {option: ["blocks.*", "blocks.*.fc"]}
    with pytest.raises(ValueError, match=rf"{option}: the pattern 'blocks\.\*\.fc' matches no"):
        OIALR(model, optimizer, delay=1, update_interval=1, **patterns)


def test_a_head_tied_to_the_embedding_stays_dense_and_tied():
    model = small()
    model["head"].weight = model["embedding"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = OIALR(model, optimizer, delay=1, update_interval=1, keep_last_layer=False)
    reasons = {report.name: report.stays_dense for report in method.survey}
    # named_parameters lists a shared parameter once, as the optimizer does.
    assert "Embedding" in reasons["embedding.weight"]
    assert "tied" in reasons["head.weight"]
    x = model["blocks"][0]["attn"](model["embedding"](torch.arange(4)))
    model["head"](x).sum().backward()
    optimizer.step()
    method.step()
    assert method.converted
    assert model["head"].weight is model["embedding"].weight


def test_a_fused_projection_is_one_factorization():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

    reports = survey(Attention(), **KEEP)
    assert [(r.name, r.groups, r.stays_dense) for r in reports] == [("qkv.weight", 1, None)]


def test_an_event_tells_the_largest_values_of_a_stack():
    model = nn.Sequential(nn.Conv2d(8, 32, 3, groups=2), nn.Flatten(), nn.Linear(32, 2))
    with torch.no_grad():
        model[0].weight[16:] *= 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = OIALR(model, optimizer, delay=1, update_interval=1)
    expected = torch.linalg.svdvals(model[0].weight.detach().reshape(2, 16, 36))
    model(torch.ones(1, 8, 3, 3)).sum().backward()
    optimizer.step()
    (layer,) = method.step().layers
    torch.testing.assert_close(layer.singular_values, expected.amax(0))
