"""Convolutions of every kind, and what a layer gives forward and backward."""

import torch
from torch import nn

KEEP = {"keep_first_layer": False, "keep_last_layer": False, "minimum_rank_fraction": 0.01}


def pull(layer, x):
    """Return output and input gradient of a layer, after a backward of fixed weights."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    return out.detach(), x.grad


SIZES = {1: (9,), 2: (9, 8), 3: (6, 5, 7)}
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
OPTIONS = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
    {"groups": 2},
    {"groups": 4, "padding": 1, "padding_mode": "replicate", "stride": 2},
    {"groups": 2, "bias": False, "dilation": 2, "padding": "same"},
]


def convolution(dimensions, **options):
    torch.manual_seed(0)
    layer = KINDS[dimensions](8, 24, **{"kernel_size": 3, **options}).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, *SIZES[dimensions], generator=generator, dtype=torch.float64)
    return layer, x
