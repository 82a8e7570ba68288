"""LeNet-5 of LeCun et al.

"Gradient-Based Learning Applied to Document Recognition", Proceedings of the IEEE 86 (11), 1998,
section II.B.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class LeNet5(nn.Module):
    """Two convolutions with pooling and three linear layers, for images of about 28 pixels.

    As LeNet-5 is used today: all maps are connected, pooling takes the mean and has no weights, and
    the classes are the outputs of a linear layer.
    """

    def __init__(
        self,
        *,
        in_chans: int = 1,
        num_classes: int = 10,
        img_size: tuple[int, int] = (28, 28),
        activation: str = "tanh",
    ) -> None:
        """Build the network with torch's default initialization.

        Args:
            in_chans: channels of the images.
            num_classes: outputs.
            img_size: height and width, at least 12 each; images smaller than 32 are padded by 2
                pixels on each side, as MNIST's are in the paper.
            activation: "tanh", as in the paper, or "relu".

        Raises:
            ValueError: an argument is none of these.
        """
        super().__init__()
        if activation not in ("tanh", "relu"):
            raise ValueError(f"activation must be tanh or relu, not {activation!r}")
        if min(img_size) < 12:
            raise ValueError(f"img_size must be at least 12 x 12, not {img_size}")
        margin = 2 if min(img_size) < 32 else 0
        maps = [((size + 2 * margin - 4) // 2 - 4) // 2 for size in img_size]
        self.activation = torch.tanh if activation == "tanh" else functional.relu
        self.convolution1 = nn.Conv2d(in_chans, 6, 5, padding=margin)
        self.convolution2 = nn.Conv2d(6, 16, 5)
        self.linear1 = nn.Linear(16 * maps[0] * maps[1], 120)
        self.linear2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, in_chans, height, width) to logits (b, num_classes)."""
        features = functional.avg_pool2d(self.activation(self.convolution1(images)), 2)
        features = functional.avg_pool2d(self.activation(self.convolution2(features)), 2)
        features = self.activation(self.linear1(features.flatten(1)))
        logits: Tensor = self.head(self.activation(self.linear2(features)))
        return logits
