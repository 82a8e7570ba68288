"""What an event does to one layer: from full-rank to factors, and from one basis to the next."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oialr.averages import take_average
from oialr.convert import densify_layer, factorize_layer, get_layer
from oialr.followers import Followers
from oialr.forms import Form, form_of, take_form
from oialr.gradients import GradientWatch
from oialr.layer_survey import LayerReport
from oialr.layers.base import FactoredLayer
from oialr.linalg.svd import Factors, balanced, truncated
from oialr.linalg.weighting import taken_back
from oialr.memory import tensors_of
from oialr.optimizer_state import (
    check_before_event,
    check_stored_optimizer,
    replace_parameter,
    rotate_parameter,
)
from oialr.options import Options
from oialr.parameter_groups import Kind, TwinGroups
from oialr.present import Bases, PresentLayers
from oialr.rank_choice import RankChoice
from oialr.transport import (
    CoreToA,
    CoreToB,
    CoreToDense,
    CoreToFactors,
    DenseToA,
    DenseToB,
    FromDense,
    FromStored,
    Projection,
    Transport,
)

RETURNED = "oialr_returned"
"""Entry of an optimizer's stored state: names of dense weights that a release has brought back."""


class Transitions(PresentLayers):
    """Applies a factorization to a layer of a network and to its optimizer's state.

    Whether a layer is dense or factorized is seen at the layer itself: a dense one is converted, a
    factorized one is updated.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        options: Options,
        groups: TwinGroups,
        gradients: GradientWatch,
    ) -> None:
        """Take hold of a network and its optimizer; nothing is changed yet.

        Args:
            model: the network.
            optimizer: holds the layers' weights.
            options: of the method.
            groups: moves what replaces the weights to parameter groups of its own.
            gradients: is told what replaces what.
        """
        super().__init__(model, optimizer)
        self._options = options
        self.ranks = RankChoice(self, options)
        name = options.frozen_dtype
        self._frozen_dtype: torch.dtype | None = None if name is None else getattr(torch, name)
        self._groups = groups
        self._gradients = gradients
        self.followers = Followers(model)
        self.released: dict[str, Literal["factors", "dense"]] = {}
        """What a release has made of each low-rank layer: two factors, or dense again."""

    def all_tensors(self) -> Iterable[Tensor]:
        """Return all that network and optimizer store."""
        return tensors_of(self._model, self._optimizer)

    def check_optimizer(self, reports: Collection[LayerReport]) -> None:
        """Raise ValueError if the optimizer or an average could not follow an event of layers."""
        self.followers.check([report.name for report in reports])
        check_before_event(
            self._optimizer,
            dense={r.name: self.weight(r) for r in reports if self.is_dense(r)},
            cores={r.name: self.weight(r) for r in reports if not self.is_dense(r)},
            groups=self._groups,
            unknown=self._options.unknown_optimizer_state,
        )

    def check_not_released(self, reports: Iterable[LayerReport]) -> None:
        """Raise ValueError if the network has been released, and nobody has told the method."""
        if any(map(self.is_released, reports)):
            raise ValueError(
                "the network's weights are those of after a release, and the method does not know "
                "of it: load the method's state too, or give OIALR the full-rank network"
            )

    def apply(
        self,
        report: LayerReport,
        factors: Factors,
        *,
        release: bool,
        weighting: Tensor | None,
    ) -> int:
        """Let factors take the place of what was factorized, and return the rank that is left.

        With deferral or at a release a dense layer may stay as it is, and at a release a factorized
        one may become dense again: then it is the full rank that is left.

        Args:
            report: the layer.
            factors: of :meth:`matrix`; of U and Vh the first ``ranks.columns_used`` are enough.
            release: train both factors from now on.
            weighting: S that the weight was multiplied by before (:mod:`oialr.linalg.weighting`).
        """
        r = self.ranks.after(report, factors.s.to(self.weight(report).dtype), release=release)
        if self.is_dense(report):
            if r is not None:
                side = None if weighting is None else report.adapter.inputs_meet
                if weighting is not None:
                    factors = taken_back(factors, r, weighting, side)
                kept: Literal["A", "B"] = "A" if side == "columns" else "B"
                self._convert(report, factors, r, release=release, kept=kept)
        elif not release:
            assert r is not None
            self._update(report, factors, r)
        elif r is None:
            self._return_to_dense(report)
        else:
            self._release(report, factors, r)
        return self.rank(report)

    def _put_factors(
        self, report: LayerReport, *factors: Tensor, kept: Literal["A", "B"] = "B"
    ) -> None:
        """Let a factorized layer take a dense one's place, in network and optimizer.

        Args:
            report: the layer.
            factors: U (m, r), core (r, r) and Vh (r, n), or A (m, r) and B (r, n).
            kept: of A and B the one that an average of the weight has too
                (:class:`oialr.transport.DenseToA`).
        """
        weight = self.weight(report)
        layer = factorize_layer(self._model, report.name, *factors)
        self._equip(layer)
        read = partial(FromDense, report.reading)
        if layer.released:
            A, B = factors
            new = {layer.A: read(DenseToA(A, B, kept)), layer.B: read(DenseToB(A, B, kept))}
            self._replace_parameter(report, weight, new)
            self._move_factors(report, layer)
        else:
            U, _, Vh = factors
            layer.store_frozen(self._frozen_dtype)
            self._replace_parameter(report, weight, {layer.core: read(Projection(U, Vh.mT))})
            self._groups.move(self._optimizer, "cores", report.name, layer.core)

    def take_forms(
        self,
        reports: Sequence[LayerReport],
        forms: Mapping[str, Form],
        *,
        returned: Collection[str] = (),
        factors: Mapping[str, Sequence[nn.Parameter]] | None = None,
    ) -> bool:
        """Give layers the forms of stored ones, and let the optimizer hold what is trained then.

        What the optimizer knew of a weight that changes its form is dropped: its own state is
        loaded afterwards.

        Args:
            reports: all layers.
            forms: of each by name.
            returned: names of dense layers that a release has brought back.
            factors: of layers that are dense now, by name; otherwise they are NaN, to be loaded.

        Returns:
            Whether a layer has changed its form.
        """
        dead: list[nn.Parameter] = []
        released = {report.name: self.released.get(report.name) for report in reports}
        for report in reports:
            name, form = report.name, forms[report.name]
            if form_of(self._model, name) != form:
                old = self.weight(report)
                layer = get_layer(self._model, name)
                dead += layer.factors if isinstance(layer, FactoredLayer) else [old]
                take_form(self._model, name, form, (factors or {}).get(name))
                self._equip(get_layer(self._model, name))
                self._gradients.replace(name, old, self.weight(report))
            if form.released:
                self.released[name] = "factors"
            elif name in returned and form.rank is None:
                self.released[name] = "dense"
            else:
                self.released.pop(name, None)
        for parameter in dead:
            take_average(self._optimizer, parameter)
            self._optimizer.state.pop(parameter, None)
            parameter.grad = None
        if dead or released != {name: self.released.get(name) for name in released}:
            homes = {report.name: self._home(report) for report in reports}
            self._groups.arrange(self._optimizer, homes, dead=dead)
        return bool(dead)

    def follow_stored_groups(self, reports: Sequence[LayerReport]) -> None:
        """Let stored states of the optimizer be loaded, and tell what the network does not.

        A dense weight that a release has brought back is in a group of its own, and looks like any
        other: so the optimizer's state names such weights, and is loaded right after the network's.

        Args:
            reports: all layers.
        """

        def store(_: Optimizer, state: dict[str, Any]) -> None:
            state[RETURNED] = self._returned()

        def take(optimizer: Optimizer, state: dict[str, Any]) -> None:
            before = self._returned()
            # States of earlier versions are without: there the method's own state has told it.
            self._arrange(reports, state.get(RETURNED, before))
            try:
                check_stored_optimizer(optimizer, state, model=self._model)
            except ValueError:
                self._arrange(reports, before)
                raise

        if self._options.release is not None:
            self._optimizer.register_state_dict_post_hook(store)
        self._optimizer.register_load_state_dict_pre_hook(take)

    def _returned(self) -> list[str]:
        return sorted(name for name, form in self.released.items() if form == "dense")

    def _arrange(self, reports: Sequence[LayerReport], returned: Collection[str]) -> None:
        """Let the optimizer have dense weights where a release has put them, in this network."""
        forms = {report.name: form_of(self._model, report.name) for report in reports}
        self.take_forms(reports, forms, returned=returned)

    def _home(self, report: LayerReport) -> tuple[Kind | None, list[nn.Parameter]]:
        """Return what is trained of a layer, and which twin of its group it belongs to."""
        layer = get_layer(self._model, report.name)
        if not isinstance(layer, FactoredLayer):
            kind: Kind | None = "dense" if report.name in self.released else None
            return kind, [self.weight(report)]
        return ("factors", [layer.A, layer.B]) if layer.released else ("cores", [layer.core])

    def _equip(self, layer: nn.Module) -> None:
        """Tell a factorized layer how it is to be applied."""
        if isinstance(layer, FactoredLayer):
            layer.configure(
                execution=self._options.execution,
                recompute_convolutions=self._options.recompute_convolutions,
            )

    def _put_dense(self, report: LayerReport) -> None:
        """Let a dense weight be one that a release has brought back, for the optimizer."""
        self.released[report.name] = "dense"
        self._groups.move(self._optimizer, "dense", report.name, self.weight(report))

    def _convert(
        self,
        report: LayerReport,
        factors: Factors,
        r: int,
        *,
        release: bool,
        kept: Literal["A", "B"],
    ) -> None:
        """W = U diag(s) Vh, or A B of balanced factors."""
        kept_part = truncated(factors, r, self.weight(report).dtype)
        if release:
            self._put_factors(report, *balanced(kept_part), kept=kept)
        else:
            U, s, Vh = kept_part
            self._put_factors(report, U, torch.diag_embed(s), Vh)

    @torch.no_grad()
    def _release(self, report: LayerReport, factors: Factors, r: int) -> None:
        """Core = L diag(s) R^T, A = U L diag(s)^(1/2), B = diag(s)^(1/2) R^T Vh."""
        layer = get_layer(self._model, report.name)
        assert isinstance(layer, FactoredLayer)
        core = layer.core
        left, s, right = (factor.to(core.dtype) for factor in factors)
        bases = Bases.of(layer)
        transport = CoreToFactors(
            bases.U, bases.Vh, left[..., :r], s[..., :r], right[..., :r, :].mT
        )
        layer.set_factors(transport.form_a().contiguous(), transport.form_b().contiguous())
        for factor in layer.factors:
            factor.requires_grad_(core.requires_grad)
        read = partial(FromStored, bases.between)
        self._replace_parameter(
            report, core, {layer.A: read(CoreToA(transport)), layer.B: read(CoreToB(transport))}
        )
        self._move_factors(report, layer)

    @torch.no_grad()
    def _return_to_dense(self, report: LayerReport) -> None:
        """W = U core Vh."""
        layer = get_layer(self._model, report.name)
        assert isinstance(layer, FactoredLayer)
        core, bases = layer.core, Bases.of(layer)
        transport = FromStored(bases.between, CoreToDense(bases.U, bases.Vh, report.reading))
        weight = densify_layer(self._model, report.name)
        weight.requires_grad_(core.requires_grad)
        self._replace_parameter(report, core, {weight: transport})
        self._put_dense(report)

    @torch.no_grad()
    def _update(self, report: LayerReport, factors: Factors, r: int) -> None:
        """Update: core = U' diag(s') Vh', U <- U U', Vh <- Vh' Vh, core <- diag(s'), cut."""
        layer = get_layer(self._model, report.name)
        assert isinstance(layer, FactoredLayer)
        left, s, right = (factor.to(layer.core.dtype) for factor in factors)
        left, right = left[..., :r], right[..., :r, :]
        bases, core = Bases.of(layer), torch.diag_embed(s[..., :r])
        U, Vh = bases.U @ left, right @ bases.Vh
        rotation = FromStored(bases.between, Projection(left, right.mT))
        if r < layer.rank:
            old = layer.core
            layer.set_factors(U, core, Vh)
            layer.store_frozen(self._frozen_dtype)
            layer.core.requires_grad_(old.requires_grad)
            self._replace_parameter(report, old, {layer.core: rotation})
        else:  # the same Parameter objects, so that DistributedDataParallel can stay
            layer.store_frozen(self._frozen_dtype)
            layer.U.copy_(U)
            layer.core.copy_(core)
            layer.Vh.copy_(Vh)
            unknown = self._options.unknown_optimizer_state
            rotate_parameter(self._optimizer, layer.core, rotation, unknown=unknown)
            self.followers.follow(report.name, [rotation])

    def _move_factors(self, report: LayerReport, layer: FactoredLayer) -> None:
        self.released[report.name] = "factors"
        self._groups.move(self._optimizer, "factors", report.name, layer.A, layer.B)

    def _replace_parameter(
        self, report: LayerReport, old: nn.Parameter, new: Mapping[nn.Parameter, Transport]
    ) -> None:
        replace_parameter(self._optimizer, old, new, unknown=self._options.unknown_optimizer_state)
        self._gradients.replace(report.name, old, next(iter(new)))
        self.followers.follow(report.name, list(new.values()))
