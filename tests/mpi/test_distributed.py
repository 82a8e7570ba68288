"""The method and its parts on several processes, under the real mpirun."""

import socket
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.launching import ROOT, launch
from torch.distributed import HashStore

from app.errors import AgreedUserError
from app.runtime import processes
from app.runtime.launch import Launch, read_launch
from app.runtime.processes import own_gpu
from app.runtime.rendezvous import new_attempt
from oialr.placement.assignment import assign

WORKERS = ROOT / "tests" / "support" / "workers"


@given(st.lists(st.floats(0.1, 100), max_size=40), st.integers(1, 9))
def test_greedy_assignment_is_balanced_within_grahams_bound(costs, count):
    owners = assign(costs, count)
    assert len(owners) == len(costs)
    assert all(0 <= owner < count for owner in owners)
    loads = [0.0] * count
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    # A lower bound of the best makespan; greedy is within 4/3 of the best itself.
    ordered = sorted(costs, reverse=True)
    best = max([sum(costs) / count, *ordered[:1]])
    if len(ordered) > count:
        best = max(best, ordered[count - 1] + ordered[count])
    assert max(loads) <= best * (2 - 1 / count) + 1e-9
    assert owners == assign(costs, count)


def test_greedy_assignment_takes_the_largest_first():
    assert assign([1, 1, 1, 3], 2) == [1, 1, 1, 0]
    # Greedily it would be 0, 1, 1, 0, 1, which takes 10 and not 9.
    assert assign([5, 4, 3, 3, 3], 2) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("processes", [2, 4])
def test_split_factorization_equals_that_of_one_process(processes):
    assert "split as whole" in launch(processes, WORKERS / "split_svd.py").stdout


def test_many_factorizations_of_a_split_layer_survive():
    """Without the workaround in oialr.compatibility MPICH aborts in the 1,022nd; it takes 1,200."""
    assert "1200 factorizations" in launch(2, WORKERS / "many_splits.py", 1200).stdout


@pytest.mark.parametrize("processes", [2, 3])
def test_events_share_little_and_survive_what_goes_wrong(processes):
    assert "all cases" in launch(processes, WORKERS / "events.py").stdout


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_method_on_several_processes_equals_one(processes):
    assert "same on all processes" in launch(processes, WORKERS / "method.py").stdout


@pytest.mark.parametrize("processes", [2, 3])
def test_a_release_on_several_processes_equals_one(processes):
    assert "same on all processes" in launch(processes, WORKERS / "release.py").stdout


def test_conversions_by_stability_on_two_processes_equal_those_of_one():
    result = launch(2, WORKERS / "stability_delay.py", 0.998)
    assert "same on all processes, conversions after [6, 10, 12]" in result.stdout


def test_a_process_that_cannot_compile_exchanges_what_the_others_do():
    """It sent its buffers twice, and all later exchanges were one off."""
    assert "same on all processes" in launch(2, WORKERS / "compiled.py").stdout


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}
OF_SRUN = {
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
}


@pytest.mark.parametrize(
    ("environment", "launcher", "index", "count"),
    [
        ({}, "alone", 0, 1),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, "mpi", 1, 4),
        (OPEN_MPI, "mpi", 2, 3),
        # mpirun of Open MPI or MVAPICH in a shell that srun --mpi=pmi2 --pty has started: each
        # believed that it was alone.
        ({**OPEN_MPI, "PMI_RANK": "0", "PMI_SIZE": "1"}, "mpi", 2, 3),
        (
            {
                "MV2_COMM_WORLD_RANK": "1",
                "MV2_COMM_WORLD_SIZE": "2",
                "PMI_RANK": "0",
                "PMI_SIZE": "1",
                "PMI_JOBID": "7.0",
                "SLURM_STEP_NUM_TASKS": "1",
                "SLURM_PROCID": "0",
            },
            "mpi",
            1,
            2,
        ),
        # srun --mpi=pmi2, and an mpirun that starts its helpers by srun, one on each node.
        ({**OF_SRUN, "PMI_JOBID": "7.0"}, "srun", 5, 8),
        (OF_SRUN, "mpi", 5, 8),
        # A batch script of Slurm knows the tasks of the job, but is one process.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "alone", 0, 1),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, "srun", 5, 8),
        # mpirun inside a Slurm job, torchrun inside srun: the innermost counts.
        (
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "PMI_RANK": "1", "PMI_SIZE": "2"},
            "mpi",
            1,
            2,
        ),
        (
            {
                "TORCHELASTIC_RUN_ID": "x",
                "RANK": "3",
                "WORLD_SIZE": "4",
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_PROCID": "0",
            },
            "torchrun",
            3,
            4,
        ),
    ],
)
def test_the_innermost_launcher_counts(environment, launcher, index, count):
    found = read_launch(environment)
    assert (found.launcher, found.process_index, found.process_count) == (launcher, index, count)


