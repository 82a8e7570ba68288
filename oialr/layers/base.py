"""What every factorized layer has in common: a weight held as U core Vh."""

import torch
from torch import Tensor, nn

from oialr.layers.cost import Execution, Way, cheapest_way
from oialr.layers.formed import guarded_weight


class FactoredLayer(nn.Module):
    """A layer whose weight, read as a matrix W (m, n), is held as U core Vh of rank r.

    U (m, r) and Vh (r, n) are parameters without gradient: they are saved and moved with the
    module, yet DistributedDataParallel sends neither them (they would be sent at every forward if
    they were buffers) nor a gradient for them. The core (r, r) is trained, and so is the bias.

    A weight may also be read as a stack of g > 1 matrices, one for each group of a convolution.
    All of them have the same rank, and every factor has a leading dimension g: U (g, m / g, r),
    core (g, r, r), Vh (g, r, n).

    The concrete layers say how the weight is applied; for every shape of the input they choose the
    cheapest way (:mod:`oialr.layers.cost`) unless ``execution`` names one.
    """

    execution: Execution = "auto"
    """How the weight is applied; "auto": the cheapest way for the present rank and input."""

    U: nn.Parameter
    core: nn.Parameter
    Vh: nn.Parameter
    bias: nn.Parameter | None
    weight_shape: torch.Size
    """Shape of the dense weight, (m, ...)."""

    def __init__(
        self,
        U: Tensor,
        core: Tensor,
        Vh: Tensor,
        *,
        weight_shape: torch.Size,
        bias: nn.Parameter | None = None,
    ) -> None:
        nn.Module.__init__(self)  # a twin's next base is a dense layer, whose weight it has not
        self.weight_shape = weight_shape
        self.set_factors(U, core, Vh)
        # The same object as before, so that the optimizer and everyone else keep their hold on it.
        self.register_parameter("bias", bias)

    @property
    def rank(self) -> int:
        """Rank r of the factorization."""
        return self.core.shape[-1]

    @property
    def groups(self) -> int:
        """Number g of matrices that the weight is read as."""
        return self.core.shape[0] if self.core.dim() == 3 else 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the weight read as a matrix: (m, n), or (m / g, n) of each group's."""
        return self.U.shape[-2], self.Vh.shape[-1]

    def way(self, rows: int, m: int | None = None) -> Way:
        """Return how the weight is applied to an input.

        Args:
            rows: of the input (batch times positions).
            m: rows of the weight that the input meets; None: all.
        """
        if self.execution != "auto":
            return self.execution
        height, n = self.matrix_shape
        return cheapest_way(rows, height if m is None else m, n, self.rank)

    @property
    def weight(self) -> Tensor:
        """The dense weight, formed anew at every access, to be read: writing to it raises."""
        return guarded_weight(self.form_weight())

    def form_weight(self) -> Tensor:
        """Form the dense weight."""
        return (self.U @ self.core @ self.Vh).reshape(self.weight_shape)

    def set_factors(self, U: Tensor, core: Tensor, Vh: Tensor) -> None:
        """Replace the factors by others of any rank: new Parameter objects.

        Args:
            U: (m, r). core: (r, r). Vh: (r, n). With groups as described at the class.
        """
        self.U = nn.Parameter(U, requires_grad=False)
        self.core = nn.Parameter(core)
        self.Vh = nn.Parameter(Vh, requires_grad=False)
