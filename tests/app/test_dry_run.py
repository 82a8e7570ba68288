"""--dry-run: what a run will need, with nothing left of it."""

import re
from datetime import timedelta
from statistics import median

import torch
from support.launching import launch, train
from support.tiny_run import TINY

from app.training.dry_run import _size, _time


def test_a_dry_run_tells_what_the_run_needs_and_leaves_nothing(tmp_path):
    options = [*TINY, "training.epochs=400", "run.keep_checkpoints=3"]
    lines = train(2, *options, "--dry-run", cwd=tmp_path).stdout.splitlines()
    assert not list(tmp_path.iterdir())
    assert lines[0].split()[:2] == ["node", "processes"]
    said = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert said["dry run"] == "nothing is trained or written; 2 processes on cpu"
    assert said["data"] == "500 training samples, 8 steps per epoch, 3200 steps"
    assert said["method"].startswith("9 layers turn low-rank after step 15, 3 weights stay")
    assert re.fullmatch(r"[\d,.]+ MiB resident in a process at its peak", said["memory"])
    assert said["stability"].split(";")[1].startswith(" 2 times 0.")
    assert "every 1 epochs" in said["stability"]
    each, *measured = map(float, re.findall(r"\d+\.\d{4}", said["step"]))
    assert each == median(measured)
    assert len(measured) == 3
    hours, minutes, seconds = map(int, said["time"].split(" ")[0].split(":"))
    told = timedelta(hours=hours, minutes=minutes, seconds=seconds)
    # The step's time is told in four digits.
    assert abs(told - timedelta(seconds=each * 3200)) <= timedelta(seconds=1 + 0.00005 * 3200)
    # A checkpoint of the run itself, before its conversion, is as large.
    whole = tmp_path / "run"
    train(2, *TINY, "run.stop_after=2", f"run.dir={whole}", "stability.enabled=false", code=75)
    size = sum(path.stat().st_size for path in whole.rglob("*.pt")) / 2**20
    found = re.match(r"([\d.]+) MiB at full rank; 3 are kept", said["checkpoint"])
    assert abs(float(found[1]) - size) < 0.1
    refused = train(0, *TINY, "--dry-run", f"run.dir={whole}", code=2)
    assert f"run.dir: {whole} holds a run already" in refused.stderr


def test_the_samples_of_a_step_are_those_that_it_had():
    """An epoch of 300 samples in batches of 1200, and one whose last batch is small."""
    (line, _) = _time(10, [(0.2, 300)] * 3)
    assert line == "step: 0.2000 s (0.2000, 0.2000, 0.2000), 1500 samples/s, full-rank"
    (line, _) = _time(10, [(0.4, 64), (0.1, 11), (0.5, 64)])
    assert "step: 0.4000 s (0.4000, 0.1000, 0.5000), 139 samples/s" in line


def test_sizes_are_those_of_files(tmp_path):
    content = {"weights": torch.randn(1000, 30), "steps": [1, 2, 3], "text": "a" * 100}
    torch.save(content, tmp_path / "file.pt")
    assert abs(_size(content) - (tmp_path / "file.pt").stat().st_size) < 200


def test_what_goes_on_is_not_tried():
    refused = train(0, "--dry-run", "--resume", "runs/any", code=2)
    assert refused.stderr == (
        "error: --dry-run: looks at a run that is to begin; leave out --resume\n"
    )


FAILING = """
from app.command import run_command
from app.train import main
from app.training import dry_run
measure = dry_run._measure
def fail(parts, *arguments):
    if parts.runtime.process_index == 1:
        raise MemoryError("no memory is left")
    return measure(parts, *arguments)
dry_run._measure = fail
run_command(lambda: main(["--dry-run", "stability.enabled=false"]))
"""


def test_a_fault_on_one_process_ends_all(tmp_path):
    """The others stood until the timeout of their exchange."""
    result = launch(2, "-c", FAILING, code=1)
    assert "process 1 of 2 failed:" in result.stderr
    assert "MemoryError: no memory is left" in result.stderr
    assert "process 1 of 2: at " in result.stderr  # the watchdog's
    assert not result.stdout
