"""One optimizer step of a training: forward, backward, clip, optimizer, average."""

import time

import torch
from torch import Tensor, nn

from app.data import Batch
from app.data.sharding import micro_batches
from app.training.build import Parts
from app.training.replicas import Replicas
from app.training.steps import Step


class TrainingStep:
    """Takes the parts of a run from one step to the next."""

    def __init__(self, parts: Parts) -> None:
        """Wrap the network, in the shapes that it has now. A collective call."""
        self._parts = parts
        self.replicas = Replicas(
            parts.model,
            parts.runtime.processes,
            parts.runtime.device,
            self._throw_away_loss,
            compiled=parts.configuration.training.compile,
        )

    def take(self, batch: Batch, *, start: float) -> Step:
        """Train on a batch, and count the step. Nothing here waits for the device.

        Args:
            batch: this process's share.
            start: time.perf_counter() when the wait for the batch began.
        """
        parts, position = self._parts, self._parts.position
        training = parts.configuration.training
        learning_rate = parts.schedule.set(position.step)
        parts.optimizer.zero_grad(set_to_none=True)
        tells = parts.method is not None and parts.method.watches_inputs
        module = self.replicas.uncompiled if tells else self.replicas.module
        losses = []
        pieces = batch.split(
            micro_batches(batch.global_count, parts.runtime.process_count, training.accumulation)
        )
        for number, piece in enumerate(pieces, start=1):
            # By number, since micro-batches of padding are one and the same.
            with self.replicas.synchronize(number == len(pieces)):
                with parts.precision.autocast():
                    loss = parts.task.loss(module, piece)
                # Gradients are averaged over the processes; their sum is that of the mean loss.
                parts.precision.backward(loss * parts.runtime.process_count)
            losses.append(loss.detach())
        if tells and parts.method and not batch.count:  # padding, for a share without samples
            parts.method.disregard_inputs()
        parts.precision.step(parts.optimizer, parts.model, training.gradient_clip)
        position.step += 1
        if parts.average:
            parts.average.update(position.step)
        position.batch += 1
        return Step(
            step=position.step,
            loss=torch.stack(losses).sum(),
            learning_rate=learning_rate,
            seconds=time.perf_counter() - start,
            samples=batch.global_count,
        )

    def _throw_away_loss(self, module: nn.Module) -> Tensor:
        with self._parts.precision.autocast():
            return self._parts.task.loss(module, self._parts.task.example_batch())
