"""A method that begins: with an optimizer of its own, and layers that may be low-rank already.

Frameworks restore weights before they make the optimizer and the method. What the method finds out
at its start (which layers there are, in which groups of the optimizer) is asked of the full-rank
network: so the low-rank layers are made dense for that, and then get the same factors again. But a
layer of which nothing is trained stays what it is, as a dense one does.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.convert import densify_layer, get_layer
from oialr.factor_steps import check_decay
from oialr.forms import DENSE, Form, form_of, take_form, weight_shapes
from oialr.layer_survey import LayerReport, factorizable, parameter_counts, survey
from oialr.layers.base import FactoredLayer, hooks_of
from oialr.momentary_groups import LISTS
from oialr.optimizer_state import check_forms, check_held
from oialr.options import Options
from oialr.parameter_groups import Kind, check_twins, exchange
from oialr.target import TargetSize, alignment_on
from oialr.transitions import Transitions

WAYS = ("execution", "recompute")
"""Attributes of a factorized layer that say how it is applied."""
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


def find_layers(
    model: nn.Module, optimizer: Optimizer, options: Options
) -> tuple[list[LayerReport], list[LayerReport], TargetSize | None]:
    """Look at a dense network, and reject all that a method could not begin with.

    Nothing is changed, so that whoever is refused has network and optimizer as they were.

    Args:
        model: dense.
        optimizer: holds its weights.
        options: of the method.

    Returns:
        All multidimensional weights, those that are factorized, and the size to be met.

    Raises:
        ValueError: a pattern that matches nothing, no layer that could be factorized, a size that
            cannot be met, or an optimizer that does not hold the weights or cannot follow.
    """
    reports = survey(model, options, minimum_rank_fraction=options.minimum_rank_fraction)
    layers = factorizable(reports)
    check_held(optimizer, {report.name: model.get_parameter(report.name) for report in layers})
    check_forms(optimizer, {report.name: report.stack_shape for report in layers})
    is_released = options.release is not None
    if is_released:
        check_decay(optimizer, options)
    check_twins(optimizer, _twins(options))
    target = TargetSize.of(
        options,
        layers,
        stored=parameter_counts(model)[1],
        is_released=is_released,
        alignment=alignment_on(model.get_parameter(layers[0].name).device),
    )
    return reports, layers, target


def _twins(options: Options) -> dict[Kind, tuple[float, bool]]:
    """Return what a method with these options adds twins of, as of :func:`check_twins`."""
    twins: dict[Kind, tuple[float, bool]] = {}
    if options.core_learning_rate_factor != 1:
        twins["cores"] = options.core_learning_rate_factor, False
    if options.release is not None:
        has_decay = options.frobenius_decay is not None
        twins |= {
            "factors": (options.factor_learning_rate_factor, has_decay),
            "dense": (1.0, False),
        }
    return twins


class LowRankLayers:
    """The low-rank layers of a network, of which it has dense ones meanwhile."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put dense layers in their places, in network and optimizer."""
        self._model = model
        self._optimizer = optimizer
        self._forms: dict[str, Form] = {}
        self._factors: dict[str, tuple[nn.Parameter, ...]] = {}
        self._states: dict[Tensor, Any] = {}
        self._ways: dict[str, dict[str, Any]] = {}
        self._hooks: dict[str, dict[str, Any]] = {}
        self._lists = [
            {key: [*group[key]] for key in LISTS if key in group}
            for group in optimizer.param_groups
        ]
        for name in weight_shapes(model):
            layer = get_layer(model, name)
            if not isinstance(layer, FactoredLayer) or _is_frozen(layer):
                continue
            self._forms[name], self._factors[name] = form_of(model, name), layer.factors
            self._ways[name] = {key: layer.__dict__[key] for key in WAYS if key in layer.__dict__}
            self._hooks[name] = hooks_of(layer)
            trained = layer.trained
            weight = densify_layer(model, name, with_hooks=False)  # they would be an obstacle
            weight.requires_grad_(trained.requires_grad)
            exchange(optimizer, self._factors[name], [weight])
            for factor in self._factors[name]:
                if factor in optimizer.state:
                    self._states[factor] = optimizer.state.pop(factor)

    def check(self, survey: Sequence[LayerReport]) -> None:
        """Reject layers of a method that have not the low-rank ones among them.

        Args:
            survey: of all weights, of which the method takes some.

        Raises:
            ValueError: a layer is none of the method's, or is read otherwise.
        """
        reports = {report.name: report for report in survey}
        for name, form in self._forms.items():
            if (reason := reports[name].stays_dense) is not None:
                raise ValueError(
                    f"{name} is {form}, and OIALR would make it full-rank: {reason}. Give the "
                    "options that it was made with, or make the network dense by oialr.to_dense"
                )
            if not form.is_read_alike(reports[name].reading):
                raise ValueError(
                    f"{name} is {form}, and OIALR would read it as {reports[name].reading}: do "
                    "attention_projection or convolutions differ from those of its training?"
                )

    def restore(self) -> None:
        """Give the layers their factors and ways again, and the optimizer what it held."""
        for name, form in self._forms.items():
            take_form(self._model, name, form, self._factors[name])
            get_layer(self._model, name).__dict__.update(self._ways[name] | self._hooks[name])
        for group, lists in zip(self._optimizer.param_groups, self._lists, strict=True):
            for key, held in lists.items():
                group[key][:] = held
        self._optimizer.state.update(self._states)

    def put_back(self, transitions: Transitions, reports: Sequence[LayerReport]) -> None:
        """Give the layers of a method their factors again, the same objects, with their state."""
        if not self._forms:
            return
        transitions.take_forms(
            reports,
            {report.name: self._forms.get(report.name, DENSE) for report in reports},
            factors=self._factors,
        )
        for name, hooks in self._hooks.items():
            get_layer(self._model, name).__dict__.update(hooks)
        # Adagrad makes state for frozen factors too, which are in no group any more.
        held = {p for group in self._optimizer.param_groups for p in group["params"]}
        self._optimizer.state.update({p: s for p, s in self._states.items() if p in held})


def _is_frozen(layer: FactoredLayer) -> bool:
    """Whether nothing of a layer's weight is trained."""
    trained = layer.factors if layer.released else (layer.core,)
    return not any(factor.requires_grad for factor in trained)
