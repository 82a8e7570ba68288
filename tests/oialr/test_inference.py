"""A network for its use: plain layers of the same function, found by quantization."""

import copy
import logging
import warnings

import pytest
import torch
from support.kinds import Conv1D
from support.low_rank import low_rank
from torch import nn
from torch.nn.parallel import DataParallel

import oialr
from oialr.layers.base import FactoredLayer
from oialr.layers.cost import pair_pays
from oialr.layers.plain_attention import PlainAttention

# Rounding of the merged core and of products in another order, float64.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


class Attending(nn.Module):
    """Attention of a kind, with everything else around it dense."""

    def __init__(self, *, cross=False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True, **options)
        self.cross = cross
        self.head = nn.Linear(64, 3)

    def forward(self, x, memory=None):
        other = x if memory is None else memory
        value = other * 2 if self.cross else other
        attended, _ = self.attention(x, other, value, need_weights=False)
        return self.head(attended)


def convolutions(**options):
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        (kind(64, 96, 3, stride=2, padding=1, **options), (2, 64, *[7] * d))
        for d, kind in enumerate(kinds, start=1)
    ]


def transposed(**options):
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return [
        (kind(96, 64, 3, stride=2, padding=1, output_padding=1, **options), (2, 96, *[5] * d))
        for d, kind in enumerate(kinds, start=1)
    ]


LAYERS = [
    (nn.Linear(48, 64), (5, 7, 48)),
    (nn.Linear(48, 64, bias=False), (5, 48)),
    *convolutions(),
    *convolutions(groups=2, dilation=2, padding_mode="reflect"),
    *convolutions(groups=2, bias=False),
    *transposed(),
    *transposed(groups=2, dilation=2, bias=False),
    (Conv1D(64, 48), (5, 7, 48)),
]


@pytest.mark.parametrize("released", [False, True], ids=["core", "released"])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: str(x)[:45])
def test_a_layer_becomes_two_of_torchs_own_type(layer, shape, released):
    model = nn.ModuleDict({"layer": layer, "head": nn.Linear(2, 2)}).double()
    model = low_rank(model, 0.25, released=released)
    factored = model["layer"]
    plain = oialr.for_inference(model)["layer"]
    kind, dimensions = type(layer), len(shape) - 2
    kinds = [nn.Linear] * 2 if kind is Conv1D else [kind] * 2
    if "Transpose" in kind.__name__:
        kinds[0] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    assert [type(part) for part in plain] == kinds
    assert plain[0].weight.numel() + plain[1].weight.numel() == sum(
        factor.numel() for factor in factored.pair()
    )
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain(x), factored.to_dense()(x), **EXACT)


@pytest.mark.parametrize("exclude", [(), ("layer", "attention")], ids=["two", "dense"])
def test_hooks_of_factorized_layers_are_those_of_what_takes_their_places(exclude):
    """They change the function here: two layers, or a dense one, without them were another net."""
    attending = Attending().double()
    model = nn.ModuleDict({"layer": nn.Linear(64, 64), "attending": attending, "head": nn.Tanh()})
    model = low_rank(model.double(), 0.1, keep_last_layer=False)
    layer, attention = model["layer"], model["attending"].attention
    out_proj = attention.out_proj
    layer.register_forward_pre_hook(lambda _, inputs: (3 * inputs[0],))
    attention.register_forward_hook(lambda _, inputs, output: (output[0] + inputs[0], output[1]))
    if not exclude:  # a dense nn.MultiheadAttention never calls it
        out_proj.register_forward_hook(lambda _, inputs, output: output - inputs[0])

    def output(network):
        return network["attending"](network["layer"](x))

    x = torch.randn(2, 5, 64, dtype=torch.float64)
    expected = output(model.eval())
    plain = oialr.for_inference(model, exclude=[f"*{name}" for name in exclude])
    assert type(plain["layer"]) is (nn.Linear if exclude else nn.Sequential)
    kind = nn.MultiheadAttention if exclude else PlainAttention
    assert type(plain["attending"].attention) is kind
    torch.testing.assert_close(output(plain), expected, **EXACT)


