"""Every command of README.md and docs/*.md, executed as it stands there.

What is filled in or appended, so that each is over in seconds, is in the tables below; so is the
name of everything that is not executed, with the reason. A command that none of them knows of is a
failure: it must be short, or get its line here.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support.documentation import ROOT, Block, blocks
from support.launching import TIMEOUT, environment
from torch import nn

import oialr
from app import OIALR, config
from app.search.definition import load
from benchmarks.study.definition import read_study
from oialr.placement.costs import Costs

NOT_EXECUTED = {
    "make train": "installs packages from the network; its command is the block below it",
    "make test": "runs this test",
    "python -m examples.with_lightning 2": "is run by test_integration_lightning.py",
    "torchrun --nproc-per-node 2 -m examples.with_transformers": (
        "is run by test_integration_huggingface.py"
    ),
    "torchrun --nproc-per-node 2 -m examples.with_a_loop": "is run by test_integration_loop.py",
    "torchrun --nproc-per-node 2 -m examples.with_timm": "is run by test_integration_timm.py",
    "torchrun --nproc-per-node 2 -m examples.with_fsdp": "is run by test_integration_fsdp.py",
    "git clone REPOSITORY oialr && cd oialr": "needs the network",
    "conda env create -f environment.yml": "needs conda and the network",
    "conda run -n oialr pip install --no-deps -r requirements-nodeps.txt": "needs conda",
    "$EDITOR slurm/env.sh": "needs somebody who edits",
    "tail -f seeds-*.out": "ends by Ctrl-C only",
    "python -m benchmarks.faults --quick": "is run by test_faults.py",
    "python -m benchmarks.faults": "takes half an hour",
    "python -m benchmarks.faults --hours 8 --seed 100": "takes hours",
    "python -m benchmarks.growth": "takes half an hour",
    "python -m benchmarks.inference --models ViT-B --rounds 5": (
        "takes a quarter of an hour; the command below it is executed"
    ),
    "python -m app.evaluate digits.onnx --run runs/digits_vit-TIME": (
        "needs the file of a command before; see tests/app/test_export.py"
    ),
    "torchrun --nproc-per-node 8 -m app.train "
    "--config configs/imagenet_vit_b16.yaml data.root=DATA": "needs eight GPUs and ImageNet",
    "python -m benchmarks.gpu.pack DATA packed": "needs CIFAR-10; see test_gpu_dry_run.py",
}
SLURM = ("sbatch ", "slurm/submit_with_report.sh ", "srun ")
"""Beginnings of what needs a site's Slurm; test_slurm.py submits these scripts to a real one."""
GPU = ("benchmarks/gpu.sh",)
"""Beginnings of what needs a GPU; test_gpu_dry_run.py runs every part of it on the CPU."""

FILLED_IN = {
    # Eight processes take half a minute to start on two cores.
    "mpirun -n 8 ": "mpirun -n 2 ",
    "TIME": "20260101-000000",
    "/data/gpt2": "gpt2",
    "data.root=DATA": "data.root=data",
    "DIR": "runs/digits-20260101-000000",
    "[oialr.enabled=false]": "oialr.enabled=false",
    "[search.evaluations=80]": "",
}
TRAIN = (
    "data.name=digits data.train_samples=128 data.augmentation=none training.epochs=2 "
    "training.warmup_epochs=1 oialr.delay=2 oialr.release=delay oialr.update_interval=1 "
    "stability.window=1"
)
# 260 steps, more than the longest delay of the space.
SEARCH = (
    "data.train_samples=104 training.batch_size=8 search.train_best=false "
    "'model.arguments={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}'"
)
APPENDED = [
    # The first that matches a command is appended to it.
    (r"app\.train .*--(keys|version)", ""),
    (r"app\.train .*--resume", ""),
    (
        r"app\.train .*language_model",
        "'data.arguments={length: 12, characters: 3000}' training.epochs=2 training.batch_size=32 "
        "'model.arguments={width: 16, depth: 1, heads: 2}' oialr.delay=3 oialr.release=3 "
        "oialr.target_size=0.8 training.warmup_epochs=0",
    ),
    (r"app\.train .*model\.initial", "model.initial=null data.train_samples=128"),
    (
        r"app\.train .*cifar10_vit",
        f"{TRAIN} training.batch_size=16 training.compile=false "
        "'model.arguments={patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}'",
    ),
    (r"app\.train .*frozen_dtype", f"{TRAIN} oialr.release=3"),
    (r"app\.train .*run\.name=small", f"{TRAIN} oialr.target_size=0.8"),
    (r"app\.train", TRAIN),
    (r"app\.search .*--resume", "search.evaluations=2"),
    (r"app\.search", f"search.evaluations=1 {SEARCH}"),
    (r"app\.report .*--follow", ""),
    (r"app\.report", "--formats png"),
    (r"app\.calibrate", "--quick"),
    (r"app\.analyze", ""),
    (r"app\.(export|evaluate)", ""),
    (r"benchmarks\.inference", "--quick"),
    # A study takes hours; test_accuracy.py runs a small one.
    (
        r"benchmarks\.accuracy --study",
        "--table data.name=digits data.train_samples=128 data.augmentation=none",
    ),
    (r"benchmarks\.release_state", "--quick"),
    (r"benchmarks\.stability_delay", "--quick"),
    (r"benchmarks\.(kernels|compression|layer_pairs|run_steps)", "--quick"),
    (r"benchmarks\.accuracy", f"--seeds 1 {TRAIN} training.batch_size=16"),
    (r"^(export|source) ", ""),
]
READ = [
    # Words of a command that name what it reads; the folder of that, and what it is a copy of.
    (r"(runs/digits-[-\d]+)(/best\.yaml)?", "search"),
    (r"(?:[\w-]+=)?(runs/(?:low|full))/best\.yaml", "search"),
    (r"(runs/digits_vit-[-\d]+)", "run"),
    (r"(runs/(?:a|b|vit|latest|oialr-\d|full-rank-\d|seed-\*|full-[-\d]+|small-[-\d]+))", "run"),
    (r"(checkpoints|gpt2)/?", "checkpoints"),
    (r"(checkpoints)/analysis", "analyzed"),
    (r"(epoch-\*\.pt)", "checkpoints/epoch-0.pt"),
]


