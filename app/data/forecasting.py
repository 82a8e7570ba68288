"""Forecasting of all variables of a time series: data in memory, squared and absolute error."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from app.data import Batch, datasets, sharding
from app.data.base import ShardedTask, digest_of
from app.data.sets.ett import VARIABLES, standardized
from app.data.splitting import limit_training_part

if TYPE_CHECKING:
    from app.config.settings import Configuration


class Forecasting(ShardedTask):
    """Every window of the series is a sample: known steps, and those to be forecast.

    Inputs are (b, input_length + horizon, variables + features): the variables, zeros where they
    are to be forecast, and the calendar of all steps. Targets are (b, horizon, variables).
    """

    figures: tuple[str, ...] = ("mse", "mae")

    def __init__(
        self,
        configuration: "Configuration",
        *,
        process_index: int,
        process_count: int,
        device: torch.device,
    ) -> None:
        """Read the series that the configuration names.

        Raises:
            UserError: as in :func:`app.data.sets.ett.load` and :class:`ShardedTask`; or a larger
                ``data.train_samples`` than there are.
        """
        data = configuration.data
        series = datasets.load(data)
        self._input_length = data.input_length
        self._length = data.input_length + data.horizon
        starts = {
            name: np.arange(part.start, part.stop - self._length + 1)
            for name, part in series.parts.items()
        }
        starts["train"] = limit_training_part(starts["train"], data)
        self._starts = {name: torch.from_numpy(s).to(device) for name, s in starts.items()}
        super().__init__(
            configuration,
            train_size=len(self._starts["train"]),
            input_shape=(self._length, series.stored.shape[1] + series.calendar.shape[1]),
            outputs=(data.horizon, series.stored.shape[1]),
            process_index=process_index,
            process_count=process_count,
            device=device,
        )
        self._variables = series.stored.shape[1]
        self._series = series
        self._standardize_by(series.mean, series.deviation)

    @cached_property
    def digest(self) -> str:
        """Of the series as it is stored, and of where the samples of all parts begin."""
        held = [torch.from_numpy(self._series.stored), torch.from_numpy(self._series.calendar)]
        return digest_of([*held, *self._starts.values()])

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How the variables are standardized, in the input and in the forecast."""
        mean, deviation = self._statistics
        return {
            "columns": [*VARIABLES, "calendar features in [-0.5, 0.5]"],
            "mean": mean.tolist(),
            "std": deviation.tolist(),
        }

    def restore_preprocessing(self, stored: Mapping[str, Any]) -> None:
        """Standardize as a network was trained with, whatever the training part is here."""
        if {"mean", "std"} <= stored.keys():
            self._standardize_by(np.array(stored["mean"]), np.array(stored["std"]))

    def _standardize_by(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        self._statistics = mean, deviation
        values = standardized(self._series.stored, mean, deviation)
        table = np.hstack([values, self._series.calendar])
        self._table = torch.from_numpy(table).to(self.device)

    def train_batches(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yield this process's shares of the global batches; see :class:`app.data.Task`."""
        order = sharding.epoch_order(self.train_size, seed=self._seed, epoch=epoch)
        starts = self._starts["train"][self._to_device(order)]
        for number in range(first_batch, self.steps_per_epoch):
            positions = sharding.global_batch(self.train_size, self._batch_size, number)
            share, count = self._share(positions)
            size = positions.stop - positions.start
            yield self._batch(starts[positions][share], count, size)

    def evaluation_batches(self, split: str) -> Iterator[Batch]:
        """Yield this process's samples of "validation" or "test"; see :class:`app.data.Task`."""
        starts = self._starts[split]
        for positions in sharding.evaluation_batches(
            len(starts), self._evaluation_batch_size, *self._process
        ):
            yield self._batch(starts[positions], positions.stop - positions.start, len(starts))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the squared error, averaged over horizon and variables of each sample.

        See :class:`app.data.Task`.
        """
        errors = (model(batch.inputs) - batch.targets).square().mean(dim=(1, 2))
        return errors.sum() * batch.weight

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, float | Tensor]:
        """Return the sums of squared and absolute error of the samples, and their count.

        Each error is averaged over horizon and variables, in standardized units; the loss is the
        squared error. See :class:`app.data.Task`.
        """
        errors = (model(batch.inputs) - batch.targets).double()
        squared = errors.square().mean(dim=(1, 2)).sum()
        return {
            "loss": squared,
            "mse": squared,
            "mae": errors.abs().mean(dim=(1, 2)).sum(),
            "count": self._count(batch),
        }

    def example_batch(self) -> Batch:
        """Return two samples of zeros."""
        horizon = self._length - self._input_length
        return Batch(
            inputs=torch.zeros(2, *self.input_shape, device=self.device),
            targets=torch.zeros(2, horizon, self._variables, device=self.device),
            count=2,
            global_count=2,
        )

    def _batch(self, starts: Tensor, count: int, global_count: int) -> Batch:
        """Cut the windows out that begin at the given steps (b,)."""
        windows = self._table[starts[:, None] + torch.arange(self._length, device=self.device)]
        targets = windows[:, self._input_length :, : self._variables].clone()
        windows[:, self._input_length :, : self._variables] = 0
        return Batch(inputs=windows, targets=targets, count=count, global_count=global_count)
