"""Small networks, batches for them, and a training loop across conversions and cuts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from oialr.convert import get_layer
from oialr.events import Event
from oialr.layers.base import FactoredLayer
from oialr.method import OIALR

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large networks and batches are."""

    width: int
    channels: int
    pixels: int
    batch: int
    shapes: tuple[tuple[int, int], ...]
    """Of single matrices."""
    vision_transformer: dict[str, int]
    image: int
    """Pixels of its images."""


GPU_SIZE = Size(
    width=192,
    channels=32,
    pixels=16,
    batch=32,
    shapes=((768, 768), (1536, 384), (384, 1536), (64, 576)),
    vision_transformer={"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    image=224,
)
DRY_SIZE = Size(
    width=32,
    channels=8,
    pixels=6,
    batch=4,
    shapes=((48, 48), (96, 24), (24, 96)),
    vision_transformer={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2},
    image=16,
)


class Mean(nn.Module):
    """Mean over the given dimensions, which is deterministic on GPUs, as pooling is not."""

    def __init__(self, *dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=self.dimensions)


def linear(size: Size, dropout: float = 0.0) -> nn.Module:
    w = size.width
    return nn.Sequential(
        nn.Linear(w, 2 * w),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(2 * w, w),
        nn.Tanh(),
        nn.Linear(w, CLASSES),
    )


def convolution(size: Size) -> nn.Module:
    c = size.channels
    return nn.Sequential(
        nn.Conv2d(c, 2 * c, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2, stride=2),
        nn.GELU(),
        nn.Conv2d(2 * c, 4 * c, 1),
        nn.BatchNorm2d(4 * c),
        Mean(2, 3),
        nn.Linear(4 * c, CLASSES),
    )


def attention(size: Size) -> nn.Module:
    w = size.width
    layer = nn.TransformerEncoderLayer(
        w, 2, 2 * w, dropout=0.0, activation="gelu", batch_first=True
    )
    return nn.Sequential(layer, Mean(1), nn.Linear(w, CLASSES))


NETWORKS: dict[str, Callable[[Size], nn.Module]] = {
    "linear": linear,
    "convolution": convolution,
    "attention": attention,
}


def input_shape(name: str, size: Size) -> tuple[int, ...]:
    """Return the shape of one sample."""
    return {
        "linear": (size.width,),
        "convolution": (size.channels, size.pixels, size.pixels),
        "attention": (5, size.width),
    }[name]


def batches(shape: tuple[int, ...], size: Size, count: int) -> list[tuple[Tensor, Tensor]]:
    """Draw inputs (b, ...) and labels (b,), on the CPU."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size.batch, *shape, generator=generator),
            torch.randint(CLASSES, (size.batch,), generator=generator),
        )
        for _ in range(count)
    ]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Smooth in the gradient: the rounding of a device stays as small as it was."""
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


@dataclass
class Training:
    """A network in training: converted after step 2, updated every 2 steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: OIALR
    losses: list[Tensor] = field(default_factory=list)
    events: dict[int, Event] = field(default_factory=dict)

    def step(self, module: nn.Module, inputs: Tensor, labels: Tensor) -> Event | None:
        """Forward, backward, optimizer, method; the loss stays on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(module(inputs), labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())
        if event := self.method.step():
            self.events[self.method.step_count] = event
        return event

    def run(self, data: Sequence[tuple[Tensor, Tensor]]) -> "Training":
        """Take a step on each batch, brought to the network's device and dtype."""
        for inputs, labels in self.placed(data):
            self.step(self.model, inputs, labels)
        return self

    def placed(self, data: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        like = next(self.model.parameters())
        return [(inputs.to(like), labels.to(like.device)) for inputs, labels in data]

    def weights(self) -> dict[str, Tensor]:
        """Return each layer's weight, U core Vh multiplied out, on the CPU in float64."""
        return {report.name: self._weight(report.name) for report in self.method.layers}

    def _weight(self, name: str) -> Tensor:
        layer = get_layer(self.model, name)
        factored = isinstance(layer, FactoredLayer)
        weight = layer.weight if factored else self.model.get_parameter(name)
        return weight.detach().double().cpu()


def training(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: object
) -> Training:
    """Prepare a training; see :class:`Training`."""
    optimizer = optimizer or sgd(model)
    arguments = {"delay": 2, "update_interval": 2, "cutoff": 0.2, "layer_fraction": 1.0, **options}
    return Training(model, optimizer, OIALR(model, optimizer, **arguments))


def build(name: str, size: Size, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a network on the CPU whose weights are far from every doubt of a cut.

    Half of each weight's singular values lie above 0.7 of the largest and half below 0.05, so that
    a cutoff of 0.2 leaves the same rank whatever a device rounds.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[name](size)
    separate(model)
    return model.to(dtype)


@torch.no_grad()
def separate(model: nn.Module) -> None:
    """Give the weights that are factorized a spectrum with a gap."""
    for report in OIALR(model, sgd(model), delay=1, update_interval=1).layers:
        weight = model.get_parameter(report.name)
        U, s, Vh = torch.linalg.svd(
            weight.double().reshape(report.stack_shape), full_matrices=False
        )
        k = s.shape[-1]
        strong = torch.linspace(1, 0.7, k - k // 2, dtype=torch.float64)
        weak = torch.linspace(0.05, 0.02, k // 2, dtype=torch.float64)
        gap = s[..., :1] * torch.cat([strong, weak])
        weight.copy_((U * gap[..., None, :] @ Vh).reshape(weight.shape))


def relative_error(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of two weights of a name, over the norm of the weight."""
    assert list(mine) == list(theirs)
    return max(
        float(torch.linalg.vector_norm(mine[name] - theirs[name]) / theirs[name].norm())
        for name in mine
    )