def executed():
    """Return the commands to execute, each once, as they stand in the documents."""
    commands = [c for block in blocks() if not block.language for c in block.commands()]
    return [
        command
        for command in dict.fromkeys(commands)
        if command not in NOT_EXECUTED and not command.startswith(SLURM + GPU)
    ]


def filled_in(command):
    """Return a command with everything filled in, and what shortens it appended."""
    for placeholder, value in FILLED_IN.items():
        command = re.sub(rf"(?<![A-Z]){re.escape(placeholder)}(?![A-Z])", value, command)
    # Digits, which take the place of other data, have a validation part of their own.
    command = re.sub(r"data\.validation_fraction=\S+ ", "", command)
    for pattern, appended in APPENDED:
        if re.search(pattern, command):
            return f"{command} {appended}".strip()
    raise AssertionError(f"{command}: nobody knows how to shorten it; see APPENDED")


def shell(command, place):
    return subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env={
            **environment(),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def checkout(place):
    """Make a checkout of the program in which commands may leave what they like."""
    place.mkdir()
    for name in ("app", "benchmarks", "configs", "examples", "oialr", "slurm"):
        (place / name).symlink_to(ROOT / name)
    (place / ".venv").symlink_to(sys.prefix)
    (place / "costs.json").write_text(json.dumps(asdict(Costs())))
    return place


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """What commands read: a run that was stopped, a finished one, a search, and checkpoints."""
    place = checkout(tmp_path_factory.mktemp("templates") / "checkout")
    for name, command in (
        ("stopped", f"python -m app.train {TRAIN} run.stop_after=3 run.dir=stopped"),
        ("run", f"python -m app.train {TRAIN} run.dir=run"),
        (
            "search",
            f"python -m app.search --config configs/search/digits.yaml run.dir=search "
            f"search.evaluations=1 search.processes_per_worker=1 {SEARCH}",
        ),
    ):
        result = shell(command, place)
        assert result.returncode == (75 if name == "stopped" else 0), result.stderr
    folder = place / "checkpoints"
    folder.mkdir()
    for epoch in range(3):
        torch.manual_seed(epoch)
        weights = {
            "h.0.attn.c_attn.weight": torch.randn(8, 6),
            "h.0.attn.masked_bias": torch.ones(2, 2),
        }
        torch.save(weights, folder / f"epoch-{epoch}.pt")
    shutil.copytree(folder, place / "analyzed")
    result = shell("python -m app.analyze analyzed", place)
    assert result.returncode == 0, result.stderr
    return place


def prepare(command, place, templates):
    """Put what a command reads where it looks for it."""
    for word in shlex.split(command):
        for pattern, template in READ:
            if match := re.fullmatch(pattern, word):
                source = templates / ("stopped" if "app.train --resume" in command else template)
                for number in (0, 1) if "*" in match[1] else (0,):
                    target = place / match[1].replace("*", str(number))
                    target.parent.mkdir(exist_ok=True)
                    if source.is_dir():
                        shutil.copytree(source, target, dirs_exist_ok=True)
                    else:
                        shutil.copy(source.with_name(target.name), target)


@pytest.fixture(scope="module")
def results(templates, tmp_path_factory, request):
    """Run the commands that are tested, two at a time, each in a checkout of its own."""
    root = tmp_path_factory.mktemp("commands")

    def run(number, command):
        place = checkout(root / str(number))
        command = filled_in(command)
        prepare(command, place, templates)
        return shell(command, place)

    calls = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = [call.params["command"] for call in calls if call and "command" in call.params]
    with ThreadPoolExecutor(2) as pool:
        yield {command: pool.submit(run, number, command) for number, command in enumerate(wanted)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", executed())
def test_a_command_does_what_it_says(command, results):
    result = results[command].result()
    assert result.returncode == 0, f"{filled_in(command)}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    assert "unfinished" not in result.stderr


@pytest.mark.slow
def test_the_transcript_of_the_default_configuration_is_true(tmp_path):
    """As far as it is the same on all machines: up to the first epoch."""
    transcript = next(
        b for b in blocks() if b.text.startswith("OMP_NUM_THREADS=1 .venv/bin/mpirun")
    )
    command, *lines = transcript.text.splitlines()
    result = shell(f"{command} run.stop_after=1", checkout(tmp_path / "checkout"))
    assert result.returncode == 75, result.stderr
    said = re.sub(r"(runs/digits_vit-)[-\d]+", r"\1TIME", result.stdout).splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("epoch 1/"))
    assert lines[0].split() == said[0].split()
    assert lines[2:end] == said[2:end]  # between them the node


def test_what_is_not_executed_is_there():
    commands = {c for block in blocks() if not block.language for c in block.commands()}
    assert set(NOT_EXECUTED) <= commands
    assert all(any(c.startswith(start) for c in commands) for start in SLURM)


def _blocks(language, elsewhere=()):
    """Return the blocks in a language, but those of pages that are tested elsewhere."""
    found = [b for b in blocks() if b.language == language and b.page not in elsewhere]
    return [pytest.param(block, id=block.page) for block in found]


# Those of docs/metrics.md are run by test_store.py, on files of all kinds, those of docs/loggers.md
# by test_loggers.py, those of docs/layers.md by test_register_layer.py, that of docs/optimizers.md
# by test_optimizers.py, those of docs/own_networks_and_data.md by test_own.py, that of
# docs/compress.md by test_compression.py; those of docs/integrations.md are lines of its examples,
# by test_integration_*.py; docs/method.md quotes lines of a file, which
# test_reference.py compares.
TESTED_ELSEWHERE = [
    f"docs/{page}.md"
    for page in (
        *("compress", "integrations", "layers", "loggers", "metrics", "method", "optimizers"),
        "own_networks_and_data",
    )
]


@pytest.mark.parametrize(
    "block",
    _blocks("python", elsewhere=TESTED_ELSEWHERE),
)
def test_a_program_runs(block: Block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a program may leave what it writes
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(m, n) for m, n in ((6, 64), (64, 64), (64, 3))))
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss": nn.CrossEntropyLoss(),
        "epochs": 2,
        "steps": 12,
        "OIALR": OIALR,  # imported by the first block of the README
        "samples": torch.randn(5, 6),
        "state": model.state_dict(),
        "oialr": oialr,  # imported by the first block of a page
        "train": lambda model: None,
        "batches": [(torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1]))] * 12,
    }
    program = block.text.replace("delay=1000, update_interval=500", "delay=4, update_interval=3")
    exec(program, names)
    if "OIALR(" in program:
        assert program != block.text or "delay=steps" in program
        if "method.step()" not in program:
            for inputs, targets in names["batches"]:
                names["optimizer"].zero_grad()
                names["loss"](model(inputs), targets).backward()
                names["optimizer"].step()
                names["method"].step()
        assert isinstance(names["method"], OIALR)
        assert names["method"].trainable_percent() < 100


