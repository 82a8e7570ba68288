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
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, "mpi", 2, 3),
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
    ("gpus", "expected"),
    [
        ([["a", "b"], ["a", "b"]], [0, 1]),  # all are shown to all
        ([["a"], ["b"]], [0, 0]),  # each its own
        ([["b", "a"], ["a", "b"]], [0, 0]),
        ([["a"], ["a"]], [None, None]),  # one GPU, two processes
        ([["a"], []], [None, None]),
        ([[]], [None]),
        ([["a", "b"]], [0]),
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
        ("cpu", ["a", "", "c"], "cpu"),
        ("cuda", ["a", "", "c"], "no GPU for each process: 1 process on {}, which shows 0 GPUs to"),
    ],
)
def test_processes_of_torchrun_take_the_same_kind_of_device(monkeypatch, device, gpus, expected):
    """Each is alone on its node here, and on one of these there is no GPU."""
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
