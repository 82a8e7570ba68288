"""The mean basis stability that the paper shows, to be drawn beside a run's own."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReferenceCurve:
    """A published curve, read at some epochs."""

    label: str
    epochs: tuple[int, ...]
    stability: tuple[float, ...]
    """Mean over the layers, against the basis 5 epochs before."""


_EPOCHS = (5, 10, 15, 20, 25, 50, 75, 100)

REFERENCE_CURVES = {
    "resnetrs101": ReferenceCurve(
        label="ResNet-RS 101, ImageNet (arXiv 2401.08505)",
        epochs=_EPOCHS,
        stability=(0.9369, 0.8893, 0.8976, 0.9165, 0.9289, 0.9646, 0.9836, 0.9948),
    ),
    "vit_b16": ReferenceCurve(
        label="ViT-B/16, ImageNet (arXiv 2401.08505)",
        epochs=_EPOCHS,
        stability=(0.8669, 0.7552, 0.7775, 0.8233, 0.8546, 0.9362, 0.9769, 0.9964),
    ),
}
"""Coquelin et al., arXiv 2401.08505, section 3: 174 and 50 layers, full-rank training."""
