"""The method in a training loop that is not ours: a small network, its data and every optimizer."""

from importlib import import_module

import pytest
import torch
from torch import nn

from oialr import OIALR
from oialr.compatibility import import_torchvision


def of_timm(name, *arguments, **options):
    """Return an optimizer of timm, which the library knows by name and does not import."""
    try:
        import_torchvision()
        optimizers = import_module("timm.optim")
    except ModuleNotFoundError as error:  # the library is tested without them, too
        pytest.skip(str(error))
    return getattr(optimizers, name)(*arguments, **options)


def muon(parameters):
    """Return torch's Muon over all matrices; it takes nothing else, so that biases stay."""
    return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-2)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "lion": lambda p: of_timm("Lion", p, lr=1e-3, weight_decay=0.1),
    "lamb": lambda p: of_timm("Lamb", p, lr=1e-2, weight_decay=0.1),
    "plain lamb": lambda p: of_timm("Lamb", p, lr=1e-2, weight_decay=0.0),
    "muon": muon,
}


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 5)
    ).to(dtype)


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, 20, generator=generator, dtype=torch.float64).to(dtype)
    return x, x[:, :5].argmax(1)


def train(model, optimizer, method, steps, first=0):
    events = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        trained = next(p for p in model.parameters() if p.requires_grad)
        x, y = batch(step, trained.dtype)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        events.append(method.step() if method else None)
    return [event for event in events if event]


def weights(model):
    return [m.weight.detach().clone() for m in model if hasattr(m, "weight")]


def make(kind="adamw", seed=0, *, has_schedule=False, **options):
    """Make a network, its optimizer, perhaps with the rates of a schedule, and the method."""
    model = network(seed)
    optimizer = OPTIMIZERS[kind](model.parameters())
    if has_schedule:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = {"delay": 5, "update_interval": 3, **options}
    return model, optimizer, OIALR(model, optimizer, **arguments)


# A cut by more than half at once, so that two factors store less than the weight.
CUT = {"cutoff": 0.6, "largest_cut": 0.8, "minimum_rank_fraction": 0.1}
