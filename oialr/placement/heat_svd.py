"""Economy SVD of one matrix split over several processes, by Heat's tall-skinny QR.

W = Q R with Q split like W, and R = U' diag(s) Vh, so that W = (Q U') diag(s) Vh: only the small
SVD of R is not shared (Demmel, Grigori, Hoemmen and Langou, SIAM J. Sci. Comput. 34, 2012).
The one importer of heat.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oialr.compatibility import free_communicators_of_heat, import_heat
from oialr.linalg.svd import Factors, economy_svd, is_orthonormal
from oialr.placement.costs import split_limit


def covers_world(communicator: Any) -> bool:
    """Whether all processes of MPI's COMM_WORLD are in a communicator of mpi4py."""
    from mpi4py import MPI

    world: int = MPI.COMM_WORLD.Get_size()
    mine: int = communicator.Get_size()
    return mine == world


class SplitSVD:
    """Factorizes matrices that all processes of a group hold, each from its own shard.

    Several groups work at the same time if they have no process in common.
    """

    def __init__(self, communicator: Any) -> None:
        """Import heat. A collective call of all processes of MPI's COMM_WORLD.

        Args:
            communicator: mpi4py communicator that the groups are taken from.
        """
        self._heat = import_heat()
        self._communicator = communicator
        self._groups: dict[tuple[int, ...], Any] = {}

    def factorize(self, matrix: Tensor, members: Sequence[int]) -> Factors | None:
        """Factorize a matrix and bring the factors to the first member. Collective in the group.

        Args:
            matrix: (m, n), of real floating dtype, finite and the same on all members.
            members: indices of the group's processes in the communicator. At most
                :func:`split_limit` of them take part in the work, the first ones.

        Returns:
            On the first member what :func:`economy_svd` returns, on the matrix's device; None on
            the others.

        Raises:
            torch.linalg.LinAlgError: the SVD does not converge; on the first member alone.
        """
        members = tuple(members)[: split_limit(matrix.shape)]
        if self._communicator.Get_rank() not in members:
            return None
        if len(members) == 1:
            return economy_svd(matrix)
        is_wide = matrix.shape[0] < matrix.shape[1]
        tall = matrix.detach().mT if is_wide else matrix.detach()
        group = self._group(members)
        shard = tall.tensor_split(len(members))[group.Get_rank()]
        part = self.factorize_shard(shard, members)
        rows = _gather(part.U, group)
        if rows is None:
            return None
        if not part.s.isfinite().all():
            raise torch.linalg.LinAlgError(f"no SVD of {tuple(matrix.shape)} converges")
        U, Vh = (part.Vh.mT, rows.mT) if is_wide else (rows, part.Vh)
        return Factors(*(factor.to(matrix.device).contiguous() for factor in (U, part.s, Vh)))

    def factorize_shard(self, shard: Tensor, members: Sequence[int]) -> Factors:
        """Factorize a tall matrix of which each member holds some rows. Collective in the group.

        The polar factor's rows U Vh are the product of what is returned, without another exchange.

        Args:
            shard: the member's rows (m_i, n), in the members' order, at least n rows on each (or
                Heat 1.8.0 may fail while it merges). Contiguous in host memory it is not copied.
            members: indices of the group's processes in the communicator.

        Returns:
            In host memory, float32 or float64: the same rows of U (m_i, n), and the whole s (n,)
            and Vh (n, n), of the same bits on all members; s and Vh are NaN where the SVD does not
            converge. Computed again in float64 where U is not orthonormal, as Heat's Q may be that
            of a matrix with equal rows or columns.
        """
        group = self._group(tuple(members))
        if shard.dtype not in (torch.float32, torch.float64):
            shard = shard.float()
        # Heat 1.8.0 fails on a transposed view that does not begin its storage.
        shard = shard.detach().cpu().contiguous()
        factors = self._factorize_shard(shard, group)
        if shard.dtype == torch.float64 or _is_orthonormal(factors.U, group):
            return factors
        return Factors(
            *(factor.to(shard) for factor in self._factorize_shard(shard.double(), group))
        )

    def _factorize_shard(self, shard: Tensor, group: Any) -> Factors:
        """Do the work of :meth:`factorize_shard` in the shard's precision."""
        heat, n = self._heat, shard.shape[1]
        with free_communicators_of_heat():
            W = heat.array(
                shard, is_split=0, copy=None, comm=heat.communication.MPICommunication(group)
            )
            Q, R = heat.linalg.qr(W)
        # One process's bits for all: rows of U made from other vectors would not fit together.
        packed = shard.new_empty(2 * n + 1, n)
        if group.Get_rank() == 0:
            packed.fill_(torch.nan)
            try:
                inner, s, Vh = economy_svd(R.larray)
                torch.cat([inner, s[None], Vh], out=packed)
            except torch.linalg.LinAlgError:
                pass
        group.Bcast(packed.numpy(), root=0)
        inner, s, Vh = packed[:n], packed[n], packed[n + 1 :]
        return Factors(Q.larray @ inner, s, Vh)

    def _group(self, members: tuple[int, ...]) -> Any:
        """Return the communicator of a group; made when its members first meet, and kept."""
        if members not in self._groups:
            group = self._communicator.Get_group().Incl(members)
            # The tag tells apart groups that are made at the same time: here none overlap.
            self._groups[members] = self._communicator.Create_group(group)
            group.Free()
        return self._groups[members]

    def close(self) -> None:
        """Free the communicators. Collective in each group."""
        for group in self._groups.values():
            group.Free()
        self._groups.clear()


def _is_orthonormal(rows: Tensor, group: Any) -> bool:
    """Whether columns of which each member holds some rows are orthonormal; the same on all."""

    def add_up(vector: Tensor) -> Tensor:
        total = torch.empty_like(vector)
        group.Allreduce(vector.numpy(), total.numpy())
        return total

    # One process's word for all: they may add up in another order.
    return bool(group.bcast(bool(is_orthonormal(rows, add_up)), root=0))


def _gather(rows: Tensor, group: Any) -> Tensor | None:
    """Bring the rows (m_i, n) of all members to the first; None on the others."""
    rows = rows.contiguous()
    counts = group.gather(rows.numel())
    if counts is None:
        group.Gatherv(rows.numpy(), None)
        return None
    whole = rows.new_empty(sum(counts) // rows.shape[1], rows.shape[1])
    group.Gatherv(rows.numpy(), [whole.numpy(), counts])
    return whole
