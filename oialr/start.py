"""A method that begins: with an optimizer of its own, and layers that may be low-rank already.

Frameworks restore weights before they make the optimizer and the method. What the method finds out
at its start (which layers there are, in which groups of the optimizer) is asked of the full-rank
network: so the low-rank layers are made dense for that, and then get the same factors again.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.convert import densify_layer, get_layer
from oialr.forms import DENSE, Form, form_of, weight_shapes
from oialr.layer_survey import LayerReport
from oialr.layers.base import FactoredLayer
from oialr.parameter_groups import exchange
from oialr.transitions import Transitions

TAKEN: WeakSet[Optimizer] = WeakSet()
"""Optimizers on which a method hangs."""


def check_free(optimizer: Optimizer) -> None:
    """Reject an optimizer on which a method hangs already: its groups and steps would be both's.

    Raises:
        ValueError: it is one.
    """
    if optimizer in TAKEN:
        raise ValueError(
            "the optimizer is that of another OIALR: go on with that one, or make a new optimizer"
        )


class LowRankLayers:
    """The low-rank layers of a network, of which it has dense ones meanwhile."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put dense layers in their places, in network and optimizer."""
        self._model = model
        self._optimizer = optimizer
        self._forms: dict[str, Form] = {}
        self._factors: dict[str, tuple[nn.Parameter, ...]] = {}
        self._states: dict[Tensor, Any] = {}
        for name in weight_shapes(model):
            layer = get_layer(model, name)
            if not isinstance(layer, FactoredLayer):
                continue
            self._forms[name], self._factors[name] = form_of(model, name), layer.factors
            trained = layer.trained
            weight = densify_layer(model, name)
            weight.requires_grad_(trained.requires_grad)
            exchange(optimizer, self._factors[name], [weight])
            for factor in self._factors[name]:
                if factor in optimizer.state:
                    self._states[factor] = optimizer.state.pop(factor)

    def put_back(self, transitions: Transitions, reports: Sequence[LayerReport]) -> None:
        """Give the layers their factors again, the same objects, with their optimizer state.

        Raises:
            ValueError: a layer is none of the method's, or is read otherwise.
        """
        readings = {report.name: report.reading for report in reports}
        for name, form in self._forms.items():
            if name not in readings or not form.is_read_alike(readings[name]):
                raise ValueError(
                    f"{name} is {form}, and the options of OIALR do not make it so: do include, "
                    "exclude, attention_projection or convolutions differ from those of its "
                    "training?"
                )
        if not self._forms:
            return
        transitions.take_forms(
            reports,
            {report.name: self._forms.get(report.name, DENSE) for report in reports},
            factors=self._factors,
        )
        self._optimizer.state.update(self._states)