@pytest.mark.parametrize(
    ("outer", "told"),
    [
        (("0", "1"), "mpi started 1 process, but each sees 2 in its MPI (MPICH"),
        (("1", "2"), "mpi started 2 processes, but their order is another in MPI (MPICH"),
        (("3", "4"), "mpi started 4 processes, but each sees 2 in its MPI (MPICH"),
    ],
    ids=str,
)
def test_what_an_outer_launcher_has_left_is_not_believed(tmp_path, outer, told):
    """MPICH's mpirun, in a program that Open MPI's has started."""
    variables = dict(zip(("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), outer, strict=True))
    program = (
        f"import os; os.environ.update({variables!r})\n"
        "from app.command import run_command\n"
        "from app.train import main\n"
        f"run_command(lambda: main(['run.dir={tmp_path}/run']))\n"
    )
    errors = launch(2, "-c", program, code=2).stderr
    assert errors.count(f"error: {told}") == (2 if outer[0] == "0" else 1)  # who is the first?
    assert "unset OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("launcher", "library", "cure"),
    [
        ("srun", "Open MPI v5.0.8, package: Debian", "srun --mpi=pmix"),
        ("srun", "MPICH Version:      5.0.2", "srun --mpi=pmi2"),
        ("mpi", "Open MPI v5.0.8, package: Debian", "the environment's own MPI"),
    ],
)
def test_the_cure_is_for_the_launcher_and_the_library(launcher, library, cure):
    started = Launch(launcher=launcher, process_index=0, process_count=8)
    assert cure in processes._cure(started, library)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([["a", "b"], ["a", "b"]], [0, 1]),  # all are shown to all
        ([["a"], ["b"]], [0, 0]),  # each its own
        ([["b", "a"], ["a", "b"]], [0, 0]),
        ([["a"], ["a"]], [None, None]),  # one GPU, two processes
        ([["a"], []], [None, None]),
        ([[]], [None]),
        ([["a", "b"]], [0]),
        # Those near to each, two sockets: --gpu-bind=closest.
        ([["a", "b"], ["a", "b"], ["c", "d"], ["c", "d"]], [0, 1, 0, 1]),
        ([["a", "b"], ["c", "d"], ["a", "b"], ["c", "d"]], [0, 0, 1, 1]),
        ([["a", "b"], ["a", "b"], ["a", "b"], ["c", "d"]], [None] * 4),
        ([["a", "b"], ["b", "c"], ["a"]], [1, 1, 0]),  # the first two move
    ],
)
def test_no_two_processes_take_one_gpu(gpus, expected):
    assert [own_gpu(gpus, i) for i in range(len(gpus))] == expected


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("cuda", ["a", "b", "c"], "cuda:0"),
        ("auto", ["a", "b", "c"], "cuda:0"),
        ("auto", ["a", "", "c"], "cpu"),
        ("auto", ["", "", ""], "cpu"),
        ("cpu", ["a", "", "c"], "cpu"),
        ("cuda", ["a", "", "c"], "no GPU for each process: 1 process on {}, which shows 0 GPUs to"),
    ],
)
def test_processes_of_torchrun_take_the_same_kind_of_device(
    monkeypatch, capsys, device, gpus, expected
):
    """Each is alone on its node here, and on one of these there is no GPU.

    One process tells of it, unless there is no GPU at all.
    """
    whole = HashStore()

    def make_store(launch, communicator, *, timeout):
        return new_attempt(whole, launch.process_index, launch.process_count)

    def visible():
        name = gpus[int(threading.current_thread().name)]
        return [name] if name else []

    monkeypatch.setattr(processes, "make_store", make_store)
    monkeypatch.setattr(processes, "_visible_gpus", visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    found = {}

    def be(index):
        own = Launch(launcher="torchrun", process_index=index, process_count=len(gpus))
        try:
            found[index] = str(processes.choose_device(device, own, None, timeout=60)[1])
        except AgreedUserError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=be, args=(i,), name=str(i)) for i in range(len(gpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == len(gpus)
    for what in found.values():
        assert expected.format(socket.gethostname()) in what
    warned = device == "auto" and "" in gpus and any(gpus)
    told = "warning: all compute on CPUs: distributed.device: there is no GPU for each process: 1 "
    assert capsys.readouterr().err.count(told) == warned
