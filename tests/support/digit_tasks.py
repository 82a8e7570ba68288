"""The task on a few digits, its batches and a network for them."""

from typing import Any

import torch
from torch import Tensor, nn

from app import config
from app.data import Batch, Task, build_task

CPU = torch.device("cpu")


def digits(
    index: int = 0,
    count: int = 1,
    *,
    seed: int = 0,
    data: dict[str, Any] | None = None,
    **training: Any,
) -> Task:
    """Share ``index`` of ``count`` of the task on 50 digits, 16 per global batch."""
    configuration = config.build(
        {
            "run": {"seed": seed},
            "data": {"name": "digits", "train_samples": 50, **(data or {})},
            "training": {"batch_size": 16, **training},
        }
    )
    return build_task(configuration, process_index=index, process_count=count, device=CPU)


def assert_equal(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> None:
    """Hold the inputs and targets of batches against those of others."""
    for (inputs, targets), (other_inputs, other_targets) in zip(left, right, strict=True):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(targets, other_targets)


def together(tasks: list[Task], epoch: int, first_batch: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of every global batch, put together from all processes."""
    batches = zip(*(task.train_batches(epoch, first_batch) for task in tasks), strict=True)
    joined = []
    for shares in batches:
        inputs = torch.cat([share.inputs[: share.count] for share in shares])
        targets = torch.cat([share.targets[: share.count] for share in shares])
        assert {share.global_count for share in shares} == {len(inputs)}
        joined.append((inputs, targets))
    return joined


def linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()


def in_double(batch: Batch) -> Batch:
    return Batch(
        inputs=batch.inputs.double(),
        targets=batch.targets,
        count=batch.count,
        global_count=batch.global_count,
    )
