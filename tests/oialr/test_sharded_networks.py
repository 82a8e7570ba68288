"""Networks and optimizers that are split over the processes are refused by name."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, distribute_tensor

from app import OIALR

pytestmark = pytest.mark.filterwarnings("ignore")  # of FSDP on a CPU


@pytest.fixture(autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network():
    return nn.Sequential(nn.Linear(20, 32), nn.Sequential(nn.Linear(32, 24)), nn.Linear(24, 5))


def fsdp(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def fsdp_inside(model):
    fsdp(model)
    return model


def fsdp_of_a_part(model):
    model[1] = fsdp(model[1], use_orig_params=True)
    return model


def fsdp2(model):
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp2_of_a_part(model):
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    return model


def inside_fsdp2(model):
    fully_shard(nn.Sequential(model), mesh=init_device_mesh("cpu", (1,)))
    return model


def tensor_parallel(model):
    mesh = init_device_mesh("cpu", (1,))
    weight = distribute_tensor(model[0].weight.detach(), mesh, [Replicate()])
    model[0].weight = nn.Parameter(weight)
    return model


SHARDED = [
    (fsdp, "FullyShardedDataParallel (FSDP)"),
    (lambda model: fsdp(model, use_orig_params=True), "FullyShardedDataParallel (FSDP)"),
    (fsdp_inside, "FullyShardedDataParallel (FSDP)"),
    (fsdp_of_a_part, "FullyShardedDataParallel (FSDP)"),
    (fsdp2, "fully_shard (FSDP2)"),
    (fsdp2_of_a_part, "fully_shard (FSDP2)"),
    (inside_fsdp2, "DTensor"),
    (tensor_parallel, "DTensor"),
]


@pytest.mark.parametrize(("shard", "name"), SHARDED)
def test_a_sharded_network_is_refused_with_what_to_do(shard, name):
    model = shard(network())
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="use DistributedDataParallel instead") as error:
        OIALR(model, optimizer, delay=1, update_interval=1)
    assert str(error.value).startswith(f"{name} splits the weights over the processes")


@pytest.mark.parametrize("shard", [fsdp_inside, fsdp2, tensor_parallel])
def test_it_is_refused_too_when_it_is_sharded_afterwards(shard):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = OIALR(model, optimizer, delay=1, update_interval=1)
    shard(model)
    optimizer.step()
    with pytest.raises(ValueError, match="splits the weights over the processes"):
        method.step()


@pytest.mark.parametrize("unknown", ["error", "reset"])
def test_an_optimizer_that_shards_is_refused(unknown):
    model = network()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"^ZeroRedundancyOptimizer .* use the optimizer inside"):
        OIALR(model, optimizer, delay=1, update_interval=1, unknown_optimizer_state=unknown)
