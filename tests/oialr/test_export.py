"""Out of the library: files of four formats, compared before they appear, and read again."""

import copy
import re

import pytest
import torch
from support.low_rank import low_rank
from torch import nn
from torch.utils._pytree import tree_leaves

import oialr
from oialr.compatibility import import_torchvision
from oialr.convert import get_layer, to_dense
from oialr.errors import ExportError
from oialr.export import SUFFIXES, files, formats
from oialr.export.state import load_dense
from oialr.layers.base import FactoredLayer
from oialr.skeleton import factored_weights

FORMATS = ["dense", "factors", "onnx", "torch-export"]


class Network(nn.Module):
    """A grouped convolution, attention, tied weights, a statistic and a buffer that is not kept."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 64, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 5)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mT * self.scale
        attended, _ = self.attention(x, x, x, need_weights=False)
        x = torch.relu(self.second(self.first(x + attended)))
        return {"logits": self.head(x.mean(1)), "features": x}


def network(seed=0):
    torch.manual_seed(seed)
    return Network()


def trained(fraction=0.1, **options):
    model = low_rank(network(), fraction, **options)
    model.norm.running_mean.uniform_(-1, 1)
    return model


@pytest.fixture
def samples():
    return torch.randn(3, 16, 9, generator=torch.Generator().manual_seed(1))


def outputs(model, x):
    with torch.no_grad():
        return list(model.eval()(x).values())


def test_the_dense_state_has_the_original_names_and_weights():
    model = trained()
    dense = network()
    state = oialr.dense_state(model)
    assert list(state) == list(dense.state_dict())
    assert {name: x.shape for name, x in state.items()} == {
        name: x.shape for name, x in dense.state_dict().items()
    }
    dense.load_state_dict(state, strict=True)
    in_proj = model.attention.in_proj
    expected = in_proj.U.double() @ in_proj.core.double() @ in_proj.Vh.double()
    torch.testing.assert_close(
        state["attention.in_proj_weight"].double(), expected, rtol=1e-5, atol=1e-6
    )
    assert state["first.weight"].data_ptr() == state["second.weight"].data_ptr()
    # what was never factorized is exactly what it was, and the network is untouched
    for name in ("first.weight", "norm.running_mean", "attention.in_proj_bias", "head.weight"):
        assert torch.equal(state[name], model.state_dict()[name])
    assert isinstance(model.attention.in_proj, FactoredLayer)
    assert model.conv.U.requires_grad is False
    assert model.conv.core.requires_grad is True
    assert "conv.core" in model.state_dict()


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("projection", ["packed", "separate"])
def test_factors_are_two_where_these_are_smaller(projection, released, samples):
    model = trained(released=released, attention_projection=projection)
    before = copy.deepcopy(model.state_dict())
    merged = oialr.two_factors(model)
    assert set(factored_weights(merged)) == {
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    state = merged.state_dict()
    assert state["conv.A"].shape[0] == 2  # one for each group
    assert not any(name.endswith(("U", "core", "Vh")) for name in state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.conv.released is released
    for ours, theirs in zip(outputs(merged, samples), outputs(model, samples), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Keeping(nn.Module):
    """Keeps what its forward pass computes, and has a weight that is formed in every one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32)
        self.second = nn.utils.weight_norm(nn.Linear(32, 4))
        self.kept = []

    def forward(self, x):
        x = self.first(x)
        self.kept.append({"hidden": x})
        self.kept.append(self.kept)  # what contains itself is walked once
        return {"out": self.second(x)}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("make", [oialr.two_factors, oialr.for_inference, oialr.dense_state])
def test_a_network_may_keep_what_a_forward_pass_has_left_in_it(make):
    model, x = low_rank(Keeping(), 0.2), torch.randn(2, 32)
    model(x)
    made = make(model)
    if isinstance(made, dict):
        network = Keeping()
        network.load_state_dict(made)
        made = network
    torch.testing.assert_close(outputs(made, x), outputs(model, x), rtol=1e-5, atol=1e-6)