OPTIONS = [
    {},
    {"bias": False},
    {"kdim": 48, "vdim": 40},
    {"add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("projection", ["packed", "separate"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dense", [(), ("in_proj_weight", "k_proj_weight"), ("out_proj.weight",)])
def test_attention_becomes_plain_layers(options, cross, projection, dense):
    torch.manual_seed(0)
    model = Attending(cross=cross, **options).double()
    dense = [f"attention.{name}" for name in dense]
    model = low_rank(model, 0.1, attention_projection=projection, dense=dense)
    plain = oialr.for_inference(model)
    assert type(plain.attention) is PlainAttention
    kinds = {type(m) for m in plain.modules() if not any(m.children())}
    assert kinds <= {nn.Linear, nn.Identity}
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    memory = None
    if not options.get("kdim"):
        memory = torch.randn(2, 6, 64, dtype=torch.float64) if cross else None
        torch.testing.assert_close(plain(x, memory), model.eval()(x, memory), **EXACT)
    else:
        inputs = (x, torch.randn(2, 6, 48).double(), torch.randn(2, 6, 40).double())
        ours, weights = plain.attention(*inputs)
        theirs, expected = model.eval().attention(*inputs)
        torch.testing.assert_close((ours, weights), (theirs, expected), **EXACT)


def encoder(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, norm_first=norm_first)
    nested = not norm_first
    return nn.Sequential(
        nn.Linear(24, 128),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested),
        nn.Linear(128, 4),
    ).double()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("part", ["attention", "feed-forward", "both"])
def test_torchs_fused_kernels_do_not_look_for_dense_weights(norm_first, part):
    dense = {
        "attention": [f"1.layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2)],
        "feed-forward": [
            f"1.layers.{i}.self_attn.{name}"
            for i in (0, 1)
            for name in ("in_proj_weight", "out_proj.weight")
        ],
        "both": [],
    }
    model = low_rank(encoder(norm_first), 0.1, dense=dense[part]).eval()
    plain = oialr.for_inference(model)
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), **EXACT)
        inner = model[0](x)
        ours = plain[1](inner, src_key_padding_mask=padding)
        theirs = model[1](inner, src_key_padding_mask=padding)
    torch.testing.assert_close(ours[~padding], theirs[~padding], **EXACT)


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, 5))


def test_the_given_network_stays_as_it_is():
    model = low_rank(perceptron()).train()
    before = copy.deepcopy(model.state_dict())
    plain = oialr.for_inference(DataParallel(model))
    assert model.training
    assert isinstance(model[0], FactoredLayer)
    assert not plain.training
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    for parameter in plain.parameters():
        parameter.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_dense_layer_is_taken_where_it_is_faster(caplog):
    model = low_rank(perceptron(), 0.4)
    with caplog.at_level(logging.INFO):
        plain = oialr.for_inference(model, rows=1)
    assert [type(layer) for layer in plain if not isinstance(layer, nn.ReLU)] == [nn.Linear] * 3
    assert "0 is dense: faster so" in caplog.text
    assert type(oialr.for_inference(model)[0]) is nn.Sequential


def test_what_reads_a_weight_can_be_kept_dense():
    model = low_rank(encoder(norm_first=False))
    plain = oialr.for_inference(model, exclude=["1.layers.0.*"])
    assert type(plain[1].layers[0].linear1) is nn.Linear
    assert type(plain[1].layers[0].self_attn) is nn.MultiheadAttention
    assert isinstance(plain[1].layers[0].self_attn.out_proj, nn.Linear)
    assert type(plain[1].layers[1].linear1) is nn.Sequential
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(plain(x), model.eval()(x), **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, not 0"),
        ({"exclude": ["nothing.*"]}, "the pattern 'nothing.*' matches no factorized layer"),
        # the attention reads it without calling it
        ({"exclude": ["*.out_proj"]}, "the pattern '\\*.out_proj' matches no factorized layer"),
    ],
)
def test_impossible_wishes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        oialr.for_inference(low_rank(encoder(norm_first=False)), **options)


@pytest.mark.slow
def test_dynamic_quantization_finds_every_layer():
    model = low_rank(encoder(norm_first=False).float(), 0.25)
    plain = oialr.for_inference(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch names its successor, torchao
        quantized = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
        kinds = {type(m) for m in quantized.modules() if "Linear(" in repr(m).splitlines()[0]}
        x = torch.randn(3, 7, 24)
        difference = (quantized(x) - plain(x)).abs().max()
    assert kinds == {torch.ao.nn.quantized.dynamic.Linear}
    assert 0 < difference < 0.05 * plain(x).abs().max()


def test_what_pays_is_a_matter_of_rank_rows_and_size():
    assert pair_pays(768, 768, 192)
    assert pair_pays(768, 768, 192, rows=1)
    assert not pair_pays(768, 768, 360)  # 0.94 of the multiply-adds, and narrower
    assert not pair_pays(64, 64, 16, rows=8)  # measured: two calls take longer than one
    assert pair_pays(64, 64, 16)
    assert pair_pays(64, 64, 16, rows=8, groups=100)
    assert not pair_pays(4096, 4096, 3000)


def test_a_dense_network_is_copied():
    model = perceptron()
    plain = oialr.for_inference(model)
    assert plain is not model
    torch.testing.assert_close(plain.state_dict(), model.state_dict(), rtol=0, atol=0)
