"""All that runs on a GPU, run on the CPU as on a host that has little more than torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import steps
from benchmarks.gpu.measuring import Results
from benchmarks.gpu.pack import TILES, pack, random_images, unpack

ROOT = Path(__file__).resolve().parents[2]
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


def measure(part, output, **variables):
    """Run a part of benchmarks/gpu.sh from elsewhere."""
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--dry-run", "--output", output, part],
        cwd=output,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


@pytest.mark.slow
def test_every_gpu_test_runs_on_the_cpu_with_little_more_than_torch(tmp_path):
    # A cache of its own: what was compiled before on this machine counts for nothing.
    result = measure("tests", tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("steps-vit", 10),
        ("steps-resnet", 9),
        ("steps-mlp", 6),
        ("factorization", 60),
        ("stability", 29),
        ("training", 9),
        ("application", 10),
    ],
)
def test_every_part_of_the_benchmark_runs_on_the_cpu(part, rows, tmp_path):
    result = measure(part, tmp_path)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    measured = json.loads((tmp_path / "gpu.json").read_text())[part]["rows"]
    assert len(measured) == rows
    assert not any("not_run" in row for row in measured)
    if part == "application":
        assert {row["exit_code"] for row in measured[:-3]} == {0}
        assert measured[-1]["test_loss"] == 0  # of a resumed run, less that of the other
    assert f"## {part}" in (tmp_path / "gpu.md").read_text()


def test_a_variant_that_fails_is_told_and_the_others_are_measured(tmp_path, monkeypatch):
    def step(variant):
        if variant.name == "0.1":
            raise RuntimeError("no kernel")

    monkeypatch.setattr(steps.Variant, "step", step)
    case = steps.cases(dry_run=True)["mlp"]
    cpu = torch.device("cpu")
    with pytest.raises(SystemExit, match=r"failed: mlp 0\.1 eager"):
        steps.measure("mlp", case, cpu, Results("steps-mlp", tmp_path, cpu), limit=60)
    rows = json.loads((tmp_path / "steps-mlp.json").read_text())["rows"]
    assert [row["variant"] for row in rows if "failed" in row] == ["0.1"]
    assert [row["variant"] for row in rows if "milliseconds" in row] == [
        *("full-rank", "0.01", "0.25", "0.4", "two 0.25"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_what_was_packed_comes_out_again(channels, tmp_path):
    images = random_images(channels, count=TILES * TILES)
    arrays = {key: value.numpy() for key, value in vars(images).items()}
    pack(arrays, tmp_path / "set.zip")
    unpacked = unpack(tmp_path, "set")
    for key, value in vars(images).items():
        assert torch.equal(getattr(unpacked, key), value), key


def test_an_unknown_part_is_refused(tmp_path):
    result = measure("step", tmp_path)
    assert result.returncode == 2
    assert "no part step; there are: tests steps-vit" in result.stderr


@pytest.mark.slow
def test_without_a_gpu_they_are_skipped_with_the_reason():
    result = run(CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no CUDA device; OIALR_GPU_DRY_RUN=1 runs the same code on the CPU" in result.stdout
    assert " passed" not in result.stdout