def test_factors_that_are_larger_than_the_weight_are_not_written(samples):
    model = trained(0.6)
    merged = oialr.two_factors(model)
    # (192, 64) at rank 38 is smaller as two factors, and (64, 64) and (32, 24) are not
    assert set(factored_weights(merged)) == {"attention.in_proj_weight"}
    assert merged.state_dict()["conv.weight"].shape == (64, 8, 3)
    for ours, theirs in zip(outputs(merged, samples), outputs(model, samples), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_of_each_format_computes_the_same_for_any_batch(form, samples, tmp_path):
    model = trained().train()
    result = files.EXPORTERS[form](
        model, tmp_path / f"model{formats.FORMATS[form].suffix}", samples
    )
    assert [path.name for path in tmp_path.iterdir()] == [result.path.name]
    assert model.training
    assert result.difference < 1e-5 < result.largest_output
    assert result.bytes == result.path.stat().st_size
    assert result.seconds_per_sample > 0 < result.dense_seconds_per_sample
    assert re.fullmatch(
        rf".*: {form}, largest difference \d\.\de-\d+ of outputs up to [\d.]+, \d+ bytes "
        r"\([\d.]+ of dense\), [\d.]+ ms per sample \([\d.]+ of dense\)",
        str(result),
    )
    read = oialr.read_exported(result.path, network(seed=3))
    for count in (1, 3, 64):
        x = torch.randn(count, 16, 9)
        with torch.no_grad():
            found = read(x)
        found = list(found.values()) if isinstance(found, dict) else found
        for ours, theirs in zip(found, outputs(model, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_factors_take_less_than_dense(samples, tmp_path):
    model = trained(0.05)
    dense, factors = (
        files.EXPORTERS[form](model, tmp_path / form, samples) for form in ("dense", "factors")
    )
    assert factors.bytes < 0.75 * dense.bytes
    assert dense.dense_bytes < dense.bytes < 1.2 * dense.dense_bytes  # tied weights once


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("timm", (3, 32, 32)),
        ("torchvision", (3, 32, 32)),
        ("resnet", (3, 32, 32)),
    ],
)
def test_timm_and_torchvision_load_the_file_with_equal_predictions(model, shape, tmp_path):
    import_torchvision()
    import timm
    import torchvision

    sizes = {"patch_size": 8, "num_heads": 2, "num_classes": 10}
    builders = {
        "timm": lambda: timm.models.VisionTransformer(img_size=32, embed_dim=64, depth=2, **sizes),
        "torchvision": lambda: torchvision.models.VisionTransformer(
            image_size=32, hidden_dim=64, mlp_dim=128, num_layers=2, **sizes
        ),
        "resnet": lambda: timm.models.ResNet(
            timm.models.resnet.BasicBlock, [1, 1, 1, 1], channels=(32, 32, 48, 64), num_classes=10
        ),
    }
    torch.manual_seed(0)
    dense = builders[model]()
    for parameter in dense.parameters():  # torchvision's heads begin at 0
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    low = low_rank(dense, 0.2).eval()
    images = torch.randn(8, *shape)
    path = tmp_path / "model.pt"
    oialr.export_dense(low, path, images)
    other = builders[model]()
    other.load_state_dict(torch.load(path, weights_only=True), strict=True)
    with torch.no_grad():
        ours, theirs = low(images), other.eval()(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))


def test_a_weight_and_its_transpose_in_one_memory_are_stored_as_two(tmp_path):
    """Of a square weight both have one place and shape, and only the strides differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    model[2].weight = nn.Parameter(model[0].weight.t())
    path = tmp_path / "model.pt"
    oialr.export_dense(model, path, torch.randn(4, 16))
    stored = torch.load(path, weights_only=True)
    assert torch.equal(stored["0.weight"], model[0].weight)
    assert torch.equal(stored["2.weight"], model[0].weight.T)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.head = nn.Linear(64, 2)

    def forward(self, x, *, mask=None, scale=1.0):
        return self.head(torch.relu(self.fc(x * mask))) * scale


@pytest.mark.parametrize("form", FORMATS)
def test_arguments_may_have_names(form, tmp_path):
    model = low_rank(TwoInputs(), 0.2)
    inputs = {"x": torch.randn(1, 64), "mask": torch.ones(1, 64)}
    result = files.EXPORTERS[form](model, tmp_path / f"model{SUFFIXES[form]}", inputs)
    assert result.difference < 1e-5


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        return self.fc(x if x.sum() > 0 else -x)


class Noisy(Branching):
    def forward(self, x):
        return self.fc(x) + torch.randn(len(x), 2)


class Infinite(Branching):
    def forward(self, x):
        return self.fc(x) / 0


@pytest.mark.parametrize(
    ("model", "form", "message"),
    [
        (Branching, "onnx", "torch.export cannot follow this network"),
        (Branching, "torch-export", "torch.export cannot follow this network"),
        (Noisy, "dense", "what was written as dense differs by"),
        (Infinite, "dense", "the network's outputs on the samples are not finite"),
    ],
)
def test_what_does_not_compute_the_same_is_no_file(model, form, message, tmp_path):
    path = tmp_path / f"model{SUFFIXES[form]}"
    path.write_text("an older file")
    with pytest.raises(oialr.ExportError, match=message) as raised:
        files.EXPORTERS[form](model(), path, torch.randn(3, 16))
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "an older file"


def test_a_wrong_writer_is_noticed(monkeypatch, samples, tmp_path):
    """The comparison is one with the file, not with what was to be written."""
    honest = formats.FORMATS["dense"]

    def write(model, path, inputs):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.head.bias[0] += 0.01
        honest.write(model, path, inputs)

    monkeypatch.setitem(formats.FORMATS, "dense", formats.Format(".pt", write, honest.read))
    with pytest.raises(oialr.ExportError, match=r"differs by 1\.0e-02"):
        oialr.export_dense(trained(), tmp_path / "model.pt", samples)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch, samples, tmp_path):
    monkeypatch.setattr(formats, "find_spec", lambda name: name == "onnx")
    with pytest.raises(oialr.UserError, match="pip install onnxscript onnxruntime"):
        oialr.export_onnx(trained(), tmp_path / "model.onnx", samples)


class Two(nn.Module):
    """Takes two arguments, and reads a weight instead of calling its layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.called = nn.Linear(64, 64)
        self.read = nn.Linear(64, 64)
        self.up = nn.ConvTranspose1d(64, 64, 2, stride=2)
        self.head = nn.Linear(64, 3)

    def forward(self, a, b, scale=None):
        y = self.called(a) - 2 * nn.functional.linear(b, self.read.weight, self.read.bias)
        y = y if scale is None else y * scale
        return self.head(self.up(y[..., None], output_size=[2]).mean(-1))


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_file_of_a_network_that_does_more_than_to_call_its_layers(form, tmp_path, caplog):
    """Inputs have the names and the order of the arguments, in whichever order they are given."""
    caplog.set_level("INFO")
    model, path = low_rank(Two(), 0.1), tmp_path / f"model{SUFFIXES[form]}"
    a, b = torch.randn(2, 3, 64)
    result = files.EXPORTERS[form](model, path, {"b": b, "a": a, "scale": torch.tensor(2.0)})
    assert "fails with two layers in their place: read, up" in caplog.text
    assert result.difference < 1e-5
    exported, scale = oialr.read_exported(path), torch.tensor(2.0)
    expected = model(a, b, scale)
    calls = [exported(a=a, b=b, scale=scale), exported(scale=scale, b=b, a=a)]
    if form == "onnx":
        calls += [exported(a, b, scale), exported(a, scale=scale, b=b)]
        for args, kwargs in (((a,), {}), ((a, b, a, a), {}), ((a, b), {"c": scale})):
            with pytest.raises(ValueError, match=r"model\.onnx takes a, b, scale, .* is given"):
                exported(*args, **kwargs)
    for found in calls:
        torch.testing.assert_close(tree_leaves(found)[0], expected, rtol=1e-4, atol=1e-5)


