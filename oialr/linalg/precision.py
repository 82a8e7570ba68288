"""Products of float32 matrices in float32, whatever a program allows elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep TF32 out of products on GPUs within, and half precision out of all.

    ``torch.set_float32_matmul_precision("high")``, a common advice for training, lets products of
    float32 matrices have 10 bits of mantissa: products of orthonormal bases would lose their
    orthonormality, 1e-3 at every update. The setting is the whole program's and comes back at the
    end. So would they in bfloat16, where a loop has its steps within ``torch.autocast``.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
