"""Algorithm 1 of arXiv 2401.08505 in its plain form: to be read, and the oracle of the tests.

docs/method.md leads through this file. The symbols are the paper's: a weight W (m, n) becomes
U Sigma Vh with U (m, r), Sigma (r, r) and Vh (r, n), where Vh is V^T and U_ is U'. What the
published code is known to get wrong is right here: the optimizer's state follows into every new
basis, updates happen between optimizer steps, and each covers at least one layer.

It knows nn.Linear and nn.Conv2d without groups, one process, and optimizers of which the state is
momentum and an average of squares. W is formed at every use, so nothing here is fast.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

LINEAR = ("momentum_buffer", "exp_avg")  # averages of the gradient
SQUARED = ("exp_avg_sq", "square_avg")  # averages of its elementwise square
ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


class LowRank(nn.Module):
    """Forms a layer's weight W = U Sigma Vh from the trained Sigma (r, r)."""

    def __init__(self, U: Tensor, Vh: Tensor, shape: torch.Size) -> None:
        """Freeze U (m, r) and Vh (r, n): they take no gradient. shape is that of W."""
        super().__init__()
        self.U, self.Vh = (nn.Parameter(factor, requires_grad=False) for factor in (U, Vh))
        self.shape = shape

    def forward(self, Sigma: Tensor) -> Tensor:
        """Return W in the shape of the dense weight."""
        return (self.U @ Sigma @ self.Vh).reshape(self.shape)


class OIALR:
    """Turns the layers of a network low-rank while it is trained, and cuts their ranks."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        d: int,
        nu: int,
        beta: float = 0.1,
        alpha: float = 0.1,
        keep_first_layer: bool = False,
        keep_last_layer: bool = True,
        minimum_rank_fraction: float = 0.01,
        largest_cut: float = 0.5,
    ) -> None:
        """Choose the layers; nothing is changed yet.

        Args:
            model: full-rank; its last layer is the nn.Linear or nn.Conv2d that is registered last.
            optimizer: holds the weights.
            d: delay, optimizer steps of full-rank training.
            nu: optimizer steps between updates.
            beta: singular values below beta times the largest are cut.
            alpha: share of the layers that each update adds, the last layers first.
            keep_first_layer, keep_last_layer: that layer of the network stays full-rank.
            minimum_rank_fraction: no rank falls below this share of min(m, n).
            largest_cut: largest share of a layer's rank that one update cuts.
        """
        self.optimizer = optimizer
        self.d, self.nu, self.beta, self.alpha = d, nu, beta, alpha
        self.minimum_rank_fraction, self.largest_cut = minimum_rank_fraction, largest_cut
        known = [item for item in model.named_modules() if type(item[1]) in (nn.Linear, nn.Conv2d)]
        chosen = known[int(keep_first_layer) : len(known) - int(keep_last_layer)]
        self.layers = {name: x for name, x in chosen if can_save(x, minimum_rank_fraction)}
        # What is trained of a weight: W, and from the conversion on Sigma, in the same object.
        self.trained = {name: x.get_parameter("weight") for name, x in self.layers.items()}
        self.low_rank: dict[str, LowRank] = {}
        self.t = 0

    @torch.no_grad()
    def step(self) -> dict[str, int]:
        """Convert or update if it is time, once after each optimizer step; return layers' ranks."""
        self.t += 1
        if self.t < self.d or (self.t - self.d) % self.nu:
            return {}
        if self.t == self.d:
            return {name: self.convert(name) for name in self.layers}
        turn = layers_in_turn((self.t - self.d) // self.nu, len(self.layers), self.alpha)
        return {name: self.update(name) for name in list(self.layers)[-turn:]}

    def convert(self, name: str) -> int:
        """W = U Sigma Vh with Sigma = diag(s), of full rank: the first cut is an update's."""
        W = self.trained[name]
        U, s, Vh = torch.linalg.svd(W.flatten(1), full_matrices=False)
        weight = self.low_rank[name] = LowRank(U, Vh, W.shape)
        replace(self.optimizer, W, torch.diag(s), U, Vh.T)
        parametrize.register_parametrization(self.layers[name], "weight", weight, unsafe=True)
        return len(s)

    def update(self, name: str) -> int:
        """Sigma = U' diag(s') Vh'. U <- U U', Vh <- Vh' Vh, Sigma <- diag(s'), cut to rank r."""
        weight, Sigma = self.low_rank[name], self.trained[name]
        U_, s_, Vh_ = torch.linalg.svd(Sigma)
        least = minimum_rank(min(len(weight.U), weight.Vh.shape[1]), self.minimum_rank_fraction)
        r = kept_rank(s_, self.beta, self.largest_cut, least)
        U_, s_, Vh_ = U_[:, :r], s_[:r], Vh_[:r]
        weight.U.data, weight.Vh.data = weight.U @ U_, Vh_ @ weight.Vh
        replace(self.optimizer, Sigma, torch.diag(s_), U_, Vh_.T)
        return r


def layers_in_turn(i: int, L: int, alpha: float) -> int:
    """Count the layers, from the last, of the i-th update: i alpha L, at least 1, at most L."""
    return min(L, max(1, math.floor(i * alpha * L + ROUNDING)))


def kept_rank(s: Tensor, beta: float, largest_cut: float, least: int) -> int:
    """Count the singular values (r,) of at least beta s[0], within the guards."""
    guard = math.ceil((1 - largest_cut) * len(s) - ROUNDING)
    return min(len(s), max(int((s >= beta * s[0]).sum()), guard, least))


def minimum_rank(k: int, fraction: float) -> int:
    """Smallest rank that a weight with k = min(m, n) may have."""
    return max(1, math.ceil(fraction * k - ROUNDING))


def can_save(layer: nn.Module, fraction: float) -> bool:
    """Whether r (m + n) + r^2 < m n at the smallest rank; not asked of grouped convolutions."""
    m, n = layer.get_parameter("weight").flatten(1).shape
    r = minimum_rank(min(m, n), fraction)
    return getattr(layer, "groups", 1) == 1 and r * (m + n) + r * r < m * n


def replace(optimizer: Optimizer, W: nn.Parameter, Sigma: Tensor, L: Tensor, R: Tensor) -> None:
    """Put Sigma = L^T W R in W's place, in the same object; gradient and state follow."""
    W.data = Sigma
    if W.grad is not None:
        W.grad = linear(W.grad, L, R)
    for key, value in optimizer.state.get(W, {}).items():
        if key in LINEAR:
            optimizer.state[W][key] = linear(value, L, R)
        elif key in SQUARED:
            optimizer.state[W][key] = linear(value, L * L, R * R)
        elif key != "step":
            raise ValueError(f"it is not known how {key!r} follows into another basis")


def linear(A: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """L^T A R (r, r) for A in the shape of the weight, read as a matrix (m, n)."""
    return L.T @ A.flatten(1) @ R
