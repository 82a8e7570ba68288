"""How long does an analysis of a large language model take, and in how much memory?

  python -m benchmarks.analysis            # half an hour on a core, and 27 GB of temporary files
  python -m benchmarks.analysis --quick    # half a minute: a small network

Checkpoints are written as transformers does, in bfloat16, in shards with an index, with the names
and shapes of Llama of 7 billion parameters: random weights, which move a little from each
checkpoint to the next. ``python -m app.analyze --dry-run`` then tells what all of them would take;
the weights of ``--include`` (two blocks and the output layer, the largest one) are told and
measured. Memory is the largest resident set of the process, pages of the mapped files included.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks._tables import table

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ["model.layers.[01].*", "lm_head.weight"]


def main() -> None:
    """Write checkpoints, look at the analysis, print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--checkpoints", type=int, default=2)
    parser.add_argument("--window", type=int, default=1)
    parser.add_argument("--include", nargs="+", default=MEASURED, help="weights that are measured")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="a small network")
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.mlp, options.vocabulary, options.blocks = 64, 172, 500, 3
    with tempfile.TemporaryDirectory(prefix="analysis-") as name:
        folder = Path(name)
        start = time.perf_counter()
        size = sum(_write(folder, number, options) for number in range(options.checkpoints))
        document: dict[str, Any] = {
            "checkpoints": {
                "GB": round(size / 1e9, 2),
                "seconds to write": round(time.perf_counter() - start, 1),
            }
        }
        for what, more in (
            ("all weights, told", ["--dry-run"]),
            ("some weights, measured", [f"--include={pattern}" for pattern in options.include]),
        ):
            command = [str(folder), "--window", str(options.window), *more]
            document[what] = _analyze(*command, "--output", str(folder / "analysis"))
    print(json.dumps(document) if options.json else table(document))


def _write(folder: Path, number: int, options: argparse.Namespace) -> int:
    """Write a checkpoint of Hugging Face's layout; return its bytes."""
    checkpoint = folder / f"checkpoint-{1000 * (number + 1)}"
    checkpoint.mkdir()
    shards = list(_shards(options))
    places: dict[str, str] = {}
    for index, shapes in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: _weight(name, shape, number) for name, shape in shapes.items()},
            checkpoint / file,
            metadata={"format": "pt"},
        )
        places |= dict.fromkeys(shapes, file)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    content = {"metadata": {"total_size": size}, "weight_map": places}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(content))
    return size


def _shards(options: argparse.Namespace) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield names and shapes of the weights of each shard: two blocks, the first, or the last."""
    d, mlp = options.hidden, options.mlp
    yield {"model.embed_tokens.weight": (options.vocabulary, d)}
    shapes = {f"self_attn.{key}_proj": (d, d) for key in "qkvo"}
    shapes |= {"mlp.gate_proj": (mlp, d), "mlp.up_proj": (mlp, d), "mlp.down_proj": (d, mlp)}
    norms = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    for first in range(0, options.blocks, 2):
        yield {
            f"model.layers.{block}.{key}.weight": shape
            for block in range(first, min(first + 2, options.blocks))
            for key, shape in {**shapes, **norms}.items()
        }
    yield {"model.norm.weight": (d,), "lm_head.weight": (options.vocabulary, d)}


def _weight(name: str, shape: tuple[int, ...], number: int) -> Tensor:
    """Return a weight that has moved a little from where it was in the checkpoint before."""
    seed = zlib.crc32(name.encode())
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for time_ in range(1, number + 1):
        generator = torch.Generator().manual_seed(seed + time_)
        weight += 0.1 * torch.randn(shape, generator=generator)
    return (0.02 * weight).to(torch.bfloat16)


def _analyze(*arguments: str) -> dict[str, Any]:
    """Run an analysis; return what it told before, what it took, and its largest memory."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "app.analyze", *arguments],
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the analysis ended with {process.returncode}")
    told = re.search(r"(\d+) weights[,:] (?:ordered .*, )?(.*), up to ([\d.]+) GiB", text)
    assert told, text
    return {
        "weights": int(told[1]),
        "told": told[2],
        "told, GiB": float(told[3]),
        "seconds": round(time.perf_counter() - start, 1),
        "CPU seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak memory, GiB": round(usage.ru_maxrss / 2**20, 2),
    }


if __name__ == "__main__":
    main()
