"""The method: orthogonality-informed adaptive low-rank training (arXiv 2401.08505, algorithm 1).

:class:`OIALR` decides when a layer is factorized, updated, cut and released. It stands between
optimizer steps in anyone's training loop::

    method = OIALR(model, optimizer, delay=1000, update_interval=500, cutoff=0.1)
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
        event = method.step()

Where ``event.shapes_changed`` the network has new Parameter objects: a list of its parameters that
was made before is out of date, and ``method.model`` must be wrapped in DistributedDataParallel
anew; a wrapper from before says so. All processes must call ``step`` alike.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from oialr.around_steps import was_skipped
from oialr.events import Event, Events
from oialr.factor_steps import FactorSteps
from oialr.forms import Form, check_can_take, form_of
from oialr.gradients import GradientWatch
from oialr.input_moments import InputMoments, InputWatch
from oialr.layer_survey import LayerReport, parameter_counts
from oialr.optimizer_state import check_optimizer
from oialr.options import RATE_FACTORS, READINGS, Options, signature_with_options
from oialr.parameter_groups import TwinGroups
from oialr.placement.assignment import Factorization, Plan
from oialr.placement.buckets import MatrixInfo
from oialr.placement.costs import Costs
from oialr.placement.factorization import Factorizer
from oialr.placement.processes import Processes
from oialr.preparation import follow_stored_forms
from oialr.schedule import stability_in_vain
from oialr.sharding import check_can_change, check_is_followed, followed, is_made_up, taken_whole
from oialr.share import little_factorized
from oialr.start import TAKEN, LowRankLayers, check_free, find_layers
from oialr.stored_state import check_stored_state, forms_here, forms_of_state
from oialr.timetable import Timetable
from oialr.transitions import Transitions
from oialr.turns import Turns
from oialr.wrappers import Wrappers

logger = logging.getLogger(__name__)


class OIALR:
    """Turns the layers of a network low-rank while it is trained, and cuts their ranks."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        options: Options | None = None,
        *,
        factorization: Factorization = "auto",
        processes: Processes | None = None,
        costs: Costs | None = None,
        measure_memory: bool = False,
        **keywords: Any,
    ) -> None:
        """Take hold of a network and its optimizer; nothing is changed yet.

        Args:
            model: the network, full-rank or with stored weights of other ranks; taken out of
                DistributedDataParallel, torch.compile's OptimizedModule or DataParallel. Master
                weights in float32 or float64, since products of half-precision bases lose their
                orthogonality.
            optimizer: of a type with a rule (:mod:`oialr.optimizers`; docs/optimizers.md), such as
                AdamW or SGD; taken out of accelerate's AcceleratedOptimizer.
            options: of the method; None: all of them are keywords.
            **keywords: options by name, as :class:`oialr.options.Options` describes each; delay and
                update_interval must be given.
            factorization: "owner": each layer is factorized by one process and sent; "heat": layers
                that can be are split over as many processes as they can be; "auto": where that
                ends an event clearly earlier; "replicated": every process factorizes every layer.
            processes: who shares the work; None: torch.distributed's default group, or this
                process alone.
            costs: what factorizations cost on this machine (app.calibrate measures it).
            measure_memory: find out ``peak_bytes`` of every event, which slows events down.

        Raises:
            ValueError: an option out of range, a sharded model, an unknown or sharding
                optimizer, a pattern that matches nothing, no layer that could be factorized.
            UserError: the processes cannot factorize in the way that was asked for.
        """
        options = Options(**keywords) if options is None else replace(options, **keywords)
        model, optimizer = taken_whole(model, optimizer)
        check_free(optimizer)
        check_optimizer(optimizer, options.unknown_optimizer_state)

        self.model = model
        self.optimizer = optimizer
        self.options = options
        self.processes = processes or Processes.current()
        self.factorizer = Factorizer(self.processes, mode=factorization, costs=costs)

        self.survey: list[LayerReport]
        """Every multidimensional weight of the network, and why it stays dense if it does."""
        self.layers: list[LayerReport]
        """Layers that the method factorizes, in the order of the network's modules."""
        low_rank = LowRankLayers(model, optimizer)
        try:
            self.survey, self.layers, target = find_layers(model, optimizer, options)
            low_rank.check(self.survey)
        except BaseException:
            low_rank.restore()
            raise
        for warning in (little_factorized(model, self.survey), stability_in_vain(options)):
            if warning and self.processes.index == 0:
                logger.warning("%s", warning)
        weights = {report.name: model.get_parameter(report.name) for report in self.layers}
        self._timetable = Timetable(options)
        self._gradients = GradientWatch(weights)
        self._groups = groups = TwinGroups(optimizer, weights)
        self._wrappers = Wrappers(model)
        self._schedule_checked = False
        if (factor := options.core_learning_rate_factor) != 1:
            groups.add(optimizer, "cores", learning_rate_factor=factor)
        if options.release is not None:
            FactorSteps(
                optimizer,
                groups,
                options=options,
                steps_since_release=lambda: self.steps_since_release,
            )
        else:
            optimizer.register_step_pre_hook(lambda optimizer, *_: groups.twins.follow(optimizer))
        self._transitions = Transitions(
            model, optimizer, options=options, groups=groups, gradients=self._gradients
        )
        moments = InputMoments(model) if options.truncation == "outputs" else None
        self._dense_counts = parameter_counts(model)
        self._events = Events(
            self._transitions,
            self.factorizer,
            self.processes,
            target=target,
            moments=moments,
            measure_memory=measure_memory,
        )

        dense = partial(filter, self._transitions.is_dense, self.layers)
        self._inputs = InputWatch(moments, self._timetable.due, dense)
        self._turns = Turns(self.layers, self._transitions, self.processes, options)
        optimizer.register_step_post_hook(self._count_step)
        TAKEN.add(optimizer)
        low_rank.put_back(self._transitions, self.layers)
        self._transitions.follow_stored_groups(self.layers)
        follow_stored_forms(model, self._take_stored_forms)
        self._inputs.look_ahead()

    def step(self) -> Event | None:
        """Convert, update, release, or do nothing, as the number of optimizer steps says.

        To be called after the optimizer's step, as often as one likes: with gradient accumulation
        or a skipped step nothing happens before the optimizer has stepped.

        Returns:
            What happened, or None.

        Raises:
            DivergedError: a weight to be factorized holds NaN or infinity; on all processes.
            DifferingReplicasError: the processes hold different bits; on all processes.
            ValueError: the optimizer could not follow: it does not hold a weight, or knows of it
                what nobody can carry over; or the network has been sharded meanwhile; or a schedule
                passes over a factor of the learning rate. No layer has been changed then.
            RuntimeError: somebody trains a parameter that an earlier event has replaced.
        """
        self._gradients.check()
        if not self._schedule_checked and self.step_count:
            self._schedule_checked = self._groups.check_schedule(self.optimizer)
        table = self._timetable
        due = table.due()
        event = None
        if due:
            if table.released_at is None:
                self._transitions.check_not_released(self.layers)
            check_can_change(self.model, table.step_count)
            self._gradients.end_interval()
        else:
            check_is_followed(self.model, self.optimizer)
        if "release" in due:
            event = self._events.run("release", self.layers, table.step_count)
            table.released_at = table.step_count
            self._turns.end(table.step_count)
        elif due:
            layers, new = self._turns.take(due)
            if layers:
                kind: Literal["convert", "update"] = "convert" if new else "update"
                event = self._events.run(kind, layers, table.step_count)
            self._turns.had(new, table.step_count, turned=bool(event and event.changed_form))
        table.handled = table.step_count
        if event and event.shapes_changed:
            self._wrappers.tell()
        self._inputs.look_ahead()
        return event

    @property
    def step_count(self) -> int:
        """Optimizer steps taken since this object was made."""
        return self._timetable.step_count

    @property
    def event_due(self) -> bool:
        """Whether the next :meth:`step` converts, updates or releases layers."""
        return bool(self._timetable.due())

    @property
    def watches_inputs(self) -> bool:
        """Whether the next pass tells what layers meet, if it is not compiled (``truncation``)."""
        return self._inputs.is_on

    def disregard_inputs(self) -> None:
        """Let what layers met in the last pass count nothing, such as padding (``truncation``)."""
        self._inputs.disregard()

    def plan(self) -> Plan:
        """Return the plan of a conversion of all layers at once. A collective call."""
        weights = [self._transitions.weight(report) for report in self.layers]
        return self.factorizer.plan(
            [
                MatrixInfo(shape=report.stack_shape, dtype=weight.dtype, device=weight.device)
                for report, weight in zip(self.layers, weights, strict=True)
            ]
        )

    @property
    def conversion_due(self) -> bool:
        """Whether the next :meth:`step` converts the network, or all that is full-rank of it.

        Who wraps the network may let go of the wrapper before, which holds the full-rank weights.
        Of a conversion by stability nobody knows before.
        """
        return self._turns.converts_all(self._timetable.due())

    @property
    def steps_since_conversion(self) -> int | None:
        """Optimizer steps since layers turned low-rank the last time; None before the first."""
        last = self._turns.last_conversion
        return None if last is None or last > self.step_count else self.step_count - last

    @property
    def converted(self) -> bool:
        """Whether a layer is low-rank already."""
        return not all(self._transitions.is_dense(report) for report in self.layers)

    @property
    def steps_since_release(self) -> int | None:
        """Optimizer steps taken since the release; None before it."""
        return self._timetable.steps_since_release

    @property
    def learning_rate_factors(self) -> list[float]:
        """Of each group of the optimizer: its learning rate over that of the full-rank weights.

        For schedules that take a rate for each group, such as OneCycleLR.
        """
        return self._groups.rate_factors(self.optimizer)

    def follow(self, averaged: nn.Module) -> None:
        """Let an averaged copy of the network change its layers with the network, from now on.

        Args:
            averaged: torch's AveragedModel, timm's ModelEmaV3, another module that holds a copy of
                the network as its ``module``, or a copy itself. It is not kept alive.

        Raises:
            ValueError: there is no copy of this network in it, or it has other ranks.
        """
        self._transitions.followers.add(averaged, [layer.name for layer in self.layers])

    @contextmanager
    def sharding(self) -> Iterator[None]:
        """Let the optimizer follow while the low-rank network is split over the processes.

        ``with method.sharding(): fully_shard(method.model)``, or a part after the other; between an
        optimizer's step and the next backward. No event may come after it.

        Raises:
            ValueError: the network is full-rank as yet.
        """
        if not self.converted:
            raise ValueError("an event needs whole weights: shard the network after its conversion")
        exchanges = (self._gradients.exchange, self._groups.exchange)
        with followed(self.model, self.optimizer, exchanges):
            yield
        self._wrappers.tell()

    def ranks(self) -> dict[str, int]:
        """Return the present rank of each layer; the full rank of a dense one."""
        return {report.name: self._transitions.rank(report) for report in self.layers}

    def trainable_percent(self) -> float:
        """Trained parameters, in percent of those of the full-rank network."""
        return 100 * parameter_counts(self.model)[0] / self._dense_counts[0]

    def compression_percent(self) -> float:
        """Stored parameters, frozen factors included, in percent of the full-rank network's."""
        return 100 * parameter_counts(self.model)[1] / self._dense_counts[1]

    def missed_target(self) -> str | None:
        """Say that the network stores more than the target size, if it does."""
        size = self.compression_percent()
        target = self.options.target_size
        if target is None or size <= 100 * target * (1 + 1e-9):
            return None
        return f"{size:.1f} % of the parameters are stored, above target_size, {target}"

    def state_dict(self) -> dict[str, Any]:
        """Return step counts and the forms of the layers, for :meth:`load_state_dict`."""
        ranks = self.ranks()
        return {
            "release": self.options.release,
            "released_at": self._timetable.released_at,
            # Of every layer: torch.distributed.checkpoint loads the keys that are there already.
            "released": dict.fromkeys(ranks) | self._transitions.released,
            "frobenius_decay": self.options.frobenius_decay,
            "step_count": self.step_count,
            "handled": self._timetable.handled,
            "delay": self.options.delay,
            **{name: getattr(self.options, name) for name in (*READINGS, *RATE_FACTORS)},
            "turns": self._turns.state_dict(),
            "ranks": {
                report.name: None if self._transitions.is_dense(report) else ranks[report.name]
                for report in self.layers
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stored state was.

        The network's own load_state_dict gives it and its optimizer the shapes of the stored
        weights, and this method does the same where it comes before: the values of the factors are
        NaN until the weights are loaded. The optimizer's load_state_dict comes after either of
        them, and raises ValueError where it does not find its shapes.

        Raises:
            ValueError: the state belongs to another network, or this network is low-rank already at
                other ranks, or cannot be low-rank, or the delay is another one and either of them
                is over.
        """
        check_stored_state(
            state,
            names=[report.name for report in self.layers],
            delay=self.options.delay,
            release=self.options.release,
            frobenius_decay=self.options.frobenius_decay,
            readings={name: getattr(self.options, name) for name in READINGS},
            rate_factors={name: getattr(self.options, name) for name in RATE_FACTORS},
        )
        forms = forms_of_state(state, self.layers)
        for name, form in forms.items() if self.converted else ():
            if form != (present := form_of(self.model, name)):
                raise ValueError(
                    f"load_state_dict needs the full-rank network, or the weights that belong to "
                    f"the state: {name} is {present}, and was {form} when the state was stored"
                )
        check_can_take(self.model, forms, to_train=True)
        released = state.get("released", {})
        returned = [name for name, form in released.items() if form == "dense"]
        self._transitions.take_forms(self.layers, forms, returned=returned)
        table = self._timetable
        table.step_count, table.handled = state["step_count"], state["handled"]
        table.released_at = state.get("released_at")
        self._turns.load_state_dict(state)
        self._inputs.begin_anew()

    def _take_stored_forms(self, stored: Mapping[str, Form]) -> None:
        """Give the network, whose weights are about to be loaded, the forms that they have.

        Raises:
            ValueError: a weight cannot have its form here. Nothing has been changed then.
        """
        forms = forms_here(self.model, self.survey, stored)
        check_can_take(self.model, forms, to_train=True)
        returned = [name for name, form in self._transitions.released.items() if form == "dense"]
        if self._transitions.take_forms(self.layers, forms, returned=returned):
            self._wrappers.tell()
            self._inputs.begin_anew()

    def _count_step(self, _: Optimizer, __: Any, options: Mapping[str, Any]) -> None:
        if is_made_up(self.optimizer, options) or was_skipped(self.optimizer):
            return
        self._timetable.step_count += 1
        self._inputs.look_ahead()
        self._gradients.look()


OIALR.__signature__ = signature_with_options(OIALR.__init__)  # type: ignore[attr-defined]
