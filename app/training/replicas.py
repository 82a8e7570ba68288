"""The network's replicas: DistributedDataParallel, made anew where shapes changed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from app.errors import AgreedUserError, UserError
from app.training.compilation import Compiled, Uncompiled
from app.training.traceless import leaving_no_trace
from oialr.compatibility import import_torchvision
from oialr.linalg.checksum import checksum
from oialr.placement.comparison import compare
from oialr.placement.processes import Processes


def check_replicas(model: nn.Module, processes: Processes) -> None:
    """Reject networks whose parameters begin with different bits. A collective call.

    Buffers become those of process 0 with the first step.

    Raises:
        AgreedUserError: they do; it names the first of them.
    """
    parameters = dict(model.named_parameters())
    if processes.count == 1 or not parameters:
        return
    device = next(model.parameters()).device
    checksums = [
        checksum([torch.view_as_real(p) if p.is_complex() else p], device)
        for p in parameters.values()
    ]
    different, _ = compare(torch.stack(checksums), processes)
    if different:
        raise AgreedUserError(
            f"model: {list(parameters)[different[0]]} is not the same on all processes: a network "
            "draws its numbers from torch's generator alone, which run.seed has seeded, and "
            "model.initial must be the same file on all nodes"
        )


def synchronize_batch_norm(
    model: nn.Module, processes: Processes, device: torch.device
) -> nn.Module:
    """Let batch normalizations take their statistics over all processes; alone, do nothing.

    Returns:
        The network, changed in place.

    Raises:
        UserError: on CPUs.
    """
    if not processes.group:
        return model
    if device.type != "cuda":
        raise UserError(
            "training.synchronize_batch_norm: torch synchronizes batch statistics on GPUs only; "
            "set it to false, or run on GPUs or in one process"
        )
    import_torchvision()
    from timm.layers import convert_sync_batchnorm

    converted: nn.Module = convert_sync_batchnorm(model, processes.group)
    return converted


class Replicas:
    """A network whose gradients are averaged over the processes; alone, the network itself.

    All processes hold the same bits before and after, so nothing is sent when the wrapper is made
    (init_sync=False). Frozen factors are parameters without gradient: they are never sent at all.
    """

    def __init__(
        self,
        model: nn.Module,
        processes: Processes,
        device: torch.device,
        throw_away_loss: Callable[[nn.Module], Tensor],
        *,
        compiled: bool = False,
    ) -> None:
        """Wrap a network.

        Args:
            model: the network, with the same bits on all processes.
            processes: who shares the work.
            device: where the network is.
            throw_away_loss: a loss of the network on some small batch, for :meth:`rebuild`.
            compiled: compile the network, anew whenever shapes changed.
        """
        self.model = model
        self._processes = processes
        self._device = device
        self._throw_away_loss = throw_away_loss
        self._compiled = compiled
        self._wrapper: DistributedDataParallel | None = None
        self.module: nn.Module = model
        """What the loss is computed with."""
        self.uncompiled: nn.Module = model
        """The same, not compiled: modules are called one by one, as those that look on expect."""
        self.rebuild()

    def release(self) -> None:
        """Let go of the wrapper and of the gradients, and so of parameters that are replaced."""
        self.module = self.uncompiled = self.model
        self._wrapper = None
        self.model.zero_grad(set_to_none=True)

    def rebuild(self) -> None:
        """Make the wrapper anew, after the network got new Parameter objects."""
        self.release()
        compiled = Compiled(self.model) if self._compiled else None
        self.module = compiled or self.model
        if self._processes.group:
            self.module = self._wrapper = self._wrap(self.module)
        self.uncompiled = Uncompiled(self.module, compiled) if compiled else self.module
        if self._wrapper:
            self._settle_buckets()

    def _wrap(self, module: nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(
            module,
            device_ids=[self._device] if self._device.type == "cuda" else None,
            process_group=self._processes.group,
            init_sync=False,
            gradient_as_bucket_view=True,
        )

    def _settle_buckets(self) -> None:
        """See to it that the order of the wrapper's buckets is the final one.

        DistributedDataParallel puts its buckets in another order after its first backward pass.
        From three processes on the order decides the order of summation and so the last bits: a
        resumed run would differ from one that was not stopped. So one throw-away pass comes first,
        here as after a resume.
        """
        with leaving_no_trace(self.model, self._device):
            self._throw_away_loss(self.uncompiled).backward()
        self.model.zero_grad(set_to_none=True)

    def synchronize(self, wanted: bool) -> AbstractContextManager[None]:
        """Return the context of a backward pass that averages gradients, or only adds them up."""
        if self._wrapper and not wanted:
            return self._wrapper.no_sync()
        return nullcontext()

    def gradient_bytes(self) -> int:
        """Bytes of gradients that each process contributes per step; 0 alone."""
        if not self._processes.group:
            return 0
        trained = (p for p in self.model.parameters() if p.requires_grad)
        return sum(p.numel() * p.element_size() for p in trained)
