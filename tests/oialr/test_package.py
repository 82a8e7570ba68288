"""What ``pip install .`` installs: the library, and nothing else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300

PROGRAM = """
import torch
from torch import nn

from oialr import OIALR, StabilityTracker

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
optimizer = torch.optim.AdamW(model.parameters())
method = OIALR(model, optimizer, delay=2, update_interval=2, cutoff=0.3, layer_fraction=1)
tracker = StabilityTracker(model, window=1)
for step in range(6):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    event = method.step()
    rows = tracker.measure()
assert method.converted and 0 < rows[-1].stability <= 1.0001, rows[-1]
import oialr
print(oialr.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what git holds: a build leaves folders beside the sources.
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True, timeout=TIMEOUT)
    names = subprocess.run(
        ["git", "ls-files", "oialr", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    for name in names:  # as it is now, committed or not
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source],
        check=True,
        timeout=TIMEOUT,
    )
    return next(folder.glob("oialr-*.whl"))


@pytest.mark.slow
def test_it_holds_the_library_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"oialr"}
    assert {"oialr/__init__.py", "oialr/py.typed", "oialr/layers/conv.py"} <= set(names)
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    needs = [line for line in text.splitlines() if line.startswith("Requires-Dist:")]
    assert needs[0] == "Requires-Dist: torch>=2.11"
    assert all("extra ==" in line for line in needs[1:])


@pytest.mark.slow
def test_it_trains_and_measures_in_an_environment_of_torch_alone(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel],
        check=True,
        timeout=TIMEOUT,
    )
    # torch and what it needs come from this environment; all else of it is not found.
    (site / "torch.pth").write_text(str(Path(sys.prefix, *site.parts[-3:])) + "\n")
    blocked = "mpi4py,heat,propulate,pydantic,rich,scipy,sklearn,matplotlib,jinja2,h5py,timm,yaml"
    result = subprocess.run(
        [python, "-c", PROGRAM],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "benchmarks" / "gpu" / "bare"),
            "BLOCKED_PACKAGES": blocked,
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert str(site) in result.stdout
