"""Workarounds for other packages, each in a process of its own, where nothing is imported yet."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import environment, launch
from support.pmi_server import run_two

from app import compatibility
from app.errors import StorageError

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code with folders in front of the installed packages."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def fake_torchvision(tmp_path: Path) -> Path:
    """The __init__.py of a package that stands in for torchvision."""
    package = tmp_path / "torchvision"
    package.mkdir()
    return package / "__init__.py"


@pytest.mark.slow
def test_torchvision_and_timm_import_and_work() -> None:
    result = run(
        "from oialr.compatibility import import_torchvision\n"
        "import_torchvision(); import_torchvision()\n"
        "import timm, torch, torchvision\n"
        "from torchvision import datasets, transforms\n"
        "print(transforms.CenterCrop(2)(torch.zeros(3, 4, 4)).shape == (3, 2, 2))\n"
    )
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


def test_working_torchvision_is_left_alone(fake_torchvision: Path) -> None:
    fake_torchvision.write_text("")
    result = run(
        "import sys\n"
        "from oialr.compatibility import import_torchvision\n"
        "import_torchvision()\n"
        "print('torchvision' in sys.modules, 'torch' in sys.modules)\n",
        fake_torchvision.parent.parent,
    )
    assert (result.returncode, result.stdout) == (0, "True False\n"), result.stderr


@pytest.mark.slow
def test_missing_operators_are_declared(fake_torchvision: Path) -> None:
    """The stand-in fails as the wheel does, and has left a submodule behind when it fails."""
    fake_torchvision.with_name("part.py").write_text("print('imported')\n")
    fake_torchvision.write_text(
        "import torch\n"
        "from torchvision import part\n"
        "if not torch._C._dispatch_has_kernel_for_dispatch_key('torchvision::nms', 'Meta'):\n"
        "    @torch.library.register_fake('torchvision::nms')\n"
        "    def _(dets, scores, iou_threshold): ...\n"
    )
    result = run(
        "from oialr.compatibility import import_torchvision\n"
        "import_torchvision()\n"
        "import torch\n"
        "print(torch.ops.torchvision.nms.default._schema)\n",
        fake_torchvision.parent.parent,
    )
    assert result.returncode == 0, result.stderr
    *imported, schema = result.stdout.splitlines()
    assert imported == ["imported", "imported"]
    assert schema.startswith("torchvision::nms(Tensor dets, Tensor scores, float iou_threshold)")


def test_other_failures_of_torchvision_are_not_hidden(fake_torchvision: Path) -> None:
    fake_torchvision.write_text("print('tried')\nraise RuntimeError('broken for another reason')\n")
    result = run(
        "from oialr.compatibility import import_torchvision\nimport_torchvision()\n",
        fake_torchvision.parent.parent,
    )
    assert (result.returncode, result.stdout) == (1, "tried\n")
    assert "RuntimeError: broken for another reason" in result.stderr


@pytest.mark.slow
def test_timm_posterizes_at_any_strength() -> None:
    result = run(
        "from app.compatibility import let_timm_posterize\n"
        "let_timm_posterize(); let_timm_posterize()\n"
        "import pickle\n"
        "from PIL import Image\n"
        "from timm.data.auto_augment import AugmentOp\n"
        "image = Image.new('RGB', (2, 2), (200, 100, 130))\n"
        "for name in ('Posterize', 'PosterizeOriginal', 'PosterizeIncreasing'):\n"
        "    for magnitude in range(11):\n"
        "        result = pickle.loads(pickle.dumps(AugmentOp(name, 1, magnitude)))(image)\n"
        "print(result.getpixel((0, 0)))\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(128, 0, 128)\n"


@pytest.mark.slow
def test_no_killed_process_leaves_shared_memory_of_mpich_behind(tmp_path: Path) -> None:
    """The processes end by a signal, and tell before what names are left of what they share."""
    report = tmp_path / "report"
    launch(
        2,
        "-c",
        "import os, signal, sys\n"
        "from app.runtime.launch import read_launch\n"
        "from app.runtime.processes import connect_mpi\n"
        "world = connect_mpi(read_launch())\n"
        "world.barrier()\n"
        "lines = [line.split() for line in open('/proc/self/maps') if 'mpich_shm_' in line]\n"
        "all_lines = sum(world.allgather(lines), [])\n"
        "if world.rank == 0:\n"
        "    print(len(all_lines), {line[-1] for line in all_lines}, file=open(sys.argv[1], 'w'))\n"
        "world.barrier()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        report,
        code=signal.SIGKILL,
    )
    assert report.read_text() == "2 {'(deleted)'}\n"


@pytest.mark.slow
def test_slurm_can_read_every_line_by_which_mpich_starts() -> None:
    """It reads 1,024 characters. How many a line has is chance, but not how many it may have.

    A value holds bytes, two digits each, and numbers of zero bytes in brackets.
    """
    puts = run_two(
        [
            sys.executable,
            "-c",
            "from app.runtime.launch import read_launch\n"
            "from app.runtime.processes import connect_mpi\n"
            "world = connect_mpi(read_launch())\n"
            "assert world.allreduce(world.rank + 1) == 3\n",
        ],
        environment(),
    )
    values = [put.split(" value=")[1].strip() for put in puts if "-seg-" in put]
    zeros = [sum(map(int, re.findall(r"\[(\d+)\]", value))) for value in values]
    digits = [
        len(re.sub(r"\[\d+\]", "", value)) + 2 * n for value, n in zip(values, zeros, strict=True)
    ]
    assert len(digits) > 1
    assert max(digits) < 900


@pytest.mark.slow
def test_heat_leaves_random_generators_alone() -> None:
    result = run(
        "import torch\n"
        "state = torch.get_rng_state()\n"
        "from oialr.compatibility import import_heat\n"
        "heat = import_heat()\n"
        "print(heat.__name__, torch.equal(state, torch.get_rng_state()))\n"
    )
    assert (result.returncode, result.stdout) == (0, "heat True\n"), result.stderr


@pytest.mark.slow
def test_scikit_learn_leaves_the_random_generator_alone() -> None:
    result = run(
        "import random\n"
        "state = random.getstate()\n"
        "from app.compatibility import import_scikit_learn\n"
        "import_scikit_learn()\n"
        "import sys\n"
        "print('sklearn.datasets' in sys.modules, random.getstate() == state)\n"
    )
    assert (result.returncode, result.stdout) == (0, "True True\n"), result.stderr


def test_shared_memory_of_an_earlier_slurm_step_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FNV-1a of "12.0" is in their names; younger ones are this step's own."""
    started = 1_000_000.0
    monkeypatch.setenv("PMI_JOBID", "12.0")
    monkeypatch.setattr(compatibility, "_start_of_step_daemon", lambda: started)
    name = "mpich_shm_fb904474_node"
    old, new, other = (tmp_path / one for one in (name, f"{name}2", "mpich_shm_1_node"))
    for path, time in ((old, started - 1), (new, started + 1), (other, started - 1)):
        path.touch()
        os.utime(path, (time, time))
    compatibility.remove_stale_shared_memory_of_mpich(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([new, other])


def test_shared_memory_of_another_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMI_JOBID", "12.0")
    monkeypatch.setattr(compatibility, "_start_of_step_daemon", lambda: 1_000_000.0)
    path = tmp_path / "mpich_shm_fb904474_node"
    path.touch()
    os.utime(path, (1, 1))

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match=rf"{path.name} on .*belongs to user {os.getuid()}, "):
        compatibility.remove_stale_shared_memory_of_mpich(tmp_path)
    assert path.exists()