class TooLarge(Two):
    def forward(self, a, b):
        raise torch.OutOfMemoryError("out of memory")


def test_memory_that_runs_out_is_no_fault_of_the_network(tmp_path):
    """All layers were made dense for it, and torch.export got the blame."""
    samples = tuple(torch.randn(2, 3, 64))
    with pytest.raises(torch.OutOfMemoryError):
        oialr.export_torch(low_rank(TooLarge(), 0.1), tmp_path / "a.pt2", samples)
    assert not list(tmp_path.iterdir())


def test_a_device_that_fails_is_no_other_network(monkeypatch):
    def fail(*_):
        raise RuntimeError("Error(s) in loading:\n an exception occurred : ('CUDA error: 700',)")

    model = Two()
    state = model.state_dict()
    monkeypatch.setattr(nn.Module, "load_state_dict", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        load_dense(model, state, "model.pt")


def test_arguments_may_be_a_list_as_a_loader_gives_it(tmp_path):
    assert oialr.export_torch(Two(), tmp_path / "a.pt2", list(torch.randn(2, 3, 64))).bytes


def test_onnx_is_not_written_in_bfloat16(tmp_path):
    samples = torch.randn(2, 3, 64).bfloat16()
    with pytest.raises(ExportError, match=r"bfloat16 on CPUs: export model\.float"):
        oialr.export_onnx(Two().bfloat16(), tmp_path / "a.onnx", tuple(samples))
    assert not list(tmp_path.iterdir())


def test_weights_of_another_network_are_refused_and_nothing_is_changed(samples, tmp_path):
    for form in ("dense", "factors"):
        files.EXPORTERS[form](trained(), tmp_path / form, samples)
    other = network(seed=7)
    other.conv = nn.Conv1d(16, 96, 3, padding=1, groups=2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"factors does not fit the network: .*conv"):
        oialr.load(other, tmp_path / "factors")
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
    other = network(seed=7)
    other.head = nn.Linear(64, 6)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"factors does not fit the network: head\."):
        oialr.load(other, tmp_path / "factors")
    with pytest.raises(ValueError, match=r"dense belongs to another network: .*head.weight"):
        oialr.read_exported(tmp_path / "dense", other)
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="dense is damaged, or no safetensors file"):
        oialr.load(network(), tmp_path / "dense")
    with pytest.raises(ValueError, match="the network must be given too"):
        oialr.read_exported(tmp_path / "dense")


@pytest.mark.parametrize("name", ["x.onnx", "x.pt2", "x.pt"])
def test_what_is_no_file_of_its_format_is_told_in_one_line(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError):
        oialr.read_exported(path, network())
    path.write_bytes(b"nothing of that kind")
    with pytest.raises(ValueError, match=f"{name} is no file of") as raised:
        oialr.read_exported(path, network())
    assert "\n" not in str(raised.value)


def test_the_network_may_be_wrapped_and_partly_released(samples, tmp_path):
    model = trained()
    get_layer(model, "conv.weight").set_factors(*get_layer(model, "conv.weight").pair())
    result = oialr.export_factors(nn.DataParallel(model), tmp_path / "model.pt", samples)
    dense = to_dense(copy.deepcopy(model))
    read = oialr.read_exported(result.path, network())
    for ours, theirs in zip(outputs(read, samples), outputs(dense, samples), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
