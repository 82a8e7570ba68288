"""Basis stability of a network in anyone's training, without the method, a file or a setting."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from torch import nn

from oialr.errors import UserError
from oialr.layer_survey import survey
from oialr.options import Convolutions
from oialr.placement.processes import Processes
from oialr.sharding import whole
from oialr.skeleton import dense_skeleton
from oialr.stability.measurement import LayerStability
from oialr.stability.tracker import BasisTracker, select_weights

if TYPE_CHECKING:
    import pandas


class StabilityTracker:
    """Compares the basis of every weight of a network with that of some measurements before.

    The stability of a weight W = U S Vh between two times is the mean cosine similarity of the
    columns of its orthogonal basis U Vh then and now, in [-1, 1] (arXiv 2401.08505, section 3)::

        tracker = StabilityTracker(model)
        for epoch in range(epochs):
            train(model)
            rows = tracker.measure()
        tracker.to_pandas().groupby("measurement").stability.mean()

    Full-rank and low-rank layers are measured alike, also those that turn from one to the other
    meanwhile. A number of bases, ``window`` times the network's weights, lie in host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int = 5,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        convolutions: Convolutions = "matrix",
        processes: Processes | None = None,
    ) -> None:
        """Look at the network's weights; nothing is measured yet.

        Args:
            model: the network, dense or low-rank; it may be wrapped in DistributedDataParallel,
                DataParallel or torch.compile, or be so later.
            window: measurements between the bases that are compared; the paper's is 5 epochs. The
                first ``window`` measurements have nothing to be compared with: NaN.
            include, exclude: shell-style patterns of dense parameter names, such as
                "blocks.*.attn.*". Measured are the weights of linear maps (linear layers,
                convolutions, attention) that match one of the first and none of the second.
            convolutions: how kernels are read, as of :class:`oialr.OIALR`: a low-rank network is
                measured between the bases that it has only if it was made so.
            processes: who shares the work, as of :class:`oialr.OIALR`; then all of them must call
                :meth:`measure`. None: this process alone, so that one of several may measure.

        Raises:
            ValueError: window is not positive, or there is no weight; or the network is sharded.
            UserError: a pattern matches no weight.
        """
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window!r}")
        self._model = whole(model)
        reports = survey(dense_skeleton(self._model), convolutions=convolutions)
        layers = [report for report in reports if report.is_linear_map]
        if not layers:
            raise ValueError("the network has no linear layer, convolution or attention")
        self._tracker = BasisTracker(
            select_weights(layers, include=include, exclude=exclude),
            processes or Processes(),
            window=window,
            unit="measurements",
        )
        self.history: list[list[LayerStability]] = []
        """What :meth:`measure` has returned, in order."""

    def measure(self) -> list[LayerStability]:
        """Measure all weights as they are now.

        Returns:
            One row for each weight, in the order of the network: its ``stability`` and
            ``mixing_similarity`` against those of ``window`` measurements ago, NaN if there is
            none; its ranks and singular values.

        Raises:
            DivergedError: a weight holds NaN or infinity.
            ValueError: the network has been sharded.
        """
        rows = self._tracker.measure(whole(self._model), len(self.history))
        self.history.append(rows)
        return rows

    def to_pandas(self) -> "pandas.DataFrame":
        """Return all measurements as one table.

        Returns:
            A row for each weight and measurement: ``measurement`` (0, 1, ...), ``name`` and all
            other fields of :class:`oialr.LayerStability` but for the singular values.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_pandas needs a package: pip install pandas") from error
        columns = [field.name for field in fields(LayerStability)]
        columns.remove("singular_values")
        return pandas.DataFrame(
            [
                [number, *(getattr(row, column) for column in columns)]
                for number, rows in enumerate(self.history)
                for row in rows
            ],
            columns=["measurement", *columns],
        )
