"""The plain reference and the fast method train the same networks alike, and docs/method.md.

Both train in float64 and are compared after every step: the weights W = U core Vh, which do not
depend on the signs of singular vectors, and after every conversion and update the layers and their
ranks. That holds where no singular value is repeated, since only then the singular vectors are
determined up to their signs; each run shows that it stays away from there.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn

from oialr import OIALR, reference

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "oialr" / "reference.py"
PAGE = ROOT / "docs" / "method.md"
QUOTE = re.compile(
    r"\[reference\.py, lines? (?P<said>[\d-]+)\]"
    r"\(\.\./oialr/reference\.py#L(?P<first>\d+)(-L(?P<last>\d+))?\)"
    r"\n\n```python\n(?P<code>.*?)```",
    re.DOTALL,
)
STEPS = 60
TOLERANCE = 1e-11  # of the weights' norm; rounding alone leaves less than 1e-13
SMALLEST_GAP = 1e-5  # between neighbouring singular values, over the largest
SMALLEST_MARGIN = 1e-9  # between a singular value and the cutoff, over the largest
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.4),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}


def linear_network():
    return nn.Sequential(
        *(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 48), nn.GELU()),
        *(nn.Linear(48, 24, bias=False), nn.Tanh(), nn.Linear(24, 5)),
    )


def convolutional_network():
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1, padding_mode="circular"), nn.Tanh()),
        *(nn.Conv2d(12, 20, 3, stride=2, padding=1), nn.GELU()),
        nn.Conv2d(20, 20, 3, padding=2, dilation=2, groups=20),  # stays full-rank
        *(nn.Conv2d(20, 32, 1, bias=False), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(32 * 4, 24), nn.Tanh(), nn.Linear(24, 5)),
    )


NETWORKS = {"linear": (linear_network, (20,)), "convolutional": (convolutional_network, (3, 8, 8))}


def network(kind):
    torch.manual_seed(0)
    return NETWORKS[kind][0]().double()


def train_one_step(model, optimizer, kind, step, *, keep_gradient=False):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, *NETWORKS[kind][1], generator=generator, dtype=torch.float64)
    if not keep_gradient:
        optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), x.flatten(1)[:, :5].argmax(1)).backward()
    optimizer.step()


def values(model):
    """Return all weights as they are multiplied with, W = U core Vh, and all biases."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "core"):
            W = (layer.U @ layer.core @ layer.Vh).detach()
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            W = layer.weight.detach().clone()
        else:
            continue
        found[f"{name}.weight"] = W.flatten(1)
        if layer.bias is not None:
            found[f"{name}.bias"] = layer.bias.detach().clone()
    return found


def assert_equal(mine, theirs, step):
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        error = torch.linalg.norm(value - theirs[name]) / torch.linalg.norm(value)
        assert error < TOLERANCE, (name, step, float(error))


def assert_determined(layer, beta):
    """Assert that a layer's singular vectors and its rank do not hang on rounding."""
    s = layer.singular_values / layer.singular_values[0]
    assert (s[:-1] - s[1:]).min() > SMALLEST_GAP, layer.name
    assert (s - beta).abs().min() > SMALLEST_MARGIN, layer.name


