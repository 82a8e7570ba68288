"""What happens at a conversion, an update or a release: check, factorize, share, apply, tell.

:mod:`oialr.method` decides when, and for which layers. What an event does to one layer is in
:mod:`oialr.transitions`, who factorizes what in :mod:`oialr.placement`.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from oialr.errors import DifferingReplicasError, DivergedError
from oialr.input_moments import InputMoments, scarce, unseen
from oialr.layer_survey import LayerReport
from oialr.linalg.checksum import checksum
from oialr.linalg.precision import full_precision
from oialr.linalg.svd import Factors, is_diagonal
from oialr.linalg.weighting import weighted
from oialr.memory import TensorMemory
from oialr.placement.buckets import MatrixInfo
from oialr.placement.comparison import compare
from oialr.placement.factorization import Factorizer
from oialr.placement.processes import Processes
from oialr.placement.spectra import gather_energies
from oialr.target import TargetSize
from oialr.transitions import Transitions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LayerEvent:
    """What happened to one layer."""

    name: str
    """Dense parameter name."""
    owner: int
    """Index of the process that factorized it, the first of several; 0 where every process did."""
    previous_rank: int
    rank: int
    """The full rank of a layer that is dense."""
    singular_values: Tensor
    """All of them before the cut (previous_rank,), descending, on the CPU; those of W S where
    ``weighted``.

    Of a stack of matrices: of each place in the order the largest.
    """
    weighted: bool = False
    """Whether a full-rank weight was weighted by its inputs (:mod:`oialr.linalg.weighting`)."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened after an optimizer step."""

    kind: Literal["convert", "update", "cut", "release"]
    """A conversion, an update that left all ranks, one that cut some, or a release."""
    step: int
    """Optimizer steps taken so far."""
    layers: Sequence[LayerEvent]
    """Without those whose factorization did not converge: they stay as they were."""
    shapes_changed: bool
    """The network has new Parameter objects: DistributedDataParallel must be made anew, and every
    list of parameters (to clip, to average, to penalize) be fetched anew."""
    changed_form: bool
    """Layers that were dense before are low-rank now, or low-rank ones were released."""
    peak_bytes: int | None
    """The most that parameters, gradients, optimizer state and all that the event made took at once
    on this process; not what LAPACK or cuSOLVER allocate inside. None unless it was measured."""
    seconds: float
    factorization_seconds: Sequence[float]
    """For each process, what it spent on factorizations."""
    predicted_seconds: Sequence[float]
    """For each process, what the plan predicts of that."""
    broadcast_bytes: int

    @property
    def imbalance(self) -> float:
        """Seconds on factorizations: the most of a process over the mean; 1 is balanced."""
        mean = sum(self.factorization_seconds) / len(self.factorization_seconds)
        return max(self.factorization_seconds) / mean if mean else 1.0


