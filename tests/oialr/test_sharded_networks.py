"""Networks and optimizers that are split over the processes: what works, and what is refused."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Replicate, distribute_tensor

import oialr
from oialr import OIALR, WeightAverage
from tests.support.method_loop import CUT, batch, make, train
from tests.support.method_loop import network as network_of_loop

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
    with pytest.raises(
        ValueError, match=r"with method\.sharding.*DistributedDataParallel"
    ) as error:
        OIALR(model, optimizer, delay=1, update_interval=1)
    assert str(error.value).startswith(f"{name} splits the weights over the processes")


@pytest.mark.parametrize("shard", [fsdp_inside, fsdp2, tensor_parallel])
def test_an_event_is_refused_too_when_it_is_sharded_afterwards(shard):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = OIALR(model, optimizer, delay=1, update_interval=1)
    shard(model)
    optimizer.step()
    with pytest.raises(ValueError, match="event is due after step 1, and needs whole weights"):
        method.step()


def low_rank(**options):
    """Make a network low-rank, with its optimizer and method; the next event is far away."""
    parts = make(update_interval=100, **options)
    train(*parts, 6)
    return parts


def split(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def split_as_one(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.slow
@pytest.mark.parametrize("has_schedule", [False, True])
def test_a_sharded_network_trains_on_with_all_that_its_optimizer_has(has_schedule):
    """Groups, a schedule, a warm-up, a decay and an average: as if it were whole."""
    options = {**CUT, "release": 5, "release_warmup": 8, "frobenius_decay": 0.1}
    options |= {"factor_learning_rate_factor": 3, "has_schedule": has_schedule}
    alone, parts = low_rank(**options), low_rank(**options)
    outputs = []
    for model, optimizer, method in (alone, parts):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        average = WeightAverage(model, optimizer, decay=0.8)
        for step in range(6, 12):
            if step == 8 and model is parts[0]:
                with method.sharding():
                    split(model)
            train(model, optimizer, method, 1, first=step)
            schedule.step()
            average.update(10**9)
        inputs = batch(99)[0]
        with average.applied():
            outputs.append(model(inputs))
        outputs.append(model(inputs))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    weights = [model[0].weight for model in (alone[0], parts[0])]
    assert torch.equal(weights[0], weights[1].full_tensor())


@pytest.mark.parametrize("is_new", [True, False])
def test_an_optimizer_that_was_left_behind_is_told(is_new):
    model, optimizer, method = low_rank()
    split(model)
    if is_new:
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"holds none of them.*with method\.sharding"):
        train(model, optimizer, method, 1, first=6)


def test_a_full_rank_network_is_not_yet_to_be_sharded():
    model, _, method = make()
    with pytest.raises(ValueError, match="after its conversion"), method.sharding():
        split(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.slow
def test_a_wrapper_from_before_says_so():
    model, _, method = low_rank()
    wrapper = nn.parallel.DistributedDataParallel(model)
    with method.sharding():
        split(model)
    with pytest.raises(RuntimeError, match="parameters that are there no more"):
        wrapper(batch(0)[0])


@pytest.mark.parametrize("shard", [split, split_as_one])
@pytest.mark.parametrize("options", [None, {}], ids=["dense", "low-rank"])
def test_weights_of_other_ranks_are_refused_before_any_is_loaded(shard, options):
    model = oialr.prepare(network_of_loop(1)) if options is None else low_rank(**options)[0]
    stored = low_rank(cutoff=0.4, cut_at_conversion=True)[0].state_dict()
    shard(model)
    before = [parameter.full_tensor() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="the stored ranks before it is sharded"):
        model.load_state_dict(stored)
    assert all(map(torch.equal, before, [p.full_tensor() for p in model.parameters()]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        oialr.StabilityTracker,
        oialr.dense_state,
        oialr.two_factors,
        oialr.for_inference,
        lambda model: oialr.compress(model, target_size=0.5),
        lambda model: oialr.save(model, "never.safetensors"),
        lambda model: oialr.load(model, "never.safetensors"),
        lambda model: oialr.export_dense(model, "never.pt", batch(0)[0]),
    ],
)
def test_what_needs_whole_weights_says_how_to_get_them(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _, method = low_rank()
    oialr.save(model, "never.safetensors")
    tracker = oialr.StabilityTracker(model)
    with method.sharding():
        split(model)
    for refused in (use, lambda _: tracker.measure()):
        with pytest.raises(ValueError, match="get_model_state_dict with full_state_dict=True"):
            refused(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = oialr.prepare(network_of_loop(1))
    whole.load_state_dict(state)
    assert torch.equal(whole(batch(0)[0]), model(batch(0)[0]))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_step_of_a_checkpoint_is_none_of_the_training(kind):
    """torch fills the state of an optimizer that has none by a step of it, before it is read."""
    model, optimizer, method = make(kind)
    train(model, optimizer, method, 4)
    state, stored = method.state_dict(), get_optimizer_state_dict(model, optimizer)
    model, optimizer, method = make(kind)
    method.load_state_dict(state)
    get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, stored)
    assert method.step() is None
    assert method.step_count == 4
    (event,) = train(model, optimizer, method, 1, first=4)
    assert event.kind == "convert"


@pytest.mark.parametrize(
    "options",
    [
        {**CUT, "release": 8},
        {"delay": "stability", "stability_threshold": 0.999, "latest_delay": 50},
    ],
)
def test_the_state_of_the_method_comes_back_out_of_a_distributed_checkpoint(options, tmp_path):
    _, _, method = parts = make(**options)
    train(*parts, 9)
    dcp.save({"method": method}, checkpoint_id=tmp_path)
    _, _, other = make(seed=1, **options)
    dcp.load({"method": other}, checkpoint_id=tmp_path)
    assert repr(other.state_dict()) == repr(method.state_dict())
    assert ("factors" in repr(method.state_dict())) == ("release" in options)
    assert ("tensor" in repr(method.state_dict())) != ("release" in options)


def test_what_groups_follow_comes_back_out_of_a_distributed_checkpoint(tmp_path):
    options = {"core_learning_rate_factor": 3.0}
    parts, others = make(**options), make(seed=1, **options)
    train(*others, 1)  # what is there already is loaded
    cores = parts[1].param_groups[1]
    set_here = {key: cores[key] for key in ("lr", "weight_decay")}
    cores |= {"lr": 0.5, "weight_decay": 0.3}
    train(*parts, 2)
    cores |= set_here  # by chance what others would have followed to
    dcp.save({"optimizer": parts[1]}, checkpoint_id=tmp_path)
    dcp.load({"optimizer": others[1]}, checkpoint_id=tmp_path)
    for each in (parts, others):
        each[1].param_groups[0] |= {"lr": 0.25, "weight_decay": 0.2, "betas": (0.8, 0.9)}
        train(*each, 1, first=2)
        expected = {**set_here, "betas": (0.8, 0.9)}
        assert {key: each[1].param_groups[1][key] for key in expected} == expected


@pytest.mark.parametrize("unknown", ["error", "reset"])
def test_an_optimizer_that_shards_is_refused(unknown):
    model = network()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"^ZeroRedundancyOptimizer .* use the optimizer inside"):
        OIALR(model, optimizer, delay=1, update_interval=1, unknown_optimizer_state=unknown)
