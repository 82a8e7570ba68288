"""tests/gpu on the CPU, as on a host that has little more than torch."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds; two idle cores take a minute


def run(*arguments, **variables):
    """Run tests/gpu where the packages that a bare host lacks are not found."""
    bare = os.pathsep.join(map(str, (ROOT / "benchmarks" / "gpu" / "bare", ROOT)))
    kept = {k: v for k, v in os.environ.items() if k != "OIALR_GPU_DRY_RUN"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": bare, **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def test_every_gpu_test_runs_on_the_cpu_with_little_more_than_torch(tmp_path):
    # A cache of its own: what was compiled before on this machine counts for nothing.
    result = run(OIALR_GPU_DRY_RUN="1", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def test_without_a_gpu_they_are_skipped_with_the_reason():
    result = run(CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no CUDA device; OIALR_GPU_DRY_RUN=1 runs the same code on the CPU" in result.stdout
    assert " passed" not in result.stdout