class Events:
    """Carries out events. All calls are collective."""

    def __init__(
        self,
        transitions: Transitions,
        factorizer: Factorizer,
        processes: Processes,
        *,
        target: TargetSize | None,
        moments: InputMoments | None,
        measure_memory: bool,
    ) -> None:
        """Put the parts together.

        Without a target, ranks are judged layer by layer; without moments full-rank weights are
        cut by their own spectra.
        """
        self._moments = moments
        self._roots: dict[str, Tensor] = {}
        """During an event S of the inputs of full-rank layers by name."""
        self._target = target
        self._transitions = transitions
        self._factorizer = factorizer
        self._processes = processes
        self._measure_memory = measure_memory
        self._send_results = False
        """Whether the owner's results are sent, since processes compute others from the same."""
        self._told: set[tuple[str, str]] = set()
        """Names of layers of which was told that something keeps them as they are, and as what."""
        self._told_unseen: set[str] = set()
        """Names of those of which was told that their inputs were not seen, or few of them."""

    def run(
        self,
        kind: Literal["convert", "update", "release"],
        reports: Sequence[LayerReport],
        step: int,
    ) -> Event:
        """Let every layer of some go to its next basis, and tell what happened.

        At a conversion at most one layer is there both dense and as factors on each process.

        Args:
            kind: a conversion, an update or a release.
            reports: the layers.
            step: optimizer steps taken so far.

        Raises:
            DivergedError: a weight holds NaN or infinity.
            DifferingReplicasError: the processes hold different bits of a layer.
        """
        start, bytes_before = time.perf_counter(), self._processes.broadcast_bytes
        reports, infos = self._check(reports, step)
        # What can fail is tried while no layer is replaced yet.
        self._transitions.check_optimizer(reports)
        was_dense = [self._transitions.is_dense(report) for report in reports]
        ranks = self._transitions.ranks
        # Around the factorizations alone: nothing large is made before and after, and it slows
        # down the many small operators of the checksums.
        memory = TensorMemory(self._transitions.all_tensors()) if self._measure_memory else None
        try:
            with full_precision():
                if self._moments and (kind == "release" or ranks.cuts_at_conversion):
                    self._roots = self._see_inputs(self._moments, reports)
                if self._target and ranks.wants(kind, reports):
                    self._aim(self._target)
            with memory or nullcontext(), full_precision():
                layers = self._factorize(reports, infos, release=kind == "release")
        finally:
            self._roots = {}
        seconds = self._prove(reports, layers, step)
        changed_form = any(
            dense != self._transitions.is_dense(report) or self._transitions.is_released(report)
            for dense, report in zip(was_dense, reports, strict=True)
        )
        cut = any(layer.rank < layer.previous_rank for layer in layers)
        return Event(
            kind="cut" if kind == "update" and cut else kind,
            step=step,
            layers=layers,
            shapes_changed=cut or changed_form,
            changed_form=changed_form,
            peak_bytes=memory.peak_bytes if memory else None,
            seconds=time.perf_counter() - start,
            factorization_seconds=seconds,
            predicted_seconds=self._factorizer.predicted_seconds,
            broadcast_bytes=self._processes.broadcast_bytes - bytes_before,
        )

    def _aim(self, target: TargetSize) -> None:
        """Find the ranks of the target size, from the spectra of all layers, in turn or not."""
        transitions, layers = self._transitions, target.layers
        energies = gather_energies(
            [tuple(transitions.matrix(layer).shape) for layer in layers],
            lambda i: self._matrix(layers[i]),
            self._processes,
        )
        mine = [obstacle is not None for obstacle in transitions.obstacles(layers)]
        flags = zip(*self._processes.gather(mine), strict=True)
        names = [layer.name for layer in layers]
        by_name = dict(zip(names, energies, strict=True))
        transitions.ranks.aim(target, by_name, [any(f) for f in flags])

    def _see_inputs(
        self, moments: InputMoments, reports: Sequence[LayerReport]
    ) -> dict[str, Tensor]:
        """Return what is known of the inputs of all layers that are full-rank as yet."""
        layers = self._target.layers if self._target else reports
        dense = [layer for layer in layers if self._transitions.is_dense(layer)]
        roots, few = moments.roots(dense, self._processes)
        wanted = [report.name for report in reports if self._transitions.is_dense(report)]
        names = [name for name in wanted if name not in roots and name not in self._told_unseen]
        few = {name: few[name] for name in wanted if name in few and name not in self._told_unseen}
        self._told_unseen.update(names, few)
        if names and self._processes.index == 0:
            logger.warning("truncation outputs: %s", unseen(names))
        if few and self._processes.index == 0:
            logger.warning(
                "truncation outputs: %s; a larger batch in that step tells more, and the last one "
                "of an epoch may be small",
                scarce(few),
            )
        return roots

    def _matrix(self, report: LayerReport) -> Tensor:
        """Return what is factorized of a layer: W, the core, or W weighted by its inputs."""
        matrix = self._transitions.matrix(report)
        S = self._roots.get(report.name)
        return matrix if S is None else weighted(matrix, S, report.adapter.inputs_meet)

    def _check(
        self, reports: Sequence[LayerReport], step: int
    ) -> tuple[list[LayerReport], list[MatrixInfo]]:
        """Find a diverged run, or replicas that differ, before anything is sent.

        Returns:
            The layers that can take part, and what is to be known of their matrices.
        """
        matrices = [self._transitions.matrix(report) for report in reports]
        obstacles = self._transitions.obstacles(reports)
        not_finite, not_diagonal = [], []
        for report, matrix in zip(reports, matrices, strict=True):
            not_finite.append(~torch.stack(matrix.aminmax()).isfinite().all())
            dense = self._transitions.is_dense(report)
            not_diagonal.append(matrix.new_ones(()).bool() if dense else ~is_diagonal(matrix))
        different, flags = compare(
            self._checksums(reports),
            self._processes,
            flags=[
                torch.stack(not_finite),
                torch.stack(not_diagonal),
                torch.tensor([obstacle is not None for obstacle in obstacles], device="cpu"),
            ],
        )
        # Before the replicas: a NaN may have any bits.
        for report, is_wrong in zip(reports, flags[0], strict=True):
            if is_wrong:
                raise DivergedError(
                    f"{report.name} holds NaN or infinity at step {step}: the training has diverged"
                )
        if different:
            raise _differ(reports[different[0]], f"before the event at step {step}")
        infos = [
            MatrixInfo(
                shape=tuple(matrix.shape),
                dtype=matrix.dtype,
                device=matrix.device,
                is_diagonal=not is_full,
            )
            for matrix, is_full in zip(matrices, flags[1], strict=True)
        ]
        for report, is_kept, obstacle in zip(reports, flags[2], obstacles, strict=True):
            what = "full-rank weight" if self._transitions.is_dense(report) else "present core"
            if is_kept and (report.name, what) not in self._told:
                self._told.add((report.name, what))
                reason = obstacle or "another process finds an obstacle"
                logger.warning("%s keeps its %s: %s", report.name, what, reason)
        free = [i for i, is_kept in enumerate(flags[2]) if not is_kept]
        return [reports[i] for i in free], [infos[i] for i in free]

    def _factorize(
        self, reports: Sequence[LayerReport], infos: Sequence[MatrixInfo], *, release: bool
    ) -> list[LayerEvent]:
        """Factorize one matrix per layer and apply the factors."""
        transitions, ranks = self._transitions, self._transitions.ranks
        converted = [report for report in reports if transitions.is_dense(report)]
        happened: dict[int, LayerEvent] = {}
        for i, factors, owner in self._factorizer.factorize(
            infos,
            lambda i: self._matrix(reports[i]),
            columns_used=(lambda i, s: ranks.columns_used(reports[i], s, release=release))
            if converted and (ranks.cuts_at_conversion or release)
            else None,
        ):
            rank = None if factors is None else self._apply(reports[i], factors, release=release)
            if factors is None or rank is None:
                what = "full-rank weight" if transitions.is_dense(reports[i]) else "factors"
                logger.warning(
                    "%s keeps its present %s%s: its factorization does not converge",
                    reports[i].name,
                    what,
                    " to the end, since none comes after a release" if release else " for now",
                )
                continue
            happened[i] = LayerEvent(
                name=reports[i].name,
                owner=owner,
                previous_rank=factors.s.shape[-1],
                rank=rank,
                singular_values=factors.s.reshape(-1, factors.s.shape[-1]).amax(0).cpu(),
                weighted=reports[i].name in self._roots,
            )
        return [happened[i] for i in sorted(happened)]

    def _apply(self, report: LayerReport, factors: Factors, *, release: bool) -> int | None:
        """Let factors take a layer's place; return the rank, None if they cannot be taken back."""
        weighting = self._roots.get(report.name)
        try:
            return self._transitions.apply(report, factors, release=release, weighting=weighting)
        except torch.linalg.LinAlgError:
            if weighting is None:
                raise
            return None  # on all processes, which have the same factors

    def _prove(
        self, reports: Sequence[LayerReport], layers: Sequence[LayerEvent], step: int
    ) -> list[float]:
        """Prove that all processes hold the same bits; let them have the same, if need be.

        Where the bits were the same before the event and the factors came from one process, only
        the processes' own products can differ: their hardware does. From then on the owner's
        results are sent.

        Returns:
            Seconds that each process spent on factorizations.
        """
        processes = self._processes
        if processes.count == 1 or not reports:
            return [self._factorizer.seconds] * processes.count
        owners = {layer.name: layer.owner for layer in layers}
        if self._send_results:
            self._send(reports, owners)
        different, _ = compare(self._checksums(reports), processes)
        if different and not self._send_results:
            logger.warning(
                "processes compute different bits from the same factors (%s): from now on results "
                "are sent instead",
                reports[different[0]].name,
            )
            self._send_results = True
            self._send(reports, owners)
            different, _ = compare(self._checksums(reports), processes)
        if different:
            raise _differ(reports[different[0]], f"after the event at step {step}")
        return processes.gather(self._factorizer.seconds)

    def _checksums(self, reports: Sequence[LayerReport]) -> Tensor:
        """Return a number for all that is stored of each layer; zeros where nobody compares."""
        device = self._transitions.weight(reports[0]).device
        if self._processes.count == 1:
            return torch.zeros(len(reports), dtype=torch.int64, device=device)
        return torch.stack(
            [checksum(self._transitions.tensors(report), device) for report in reports]
        )

    @torch.no_grad()
    def _send(self, reports: Sequence[LayerReport], owners: dict[str, int]) -> None:
        """Give all processes the owner's bits of all that is stored of each layer."""
        for report in reports:
            device = self._transitions.weight(report).device
            for tensor in self._transitions.tensors(report):
                buffer = tensor.to(device).contiguous()
                self._processes.broadcast(buffer, owners.get(report.name, 0))
                tensor.copy_(buffer)


def _differ(report: LayerReport, when: str) -> DifferingReplicasError:
    return DifferingReplicasError(
        f"{report.name} differs between the processes {when}: they no longer train the same network"
    )
