"""Checkpoints between GPU and CPU, and the exact resume on the GPU."""

import pytest
import torch
from support.gpu.accelerator import random_state, set_random_state
from support.gpu.networks import (
    batches,
    build,
    input_shape,
    linear,
    relative_error,
    separate,
    training,
)

from app.training.checkpoint import Checkpoints
from app.training.precision import Precision
from oialr.placement.processes import Processes

OPTIMIZERS = {
    "foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
}


def dropout_network(size):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = linear(size, dropout=0.2)
    separate(model)
    return model


def save(folder, trained, precision):
    """Write what the trainer writes, but for records."""
    shared = {
        "process_count": 1,
        "method": trained.method.state_dict(),
        "model": trained.model.state_dict(),
        "optimizer": trained.optimizer.state_dict(),
        "precision": precision.state_dict(),
    }
    device = next(trained.model.parameters()).device
    own = {"random_state": torch.get_rng_state(), f"of_{device.type}": random_state(device)}
    Checkpoints(folder, Processes(), keep=1).save(trained.method.step_count, shared, own)


def load(folder, model, optimizer, precision_name="float32"):
    """Give a full-rank network what was saved; return its training, random states included."""
    shared, (own,) = Checkpoints(folder, Processes(), keep=1).load()
    trained = training(model, optimizer)
    trained.method.load_state_dict(shared["method"])
    model.load_state_dict(shared["model"])
    optimizer.load_state_dict(shared["optimizer"])
    device = next(model.parameters()).device
    precision = Precision(precision_name, device)
    precision.load_state_dict(shared["precision"])
    torch.set_rng_state(own["random_state"])
    if (state := own.get(f"of_{device.type}")) is not None:  # from another kind, begin anew
        set_random_state(device, state)
    return trained


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_goes_from_the_gpu_to_the_cpu_and_back(optimizer, size, device, tmp_path):
    data = batches(input_shape("linear", size), size, 8)
    places = [device, torch.device("cpu"), device]
    made, trained = OPTIMIZERS[optimizer], None
    for number, place in enumerate(places):
        model = build("linear", size).to(place)
        if trained is None:
            trained = training(model, made(model))
        else:
            before = {name: value.cpu() for name, value in trained.model.state_dict().items()}
            ranks = trained.method.ranks()
            trained = load(tmp_path / str(number), model, made(model))
            assert trained.method.ranks() == ranks
            for name, value in model.state_dict().items():
                assert value.device.type == place.type
                assert torch.equal(value.cpu(), before[name])
            for parameter, state in trained.optimizer.state.items():
                for key, value in state.items():
                    assert key == "step" or value.device == parameter.device
        trained.run(data[3 * number : 3 * number + 3])
        save(tmp_path / str(number + 1), trained, Precision("float32", place))
    assert trained.method.step_count == 8
    assert trained.events.keys() == {8}

    model = build("linear", size)
    whole = training(model, made(model)).run(data)
    assert trained.method.ranks() == whole.method.ranks()
    if optimizer == "sgd":  # a step of Adam may turn a rounding of a gradient near zero into 1e-3
        assert relative_error(trained.weights(), whole.weights()) < 1e-4


@pytest.mark.parametrize("split", [1, 3, 5])
@pytest.mark.parametrize("optimizer", ["foreach", "fused"])
def test_a_resumed_training_has_the_bits_of_one_that_was_not_stopped(
    optimizer, split, size, device, tmp_path
):
    torch.use_deterministic_algorithms(True)
    data = batches(input_shape("linear", size), size, 8)
    made = OPTIMIZERS[optimizer]

    def start():
        torch.manual_seed(7)  # of the dropout, on all devices
        model = dropout_network(size).to(device)
        return training(model, made(model))

    whole = start().run(data)
    first = start().run(data[:split])
    save(tmp_path, first, Precision("float32", device))
    torch.manual_seed(8)
    model = dropout_network(size).to(device)
    resumed = load(tmp_path, model, made(model)).run(data[split:])
    assert [e.kind for e in whole.events.values()][:2] == ["convert", "cut"]
    assert resumed.method.ranks() == whole.method.ranks()
    assert torch.equal(torch.stack(resumed.losses), torch.stack(whole.losses[split:]))
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_scale_of_float16_is_resumed(size, device, tmp_path):
    model = build("linear", size).to(device)
    trained = training(model)
    precision = Precision("float16", device)
    for inputs, labels in trained.placed(batches(input_shape("linear", size), size, 3)):
        trained.optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        precision.backward(loss)
        precision.step(trained.optimizer, model, None)
    save(tmp_path, trained, precision)
    shared, _ = Checkpoints(tmp_path, Processes(), keep=1).load()
    other = Precision("float16", device)
    other.load_state_dict(shared["precision"])
    assert other.state_dict() == precision.state_dict()
