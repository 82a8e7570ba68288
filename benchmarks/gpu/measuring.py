"""What all parts share: their command line, the clock of a device, and a file of results."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all parts have."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="a folder")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--seconds", type=float, default=280, help="start nothing new after these")
    return parser


def choose_device(*, dry_run: bool) -> torch.device:
    """Return the GPU, or the CPU for a dry run.

    Raises:
        SystemExit: there is no GPU.
    """
    if dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --dry-run takes the CPU")
    return torch.device("cuda")


class Results:
    """Rows of one part in ``OUTPUT/PART.json``: each is on disk as soon as it is measured."""

    def __init__(self, part: str, output: Path, device: torch.device) -> None:
        """Begin the part anew."""
        output.mkdir(parents=True, exist_ok=True)
        self._path = output / f"{part}.json"
        is_gpu = device.type == "cuda"
        self._start = time.perf_counter()
        self._document: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if is_gpu else f"CPU ({platform.machine()})",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rows": [],
        }

    @property
    def seconds(self) -> float:
        """Seconds since the part began."""
        return time.perf_counter() - self._start

    def add(self, **row: Any) -> None:
        """Keep a row, and print it."""
        self._document["rows"].append(row)
        self._document["seconds"] = self.seconds
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._document, indent=1))
        os.replace(partial, self._path)
        shown = {key: value for key, value in row.items() if key not in ("profile", "traceback")}
        print(f"{self.seconds:6.1f} s  {json.dumps(shown)}", flush=True)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: torch.device, *, repeat: int = 1) -> float:
    """Seconds of a call by the clock, the work that it leaves to the device included.

    Args:
        call: what is timed, back to back, so that a device is not waited for in between.
        device: of the call.
        repeat: number of calls; the mean counts.
    """
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeat


def interleaved(
    calls: Sequence[Callable[[], Any]], device: torch.device, *, rounds: int, repeat: int
) -> list[list[float]]:
    """Seconds of each of some calls, one round after the other, so that a disturbance meets all.

    Returns:
        For each call one number per round.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for mine, call in zip(seconds, calls, strict=True):
            mine.append(seconds_of(call, device, repeat=repeat))
    return seconds


def median_ratio(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of one call's time over another's."""
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
