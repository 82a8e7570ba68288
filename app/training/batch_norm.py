"""Batch normalizations that a share of one sample would leave with a single value per channel.

Its variance is not defined, and torch refuses it. How many samples a process gets at once is known
before the first step, so that nobody has to wait for the end of an epoch to be told.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from app.config.settings import Configuration
from app.data import Task
from app.data.sharding import micro_batches, share
from app.errors import UserError
from app.training.traceless import leaving_no_trace


def check_batch_norm(
    model: nn.Module, task: Task, configuration: Configuration, process_count: int
) -> None:
    """Reject batches that leave some normalization with a single value per channel.

    Buffers, the random state and the mode of the network are as before afterwards.

    Args:
        model: the network, in training mode.
        task: what it learns.
        configuration: data.drop_last and the section training are read.
        process_count: processes that share every global batch.

    Raises:
        UserError: there are such batches; it names the normalization and the cure.
    """
    training = configuration.training
    sizes = global_batches(task.train_size, training.batch_size, configuration.data.drop_last)
    single = [n for n in sizes if least_samples(n, process_count, training.accumulation) == 1]
    if not single or (training.synchronize_batch_norm and process_count > 1):
        return
    name = _first_of_single_values(model, task)
    if name is None:
        return
    layer = f"{name} ({type(model.get_submodule(name)).__name__}) has one value per channel there"
    ways = f"{process_count} processes" if process_count > 1 else "1 process"
    if training.accumulation > 1:
        ways += f" and training.accumulation={training.accumulation}"
    if training.batch_size in single:
        raise UserError(
            f"training.batch_size: {training.batch_size} samples over {ways} are one at a time, "
            f"and {layer}: raise it, or lower what it is divided by"
        )
    raise UserError(
        f"data.drop_last: the last batch of an epoch has {single[0]} sample{'s' * (single[0] > 1)} "
        f"({task.train_size} in batches of {training.batch_size}); over {ways} some are one at a "
        f"time, and {layer}: set data.drop_last=true, or another training.batch_size"
    )


def global_batches(size: int, batch_size: int, drop_last: bool) -> Sequence[int]:
    """Return the different sizes of the global batches of an epoch of ``size`` samples."""
    full, rest = divmod(size, batch_size)
    return [batch_size] * (full > 0) + [rest] * (rest > 0 and not drop_last)


def least_samples(batch: int, process_count: int, accumulation: int) -> int:
    """Return the fewest samples that any process takes at once of a global batch.

    An empty share is one sample of padding. Of the shares the last one is the smallest.
    """
    last = share(batch, process_count - 1, process_count)
    parts = micro_batches(batch, process_count, accumulation)
    return max(1, last.stop - last.start) // parts


def _first_of_single_values(model: nn.Module, task: Task) -> str | None:
    """Return the first normalization by batch that gets one value per channel and sample."""
    found: list[str] = []

    def look(name: str, module: _BatchNorm, values: Tensor) -> None:
        if module.training and math.prod(values.shape[2:]) == 1:
            found.append(name)

    hooks = [
        module.register_forward_pre_hook(
            lambda module, arguments, name=name: look(name, module, arguments[0])
        )
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    if not hooks:
        return None
    batch = task.example_batch()
    try:
        with torch.no_grad(), leaving_no_trace(model, batch.inputs.device):
            model(batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
