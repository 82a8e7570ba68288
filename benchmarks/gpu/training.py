"""Trainings with all data on the GPU: full-rank, the paper's algorithm, and our recipe.

A cell is one network on one data set by one method with one seed, in a process of its own. Two run
at a time, so that their seconds do not compare; nine at a time take their steps in turn on one GPU
and are no faster together (seen on an H200). When time is up a cell ends with the epoch that it is
in, and tells how many it has done. Methods: full-rank; "paper": OIALR after a third of the steps,
an update every epoch; "recipe": configs/recipes, released after a half of the steps (residual
networks, kernels in two directions) or a quarter (the ViT), stored at 35 %.

The data come packed (``python -m benchmarks.gpu.pack``); without them random images are learned by
heart, which shows only that everything runs.
"""

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.models.cifar_resnet import CifarResNet
from benchmarks.gpu.measuring import Results, choose_device, command_line, synchronize
from benchmarks.gpu.networks import of_timm
from benchmarks.gpu.pack import Images, random_images, unpack
from oialr.method import OIALR

METHODS = ("full-rank", "paper", "recipe")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network, its data set, and how it is trained."""

    data: str
    build: Callable[..., nn.Module]
    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    warmup_epochs: int
    core_learning_rate_factor: float
    cutoff: float
    flip: bool
    release_after: int
    """Of the recipe: one over the share of the steps."""
    convolutions: Literal["matrix", "spatial"]
    """Of the recipe: how kernels are read."""
    precision: torch.dtype = torch.float32


MINI_VIT = partial(
    of_timm,
    "vit_base_patch16_224",
    img_size=32,
    patch_size=8,
    embed_dim=768,
    depth=6,
    num_heads=6,
)
RESNET = Recipe(
    data="cifar10",
    build=partial(CifarResNet, depth=20),
    epochs=30,
    batch_size=128,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    warmup_epochs=1,
    core_learning_rate_factor=10.0,
    cutoff=0.1,
    flip=True,
    release_after=2,
    convolutions="spatial",
)
RECIPES = {
    "CIFAR-10, ResNet-20": RESNET,
    "Fashion-MNIST, ResNet-20": replace(
        RESNET, data="fashion_mnist", core_learning_rate_factor=3.0
    ),
    "CIFAR-10, mini-ViT": Recipe(
        data="cifar10",
        build=MINI_VIT,
        epochs=60,
        batch_size=512,
        optimizer="adamw",
        learning_rate=3e-4,
        weight_decay=0.01,
        warmup_epochs=5,
        core_learning_rate_factor=1.0,
        cutoff=0.15,
        flip=True,
        release_after=4,
        convolutions="matrix",
        precision=torch.bfloat16,
    ),
}


def make_method(
    name: str, model: nn.Module, optimizer: Any, recipe: Recipe, *, steps: int, interval: int
) -> OIALR | None:
    """Return what is asked after every step; None for full-rank training."""
    common: dict[str, Any] = {
        "update_interval": max(1, interval),
        "rank_multiple": 1 if recipe.optimizer == "sgd" else 16,
    }
    match name:
        case "paper":
            return OIALR(
                model,
                optimizer,
                delay=max(2, steps // 3),
                cutoff=recipe.cutoff,
                core_learning_rate_factor=recipe.core_learning_rate_factor,
                **common,
            )
        case "recipe":
            start = max(2, steps // recipe.release_after)
            return OIALR(
                model,
                optimizer,
                delay=start,
                release=start,
                target_size=0.35,
                truncation="outputs",
                convolutions=recipe.convolutions,
                frobenius_decay=recipe.weight_decay,
                **common,
            )
    return None


def augmented(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Cut out of images (b, c, h, w), padded by an eighth, at random, and mirror half of them."""
    b, _, h, w = images.shape
    margin = w // 8
    padded = functional.pad(images, (margin,) * 4)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)
    device = images.device
    top, left = torch.randint(2 * margin + 1, (2, b), generator=generator, device=device)
    cut = windows[torch.arange(b, device=device), :, top, left]
    if not flip:
        return cut
    mirrored = torch.rand(b, generator=generator, device=device) < 0.5
    return torch.where(mirrored[:, None, None, None], cut.flip(-1), cut)


