"""Which rank an event leaves a layer: by its own spectrum, or by that of all for a target size."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from oialr.allocation import Choice, stored_parameters
from oialr.layer_survey import LayerReport
from oialr.options import Options
from oialr.present import PresentLayers
from oialr.schedule import kept_rank
from oialr.target import TargetSize, alignment_on


class RankChoice:
    """Chooses the ranks that events leave."""

    def __init__(self, layers: PresentLayers, options: Options) -> None:
        """Choose for some layers; there is no target size yet."""
        self._layers = layers
        self._options = options
        self.cuts_at_conversion = options.cut_at_conversion or options.defer_conversion
        """Whether a conversion needs less than all columns of the factors."""
        self.wanted: dict[str, int | None] = {}
        """Ranks that a target size asks for, by name; None: dense. Empty without a target."""

    def wants(self, kind: str, reports: Sequence[LayerReport]) -> bool:
        """Whether an event of some layers cuts ranks, so that a target for them matters."""
        if kind != "convert" or self.cuts_at_conversion:
            return True
        return not all(map(self._layers.is_dense, reports))

    def aim(
        self,
        target: TargetSize,
        energies: Mapping[str, Sequence[float] | None],
        obstacles: Sequence[bool],
    ) -> None:
        """Take the ranks of a target size for the events to come.

        Args:
            target: knows the layers.
            energies: squared singular values of the layers' weights by name; None: unknown.
            obstacles: of each layer whether something keeps it as it is.
        """
        fixed = {
            layer.name: self._present(layer, has_core=is_kept or not target.is_released)
            for layer, is_kept in zip(target.layers, obstacles, strict=True)
            if is_kept or energies[layer.name] is None
        }
        waiting = {layer.name for layer in target.layers if self._layers.is_dense(layer)}
        self.wanted = target.ranks(
            energies,
            fixed=fixed,
            may_stay_dense=waiting if self._options.defer_conversion else frozenset(),
            alignment=alignment_on(self._layers.weight(target.layers[0]).device),
        )

    def _present(self, report: LayerReport, *, has_core: bool) -> Choice:
        """Return the size that a layer has if it keeps its rank."""
        if self._layers.is_dense(report):
            return Choice(None, math.prod(report.shape), 0.0)
        rank = self._layers.rank(report)
        return Choice(rank, stored_parameters(report.stack_shape, rank, has_core=has_core), 0.0)

    def columns_used(self, report: LayerReport, s: Tensor, *, release: bool = False) -> int:
        """Return how many singular vectors an event uses, given the singular values."""
        return self.after(report, s.to(self._layers.weight(report).dtype), release=release) or 0

    def after(self, report: LayerReport, s: Tensor, *, release: bool) -> int | None:
        """Return the rank that an event leaves a layer; None if the layer is dense after it."""
        is_dense = self._layers.is_dense(report)
        if is_dense and not self.cuts_at_conversion and not release:
            return s.shape[-1]
        m, n = report.matrix_shape
        wanted = self.wanted.get(report.name)
        if self.wanted and wanted is None and not release:
            return None if is_dense and self._options.defer_conversion else s.shape[-1]
        if self.wanted and release:  # now or never, whatever a cut at once may be
            return wanted
        r = kept_rank(
            s,
            self._options,
            full_rank=report.full_rank,
            alignment=alignment_on(s.device),
            wanted=wanted,
        )
        if release:
            return r if stored_parameters((m, n), r, has_core=False) < m * n else None
        waits = (
            is_dense and self._options.defer_conversion and not report.adapter.rank_pays(m, n, r)
        )
        return None if waits else r
