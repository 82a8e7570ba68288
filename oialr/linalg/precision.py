"""Products of float32 matrices in float32, whatever a program allows elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Keep half precision out of products within, in this thread."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep TF32 and half precision out of products of float32 matrices within.

    ``torch.set_float32_matmul_precision("high")``, a common advice for training, lets products of
    float32 matrices have 10 bits of mantissa: products of orthonormal bases would lose their
    orthonormality, 1e-3 at every update. The setting is the whole program's and comes back at the
    end. So would they in bfloat16, where a loop has its steps within ``torch.autocast``.
    """
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    # What is as everywhere is not set here, and goes on following what is set there.
    everywhere = torch.backends.fp32_precision  # type: ignore[attr-defined]
    read = [each.fp32_precision for each in settings]
    before = ["none" if value == everywhere else value for value in read]
    for each in settings:
        each.fp32_precision = "ieee"
    try:
        with without_autocast():
            yield
    finally:
        for each, was in zip(settings, before, strict=True):
            each.fp32_precision = was
