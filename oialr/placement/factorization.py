"""Factorizations spread over the processes: the owner computes, all receive."""

import importlib.util
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from oialr.errors import UserError
from oialr.linalg.svd import Factors, diagonal_svd, economy_svd
from oialr.placement.assignment import Factorization, Plan, make_plan
from oialr.placement.buckets import (
    Bucket,
    MatrixInfo,
    empty_bucket,
    make_buckets,
    pack,
    unpack,
)
from oialr.placement.costs import Costs
from oialr.placement.heat_svd import covers_world
from oialr.placement.processes import Processes

BYTES_UNDER_WAY = 256 * 2**20
"""Bytes of messages that a process has memory for at a time, beside the factors themselves."""

Result = tuple[int, Factors | None, int]
"""Index of a matrix, its factors (None: no factorization converged) and its owner."""


class Factorizer:
    """Factorizes matrices that all processes hold; every process receives the same bits."""

    def __init__(
        self, processes: Processes, *, mode: Factorization = "auto", costs: Costs | None = None
    ) -> None:
        """Check that the processes can work in this way.

        Args:
            processes: the group; all its processes make the same calls.
            mode: "owner": one process factorizes a layer and sends it; "heat": layers that can be
                are split over as many processes as they can be; "auto": where that ends the whole
                earlier; "replicated": every process factorizes everything and nothing is sent.
            costs: for the plan; those of process 0 count.

        Raises:
            ValueError: none of these.
            UserError: "heat" is not possible.
        """
        self._processes = processes
        if mode not in (choices := get_args(Factorization)):
            raise ValueError(f"factorization must be one of {', '.join(choices)}, not {mode!r}")
        self._mode = mode
        self._costs = costs or Costs()
        self._nodes: list[int] | None = None
        self._can_split = False
        self.seconds = 0.0
        """Seconds that this process has spent on factorizations in the last call."""
        self.predicted_seconds = [0.0] * processes.count
        """For each process, what the plan of the last call predicts of that."""
        if mode == "heat" and (problem := why_not_split(processes)):
            raise UserError(f"distributed.factorization: heat needs {problem}")

    def plan(self, infos: Sequence[MatrixInfo]) -> Plan:
        """Plan who factorizes what. A collective call the first time."""
        if self._nodes is None:
            # Every process must come to the same plan.
            self._costs = self._processes.from_first(self._costs)
            mine = socket.gethostname(), why_not_split(self._processes) is None
            places = self._processes.gather(mine)
            names = [name for name, _ in places]
            self._nodes = [names.index(name) for name in names]
            self._can_split = all(can_split for _, can_split in places)
        # Between GPUs what is split goes through host memory: only where it was asked for.
        is_near = all(info.device.type == "cpu" for info in infos)
        return make_plan(
            [info.shape for info in infos],
            self._nodes,
            mode=self._mode,
            costs=self._costs,
            can_split=self._can_split and (is_near or self._mode == "heat"),
        )

    def factorize(
        self,
        infos: Sequence[MatrixInfo],
        get_matrix: Callable[[int], Tensor],
        *,
        columns_used: Callable[[int, Tensor], int] | None = None,
    ) -> Iterator[Result]:
        """Factorize all matrices; all processes must exhaust the iterator.

        First come those that this process factorizes, each as soon as it is done, so that the
        caller can give up the matrix before the next one is made; the others arrive meanwhile and
        come last, or before where much has arrived. So the order differs between the processes.

        A diagonal matrix is factorized exactly, by every process, and not sent.

        Args:
            infos: of the matrices, the same on all processes.
            get_matrix: returns the matrix or stack of an index, finite.
            columns_used: returns how many singular vectors of a matrix are needed, given its
                singular values; others are not sent. Then nothing is sent before the last
                factorization is done.

        Yields:
            Index, factors, owner.
        """
        self.seconds = 0.0
        for i, info in enumerate(infos):
            if info.is_diagonal:
                yield i, diagonal_svd(get_matrix(i)), 0
        rest = [i for i, info in enumerate(infos) if not info.is_diagonal]
        plan = self.plan([infos[i] for i in rest])
        self.predicted_seconds = plan.loads
        if self._processes.count == 1 or not any(plan.groups):
            for i in rest:
                yield i, self.timed(partial(_factorize, get_matrix, i)), 0
            return
        call = _Sharing(
            factorizer=self,
            processes=self._processes,
            plan=plan,
            infos=[infos[i] for i in rest],
            get_matrix=lambda j: get_matrix(rest[j]),
            columns_used=(lambda j, s: columns_used(rest[j], s)) if columns_used else None,
        )
        for j, factors, owner in call.run():
            yield rest[j], factors, owner

    def timed(self, factorize: Callable[[], Factors | None]) -> Factors | None:
        """Call a function, note its seconds; None where nothing converges."""
        start = time.perf_counter()
        try:
            return factorize()
        except torch.linalg.LinAlgError:
            return None
        finally:
            self.seconds += time.perf_counter() - start


