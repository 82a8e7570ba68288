"""One small layer of each kind that can be factorized, with a batch for it, in float64."""

import torch
from torch import nn

from oialr import OIALR
from oialr.layers.registry import kind_of
from oialr.linalg.svd import economy_svd
from oialr.options import Selection

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:

    class Conv1D(nn.Module):
        """Stands for that of transformers, where it is not installed: the same name and formula."""

        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf) / 50)
            self.bias = nn.Parameter(torch.zeros(nf))

        def __repr__(self):
            return f"Conv1D(nf={self.nf}, nx={self.nx})"

        def forward(self, x):
            return x @ self.weight + self.bias

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


def normal(*shape):
    """Return a function that makes batches (b, *shape) from a seed."""

    def batch(seed, rows=6):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, *shape, generator=generator, dtype=torch.float64)

    return batch


def tokens(seed):
    """Token numbers (6, 7), some of them more than once."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(30, (6, 7), generator=generator) // 2


CASES = {
    "Linear": (lambda: nn.Linear(12, 16), normal(5, 12)),
    "Conv2d": (lambda: nn.Conv2d(8, 24, 3, stride=2, padding=1), normal(8, 6, 5)),
    "Conv2d, spatial": (
        lambda: nn.Conv2d(8, 6, (2, 3), stride=(1, 2), padding=1, dilation=(2, 1)),
        normal(8, 6, 5),
    ),
    "Conv2d, groups": (lambda: nn.Conv2d(8, 24, 3, padding=1, groups=2), normal(8, 4, 5)),
    "ConvTranspose1d": (
        lambda: nn.ConvTranspose1d(12, 8, 3, stride=2, padding=1, output_padding=1),
        normal(12, 5),
    ),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(12, 8, (2, 3), stride=2), normal(12, 4, 3)),
    "ConvTranspose2d, groups": (
        lambda: nn.ConvTranspose2d(12, 8, 3, stride=(1, 2), dilation=2, groups=2, bias=False),
        normal(12, 4, 3),
    ),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(8, 6, 2, padding=1), normal(8, 3, 4, 3)),
    "Conv1D": (lambda: Conv1D(16, 12), normal(5, 12)),
    "Embedding": (lambda: nn.Embedding(30, 12, padding_idx=2), tokens),
}
"""By name: makes the dense layer, makes a batch from a seed."""

OPTIONS = {"Conv2d, spatial": {"convolutions": "spatial"}}
"""Of the method, by name, where a case is one of these options."""


def dense_layer(case):
    torch.manual_seed(0)
    return CASES[case][0]().double()


def batch_for(case, seed=0):
    return CASES[case][1](seed)


def reading_of(layer, case):
    options = Selection(**OPTIONS.get(case, {}))
    return kind_of(layer).reading(layer, "weight", options)


def twin_of(layer, case, rank=None, *, released=False):
    """Return the factorized layer of a dense one, cut to a rank."""
    U, s, Vh = economy_svd(reading_of(layer, case).to_matrix(layer.weight.detach()))
    r = rank or s.shape[-1]
    U, s, Vh = U[..., :r].contiguous(), s[..., :r], Vh[..., :r, :].contiguous()
    root = s.sqrt()
    factors = (U * root[..., None, :], root[..., :, None] * Vh)
    if not released:
        factors = (U, torch.diag_embed(s), Vh)
    _, twin = kind_of(layer).factorize(layer, "weight", factors)
    return twin


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "momentum": lambda p: torch.optim.SGD(p, lr=3e-2, momentum=0.9),
}
DELAY = 3


def make(case, kind="adamw", **options):
    """Put the layer before a head that stays full-rank; return model, optimizer and method."""
    layer = dense_layer(case)  # which sets the seed for both
    head = nn.AdaptiveAvgPool1d(24), nn.Linear(24, 3).double()
    model = nn.Sequential(layer, nn.Flatten(), *head)
    optimizer = OPTIMIZERS[kind](model.parameters())
    options = {"delay": DELAY, "update_interval": 2, "cutoff": 0.3, **options}
    options |= {"include_embeddings": True, **OPTIONS.get(case, {})}
    return model, optimizer, OIALR(model, optimizer, layer_fraction=1, rank_multiple=1, **options)


def train(case, model, optimizer, method, steps, *, first=0):
    """Train and return the events; without a method there are none."""
    events = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        target = torch.arange(6) % 3
        nn.functional.cross_entropy(model(batch_for(case, step)), target).backward()
        optimizer.step()
        events.append(method.step() if method else None)
    return [event for event in events if event]
