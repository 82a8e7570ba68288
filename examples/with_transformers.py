"""A small Llama, trained low-rank by transformers' Trainer on arithmetic sequences, and resumed.

  python -m examples.with_transformers
  torchrun --nproc-per-node 2 -m examples.with_transformers

Nothing is downloaded; runs/with_transformers is written. What this prints is in
docs/integrations.md.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from oialr.compatibility import import_torchvision

import_torchvision()  # for a wheel of torchvision that does not fit torch's; else it does nothing

from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from oialr.integrations import huggingface

# added:
from oialr.integrations.huggingface import OIALRCallback, StabilityCallback

FOLDER = Path("runs/with_transformers")
VALUES, LENGTH = 24, 12
PROCESSES = int(os.environ.get("WORLD_SIZE") or 1)


def network(seed: int) -> Any:
    """Make a Llama of two blocks, by its configuration."""
    torch.manual_seed(seed)
    configuration = LlamaConfig(
        vocab_size=VALUES,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(configuration)


def sequences() -> list[dict[str, torch.Tensor]]:
    """Return start, start + step, start + 2 step, ..., modulo VALUES, of all starts and steps."""
    grid = torch.cartesian_prod(torch.arange(VALUES), torch.arange(1, 6))
    rows = (grid[:, :1] + grid[:, 1:] * torch.arange(LENGTH)) % VALUES
    return [{"input_ids": row, "labels": row} for row in rows]


def train(folder: Path, *, seed: int, checkpoint: Path | None = None) -> tuple[Any, list[Any]]:
    """Train a new network, or go on from a checkpoint; return the Trainer and its callbacks."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=16,
        per_device_train_batch_size=12 // PROCESSES,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        save_strategy="epoch",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    # added:
    callbacks = [OIALRCallback(delay=20, update_interval=10, cutoff=0.2), StabilityCallback()]
    trainer = Trainer(
        model=network(seed), args=arguments, train_dataset=sequences(), callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer, callbacks


def share_right(model: Any) -> float:
    """Return the share of last values that the network tells rightly."""
    rows = torch.stack([row["input_ids"] for row in sequences()])
    with torch.no_grad():
        answers = model.eval()(rows[:, :-1]).logits[:, -1].argmax(-1)
    return float((answers == rows[:, -1]).float().mean())


def main() -> None:
    """Train to the end, and again from a checkpoint, and compare."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    whole, (low_rank, stability) = train(FOLDER / "whole", seed=0)
    middle = FOLDER / "whole" / "checkpoint-35"
    resumed, _ = train(FOLDER / "resumed", seed=1, checkpoint=middle)
    if not whole.is_world_process_zero():
        return

    stored = huggingface.from_pretrained(LlamaForCausalLM, FOLDER / "whole" / "checkpoint-80")
    huggingface.save_pretrained(stored, FOLDER / "dense")
    dense = LlamaForCausalLM.from_pretrained(FOLDER / "dense")
    print("ranks:", list(low_rank.method.ranks().values()))
    print(f"trained: {low_rank.method.trainable_percent():.1f} % of the parameters")
    rows = [row["stability"] for row in whole.state.log_history if "stability" in row]
    print(f"basis stability: {rows[-1]:.3f}, epoch {len(stability.tracker.history)}")
    print(f"right: {share_right(stored):.3f} low-rank, {share_right(dense):.3f} as dense weights")
    equal = all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    print("resumed after 35 of 80 steps, with the same bits in the end:", equal)


if __name__ == "__main__":
    main()
