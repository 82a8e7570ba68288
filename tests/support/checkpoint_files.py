"""Checkpoints of some small weights, as programs leave them."""

import json

import torch
from safetensors.torch import save_file


def save_series(folder, count=4):
    """Write checkpoints of five weights that move a little from each to the next."""
    torch.manual_seed(0)
    folder.mkdir()
    weights = {f"fc{i}.weight": torch.randn(6 + i, 5) for i in range(5)}
    for number in range(count):
        torch.save({k: v + number * 0.1 * torch.randn_like(v) for k, v in weights.items()},
                   folder / f"model-{number}.pt")  # fmt: skip
    return folder


def save_shards(folder, states, *, suffix="safetensors", names="model-{:05d}-of-{:05d}"):
    """Write shards and their index, as transformers does."""
    folder.mkdir(parents=True)
    save = save_file if suffix == "safetensors" else torch.save
    places = {}
    for number, state in enumerate(states, start=1):
        name = f"{names.format(number, len(states))}.{suffix}"
        save(state, folder / name)
        places |= dict.fromkeys(state, name)
    content = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps(content))
