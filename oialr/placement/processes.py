"""The processes that share the work, and what they say to each other.

One code path serves one and many processes: with one, every call here does nothing.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from oialr.errors import AgreedUserError, UserError, refused_path

if TYPE_CHECKING:
    from oialr.placement.heat_svd import SplitSVD

Result = TypeVar("Result")


class Processes:
    """A group of processes, each with its index. All methods are collective calls."""

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        host_group: dist.ProcessGroup | None = None,
        communicator: Any = None,
    ) -> None:
        """Wrap torch.distributed groups.

        Args:
            group: for tensors on the device; None: this process alone.
            host_group: for objects and tensors in host memory; None: the same as ``group``.
            communicator: mpi4py communicator of the same processes in the same order, if there is
                MPI between them.
        """
        self.group = group
        self.host_group = host_group or group
        self.communicator = communicator
        self._split_svd: SplitSVD | None = None
        self.index = dist.get_rank(group) if group else 0
        self.count = dist.get_world_size(group) if group else 1
        self.broadcast_bytes = 0
        """Bytes broadcast so far by any process of the group (each counted once)."""

    @classmethod
    def current(cls) -> "Processes":
        """Return the processes of torch.distributed's default group, or this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(group=dist.group.WORLD)

    def close(self) -> None:
        """Let go of the groups, so that they can end."""
        self.group = self.host_group = None
        if self._split_svd:
            self._split_svd.close()
            self._split_svd = None

    def split_svd(self) -> "SplitSVD":
        """Return what factorizes one matrix together; imports heat on all processes."""
        if self._split_svd is None:
            from oialr.placement.heat_svd import SplitSVD

            self._split_svd = SplitSVD(self.communicator)
        return self._split_svd

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite a tensor, of the same shape and dtype on all processes, with the owner's."""
        if self.group:
            dist.broadcast(tensor, group=self.group, group_src=owner)
            self.broadcast_bytes += tensor.numel() * tensor.element_size()

    def start_broadcast(self, tensor: Tensor, owner: int) -> dist.Work:
        """Begin a :meth:`broadcast` among several processes; the tensor is there after wait()."""
        self.broadcast_bytes += tensor.numel() * tensor.element_size()
        work = dist.broadcast(tensor, group=self.group, group_src=owner, async_op=True)
        assert work is not None
        return work

    def maximum(self, tensor: Tensor) -> Tensor:
        """Take the largest of each number over all processes, in place, and return the tensor."""
        if self.group:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all processes, in place, and return it."""
        if self.group:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Collect a picklable object of every process on all processes, in process order."""
        if not self.host_group:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def from_first(self, value: Result) -> Result:
        """Return process 0's picklable object on all processes."""
        values = [value]
        if self.host_group:
            dist.broadcast_object_list(values, group=self.host_group, group_src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def agree(self, function: Callable[[], Result]) -> Result:
        """Call a function on every process; if it is the user's mistake on one, it is on all.

        Raises:
            AgreedUserError: the first process's, by index, on every process.
        """
        return agree(self.gather, function)


def agree(gather: Callable[[Any], list[Any]], function: Callable[[], Result]) -> Result:
    """Call a function on every process; if it is the user's mistake on one, it is on all.

    Args:
        gather: collective; returns what it was given by all processes, by index.
        function: may raise UserError, or what the system says of a path that it refuses.

    Raises:
        AgreedUserError: the first process's, by index, on every process.
    """
    result, message = None, None
    try:
        result = function()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if (message := refused_path(error)) is None:
            raise
    for problem in gather(message):
        if problem is not None:
            raise AgreedUserError(problem)
    return result  # type: ignore[return-value]
