"""What each layer of a network is now: dense, low-rank or released, of which rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.averages import averages_aside
from oialr.convert import get_layer
from oialr.layer_survey import LayerReport
from oialr.layers.base import FactoredLayer
from oialr.linalg.svd import orthonormalized
from oialr.obstacles import Obstacles, lost_hooks


@dataclass(frozen=True)
class Bases:
    """Orthonormal bases of a low-rank weight, in the dtype of its core.

    U and Vh themselves, unless they are stored in a lower precision: rounded, they are orthonormal
    no more, and would be less so after every event. Then U = Q H and Vh^T = P G are taken apart, W
    = Q (H core G^T) P^T is what an event works with, and W does not change by it.
    """

    U: Tensor
    """(m, r)."""
    Vh: Tensor
    """(r, n)."""
    stretched: tuple[Tensor, Tensor] | None
    """H and G; None where the stored ones are orthonormal."""

    @classmethod
    def of(cls, layer: FactoredLayer) -> Self:
        """Return the bases of a layer that is not released."""
        dtype, U, Vh = layer.core.dtype, layer.U.detach(), layer.Vh.detach()
        if U.dtype == dtype:
            return cls(U, Vh, None)
        Q, H = orthonormalized(U.to(dtype))
        P, G = orthonormalized(Vh.to(dtype).mT)
        return cls(Q, P.mT, (H, G))

    def between(self, core: Tensor) -> Tensor:
        """Return the core that belongs to these bases."""
        if self.stretched is None:
            return core
        H, G = self.stretched
        return H @ core @ G.mT


class PresentLayers:
    """Reads off a network what each of its layers is now."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Look at a network and at the optimizer that holds the layers' weights."""
        self._model = model
        self._optimizer = optimizer

    def is_dense(self, report: LayerReport) -> bool:
        """Whether a layer is full-rank, as yet or again."""
        return not isinstance(get_layer(self._model, report.name), FactoredLayer)

    def is_released(self, report: LayerReport) -> bool:
        """Whether both factors of a layer are trained."""
        layer = get_layer(self._model, report.name)
        return isinstance(layer, FactoredLayer) and layer.released

    def rank(self, report: LayerReport) -> int:
        """Return the present rank of a layer; the full rank of a dense one."""
        layer = get_layer(self._model, report.name)
        return layer.rank if isinstance(layer, FactoredLayer) else report.full_rank

    def weight(self, report: LayerReport) -> nn.Parameter:
        """Return what is trained of a layer's weight: the dense weight, the core, or A of A B.

        Raises:
            ValueError: somebody has taken the layer away, or made its weight something else.
        """
        try:
            layer = get_layer(self._model, report.name)
            if isinstance(layer, FactoredLayer):
                return layer.trained
            return self._model.get_parameter(report.name)
        except AttributeError:
            raise ValueError(
                f"{report.name} is no parameter of the network any more: change its layers before "
                "OIALR is made, or name them in exclude"
            ) from None

    def matrix(self, report: LayerReport) -> Tensor:
        """Return what an event factorizes: a dense weight as matrix or stack, or the core.

        The core is that between bases that are orthonormal: see :class:`Bases`.
        """
        weight = self.weight(report).detach()
        if self.is_dense(report):
            return report.reading.to_matrix(weight)
        layer = get_layer(self._model, report.name)
        assert isinstance(layer, FactoredLayer)
        if layer.released:
            return weight
        return Bases.of(layer).between(weight)

    def tensors(self, report: LayerReport) -> list[Tensor]:
        """Return what is stored of a layer's weight: factors or weight, and optimizer state."""
        layer = get_layer(self._model, report.name)
        parameters: Sequence[nn.Parameter] = [self.weight(report)]
        if isinstance(layer, FactoredLayer):
            parameters = layer.factors
        states = [self._optimizer.state.get(parameter, {}) for parameter in parameters]
        stored = [value for state in states for value in state.values()]
        aside = averages_aside(self._optimizer)
        stored += [aside[parameter].average for parameter in parameters if parameter in aside]
        tensors = (*parameters, *(value for value in stored if isinstance(value, Tensor)))
        return [tensor.detach() for tensor in tensors]

    def obstacles(self, reports: Sequence[LayerReport]) -> list[str | None]:
        """Say of each layer why no event can change it any more; None if it can."""
        obstacles = Obstacles(self._model) if any(map(self.is_dense, reports)) else None
        return [
            obstacles.of(report.name)
            if obstacles and self.is_dense(report)
            else lost_hooks(self.weight(report))
            for report in reports
        ]
