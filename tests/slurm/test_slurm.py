"""The batch scripts in a real Slurm of two emulated nodes: training, preemption, faults, the array.

The job's processes are real, start through srun and PMI on either node, and share this machine.
"""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from support.emulated_slurm import PROGRAMS, EmulatedSlurm, wait_for
from support.machine import need
from support.tiny_run import PAPER, last_checkpoint

from app.recording.store import read_rows

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "slurm").glob("*.sh")
    if path.name not in ("env.sh", "job.sh", "submit_with_report.sh")
)
EPOCHS = 24  # several seconds remain after the second, for disturbances to come in time
# Over the configuration for ImageNet: a tiny network on digits, epochs of 20 steps.
TINY = [
    "data.name=digits",
    "data.validation_fraction=0.1",
    "data.image_size=224",
    "data.workers=2",
    "data.drop_last=false",
    "data.random_augment=null",
    "data.random_erasing=0",
    "data.mixup=0",
    "data.cutmix=0",
    "model.name=vision_transformer",
    "model.arguments={patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2, proj_drop_rate: 0.1}",
    f"training.epochs={EPOCHS}",
    "training.batch_size=64",
    "training.warmup_epochs=1",
    *PAPER,
    "oialr.delay=50",
    "oialr.update_interval=20",
    "oialr.layer_fraction=0.5",
    "oialr.cutoff=0.4",
    "stability.window=2",
    "run.log_interval=5",
]
SMALL = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
ONE_NODE = ["NumNodes=1", "NumTasks=1", "NumCPUs=1"]
LONG = "training.epochs=500"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    need(*PROGRAMS)
    with EmulatedSlurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


def train(slurm, *arguments, script="slurm/oialr_resnet.sh", options=SMALL):
    """Submit a training of the tiny network."""
    runs = str(slurm.folder / "runs")
    return slurm.submit(script, *TINY, *arguments, options=options, RUNS_ROOT=runs)


def run_dir(slurm, job, name="oialr_resnet"):
    return slurm.folder / "runs" / f"{name}-{job}"


