"""Tests that need a GPU. OIALR_GPU_DRY_RUN=1 runs the same code on the CPU with tiny sizes.

They import torch, timm, h5py and numpy alone, of what the application uses.
"""

import os
from pathlib import Path

import pytest
from support.gpu.accelerator import DRY_RUN
from support.gpu.networks import DRY_SIZE, GPU_SIZE

FOLDER = Path(__file__).resolve().parent

# cuBLAS reads it when it starts; without it, its products are not deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items):
    """Mark all tests of this folder, and skip them where there is nothing to run them on."""
    mine = [item for item in items if FOLDER in item.path.parents]
    if not mine:
        return
    reason = None if DRY_RUN else why_not()
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_not():
    import torch

    if torch.cuda.is_available():
        return None
    return "no CUDA device; OIALR_GPU_DRY_RUN=1 runs the same code on the CPU"


@pytest.fixture(scope="session")
def device():
    import torch

    return torch.device("cpu" if DRY_RUN else "cuda:0")


@pytest.fixture(scope="session")
def size():
    return DRY_SIZE if DRY_RUN else GPU_SIZE


@pytest.fixture(autouse=True)
def _settings_of_one_test():
    """Leave random numbers and torch's switches as they were, and free the device's memory."""
    import torch
    from torch.backends import cudnn

    # A convolution in float32 that rounds to TF32 could not be compared with the CPU's.
    with (
        torch.random.fork_rng(),
        cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        torch.manual_seed(0)
        yield
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
