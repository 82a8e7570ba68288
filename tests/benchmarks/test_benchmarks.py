"""The benchmarks are scripts that run from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import TIMEOUT

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Start all of them at once: each takes seconds for its imports."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return {
        script: subprocess.Popen(
            [sys.executable, script, "--help"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script in SCRIPTS
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_benchmark_tells_its_options(started, script):
    out, err = started[script].communicate(timeout=TIMEOUT)
    assert started[script].returncode == 0, err
    assert "usage:" in out
