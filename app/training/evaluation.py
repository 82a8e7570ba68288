"""Evaluation of a network on one part of the data, spread over the processes."""

from collections.abc import Callable

import torch
from torch import nn

from app.data import Task
from app.errors import AgreedUserError
from oialr.placement.processes import Processes


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    split: str,
    processes: Processes,
    device: torch.device,
    *,
    stop_asked: Callable[[], int] = lambda: 0,
) -> dict[str, float] | None:
    """Return the mean loss and figures of merit; every sample counts once. A collective call.

    None, on all processes, if any was asked to stop meanwhile.

    Args:
        model: the network, unwrapped; in training mode before and after.
        task: gives this process's batches, and their sums.
        split: "validation" or "test".
        processes: who shares the work.
        device: where the sums are made.
        stop_asked: returns other than 0 if this process is to stop; called before each batch.

    Raises:
        AgreedUserError: a process cannot read its data, or there are none; on all of them.
    """
    for buffer in model.buffers():  # running statistics: those of process 0 count
        processes.broadcast(buffer, 0)
    keys = ("loss", *task.figures, "count")

    def own_totals() -> torch.Tensor:
        totals = torch.zeros(len(keys) + 1, dtype=torch.float64, device=device)
        for batch in task.evaluation_batches(split):
            if stop_asked():
                totals[-1] = 1
                break
            sums = task.evaluate(model, batch)
            totals[:-1] += torch.stack(
                [torch.as_tensor(sums[key], dtype=torch.float64, device=device) for key in keys]
            )
        return totals

    model.eval()
    totals = processes.agree(own_totals)
    model.train()
    *sums_of_all, count, stopped = processes.sum(totals).tolist()
    if stopped:
        return None
    if not count:
        raise AgreedUserError(f"data.name: the data have no sample in their part {split!r}")
    return {key: total / count for key, total in zip(keys[:-1], sums_of_all, strict=True)}