def processes_of(folder):
    """Return the process id of every process that has this folder on its command line, by task."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            environment = (path / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in command and b"app.train" in command and b"srun" not in command:
            task = re.search(rb"\0SLURM_PROCID=(\d+)", environment)
            found[int(task[1]) if task else None] = int(path.name)
    return found


def assert_same_weights(folder, reference):
    mine, theirs = last_checkpoint(folder), last_checkpoint(reference)
    assert mine["position"] == theirs["position"]
    for name, value in mine["model"].items():
        assert torch.equal(value, theirs["model"][name]), name


@pytest.fixture(scope="module")
def undisturbed(slurm):
    """The run directory of a job that trained from beginning to end."""
    job = train(slurm)
    slurm.wait_for_state(job, "COMPLETED")
    return run_dir(slurm, job)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_slurm_accepts_every_header(slurm, script):
    assert "to start at" in slurm.run("sbatch", "--test-only", script)


def test_a_job_trains_on_both_nodes(slurm, undisturbed):
    job = undisturbed.name.rpartition("-")[2]
    assert "2 processes on cpu" in slurm.log(job)
    assert last_checkpoint(undisturbed)["position"]["epoch"] == EPOCHS
    assert re.search(r"step \d+: cut of", slurm.log(job))
    assert slurm.show(job)["NodeList"] == "n[1-2]"
    for process, node in enumerate(("n1", "n2")):  # of the table before the training
        assert re.search(rf"^{node} +{process} +cpu +\w{{8}} +\w{{8}} +[+-]", slurm.log(job), re.M)


def test_a_signal_leads_to_a_checkpoint_a_requeue_and_the_same_weights(slurm, undisturbed):
    job = train(slurm)
    slurm.wait_for_line(job, r"epoch 3/")
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    slurm.wait_for_line(job, "Stopped .exit code 75.; requeueing job")
    slurm.wait_for_state(job, "COMPLETED")
    assert slurm.show(job)["Restarts"] == "1"
    assert "restart 1" in slurm.log(job)
    first_steps = read_rows(run_dir(slurm, job) / "metrics.h5", "sessions")["first_step"]
    assert first_steps[0] == 0
    assert 40 <= first_steps[1] < 20 * EPOCHS
    assert_same_weights(run_dir(slurm, job), undisturbed)


def test_the_time_limit_is_treated_alike(slurm):
    options = [*SMALL, "--time=2", "--signal=B:USR1@70"]
    job = train(slurm, LONG, options=options)
    slurm.wait_for_line(job, "Stopped .* requeueing job")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    slurm.wait_for_line(job, r"from step \d+ on")
    slurm.run("scancel", job)


def test_a_cancelled_job_leaves_nothing_behind(slurm):
    job = train(slurm, LONG)
    slurm.wait_for_line(job, r"epoch 3/")
    assert processes_of(run_dir(slurm, job)).keys() >= {0, 1}
    slurm.run("scancel", job)
    wait_for(lambda: not processes_of(run_dir(slurm, job)), "end of the processes", 60)
    wait_for(lambda: job not in slurm.run("squeue", "-h", "-o", "%i").split(), "end of the job", 60)
    assert slurm.state(job) == "CANCELLED"
    assert "requeueing" not in slurm.log(job)
    assert slurm.show(job)["Restarts"] == "0"


def test_a_node_that_goes_down_leads_to_a_requeue_also_on_fewer_nodes(slurm):
    job = train(slurm)
    slurm.wait_for_line(job, r"epoch 3/")
    slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        slurm.wait_for_state(job, "PENDING")
        wait_for(lambda: not processes_of(run_dir(slurm, job)), "end of the processes", 60)
        slurm.run("scontrol", "update", f"JobId={job}", *ONE_NODE)
        slurm.wait_for_state(job, "COMPLETED")
    finally:
        slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    sessions = read_rows(run_dir(slurm, job) / "metrics.h5", "sessions")
    assert list(sessions["process_count"]) == [2, 1]
    assert sessions["first_step"][1] >= 40
    assert last_checkpoint(run_dir(slurm, job))["position"]["epoch"] == EPOCHS


def test_a_frozen_process_ends_the_step_and_the_job_goes_on(slurm, undisturbed):
    job = train(slurm, "distributed.timeout=40")
    slurm.wait_for_line(job, r"epoch 3/")
    os.kill(processes_of(run_dir(slurm, job))[1], signal.SIGSTOP)
    slurm.wait_for_line(job, "process 0 of 2 on n1: no progress in 40 s .* at ")
    slurm.wait_for_line(job, "Failed .*, after new results; requeueing job")
    wait_for(lambda: not processes_of(run_dir(slurm, job)), "end of the processes", 60)
    slurm.wait_for_state(job, "COMPLETED")
    assert_same_weights(run_dir(slurm, job), undisturbed)


def test_a_killed_process_ends_the_step_and_the_job_goes_on(slurm):
    """On one node, where a step of the same number finds what the killed one shared with others."""
    job = train(slurm, options=["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"])
    slurm.wait_for_line(job, r"epoch 3/")
    os.kill(processes_of(run_dir(slurm, job))[1], signal.SIGKILL)
    slurm.wait_for_line(job, "Failed .*, after new results; requeueing job")
    slurm.wait_for_state(job, "COMPLETED")
    assert slurm.show(job)["Restarts"] == "1"
    sessions = read_rows(run_dir(slurm, job) / "metrics.h5", "sessions")
    assert list(sessions["process_count"]) == [2, 2]
    assert last_checkpoint(run_dir(slurm, job))["position"]["epoch"] == EPOCHS


def test_one_command_leads_from_an_array_of_seeds_to_their_table(slurm):
    """The report waits for all of them, also for one that is stopped and requeued."""
    said = slurm.run(
        *("slurm/submit_with_report.sh", "--array=0-1", "--cpus-per-task=1"),
        *("slurm/seeds.sh", "configs/digits_vit.yaml", *TINY),
        RUNS_ROOT=str(slurm.folder / "runs"),
        SBATCH_OUTPUT=str(slurm.folder / "%x-%j.out"),
    )
    job, report = re.search(r"^job (\d+), and after it job (\d+): ", said, re.M).groups()
    slurm.wait_for_line(f"{job}_0", r"epoch 3/")
    slurm.run("scancel", "--signal=USR1", "--batch", f"{job}_0")
    slurm.wait_for_line(f"{job}_0", "requeueing job")
    losses = []
    for seed in (0, 1):
        slurm.wait_for_state(f"{job}_{seed}", "COMPLETED")
        assert "1 process on cpu" in slurm.log(f"{job}_{seed}")
        folder = run_dir(slurm, f"{job}_{seed}", "seed")
        losses.append(last_checkpoint(folder)["last_loss"])
    assert losses[0] != losses[1]
    assert slurm.show(f"{job}_0")["Restarts"] == "1"
    slurm.wait_for_state(report, "COMPLETED")
    page = (slurm.folder / "runs" / f"report_of_{job}" / "report.html").read_text()
    assert all(f"seed-{job}_{seed}" in page for seed in (0, 1))
    assert "2 runs, finished" in page


def leave_stale_shared_memory(job):
    """Leave a file that MPICH takes for its own in the job's first step, as a killed process does.

    Nobody clears it then, and all wait in MPI_Init for one who says that it is clear.
    """
    name = 0x811C9DC5
    for byte in f"{job}.0".encode():
        name = (name ^ byte) * 0x01000193 % 2**32
    paths = [Path(f"/dev/shm/mpich_shm_{name:x}_{node}") for node in (0, 1)]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(2**22)
    return paths


def test_a_search_runs_on_both_nodes(slurm):
    """Also where a killed step of the same number left its shared memory on both."""
    network = "model.arguments={patch_size: 2, embed_dim: 32, depth: 2, num_heads: 2}"
    arguments = ["search.evaluations=2", "search.trainable_bound=null", "training.epochs=13"]
    job = slurm.submit(
        "slurm/search.sh",
        "configs/search/digits.yaml",
        network,
        *arguments,
        options=["--hold", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"],
        RUNS_ROOT=str(slurm.folder / "runs"),
    )
    stale = leave_stale_shared_memory(job)
    try:
        slurm.run("scontrol", "release", job)
        slurm.wait_for_state(job, "COMPLETED", timeout=240)
    finally:
        for path in stale:
            path.unlink(missing_ok=True)
    assert (run_dir(slurm, job, "search") / "best.yaml").exists()
