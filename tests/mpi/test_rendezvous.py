"""How processes find each other, under torchrun also when it starts them anew, and part again."""

import sys
import threading

import torch
import torch.distributed as dist
from support.launching import launch

from app.runtime.launch import Launch
from app.runtime.processes import Groups
from app.runtime.rendezvous import new_attempt


def attempt(store, count):
    """Let ``count`` threads be the processes of an attempt; return what each of them got."""
    found = {}

    def be(index):
        found[index] = new_attempt(store, index, count)

    threads = [threading.Thread(target=be, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == count
    return [found[index] for index in range(count)]


def test_all_processes_of_an_attempt_share_what_no_other_has_written():
    store = dist.HashStore()
    first = attempt(store, 3)
    first[1].set("address", "of the dead")
    assert first[2].get("address") == b"of the dead"
    for count in (3, 2, 4):  # another number of processes too
        again = attempt(store, count)
        assert not any(one.check(["address"]) for one in again)
        again[-1].set("address", "of the living")
        assert {one.get("address") for one in again} == {b"of the living"}


def test_a_question_of_the_dead_does_not_mislead():
    """Processes that died while they asked leave question and answer behind."""
    store = dist.HashStore()
    store.set("oialr/asks/1", "dead")
    store.set("oialr/answers/1", "dead oialr/attempts/old")
    store.set("oialr/attempts/old/has-it/1", "")
    store.set("oialr/attempts/old/address", "of the dead")
    assert not any(one.check(["address"]) for one in attempt(store, 2))


class Alone:
    """A communicator of one process."""

    def bcast(self, value, root):
        return value


def test_what_torch_hangs_on_the_interpreter_goes_with_the_groups():
    hook = sys.excepthook
    for _ in range(2):
        launch = Launch(launcher="mpi", process_index=0, process_count=1)
        groups = Groups(launch, Alone(), device=torch.device("cpu"), timeout=60.0)
        assert dist.is_initialized()
        assert sys.excepthook is not hook  # else nothing is shown here
        groups.close()
        assert not dist.is_initialized()
        assert sys.excepthook is hook


def test_no_thread_of_the_groups_outlives_them():
    # Such a thread aborts the process if it lets go of a tensor while the interpreter ends.
    program = (
        "import glob, torch\n"
        "from app.runtime.processes import start_runtime\n"
        "with start_runtime(device='cpu', timeout=60):\n"
        "    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))\n"
        "    network(torch.ones(1, 2)).sum().backward()\n"
        "    del network\n"
        "print([open(name).read() for name in glob.glob('/proc/self/task/*/comm')])\n"
    )
    result = launch(2, "-c", program)
    assert result.stdout.count("python") >= 2
    assert "gloo" not in result.stdout
