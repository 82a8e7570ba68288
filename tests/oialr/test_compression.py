"""A trained network made low-rank at once: against truncation by hand and brute force, float64."""

import copy
import itertools
import math

import pytest
import torch
from support.documentation import blocks
from torch import nn

from oialr import OIALR, DivergedError, compress, to_dense


def network():
    """Three layers of very different spectra, a convolution among them, and a head."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 9),
        nn.ReLU(),
        nn.Linear(9, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    ).double()
    with torch.no_grad():
        for i, decay in ((0, 0.3), (3, 0.7), (5, 0.95)):
            weight = model[i].weight
            U, s, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            s = s[0] * decay ** torch.arange(len(s))
            weight.copy_((U * s @ Vh).view_as(weight))
    return model


INPUTS = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LAYERS = (0, 3, 5)
STORED = sum(p.numel() for p in network().parameters())


def truncated(weight, r):
    matrix = weight.detach().flatten(1)
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :r] * s[:r] @ Vh[:r]).view_as(weight)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("release", [True, False])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_every_weight_is_its_best_approximation(target, release):
    dense, model = network(), network()
    layers = compress(model, target_size=target, release=release)
    assert [layer.name for layer in layers] == [f"{i}.weight" for i in LAYERS]
    assert count(model) <= target * STORED
    for i, layer in zip(LAYERS, layers, strict=True):
        expected = dense[i].weight.detach()
        if layer.rank is not None:
            expected = truncated(expected, layer.rank)
        torch.testing.assert_close(model[i].weight.detach(), expected, atol=1e-12, rtol=0)
        energy = dense[i].weight.square().sum().item()
        error = (model[i].weight - dense[i].weight).square().sum().item()
        assert layer.lost == pytest.approx(error / energy, abs=1e-12)
        dense[i].weight.data = expected
    torch.testing.assert_close(model(INPUTS), dense(INPUTS), atol=1e-12, rtol=0)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained & {"U", "core", "Vh", "A", "B"} == ({"A", "B"} if release else {"core"})


@pytest.mark.slow
@pytest.mark.parametrize("release", [True, False])
def test_no_other_ranks_lose_less_but_for_a_single_step(release):
    """Against all combinations: within the largest gain of one step of the best."""
    dense = network()
    shapes = [tuple(dense[i].weight.flatten(1).shape) for i in LAYERS]
    spectra = [torch.linalg.svdvals(dense[i].weight.flatten(1).detach()).square() for i in LAYERS]
    shares = [[*(s.flip(0).cumsum(0).flip(0) / s.sum()).tolist(), 0.0] for s in spectra]
    steps = [pair for lost in shares for pair in itertools.pairwise(lost[1:])]
    largest = max(before - after for before, after in steps)
    others = STORED - sum(map(math.prod, shapes))

    def cost(r, shape):
        return min(r * sum(shape) + (0 if release else r * r), math.prod(shape))

    for target in (0.3, 0.4, 0.55, 0.7):
        best = math.inf
        for ranks in itertools.product(*(range(1, min(shape) + 1) for shape in shapes)):
            costs = [cost(r, shape) for r, shape in zip(ranks, shapes, strict=True)]
            if others + sum(costs) <= target * STORED:
                is_dense = [c == math.prod(shape) for c, shape in zip(costs, shapes, strict=True)]
                lost = sum(
                    0.0 if whole else share[r]
                    for share, r, whole in zip(shares, ranks, is_dense, strict=True)
                )
                best = min(best, lost)
        found = sum(
            layer.lost for layer in compress(network(), target_size=target, release=release)
        )
        assert best - 1e-12 <= found <= best + largest


@pytest.mark.slow
def test_it_is_what_a_release_right_after_the_first_step_does():
    """With a learning rate of 0 that step changes nothing."""
    model, trained = network(), network()
    compress(model, target_size=0.4)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
    method = OIALR(trained, optimizer, delay=1, update_interval=1, release=1, target_size=0.4)
    trained(INPUTS).sum().backward()
    optimizer.step()
    method.step()
    state, other = model.state_dict(), trained.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-12, rtol=0)


def test_groups_attention_and_selection():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 16, 3, groups=2, padding=1)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.free = nn.Linear(16, 16)
            self.head = nn.Linear(16, 2)

        def forward(self, x):
            x = self.conv(x).transpose(1, 2)
            x, _ = self.attention(x, x, x)
            return self.head(self.free(x))

    torch.manual_seed(0)
    model = Net().double()
    dense = copy.deepcopy(model)
    layers = compress(model, target_size=0.7, exclude=["free"])
    names = {layer.name for layer in layers}
    assert {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"} == names
    assert isinstance(model.free, nn.Linear)
    assert count(model) <= 0.7 * count(dense)
    x = torch.randn(3, 8, 5, dtype=torch.float64)
    torch.testing.assert_close(to_dense(copy.deepcopy(model))(x), model(x), atol=1e-12, rtol=0)
    (lost,) = [layer.lost for layer in layers if layer.name == "conv.weight"]
    error = sum(
        (a - b).square().sum() for a, b in zip(model.conv.weight, dense.conv.weight, strict=True)
    )
    assert lost == pytest.approx((error / dense.conv.weight.square().sum()).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_size": 0.01}, ValueError, "target_size 0.01 cannot be reached"),
        ({"target_size": 1.5}, ValueError, "target_size"),
        ({"target_size": 0.5, "cutoff": 0.1}, TypeError, "compress takes no option cutoff"),
        ({"target_size": 0.5, "exclude": ["*"]}, ValueError, "no layer can be factorized: "),
    ],
)
def test_what_cannot_be_is_told_and_changes_nothing(options, error, message):
    model = network()
    with pytest.raises(error, match=message):
        compress(model, **options)
    assert all(type(module).__module__.startswith("torch.nn") for module in model)


def test_a_weight_that_is_not_finite_is_named():
    model = network()
    model[3].weight.data[0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"^3\.weight holds NaN or infinity$"):
        compress(model, target_size=0.5)
    assert type(model[0]) is nn.Conv2d


def test_the_page_says_what_works():
    (block,) = (b for b in blocks() if b.page == "docs/compress.md" and b.language == "python")
    model = network()
    names = {"model": model, "torch": torch, "loader": [(INPUTS, None)]}
    exec(block.text, names)
    assert count(model) <= 0.35 * STORED
    held = {id(p) for group in names["optimizer"].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.slow
def test_what_is_around_a_network_is_looked_through():
    model, compiled = network(), torch.compile(network())
    compress(model, target_size=0.5)
    compress(compiled, target_size=0.5)
    inside = compiled._orig_mod
    assert inside.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(inside(INPUTS), model(INPUTS), atol=0, rtol=0)


def test_a_network_that_is_low_rank_already_is_refused():
    model = network()
    compress(model, target_size=0.5)
    with pytest.raises(ValueError, match=r"is low-rank already: oialr\.to_dense"):
        compress(model, target_size=0.4)


def test_frozen_weights_stay_as_they_are_and_training_goes_on():
    model = network()
    model[3].weight.requires_grad_(False)
    compress(model, target_size=0.85)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert type(model[3]) is nn.Linear
    assert type(model[0]) is not nn.Conv2d
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(INPUTS).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