def batches(
    images: Tensor, labels: Tensor, size: int, generator: torch.Generator, *, flip: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's full batches; images (b, c, h, w) of the device's own."""
    order = torch.randperm(len(labels), generator=generator, device=labels.device)
    for start in range(0, len(order) - size + 1, size):
        taken = order[start : start + size]
        yield augmented(images.index_select(0, taken), generator, flip=flip), labels[taken]


def train(cell: tuple[str, Recipe, str, int, Images, str, float]) -> dict[str, Any] | None:
    """Train one cell and return its figures. Runs in a process of its own.

    Args:
        cell: network, recipe, method, seed, data, kind of device, and when time is up, by the
            clock; None is returned for a cell that would begin later.
    """
    network, recipe, method_name, seed, data, device_name, deadline = cell
    if time.time() > deadline:
        return None
    device = torch.device(device_name)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator(device=device).manual_seed(seed)
    start = time.perf_counter()
    channels = data.train_images.shape[1]
    model = recipe.build(in_chans=channels, num_classes=10).to(device)
    dense_size = sum(p.numel() for p in model.parameters())
    parts = {
        "train": (data.train_images.to(device), data.train_labels.to(device)),
        "test": (data.test_images.to(device), data.test_labels.to(device)),
    }
    mean = parts["train"][0].float().mean((0, 2, 3))[:, None, None]
    deviation = parts["train"][0].float().std((0, 2, 3))[:, None, None]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[recipe.optimizer]
    options: dict[str, Any] = {"momentum": 0.9} if recipe.optimizer == "sgd" else {}
    optimizer = kind(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, **options
    )
    interval = len(parts["train"][1]) // recipe.batch_size
    steps = recipe.epochs * interval
    method = make_method(method_name, model, optimizer, recipe, steps=steps, interval=interval)
    warmup = recipe.warmup_epochs * interval

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def forward(images: Tensor) -> Tensor:
        normalized = (images.float() - mean) / deviation
        with torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=recipe.precision == torch.bfloat16
        ):
            outputs: Tensor = model(normalized)
        return outputs.float()

    done = 0
    for epoch in range(recipe.epochs):
        model.train()
        for images, labels in batches(
            *parts["train"], recipe.batch_size, generator, flip=recipe.flip
        ):
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            if method is not None:
                method.step()
        done = epoch + 1
        if time.time() > deadline:
            break
    synchronize(device)
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in zip(*(part.split(1000) for part in parts["test"]), strict=True):
            right += int((forward(images).argmax(1) == labels).sum())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "network": network,
        "method": method_name,
        "seed": seed,
        "accuracy": right / len(parts["test"][1]),
        "train_loss": float(loss.detach()),
        "trained_percent": 100 * trained / dense_size,
        "stored_percent": 100 * sum(p.numel() for p in model.parameters()) / dense_size,
        "epochs": done,
        "planned_epochs": recipe.epochs,
        "steps": done * interval,
        "training_images": len(parts["train"][1]),
        "test_images": len(parts["test"][1]),
        "process_seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Train all cells, several at a time, and stop starting new ones when time is up."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, help="a folder of packed data")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    device = choose_device(dry_run=options.dry_run)
    results = Results("training", options.output, device)
    recipes, processes, seeds = RECIPES, options.processes, options.seeds
    if options.dry_run:
        small = partial(of_timm, "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1)
        recipes = {
            name: replace(
                recipe,
                epochs=3,
                batch_size=8,
                build=partial(CifarResNet, depth=8, width=8)
                if recipe.optimizer == "sgd"
                else small,
            )
            for name, recipe in RECIPES.items()
        }
        processes, seeds = 2, 1
    sets = {}
    for recipe in recipes.values():
        if recipe.data not in sets:
            sets[recipe.data] = (
                unpack(options.data, recipe.data)
                if options.data
                else random_images(1 if recipe.data == "fashion_mnist" else 3)
            )
    cells = [
        (name, recipe, method, seed, sets[recipe.data], device.type)
        for seed in range(seeds)
        for name, recipe in recipes.items()
        for method in options.methods
    ]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    deadline = time.time() + 0.9 * options.seconds - results.seconds
    with context.Pool(processes, maxtasksperchild=1) as pool:
        for figures in pool.imap_unordered(train, [(*cell, deadline) for cell in cells]):
            if figures:
                results.add(**figures)
    print(json.dumps({"cells": len(cells)}))


if __name__ == "__main__":
    main()
