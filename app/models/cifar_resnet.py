"""The residual networks for CIFAR of He et al.

"Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2; options A and B of
the shortcut from section 3.3.
"""

from torch import Tensor, nn
from torch.nn import functional


class CifarResNet(nn.Module):
    """6n + 2 layers: a convolution, three stages of n blocks of two convolutions, a classifier.

    The stages have 1, 2 and 4 times ``width`` channels on maps of the full, half and quarter size.
    """

    def __init__(
        self,
        *,
        depth: int = 20,
        width: int = 16,
        shortcut: str = "A",
        in_chans: int = 3,
        num_classes: int = 10,
    ) -> None:
        """Build the network with He initialization.

        Args:
            depth: 6n + 2: 20, 32, 44, 56 and 110 in the paper.
            width: channels of the first stage.
            shortcut: where the shape changes: "A": every second pixel, new channels filled with
                zeros, no parameters (the paper's choice for CIFAR); "B": a 1x1 convolution.
            in_chans: channels of the images.
            num_classes: outputs.

        Raises:
            ValueError: an argument is none of these.
        """
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if blocks < 1 or remainder:
            raise ValueError(f"depth must be 6n + 2 with n >= 1, such as 20 or 56, not {depth}")
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' or 'B', not {shortcut!r}")
        self.convolution = _convolution(in_chans, width, stride=1)
        self.normalization = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(_Block(channels, width * 2**stage, stride, shortcut))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, in_chans, height, width) to logits (b, num_classes)."""
        features = functional.relu(self.normalization(self.convolution(images)))
        features = self.blocks(features)
        return self.head(features.mean(dim=(2, 3)))


class _Block(nn.Module):
    """Two 3x3 convolutions with batch normalization, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.convolution1 = _convolution(inputs, outputs, stride=stride)
        self.normalization1 = nn.BatchNorm2d(outputs)
        self.convolution2 = _convolution(outputs, outputs, stride=1)
        self.normalization2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs
        self.projection: nn.Module | None = None
        if shortcut == "B" and stride > 1:
            self.projection = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, features: Tensor) -> Tensor:
        residual = functional.relu(self.normalization1(self.convolution1(features)))
        residual = self.normalization2(self.convolution2(residual))
        if self.projection is not None:
            shortcut = self.projection(features)
        else:
            subsampled = features[:, :, :: self.stride, :: self.stride]
            shortcut = functional.pad(subsampled, (0, 0, 0, 0, 0, self.new_channels))
        return functional.relu(residual + shortcut)


def _convolution(inputs: int, outputs: int, *, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
