"""One process by nccl, and two by gloo that share the GPU, against one process alone."""

import pytest
import torch
from support.gpu import workers
from support.gpu.accelerator import backend
from support.gpu.networks import relative_error

from oialr.placement.processes import Processes

CASES = [("nccl", 1), ("gloo", 2)]


@pytest.fixture(scope="module", params=CASES, ids=["nccl-1", "gloo-2"])
def launched(request, size, device, tmp_path_factory):
    """Return the number of processes that have run, and the folder of what they left."""
    name, count = request.param
    folder = tmp_path_factory.mktemp(name)
    workers.start(count, backend(device) if name == "nccl" else name, device, size, folder)
    return count, folder


@pytest.mark.parametrize("name", workers.TRAINED)
def test_a_training_is_that_of_one_process_on_the_whole_batch(name, launched, size, device):
    count, folder = launched
    alone = workers.train(name, size, device, Processes())
    results = [torch.load(folder / f"{name}-{i}.pt", weights_only=True) for i in range(count)]
    for result in results:
        assert result["kinds"] == ["convert", "cut", "update", "update"]
        assert result["ranks"] == alone.method.ranks()
        # float64; only the order of the sums over the batch is another.
        assert relative_error(result["weights"], alone.weights()) < 1e-11
    if count > 1:
        assert set(results[0]["owners"]) == {0, 1}
        assert results[0]["bytes"][0] > 0
        for key, weight in results[0]["weights"].items():
            assert torch.equal(weight, results[1]["weights"][key])


def test_they_tell_each_other_what_lies_on_the_device(launched):
    count, folder = launched
    assert len(list(folder.glob("conversed-*"))) == count
