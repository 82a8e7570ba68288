"""What is checked on every node before a training, and how it is told."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.image_folders import write_images
from support.launching import ROOT, launch

from app.config.settings import Configuration
from app.errors import AgreedUserError
from app.runtime import startup_check
from app.runtime.processes import Runtime
from app.runtime.startup_check import (
    Report,
    check_folder,
    check_nodes,
    find_problem,
    table,
    unseen_gpus,
)
from oialr.placement.processes import Processes

CPU = Report(
    node="n1",
    gpu=None,
    visible_gpus=0,
    granted_gpus=0,
    code="c0de",
    configuration="c0f1",
    data_problem="",
    clock=1000.0,
)


def gpu(node, identity):
    return replace(CPU, node=node, gpu=f"NVIDIA H100 ({identity})", visible_gpus=4)


OTHER = replace(CPU, node="n2")
PROBLEMS = [
    (replace(OTHER, code="01d"), "its program, Python or torch is not that of node n1"),
    (replace(OTHER, configuration="01d"), "its configuration is not that of node n1"),
    (replace(OTHER, data_problem="cannot read /data"), "cannot read /data, but node n1 can"),
    (replace(OTHER, clock=1011.0), "its clock differs by +11.0 s"),
    (replace(OTHER, clock=989.0), "its clock differs by -11.0 s"),
]


@pytest.mark.parametrize(("report", "message"), PROBLEMS, ids=lambda value: str(value)[:30])
def test_a_problem_is_one_line_with_node_and_cure(report, message):
    problem = find_problem([CPU, OTHER, report])
    assert "node n2 (process 2)" in problem
    assert message in problem
    assert ": " in problem.partition(message)[2]  # the cure
    assert "\n" not in problem


def test_nothing_is_wrong():
    assert find_problem([CPU]) == ""
    assert find_problem([CPU, replace(OTHER, clock=1009.0)]) == ""
    assert find_problem([gpu("n1", "a"), gpu("n1", "b"), gpu("n2", "c")]) == ""


def test_data_that_are_missing_everywhere_are_left_to_who_reads_them():
    missing = "cannot read /data"
    assert not find_problem(
        [replace(CPU, data_problem=missing), replace(OTHER, data_problem=missing)]
    )


def test_a_gpu_has_one_process():
    problem = find_problem([gpu("n1", "a"), gpu("n1", "b"), gpu("n1", "a")])
    assert "node n1 (process 2): shares the NVIDIA H100 (a) with process 0" in problem


def test_the_table_has_one_line_per_node():
    reports = [gpu("n1", "a"), gpu("n1", "b"), *[OTHER] * 9, replace(OTHER, visible_gpus=2)]
    reports[-1] = replace(reports[-1], clock=999.5)
    lines = table(reports).splitlines()
    assert lines[0].split() == ["node", "processes", "device", "code", "configuration", "clock"]
    assert lines[1].split("  ")[0] == "n1"
    assert "2 x NVIDIA H100" in lines[1]
    assert lines[1].endswith("+0.000 s")
    assert "2, 3, 4, 5, 6, 7, 8, 9, ..." in lines[2]
    assert "cpu, 2 GPUs unused" in lines[2]
    assert lines[2].endswith("-0.500 s")
    assert len(lines) == 3


def test_granted_gpus_that_torch_does_not_see_are_told():
    unseen = replace(OTHER, granted_gpus=4)
    warning = unseen_gpus([CPU, unseen, unseen, replace(CPU, node="n3", granted_gpus=2)])
    assert "Slurm granted GPUs (4 on n2, 2 on n3)" in warning
    assert "\n" not in warning
    assert unseen_gpus([CPU, replace(unseen, visible_gpus=4)]) == ""


@pytest.fixture
def pair():
    """Two processes of which the other one, the same as this, is not there."""

    class Pair(Processes):
        def gather(self, value):
            return [value, value]

    return Runtime(
        process_index=0,
        process_count=2,
        local_index=0,
        device=torch.device("cpu"),
        communicator=None,
        processes=Pair(),
    )


def test_a_check_leaves_nothing_behind(pair, tmp_path):
    lines = check_nodes(Configuration(), pair).splitlines()
    assert len(lines) == 2
    assert "0, 1 " in lines[1]
    check_folder(tmp_path, pair)
    assert not list(tmp_path.iterdir())


def test_one_process_has_nothing_to_agree_on(pair, tmp_path):
    assert check_nodes(Configuration(), replace(pair, process_count=1)) == ""
    check_folder(tmp_path / "gone", replace(pair, process_count=1))


def test_one_process_is_told_of_gpus(pair, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert check_nodes(Configuration(), replace(pair, process_count=1)) == ""
    assert "Slurm granted GPUs (3 on " in caplog.text


def test_a_folder_that_cannot_be_written(pair, tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(AgreedUserError, match=f"run.dir: .*cannot write to {gone}: No such file"):
        check_folder(gone, pair)


def test_a_folder_that_is_not_shared_is_one_mistake(tmp_path):
    for index in (0, 1):
        (tmp_path / str(index) / "run").mkdir(parents=True)
    program = (
        "import os, sys\n"
        f"os.chdir(os.path.join({str(tmp_path)!r}, os.environ['PMI_RANK']))\n"
        "from app.command import run_command\n"
        "from app.train import main\n"
        "run_command(lambda: main(['run.dir=run']))\n"
    )
    result = launch(2, "-c", program, code=2)
    assert result.stderr.count("error: run.dir: node ") == 1
    assert "(process 1): is not the folder that process 0 sees: choose a folder" in result.stderr


def begun(folder, *keys):
    """Start a training on two processes, each in a folder of its own; it is refused."""
    program = (
        "import os, sys\n"
        f"sys.path.insert(0, os.path.join({str(folder)!r}, os.environ['PMI_RANK']))\n"
        f"os.chdir(os.path.join({str(folder)!r}, os.environ['PMI_RANK']))\n"
        "from app.command import run_command\n"
        "from app.train import main\n"
        f"run_command(lambda: main({['oialr.enabled=false', *keys]!r}))\n"
    )
    (error,) = launch(2, "-c", program, code=2).stderr.splitlines()
    assert not list(folder.glob("**/metrics.h5"))
    return error


def test_networks_that_begin_with_other_bits_are_refused(tmp_path):
    """A full-rank training went on with them, and nobody was told."""
    for index in (0, 1):
        place = tmp_path / str(index) / "mine"
        place.mkdir(parents=True)
        (place / "network.py").write_text(
            "import numpy, torch\n\n"
            "def build(*, input_shape, outputs):\n"
            "    first = [torch.nn.Flatten(), torch.nn.Linear(64, 32)]\n"
            "    model = torch.nn.Sequential(*first, torch.nn.Linear(32, outputs))\n"
            "    model[2].bias.data += float(numpy.random.default_rng().random())\n"
            "    return model\n"
        )
    error = begun(tmp_path, "model.name=mine.network:build", "model.arguments={}")
    assert error.startswith(
        "error: model: 2.bias is not the same on all processes: a network draws"
    )


def test_data_that_differ_between_nodes_are_refused(tmp_path):
    """With an image less on one node, samples were trained on there and validated on here."""
    for index in (0, 1):
        for name in ("train", "val"):
            write_images(tmp_path / str(index) / "data" / name, 12)
    next((tmp_path / "1" / "data" / "train").glob("*/5.png")).unlink()
    keys = ["data.name=image_folder", "data.root=data", "data.image_size=16", "data.workers=0"]
    keys += ["training.batch_size=8", "model.name=lenet5", "model.arguments={}"]
    error = begun(tmp_path, *keys)
    assert error.startswith("error: data.root: process 1 on ")
    assert "(train_size 31 and 32)" in error
    assert "data.stage_to" in error


def test_the_digest_of_the_program_covers_application_and_library(monkeypatch, tmp_path):
    digests = {startup_check._code_digest()}
    for package in ("app", "oialr"):
        copied = tmp_path / package
        shutil.copytree(ROOT / package, copied, ignore=shutil.ignore_patterns("__pycache__"))
        (copied / "errors.py").write_text("changed = True\n")
        (copied / ".#errors.py").symlink_to("somebody@elsewhere.7")  # Emacs' lock
        module = SimpleNamespace(__file__=str(copied / "__init__.py"))
        with monkeypatch.context() as patched:
            patched.setattr(startup_check, package, module)
            digests.add(startup_check._code_digest())
    assert len(digests) == 3
