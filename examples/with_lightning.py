"""A small network for the digits of scikit-learn, trained low-rank by Lightning, and resumed.

  python -m examples.with_lightning [PROCESSES]

Nothing is downloaded; runs/with_lightning is written. What this prints is in docs/integrations.md.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

import oialr
from oialr.compatibility import import_torchvision

import_torchvision()  # for a wheel of torchvision that does not fit torch's; else it does nothing

import lightning.pytorch as pl

# added:
from oialr.integrations.lightning import OIALRCallback, StabilityCallback

FOLDER = Path("runs/with_lightning")


class Classifier(pl.LightningModule):
    """Two hidden layers; nothing in it knows of the method."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
        )

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """Return the optimizer with its schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = CosineAnnealingLR(optimizer, 10)
        return [optimizer], [schedule]


def train(epochs: int, *, processes: int, seed: int, checkpoint: Path | None = None) -> Any:
    """Train a new network, or go on from a checkpoint; return Lightning's Trainer."""
    torch.manual_seed(seed)
    images, classes = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(classes))
    # added:
    callbacks = [OIALRCallback(delay=10, update_interval=10, cutoff=0.3), StabilityCallback()]
    trainer = pl.Trainer(
        callbacks=callbacks,
        max_epochs=epochs,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=64), ckpt_path=checkpoint)
    return trainer


def main() -> None:
    """Train to the end, and again in two parts, and compare."""
    warnings.filterwarnings("ignore")
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    whole = train(10, processes=processes, seed=0)
    train(4, processes=processes, seed=0).save_checkpoint(FOLDER / "last.ckpt")
    resumed = train(10, processes=processes, seed=1, checkpoint=FOLDER / "last.ckpt")
    if not whole.is_global_zero:
        return

    network, other = whole.lightning_module.network, resumed.lightning_module.network
    oialr.save(network, FOLDER / "network.safetensors")
    loaded = oialr.load(Classifier().network, FOLDER / "network.safetensors")
    images, classes = load_digits(return_X_y=True)
    answers = loaded(torch.tensor(images / 16).float()).argmax(1)
    (low_rank, stability), figures = whole.callbacks[:2], whole.callback_metrics
    print("ranks:", low_rank.method.ranks())
    print(f"trained: {figures['trainable_percent']:.1f} % of the parameters")
    print(f"basis stability: {figures['stability']:.3f}, epoch {len(stability.tracker.history)}")
    print(f"accuracy on what was trained: {(answers == torch.tensor(classes)).float().mean():.3f}")
    equal = all(map(torch.equal, network.parameters(), other.parameters()))
    print("resumed after 4 of 10 epochs, with the same bits in the end:", equal)


if __name__ == "__main__":
    main()
