"""Under torchrun: processes that it starts anew, and stops that it must not take for faults."""

import json
import signal
import subprocess

import pytest
from support.launching import TIMEOUT, command, environment
from support.tiny_run import DISTURBED, TINY, last_checkpoint

from app.recording.store import read_rows
from app.runtime.launch import read_launch


def torchrun(*arguments, cwd, variables=None):
    """Start a program under torchrun, with what it says on stdout and stderr in one."""
    return subprocess.Popen(
        command(0, "-m", "torch.distributed.run", *arguments),
        cwd=cwd,
        env={**environment(), **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process):
    """Wait for the end; a hang ends the test."""
    try:
        return process.communicate(timeout=TIMEOUT)[0]
    finally:
        process.terminate()


@pytest.mark.parametrize(
    ("place", "variables"),
    [
        ([], {}),
        # Then not the agent hosts the store, but process 0 of each attempt.
        (["run.dir=runs/mine"], {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
    ],
)
def test_a_new_attempt_goes_on_in_the_same_folder(tmp_path, place, variables):
    process = torchrun(
        "--nproc-per-node=2",
        "--max-restarts=1",
        *[DISTURBED, "kill", 1, 20],
        *TINY,
        *place,
        cwd=tmp_path,
        variables=variables,
    )
    said = end(process)
    assert process.returncode == 0, said
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if not path.is_symlink()]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 32
    assert list(read_rows(folder / "metrics.h5", "sessions")["first_step"]) == [0, 16]
    assert not (folder / "unfinished.json").exists()


def test_a_new_attempt_leaves_the_run_of_somebody_else_alone(tmp_path):
    (tmp_path / "metrics.h5").touch()
    (tmp_path / "unfinished.json").write_text(json.dumps({"agents": ["n1:/tmp/other"]}))
    arguments = ["--nproc-per-node=1", "--max-restarts=1", "-m", "app.train"]
    process = torchrun(*arguments, *TINY, f"run.dir={tmp_path}", cwd=tmp_path)
    said = end(process)
    assert process.returncode == 1
    assert said.count(f"error: run.dir: {tmp_path} holds a run already") == 2
    assert not (tmp_path / "checkpoints").exists()


def test_a_stop_is_no_fault_and_says_so(tmp_path):
    arguments = ["--nproc-per-node=1", "--max-restarts=3", "-m", "app.train"]
    process = torchrun(*arguments, *TINY, f"run.dir={tmp_path}", "run.stop_after=9", cwd=tmp_path)
    said = end(process)
    assert process.returncode == 0
    assert (
        said.count(f"stopped by run.stop_after after step 9: go on with --resume {tmp_path}") == 1
    )
    assert "unfinished" in said
    found = json.loads((tmp_path / "unfinished.json").read_text())
    assert found["stopped"] == "stopped by run.stop_after after step 9"
    assert found["go_on"] == f"python -m app.train --resume {tmp_path}"


def test_the_checkpoint_comes_before_torchrun_kills(tmp_path):
    arguments = ["--nproc-per-node=2", "-m", "app.train"]
    process = torchrun(*arguments, "training.epochs=500", f"run.dir={tmp_path}", cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            process.send_signal(signal.SIGTERM)
            break
    end(process)
    found = json.loads((tmp_path / "unfinished.json").read_text())
    assert found["stopped"].startswith("stopped by signal 15 after step ")
    assert last_checkpoint(tmp_path)["position"]["step"] >= 20


def test_attempts_of_one_start_are_told_from_those_of_another():
    def agent(path):
        variables = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}
        return read_launch({**variables, "TORCHELASTIC_ERROR_FILE": path}).agent

    assert agent("/tmp/a/none_x/attempt_0/0/error.json") == agent(
        "/tmp/a/none_x/attempt_1/1/error.json"
    )
    assert agent("/tmp/a/none_x/attempt_0/0/error.json") != agent(
        "/tmp/a/none_y/attempt_0/0/error.json"
    )
    assert agent("/dev/null") == agent("") == ""