def _factorize(get_matrix: Callable[[int], Tensor], i: int) -> Factors:
    return economy_svd(get_matrix(i))


class _Sharing:
    """One call of :meth:`Factorizer.factorize` on several processes."""

    def __init__(
        self,
        *,
        factorizer: Factorizer,
        processes: Processes,
        plan: Plan,
        infos: Sequence[MatrixInfo],
        get_matrix: Callable[[int], Tensor],
        columns_used: Callable[[int, Tensor], int] | None,
    ) -> None:
        self._timed = factorizer.timed
        self._processes = processes
        self._plan = plan
        self._infos = infos
        self._get_matrix = get_matrix
        self._columns_used = columns_used
        self._columns = [min(info.shape[-2:]) for info in infos]
        self._done: dict[int, Factors | None] = {}
        """What this process owns and has not packed yet."""
        self._under_way: deque[tuple[Bucket, Tensor, list[list[Tensor]], Any]] = deque()

    def run(self) -> Iterator[Result]:
        index = self._processes.index
        for i in self._plan.split:
            yield from self._factorize_together(i)
        if self._columns_used:
            for i in self._plan.order:
                if self._plan.groups[i] == (index,):
                    yield self._factorize(i)
            self._agree_on_columns()
        for bucket in make_buckets(self._plan, self._infos, self._columns):
            flat, views = empty_bucket(bucket, self._infos, self._columns)
            if bucket.owner == index:
                for i, parts in zip(bucket.layers, views, strict=True):
                    if i not in self._done:
                        yield self._factorize(i)
                    pack(self._done.pop(i), parts)
            work = self._processes.start_broadcast(flat, bucket.owner)
            self._under_way.append((bucket, flat, views, work))
            yield from self._receive(BYTES_UNDER_WAY)
        yield from self._receive(0)

    def _factorize(self, i: int) -> Result:
        return self._keep(i, self._timed(partial(_factorize, self._get_matrix, i)))

    def _keep(self, i: int, factors: Factors | None) -> Result:
        self._done[i] = factors
        if self._columns_used and factors is not None:  # before the caller changes the layer
            self._columns[i] = self._columns_used(i, factors.s)
        return i, factors, self._processes.index

    def _factorize_together(self, i: int) -> Iterator[Result]:
        """Factorize a split layer, if this process takes part in it."""
        split_svd = self._processes.split_svd()  # imports heat, on all processes
        group, index = self._plan.groups[i], self._processes.index
        if index in group:
            factors = self._timed(lambda: split_svd.factorize(self._get_matrix(i), group))
            if index == group[0]:
                yield self._keep(i, factors)

    def _agree_on_columns(self) -> None:
        """Let all processes know how much of each layer is sent."""
        mine = torch.zeros(len(self._infos), dtype=torch.int64, device=self._infos[0].device)
        for i in self._done:
            mine[i] = self._columns[i]
        self._columns = self._processes.maximum(mine).tolist()

    def _receive(self, limit: int) -> Iterator[Result]:
        """Wait for messages until no more bytes than the limit are under way; hand out layers.

        Nobody waits for a bucket before all earlier ones are through, so the processes never wait
        for each other in a circle. What arrives early stays where it is, so that the order of all
        work, and the memory that it takes, do not depend on the time of arrival.
        """
        while sum(flat.nbytes for _, flat, _, _ in self._under_way) > limit:
            bucket, _, views, work = self._under_way.popleft()
            work.wait()
            if bucket.owner != self._processes.index:
                for i, parts in zip(bucket.layers, views, strict=True):
                    yield i, unpack(parts), bucket.owner


def why_not_split(processes: Processes) -> str | None:
    """Say what the processes lack to share the work on a layer; None if nothing. Local."""
    if processes.count == 1:
        return None
    if processes.communicator is None:
        return "the processes of mpirun or srun: those of torchrun have no MPI between them"
    if importlib.util.find_spec("heat") is None:
        return "the package heat: pip install --no-deps -r requirements-nodeps.txt"
    if "heat" not in sys.modules and not covers_world(processes.communicator):
        # Its import is a collective call of all processes, and only some are here.
        return "all processes that were started, not a part of them"
    return None
