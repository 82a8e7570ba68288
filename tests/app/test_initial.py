"""Weights to start from: every file that holds them, and what does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from app import config
from app.errors import UserError
from app.runtime.processes import start_runtime
from app.training.build import build
from app.training.initial import load_initial
from oialr import OIALR

State = dict[str, Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))


def changed() -> State:
    torch.manual_seed(1)
    return {
        name: torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 7
        for name, tensor in network().state_dict().items()
    }


def named(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def save_checkpoint(state: State, path: Path) -> Path:
    for step, weights in ((5, network().state_dict()), (40, state)):
        folder = path.with_suffix("") / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        torch.save({"model": weights, "process_count": 1}, folder / "state.pt")
    return path.with_suffix("")


@pytest.mark.parametrize("inside", ["module", "model", "_orig_mod"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "network.", "module._orig_mod."])
def test_a_part_of_a_name_may_be_the_network_s_own(
    tmp_path: Path, inside: str, prefix: str
) -> None:
    """As where a module of Lightning holds as model a network whose own names begin with model."""
    model, state = nn.ModuleDict({inside: network()}), named(changed(), f"{inside}.")
    torch.save(named(state, prefix), tmp_path / "file.pt")
    load_initial(model, str(tmp_path / "file.pt"))
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda state, path: torch.save({"state_dict": named(state, "module."), "epoch": 3}, path),
        lambda state, path: torch.save({"model": named(state, "_orig_mod.module.")}, path),
        lambda state, path: torch.save({"state_dict": named(state, "model.")}, path),
        lambda state, path: save_file(state, path.with_suffix(".safetensors")),
        save_checkpoint,
        lambda state, path: save_checkpoint(state, path) / "checkpoints" / "step-00000040",
    ],
)
def test_all_weights_are_those_of_the_file(
    tmp_path: Path, save: Callable[[State, Path], Path | None]
) -> None:
    state, path = changed(), tmp_path / "weights.pt"
    path = save(state, path) or (path if path.exists() else path.with_suffix(".safetensors"))
    model = network()
    load_initial(model, str(path))
    assert {n: t.tolist() for n, t in model.state_dict().items()} == {
        n: t.tolist() for n, t in state.items()
    }


def factors() -> State:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = OIALR(model, optimizer, delay=1, update_interval=1)
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    method.step()
    assert method.converted
    return model.state_dict()


def edited(**entries: Tensor | None) -> State:
    state: dict[str, Any] = {**changed(), **entries}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: edited(**{"2.bias": None}), "it lacks 2.bias"),
        (lambda: edited(**{"3.bias": torch.ones(2)}), "the network has no 3.bias"),
        (
            lambda: edited(**{"2.weight": torch.ones(4, 8), "2.bias": torch.ones(4)}),
            r"of another shape: 2.weight is \(4, 8\) and not \(5, 8\), 2.bias is \(4,\)",
        ),
        (lambda: edited(**{"2.bias": torch.full((5,), torch.nan)}), "not finite: 2.bias"),
        (lambda: {"other": torch.ones(2)}, r"it lacks 0.weight, 0.bias, 1.weight and \d more; the"),
        (factors, "it holds low-rank factors, and a run starts full-rank; go on with that run by"),
    ],
)
def test_what_does_not_fit_is_told_and_changes_nothing(
    tmp_path: Path, state: Callable[[], State], message: str
) -> None:
    path, model = tmp_path / "weights.pt", network()
    torch.save(state(), path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_initial(model, str(path))
    assert str(caught.value).startswith(f"model.initial: {path} does not fit the network: ")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "not found"),
        (lambda path: path.write_bytes(b"nothing of that"), "cannot be read"),
        (lambda path: torch.save(network(), path), "holds more than tensors and plain values"),
        (
            lambda path: torch.save({"epoch": 3}, path),
            "no state_dict, neither at the top nor",
        ),
        (lambda path: path.mkdir(), "is neither a run with checkpoints nor one checkpoint"),
    ],
)
def test_a_file_that_holds_no_weights_is_told(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "weights.pt"
    make(path)
    with pytest.raises(UserError, match=rf"^model\.initial: .*weights\.pt.*{message}"):
        load_initial(network(), str(path))


def test_a_run_is_built_with_them(tmp_path: Path) -> None:
    values: dict[str, Any] = {"model": {"name": "cifar_resnet", "arguments": {"depth": 8}}}
    values["oialr"] = {"delay": 5}
    with start_runtime(device="cpu", timeout=60) as runtime:
        first = build(config.build({**values, "run": {"seed": 1}}), runtime).model
        torch.save(first.state_dict(), tmp_path / "weights.pt")
        values["model"]["initial"] = str(tmp_path / "weights.pt")
        parts = build(config.build(values), runtime)
        assert all(
            torch.equal(tensor, first.state_dict()[name])
            for name, tensor in parts.model.state_dict().items()
        )
        own = build(config.build(values), runtime, initial=False).model
        assert not torch.equal(own.state_dict()["head.weight"], first.state_dict()["head.weight"])
