"""A small Vision Transformer of timm for the digits of scikit-learn, trained low-rank, and resumed.

  python -m examples.with_timm
  torchrun --nproc-per-node 2 -m examples.with_timm

The loop is that of timm's train.py in short: optimizer, resume, average, DistributedDataParallel,
schedule, saver. Nothing is downloaded; runs/with_timm is written. What this prints is in
docs/integrations.md.
"""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oialr.compatibility import import_torchvision

import_torchvision()  # for a wheel of torchvision that does not fit torch's; else it does nothing

from timm.models import load_checkpoint, resume_checkpoint
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, dispatch_clip_grad

# added:
from oialr.integrations.timm import StabilityMetrics, oialr_in_loop

FOLDER = Path("runs/with_timm")
PROCESSES, PROCESS = (
    int(os.environ.get(name) or n) for name, n in (("WORLD_SIZE", 1), ("RANK", 0))
)
EPOCHS, BATCH, ACCUMULATION = 8, 24, 2


def digits() -> tuple[Tensor, Tensor]:
    """Return images (n, 1, 8, 8) and classes (n,)."""
    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(classes)


def train(folder: Path, *, seed: int, resume: Path | None = None) -> tuple[nn.Module, ModelEmaV3]:
    """Train a new network, or go on from a checkpoint; return it, and its average."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    network = VisionTransformer(**size, embed_dim=48, depth=2, num_heads=4)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=5e-3, weight_decay=0.05)
    # added:
    method = oialr_in_loop(network, optimizer, delay=60, update_interval=20, cutoff=0.1)
    start = (resume_checkpoint(network, str(resume), optimizer) or 0) if resume else 0
    average = ModelEmaV3(network, decay=0.9)
    # added:
    method.follow(average)
    if resume:
        load_checkpoint(average.module, str(resume), use_ema=True)
    model: nn.Module = DistributedDataParallel(network) if PROCESSES > 1 else network
    schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS)
    schedule.step(start)
    folder.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(
        model,
        optimizer,
        argparse.Namespace(model="small_vit"),
        model_ema=average,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    # added:
    stability = StabilityMetrics(network, window=3)

    images, classes = digits()
    metrics: dict[str, float] = {}
    for epoch in range(start, EPOCHS):
        for number in range(len(images) // (PROCESSES * BATCH * ACCUMULATION) * ACCUMULATION):
            first = (number * PROCESSES + PROCESS) * BATCH
            part = slice(first, first + BATCH)
            loss = nn.functional.cross_entropy(model(images[part]), classes[part])
            (loss / ACCUMULATION).backward()
            if (number + 1) % ACCUMULATION == 0:
                dispatch_clip_grad(model.parameters(), value=1.0)
                optimizer.step()
                optimizer.zero_grad()
                average.update(network)
        schedule.step(epoch + 1)
        # added:
        metrics.update(stability.measure())
        if PROCESS == 0:
            saver.save_checkpoint(epoch, metric=epoch)
    if PROCESS == 0 and resume is None:
        print("ranks:", list(method.ranks().values()))
        print(f"trained: {method.trainable_percent():.1f} % of the parameters")
        print(f"basis stability: {metrics['stability']:.3f}, epoch {EPOCHS}")
    return network, average


def main() -> None:
    """Train to the end, and again from a checkpoint, and compare."""
    logging.disable(logging.WARNING)
    if PROCESSES > 1:
        torch.distributed.init_process_group("gloo")
    whole, average = train(FOLDER / "whole", seed=0)
    if PROCESSES > 1:
        torch.distributed.barrier()  # until the checkpoints are written
    middle = FOLDER / "whole" / "checkpoint-3.pth.tar"
    resumed, other = train(FOLDER / "resumed", seed=1, resume=middle)
    if PROCESS == 0:
        images, classes = digits()
        with torch.no_grad():
            right = (average.module.eval()(images).argmax(1) == classes).float().mean()
        print(f"accuracy of the average on what was trained: {right:.3f}")
        pairs = [(whole, resumed), (average.module, other.module)]
        equal = all(all(map(torch.equal, a.parameters(), b.parameters())) for a, b in pairs)
        print("resumed after 4 of 8 epochs, with the same bits in the end:", equal)
    if PROCESSES > 1:
        torch.distributed.barrier()  # so that none leaves amid what the others still do
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