@pytest.mark.parametrize("block", _blocks("yaml", elsewhere=["docs/own_networks_and_data.md"]))
def test_a_file_is_a_configuration(block: Block, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    if "space:" in block.text:
        path = tmp_path / "configs" / "search" / "example.yaml"
        path.write_text(block.text)
        assert load(path).space.keys
    elif "methods:" in block.text:
        shutil.copytree(ROOT / "benchmarks" / "accuracy", tmp_path / "studies")
        path = tmp_path / "studies" / "example.yaml"
        path.write_text(block.text)
        assert read_study(path).methods["mine"].networks == ["digits"]
    else:
        path = tmp_path / "configs" / "example.yaml"
        path.write_text(block.text)
        assert config.load(path).data.name == "fashion_mnist"


def test_every_block_is_of_a_kind_that_is_tested():
    for block in blocks():
        assert block.language in {"", "python", "yaml", "math"}, block


def test_srun_names_the_mpi_that_the_environment_has():
    texts = [path.read_text() for path in (ROOT / "configs").rglob("*.yaml")]
    texts += [block.text for block in blocks()]
    lines = [line for text in texts for line in text.splitlines() if re.search(r"\bsrun -", line)]
    assert len(lines) >= 3
    assert all("srun --mpi=pmi2 " in line or "--jobid" in line for line in lines), lines
