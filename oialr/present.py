"""What each layer of a network is now: dense, low-rank or released, of which rank."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.convert import get_layer
from oialr.layer_survey import LayerReport
from oialr.layers.base import FactoredLayer
from oialr.obstacles import Obstacles


class PresentLayers:
    """Looks at the layers of a network, which all that is known of them is read from."""

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
                return layer.A if layer.released else layer.core
            return self._model.get_parameter(report.name)
        except AttributeError:
            raise ValueError(
                f"{report.name} is no parameter of the network any more: change its layers before "
                "OIALR is made, or name them in exclude"
            ) from None

    def matrix(self, report: LayerReport) -> Tensor:
        """Return what an event factorizes: a dense weight as matrix or stack, or the core."""
        weight = self.weight(report).detach()
        return report.reading.to_matrix(weight) if self.is_dense(report) else weight

    def tensors(self, report: LayerReport) -> list[Tensor]:
        """Return what is stored of a layer's weight: factors or weight, and optimizer state."""
        layer = get_layer(self._model, report.name)
        parameters: Sequence[nn.Parameter] = [self.weight(report)]
        if isinstance(layer, FactoredLayer):
            parameters = layer.factors
        states = [self._optimizer.state.get(parameter, {}) for parameter in parameters]
        stored = [value for state in states for value in state.values()]
        tensors = (*parameters, *(value for value in stored if isinstance(value, Tensor)))
        return [tensor.detach() for tensor in tensors]

    def obstacles(self, reports: Sequence[LayerReport]) -> list[str | None]:
        """Say of each layer why it cannot be converted any more; None if it can, or is low-rank."""
        if not any(map(self.is_dense, reports)):
            return [None] * len(reports)
        obstacles = Obstacles(self._model)
        return [obstacles.of(r.name) if self.is_dense(r) else None for r in reports]