def train_both(
    network_kind,
    optimizer_kind,
    *,
    delay=9,
    update_interval=4,
    keep_gradients=False,
    fast_only=None,
    **options,
):
    """Train by both side by side, compare them after every step, and return the events."""
    fast_only = fast_only or {}
    models = [network(network_kind) for _ in range(2)]
    optimizers = [OPTIMIZERS[optimizer_kind](model.parameters()) for model in models]
    beta, alpha = options.pop("cutoff", 0.5), options.pop("layer_fraction", 0.4)
    fast = OIALR(
        *(models[0], optimizers[0]),
        **{"delay": delay, "update_interval": update_interval},
        **{"cutoff": beta, "layer_fraction": alpha, "rank_multiple": 1, **options, **fast_only},
    )
    plain = reference.OIALR(
        models[1], optimizers[1], d=delay, nu=update_interval, beta=beta, alpha=alpha, **options
    )
    assert [layer.name for layer in fast.layers] == [f"{name}.weight" for name in plain.layers]
    events = []
    for step in range(1, STEPS + 1):
        for model, optimizer in zip(models, optimizers, strict=True):
            keep_gradient = keep_gradients and (step - delay) % update_interval == 1
            train_one_step(model, optimizer, network_kind, step, keep_gradient=keep_gradient)
        event, ranks = fast.step(), plain.step()
        happened = {layer.name: layer.rank for layer in event.layers} if event else {}
        assert happened == {f"{name}.weight": r for name, r in ranks.items()}, step
        for layer in event.layers if event else ():
            assert_determined(layer, beta)
        assert_equal(*map(values, models), step)
        events += [event] if event else []
    return events


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_kind", OPTIMIZERS)
@pytest.mark.parametrize("network_kind", NETWORKS)
def test_fast_method_and_reference_train_alike(network_kind, optimizer_kind):
    events = train_both(network_kind, optimizer_kind)
    assert [event.step for event in events] == list(range(9, STEPS + 1, 4))
    cuts = [x for event in events for x in event.layers if x.rank < x.previous_rank]
    assert {layer.name for layer in cuts} == {layer.name for layer in events[0].layers}
    assert any(layer.rank > layer.previous_rank / 2 for layer in cuts)  # not the guard's choice


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"layer_fraction": 0.1, "cutoff": 0.2},  # less than one layer: one is updated
        {"layer_fraction": 1.0, "cutoff": 0.9, "largest_cut": 0.29, "minimum_rank_fraction": 0.28},
        {"keep_first_layer": True, "keep_last_layer": False},
        {"delay": 1, "update_interval": 1, "cutoff": 0.15},
        {"keep_gradients": True},
    ],
    ids=["few layers", "guards", "first and last layer", "every step", "pending gradients"],
)
@pytest.mark.parametrize("network_kind", NETWORKS)
def test_options_mean_the_same(network_kind, options):
    train_both(network_kind, "adam", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fast_only",
    [
        {"execution": "factored"},
        {"execution": "folded", "recompute_convolutions": True},
        {"execution": "dense"},
    ],
    ids=lambda options: options["execution"],
)
@pytest.mark.parametrize("network_kind", NETWORKS)
def test_every_order_of_the_products_trains_alike(network_kind, fast_only):
    train_both(network_kind, "adam", fast_only=fast_only)


def sliced(A, L, R):
    """Keep a part of the state as it is, in place of carrying it into the new basis."""
    return A.flatten(1)[: L.shape[1], : R.shape[1]].clone()


MISTAKES = {
    "state not carried into the new basis": ("linear", lambda right: sliced),
    "signs of singular vectors lost": (
        "linear",
        lambda right: lambda A, L, R: right(A, L.abs(), R.abs()),
    ),
    "second moment carried like the first": (
        "LINEAR",
        lambda right: (*right, *reference.SQUARED),
    ),
    "one singular value too few": ("kept_rank", lambda right: lambda *a: max(1, right(*a) - 1)),
    "cutoff by the square": (
        "kept_rank",
        lambda right: lambda s, beta, *a: right(s, beta**2, *a),
    ),
    "no guard": ("kept_rank", lambda right: lambda s, beta, *a: int((s >= beta * s[0]).sum())),
    "all layers at once": ("layers_in_turn", lambda right: lambda i, L, alpha: L),
    "one update late": ("layers_in_turn", lambda right: lambda i, L, alpha: right(i - 1, L, alpha)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(monkeypatch, mistake):
    name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(reference, name, wrong(getattr(reference, name)))
    with pytest.raises(AssertionError):
        train_both("linear", "adam", cutoff=0.6)


def test_reference_is_short_and_stands_alone():
    assert len(SOURCE.read_text().splitlines()) <= 150
    imported = [node for node in ast.walk(ast.parse(SOURCE.read_text())) if is_import(node)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imported}
    assert {name.partition(".")[0] for name in names} == {"math", "torch"}


def is_import(node):
    return isinstance(node, ast.Import | ast.ImportFrom)


def test_the_page_quotes_the_reference():
    page, source = PAGE.read_text(), SOURCE.read_text().splitlines(keepends=True)
    quotes = list(QUOTE.finditer(page))
    assert len(quotes) == page.count("```python") >= 10
    for quote in quotes:
        first = last = int(quote["first"])
        if quote["last"]:
            last = int(quote["last"])
        assert quote["said"] == (f"{first}-{last}" if last > first else f"{first}")
        assert quote["code"] == dedent("".join(source[first - 1 : last])), quote["said"]


def test_the_page_names_arguments_and_files_that_exist():
    page = PAGE.read_text()
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ")]
    named = {name for row in rows[2:] for name in re.findall(r"`(\w+)`", row)}
    assert len(named) == 8
    assert named <= inspect.signature(OIALR).parameters.keys()
    for target in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (PAGE.parent / target).is_file(), target


@pytest.mark.slow
def test_the_figure_can_be_drawn_anew(tmp_path):
    drawn = tmp_path / "method.png"
    command = [sys.executable, "-m", "docs.figures.method", "--output", str(drawn)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "MPLBACKEND": "Agg"})
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs" / "figures" / "method.png").stat().st_size < 100_000
