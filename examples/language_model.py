"""A character-level transformer on the sources of Python's standard library, trained low-rank.

  python -m app.train --config examples/language_model.yaml

A network and data from outside the packages, named by import path: docs/own_networks_and_data.md.
Nothing is downloaded; the text is what the running Python brings along.
"""

import math
import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.config.settings import Configuration
from app.data import TensorTask
from app.errors import UserError

VOCABULARY = 128
"""Characters are ASCII; others become question marks."""


class StandardLibrary(TensorTask):
    """Each sample is a piece of source text; after every character the next one is to be told."""

    figures = ("accuracy", "bits_per_character")

    def __init__(
        self,
        configuration: Configuration,
        *,
        length: int = 64,
        characters: int = 500_000,
        process_index: int,
        process_count: int,
        device: torch.device,
    ) -> None:
        """Read the text; a tenth of the pieces each are the validation and the test part.

        Args:
            configuration: of the run.
            length: characters of a sample.
            characters: of the whole text.
            process_index, process_count, device: as the program gives them.
        """
        text = read_sources(characters)
        pieces = len(text) // (length + 1)
        if pieces < 10:
            raise UserError(
                f"data.arguments: {len(text)} characters are no ten samples of {length}"
            )
        samples = torch.tensor(list(text[: pieces * (length + 1)])).view(pieces, length + 1)
        inputs, targets = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
        train, validation = pieces - 2 * (pieces // 10), pieces - pieces // 10
        cuts = {
            "train": slice(0, train),
            "validation": slice(train, validation),
            "test": slice(validation, pieces),
        }
        super().__init__(
            configuration,
            {name: (inputs[cut], targets[cut]) for name, cut in cuts.items()},
            outputs=(length, VOCABULARY),
            process_index=process_index,
            process_count=process_count,
            device=device,
        )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy of each sample (b,), of logits (b, length, vocabulary)."""
        each = functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
        return each.mean(dim=1)

    def measures(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the share of characters that are told rightly, and the cross entropy in bits."""
        return {
            "accuracy": (outputs.argmax(dim=2) == targets).float().mean(dim=1),
            "bits_per_character": self.losses(outputs, targets) / math.log(2),
        }


def read_sources(characters: int) -> bytes:
    """Return so many characters of the standard library, of its modules in a fixed random order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.glob("*.py") if path.is_file())
    random.Random(0).shuffle(paths)
    text = bytearray()
    for path in paths:
        text += path.read_bytes().decode(errors="replace").encode("ascii", errors="replace")
        if len(text) >= characters:
            break
    return bytes(text[:characters])


class Block(nn.Module):
    """Causal attention and a feed-forward network, each after a normalization."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b, length, width) of the same."""
        shape = x.shape
        qkv = self.query_key_value(self.attention_norm(x))
        q, k, v = qkv.view(*shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(shape))
        return x + self.contract(functional.gelu(self.expand(self.feed_forward_norm(x))))


class Transformer(nn.Module):
    """Tells the next character after each of a text."""

    def __init__(self, length: int, vocabulary: int, *, width: int, depth: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits (b, length, vocabulary) of int64 (b, length)."""
        x = self.embedding(text) + self.position[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that are not decayed, beside biases and normalizations."""
        return {"position"}


def transformer(
    *,
    input_shape: tuple[int],
    outputs: tuple[int, int],
    width: int = 96,
    depth: int = 2,
    heads: int = 4,
) -> Transformer:
    """Build the network, as model.name asks for it."""
    return Transformer(input_shape[0], outputs[1], width=width, depth=depth, heads=heads)
