"""What a run records, in the columns of metrics.h5. On processes other than the first: nothing."""

import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from app.errors import StorageError
from app.recording.loggers.chosen import Loggers
from app.recording.rebuilding import rebuild
from app.recording.schema import full_rank_of
from app.recording.store import MetricsStore
from app.recording.swmr import UnreadableFileError
from app.recording.thinning import is_recorded
from app.runtime.versions import installed_versions
from oialr.layer_survey import LayerReport, parameter_counts
from oialr.method import Event
from oialr.stability.measurement import LayerStability
from oialr.stability.tracker import mean_mixing_similarity, mean_stability

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

KEPT = ("sessions", "eval", "lowrank", "stability")
"""Groups with a row per start, evaluation, event and measurement; small, and the results."""


class Recorder:
    """Turns what happens into rows of the store; knows which groups and columns there are."""

    def __init__(self, store: MetricsStore | None) -> None:
        """Write into a store; None: this process records nothing."""
        self._store = store
        self.loggers = Loggers()
        """Of the first process; told of every row that the store gets."""
        self.problem: StorageError | None = None
        """Why nothing more can be written; raised by nobody here, since only one process knows."""

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        configuration: str,
        layers: Sequence[LayerReport],
        figures: Sequence[str],
    ) -> "Recorder":
        """Start a new file.

        Args:
            path: of metrics.h5.
            configuration: the resolved configuration as YAML.
            layers: the dense network's multidimensional weights.
            figures: figures of merit that an evaluation gives beside the loss.
        """
        return cls(MetricsStore.create(path, **_schema(configuration, layers, figures)))

    @classmethod
    def resume(
        cls,
        path: Path,
        counts: Mapping[str, int],
        kept: Mapping[str, Mapping[str, Tensor]],
        *,
        configuration: str,
        layers: Sequence[LayerReport],
        figures: Sequence[str],
    ) -> "Recorder":
        """Go on with a file after the given numbers of rows.

        A damaged file is set aside, and a new one goes on with what is left of it and what was
        kept; a warning says so.

        Args:
            path: of metrics.h5.
            counts: rows of each group.
            kept: as :meth:`kept` returned it at that time.
            configuration, layers, figures: as for :meth:`create`.

        Raises:
            UserError: there is no such file, it is another one, or has fewer rows.
        """
        try:
            return cls(MetricsStore.resume(path, counts=counts, configuration=configuration))
        except UnreadableFileError as damage:
            store, line = rebuild(
                path,
                counts=counts,
                kept={group: _as_arrays(rows) for group, rows in kept.items()},
                **_schema(configuration, layers, figures),
            )
            logger.warning("%s is damaged (%s): %s", path, damage.reason, line)
            return cls(store)

    def session(self, *, process_count: int, first_step: int) -> None:
        """Record a start of the program."""
        self._append(
            "sessions",
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            process_count=process_count,
            first_step=first_step,
            versions=installed_versions(),
            command=shlex.join(sys.orig_argv),
        )
        self.flush()

    def step(self, **values: Any) -> None:
        """Record a training step."""
        self._row("train", **values)

    def evaluation(self, **values: Any) -> None:
        """Record an evaluation."""
        self._append("eval", **values)
        self._log(values["split"], {k: v for k, v in values.items() if k != "split"})
        self.flush()

    def event(
        self,
        event: Event,
        *,
        model: nn.Module,
        trainable_percent: float,
        compression_percent: float,
        gradient_bytes: int,
    ) -> None:
        """Record what the method did, and the ranks and spectra that it saw of the weights."""
        assert event.peak_bytes is not None, "a run's method measures memory"
        self._row(
            "lowrank",
            step=event.step,
            event=event.kind,
            trainable_parameters=parameter_counts(model)[0],
            trainable_percent=trainable_percent,
            compression_percent=compression_percent,
            seconds=event.seconds,
            gradient_bytes=gradient_bytes,
            broadcast_bytes=event.broadcast_bytes,
            factorization_seconds=max(event.factorization_seconds),
            predicted_seconds=max(event.predicted_seconds),
            imbalance=event.imbalance,
            peak_bytes=event.peak_bytes,
        )
        for layer in event.layers:
            self._row("rank", layer.name, step=event.step, rank=layer.rank, owner=layer.owner)
            if not layer.weighted:  # otherwise it is no spectrum of the weight itself
                self._spectrum(layer.name, event.step, layer.singular_values)
        self.flush()

    def stability(
        self, rows: Sequence[LayerStability], *, epoch: int, step: int, seconds: float
    ) -> None:
        """Record a measurement of the bases, with the spectra that it gave."""
        self._row(
            "stability",
            epoch=epoch,
            step=step,
            mean_stability=mean_stability(rows),
            mean_mixing_similarity=mean_mixing_similarity(rows),
            layers=sum(row.averaged for row in rows),
            seconds=seconds,
        )
        for row in rows:
            self._row(
                "stability",
                row.name,
                epoch=epoch,
                step=step,
                stability=row.stability,
                mixing_similarity=row.mixing_similarity,
                rank=row.rank,
                reference_rank=row.reference_rank,
                numerical_rank=row.numerical_rank,
                effective_rank=row.effective_rank,
                stable_rank=row.stable_rank,
                orthonormality_error=row.orthonormality_error,
            )
            self._spectrum(row.name, step, row.singular_values)
        self.flush()

    def flush(self) -> None:
        """Bring everything to the file, for those who read it meanwhile."""
        self.loggers.flush()
        self._try(MetricsStore.flush)

    def counts(self) -> dict[str, int]:
        """Return the rows of each group, which others see by then."""
        self.loggers.flush()
        return self._try(MetricsStore.counts) or {}

    def move_to(self, path: Path) -> None:
        """Go on in another file, with all rows, where the first is lost.

        Raises:
            StorageError: it cannot be written.
        """
        if self._store:
            self._store = self._store.move_to(path)
        self.problem = None

    def kept(self) -> dict[str, dict[str, Tensor]]:
        """Return all rows of the groups that a checkpoint holds too: a run cannot make them again.

        Returns:
            For each group its columns: numbers as they are, text as uint8 (rows, bytes).
        """

        def read(store: MetricsStore) -> dict[str, dict[str, Tensor]]:
            return {
                group: {name: _as_tensor(values) for name, values in store.rows(group).items()}
                for group in KEPT
            }

        return self._try(read) or {}

    def close(self) -> None:
        """Close the file."""
        self.loggers.close()
        if self._store:
            try:
                self._store.close()
            except StorageError as error:
                self.problem = self.problem or error

    def _try(self, write: Callable[[MetricsStore], Result]) -> Result | None:
        """Write, unless there was a problem; note it if there is one."""
        if self._store and not self.problem:
            try:
                return write(self._store)
            except StorageError as error:
                self.problem = error
        return None

    def _spectrum(self, layer: str, step: int, singular_values: Tensor) -> None:
        """Record a spectrum, which comes with a row of ranks or stability, unless it is left out.

        Its number follows from those rows: it is the same in a run that was stopped and resumed.
        """
        if not self._store:
            return
        number = sum(self._store.length(f"layers/{layer}/{name}") for name in ("rank", "stability"))
        if is_recorded(number):
            values = singular_values.float().numpy()
            self._append(f"layers/{layer}/spectrum", step=step, singular_values=values)
            self.loggers.spectrum(layer, step, values)

    def _row(self, group: str, layer: str | None = None, **values: Any) -> None:
        """Record a row of a group, of the run or of a layer, and let the loggers know of it."""
        self._append(f"layers/{layer}/{group}" if layer else group, **values)
        self._log(group, values, layer)

    def _log(self, group: str, values: Mapping[str, Any], layer: str | None = None) -> None:
        if self.loggers:
            others = {name: value for name, value in values.items() if name != "step"}
            self.loggers.scalars(group, values["step"], others, layer=layer)

    def _append(self, group: str, **values: Any) -> None:
        if self._store:
            self._store.append(group, **values)


def _schema(
    configuration: str, layers: Sequence[LayerReport], figures: Sequence[str]
) -> dict[str, Any]:
    return {
        "configuration": configuration,
        "layers": {layer.name: layer.shape for layer in layers},
        "figures": figures,
        "not_averaged": {layer.name for layer in layers if not layer.is_linear_map},
        "full_ranks": {
            layer.name: layer.full_rank
            for layer in layers
            if layer.full_rank != full_rank_of(layer.shape, layer.reading.groups)
        },
        "groups": {layer.name: layer.reading.groups for layer in layers},
    }


def _as_tensor(values: np.ndarray) -> Tensor:
    if values.dtype.kind == "S":
        values = values.view(np.uint8).reshape(len(values), values.dtype.itemsize)
    return torch.from_numpy(values)


def _as_arrays(columns: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    arrays = {name: values.numpy() for name, values in columns.items()}
    return {
        name: values.view(f"S{values.shape[1]}")[:, 0] if values.dtype == np.uint8 else values
        for name, values in arrays.items()
    }
