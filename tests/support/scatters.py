"""A network that a run cannot train by deterministic algorithms, for a program to import."""

import torch
from torch import Tensor, nn


class Scatters(nn.Module):
    """A network with an operator that torch has no deterministic algorithm for, on CPUs too."""

    def __init__(self, **arguments: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        inputs = images.flatten(1)
        inputs.new_zeros(3).put_(torch.tensor([1]), inputs.new_ones(1))
        return self.head(inputs)
