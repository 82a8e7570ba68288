"""What an event does to one layer: from full-rank to factors, and from one basis to the next."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.conversion import LayerReport, factorize_layer, get_layer
from oialr.gradients import GradientWatch
from oialr.layers.base import FactoredLayer
from oialr.layers.conv import FactoredConv
from oialr.layers.cost import Execution, rank_pays
from oialr.linalg.svd import Factors
from oialr.memory import tensors_of
from oialr.obstacles import Obstacles
from oialr.optimizer_state import (
    CoreGroups,
    UnknownState,
    check_before_event,
    replace_parameter,
    rotate_parameter,
)

TENSOR_CORE_ALIGNMENT = 8
"""Numbers of half precision in 16 bytes."""


class Transitions:
    """Applies a factorization to a layer of a network and to its optimizer's state.

    Whether a layer is dense or factorized is seen at the layer itself: a dense one is converted, a
    factorized one is updated.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        kept_rank: Callable[..., int],
        cut_at_conversion: bool,
        defer_conversion: bool,
        execution: Execution,
        recompute_convolutions: bool,
        unknown_optimizer_state: UnknownState,
        core_groups: CoreGroups | None,
        gradients: GradientWatch,
    ) -> None:
        """Take hold of a network and its optimizer; nothing is changed yet.

        Args:
            model: the network.
            optimizer: holds the layers' weights.
            kept_rank: :func:`oialr.schedule.kept_rank` but for ``s`` and ``full_rank``.
            cut_at_conversion, defer_conversion, execution, recompute_convolutions,
                unknown_optimizer_state: as of the method.
            core_groups: moves cores to parameter groups of their own.
            gradients: is told what replaces what.
        """
        self._model = model
        self._optimizer = optimizer
        self._kept_rank = kept_rank
        self.cuts_at_conversion = cut_at_conversion or defer_conversion
        """Whether a conversion needs less than all columns of the factors."""
        self._defer_conversion = defer_conversion
        self._execution = execution
        self._recompute_convolutions = recompute_convolutions
        self._unknown_optimizer_state = unknown_optimizer_state
        self._core_groups = core_groups
        self._gradients = gradients

    def is_dense(self, report: LayerReport) -> bool:
        """Whether a layer is full-rank as yet."""
        return not isinstance(get_layer(self._model, report.name), FactoredLayer)

    def weight(self, report: LayerReport) -> nn.Parameter:
        """Return what is trained of a layer's weight: the dense weight or the core.

        Raises:
            ValueError: somebody has taken the layer away, or made its weight something else.
        """
        try:
            layer = get_layer(self._model, report.name)
            if isinstance(layer, FactoredLayer):
                return layer.core
            return self._model.get_parameter(report.name)
        except AttributeError:
            raise ValueError(
                f"{report.name} is no parameter of the network any more: change its layers before "
                "OIALR is made, or name them in exclude"
            ) from None

    def matrix(self, report: LayerReport) -> Tensor:
        """Return what an event factorizes: a dense weight as matrix or stack, or the core."""
        weight = self.weight(report).detach()
        return weight.reshape(report.stack_shape) if self.is_dense(report) else weight

    def tensors(self, report: LayerReport) -> list[Tensor]:
        """Return what is stored of a layer's weight: factors or weight, and optimizer state."""
        layer = get_layer(self._model, report.name)
        frozen = [layer.U, layer.Vh] if isinstance(layer, FactoredLayer) else []
        weight = self.weight(report)
        state = self._optimizer.state.get(weight, {})
        stored = [value for value in state.values() if isinstance(value, Tensor)]
        return [tensor.detach() for tensor in (weight, *frozen, *stored)]

    def all_tensors(self) -> Iterable[Tensor]:
        """Return all that network and optimizer store."""
        return tensors_of(self._model, self._optimizer)

    def obstacles(self, reports: Sequence[LayerReport]) -> list[str | None]:
        """Say of each layer why it cannot be converted any more; None if it can, or is low-rank."""
        if not any(map(self.is_dense, reports)):
            return [None] * len(reports)
        obstacles = Obstacles(self._model)
        return [obstacles.of(r.name) if self.is_dense(r) else None for r in reports]

    def check_optimizer(self, reports: Iterable[LayerReport]) -> None:
        """Raise ValueError if the optimizer could not follow an event of these layers."""
        check_before_event(
            self._optimizer,
            dense={r.name: self.weight(r) for r in reports if self.is_dense(r)},
            cores={r.name: self.weight(r) for r in reports if not self.is_dense(r)},
            core_groups=self._core_groups,
            unknown=self._unknown_optimizer_state,
        )

    def apply(self, report: LayerReport, factors: Factors) -> int:
        """Let factors take the place of what was factorized, and return the rank that is left.

        With deferral a dense layer may stay as it is: then it is the full rank that is left.

        Args:
            report: the layer.
            factors: of :meth:`matrix`; of U and Vh the first :meth:`columns_used` are enough.
        """
        if self.is_dense(report):
            return self._convert(report, factors)
        return self._update(report, factors)

    def put_factors(self, report: LayerReport, U: Tensor, core: Tensor, Vh: Tensor) -> None:
        """Let a factorized layer take a dense one's place, in network and optimizer."""
        weight = self.weight(report)
        layer = factorize_layer(self._model, report.name, U, core, Vh)
        layer.execution = self._execution
        if isinstance(layer, FactoredConv):
            layer.recompute = self._recompute_convolutions
        self._replace_parameter(report, weight, layer.core, U, Vh.mT)
        if self._core_groups:
            self._core_groups.move(self._optimizer, weight, layer.core)

    def _convert(self, report: LayerReport, factors: Factors) -> int:
        """W = U diag(s) Vh."""
        dtype = self.weight(report).dtype
        U, s, Vh = (factor.to(dtype) for factor in factors)
        r = self._rank_after(report, s)
        if self._defer_conversion and not rank_pays(*report.matrix_shape, r):
            return report.full_rank
        U, Vh = U[..., :r].contiguous(), Vh[..., :r, :].contiguous()
        self.put_factors(report, U, torch.diag_embed(s[..., :r]), Vh)
        return r

    @torch.no_grad()
    def _update(self, report: LayerReport, factors: Factors) -> int:
        """Update: core = U' diag(s') Vh', U <- U U', Vh <- Vh' Vh, core <- diag(s'), cut."""
        layer = get_layer(self._model, report.name)
        assert isinstance(layer, FactoredLayer)
        left, s, right = (factor.to(layer.core.dtype) for factor in factors)
        r = self._rank_after(report, s)
        left, right = left[..., :r], right[..., :r, :]
        U, core, Vh = layer.U @ left, torch.diag_embed(s[..., :r]), right @ layer.Vh
        if r < layer.rank:
            old = layer.core
            layer.set_factors(U, core, Vh)
            layer.core.requires_grad_(old.requires_grad)
            self._replace_parameter(report, old, layer.core, left, right.mT)
        else:  # the same Parameter objects, so that DistributedDataParallel can stay
            layer.U.copy_(U)
            layer.core.copy_(core)
            layer.Vh.copy_(Vh)
            rotate_parameter(
                self._optimizer,
                layer.core,
                left,
                right.mT,
                unknown=self._unknown_optimizer_state,
            )
        return r

    def columns_used(self, report: LayerReport, s: Tensor) -> int:
        """Return how many singular vectors :meth:`apply` uses, given the singular values."""
        r = self._rank_after(report, s.to(self.weight(report).dtype))
        stays = self.is_dense(report) and self._defer_conversion
        return 0 if stays and not rank_pays(*report.matrix_shape, r) else r

    def _rank_after(self, report: LayerReport, s: Tensor) -> int:
        if self.is_dense(report) and not self.cuts_at_conversion:
            return s.shape[-1]
        alignment = TENSOR_CORE_ALIGNMENT if s.is_cuda else 1
        return self._kept_rank(s, full_rank=report.full_rank, alignment=alignment)

    def _replace_parameter(
        self,
        report: LayerReport,
        old: nn.Parameter,
        new: nn.Parameter,
        left: Tensor,
        right: Tensor,
    ) -> None:
        replace_parameter(
            self._optimizer, old, new, left, right, unknown=self._unknown_optimizer_state
        )
        self._gradients.replace(report.name, old, new)
