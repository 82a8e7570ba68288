"""What all tests share: markers by folder, one thread, and hypothesis without clocks or chance."""

import os
import signal
from pathlib import Path

import pytest
from support.entered import Entered

TESTS = Path(__file__).resolve().parent
MARKED = ("mpi", "slurm")
"""Folders whose tests have a marker of the folder's name."""

IGNORED = {n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN}
"""Signals that Python itself ignores, or whoever has started it."""

os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a bare host, which runs tests/gpu alone
    pass
else:
    # A machine under load takes as long as it takes, and the same examples come in every run.
    settings.register_profile(
        "tests",
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("tests")


def pytest_addoption(parser):
    parser.addoption(
        "--every-module",
        action="store_true",
        help="fail where a module of app/ or oialr/ is left out",
    )


def pytest_configure(config):
    if config.getoption("--every-module"):
        config.pluginmanager.register(Entered())


def pytest_collection_modifyitems(items):
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in MARKED:
            item.add_marker(folder)


@pytest.fixture
def own_random_state():
    """torch's generator seeded for a test, and as it was before afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Let a test that skips itself fail where nothing may be skipped, but for those of GPUs."""
    report = yield
    asked = os.environ.get("NO_SKIPPED_TESTS") and "gpu" not in item.keywords
    if asked and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr[2]}"
    return report


@pytest.fixture
def global_random_state_untouched():
    """The test fails if it leaves a global random generator in another state."""
    import random

    import numpy as np
    import torch

    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.fixture(autouse=True)
def no_signal_left_ignored():
    """The test fails if it leaves a signal ignored, as a program on its way out does.

    All that later tests start would inherit it.
    """
    yield
    ignored = [n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN]
    left = set(ignored) - IGNORED
    for number in left:
        signal.signal(number, signal.SIG_DFL)
    assert not left, left
