"""torch's deterministic algorithms, for as long as a run wants them."""

import os
from types import SimpleNamespace

import pytest
import torch
from support.launching import train
from support.scatters import Scatters

from app.errors import UserError
from app.training.determinism import deterministic_algorithms
from app.training.run import _own_random_state

RUN = ("training.epochs=1", "training.warmup_epochs=0", "oialr.enabled=false")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_all_is_as_before_afterwards():
    with deterministic_algorithms(wanted=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(wanted=False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operator_without_such_an_algorithm_is_a_users_mistake():
    with (
        pytest.raises(UserError, match=r"training.deterministic: put_\w* of this network does not"),
        deterministic_algorithms(wanted=True),
    ):
        Scatters()(torch.zeros(2, 64))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="another"), deterministic_algorithms(wanted=True):
        raise RuntimeError("another")


@pytest.mark.parametrize("arguments", [("--dry-run",), ()])
def test_a_run_is_deterministic_where_it_is_asked_for(arguments, tmp_path):
    keys = ("model.name=tests.support.scatters:Scatters", "model.arguments={}", *RUN)
    folder = f"run.dir={tmp_path / 'run'}"
    told = train(0, *arguments, *keys, folder, "training.deterministic=true", code=2)
    assert told.stderr.count("error: training.deterministic: put_") == 1
    train(0, *arguments, *keys, folder + "-2")


def test_each_process_draws_numbers_of_its_own_and_the_same_again():
    drawn, before = [], torch.get_rng_state()
    for index in (0, 1, 0):
        runtime = SimpleNamespace(process_index=index, device=torch.device("cpu"))
        with _own_random_state(3, runtime):
            drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[2] != drawn[1]
    assert torch.equal(torch.get_rng_state(), before)
