"""A check of all nodes before a training: what differs or is missing there, and one table of it."""

import hashlib
import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import app
import oialr
from app.config import to_yaml
from app.config.settings import Configuration, DataSection
from app.errors import AgreedUserError
from app.runtime.launch import node_name
from app.runtime.processes import Runtime

logger = logging.getLogger(__name__)

CLOCK_TOLERANCE = 10.0
"""Seconds by which the clocks may differ: rows and files of different nodes are compared."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one process sees of its node."""

    node: str
    gpu: str | None
    """Name and identity of the GPU that it computes on; None: it computes on CPUs."""
    visible_gpus: int
    granted_gpus: int
    """GPUs that Slurm gave to the job here; 0 where nobody wants them."""
    code: str
    """Digest of the program's files and of the versions of Python and torch."""
    configuration: str
    """Digest of the resolved configuration."""
    data_problem: str
    clock: float
    """Seconds since 1970, read by all processes at the same time."""


def check_nodes(configuration: Configuration, runtime: Runtime) -> str:
    """Check every process's node. A collective call.

    Args:
        configuration: the resolved configuration.
        runtime: this process among all.

    Returns:
        The table, one line per node, each with its end; of one process, which has nothing to agree
        on, nothing.

    Raises:
        AgreedUserError: a check failed; it names the node and the cure.
    """
    if runtime.process_count == 1:
        _warn_of_unseen_gpus([_report(configuration, runtime, time.time())])
        return ""
    runtime.processes.barrier()
    clock = time.time()
    reports = runtime.processes.gather(_report(configuration, runtime, clock))
    if problem := find_problem(reports):
        raise AgreedUserError(problem)
    if runtime.is_first:
        _warn_of_unseen_gpus(reports)
    return table(reports) + "\n"


def check_folder(folder: Path, runtime: Runtime) -> None:
    """Check that every node can write to a folder, and that all see the same one. Collective.

    Args:
        folder: of the run, which exists.
        runtime: this process among all.

    Raises:
        AgreedUserError: it names the node and the cure.
    """
    if runtime.process_count == 1:
        return
    processes = runtime.processes
    mark = folder / f".process-{runtime.process_index}"
    problem = _write_mark(mark) if runtime.local_index == 0 else ""
    is_marked = runtime.local_index == 0 and not problem
    processes.barrier()
    if not problem and not (folder / ".process-0").exists():
        problem = "is not the folder that process 0 sees"
    problems = processes.gather((node_name(), problem))
    if is_marked:  # elsewhere nothing can be removed either
        mark.unlink(missing_ok=True)
    processes.barrier()
    for index, (node, what) in enumerate(problems):
        if what:
            raise AgreedUserError(
                f"run.dir: node {node} (process {index}): {what}: choose a folder on a file system "
                f"that all nodes share"
            )


def _report(configuration: Configuration, runtime: Runtime, clock: float) -> Report:
    return Report(
        node=node_name(),
        gpu=_gpu(runtime.device),
        visible_gpus=torch.cuda.device_count(),
        granted_gpus=0 if configuration.distributed.device == "cpu" else _granted_gpus(),
        code=_code_digest(),
        configuration=_digest(to_yaml(configuration).encode()),
        data_problem=_data_problem(configuration.data),
        clock=clock,
    )


def find_problem(reports: Sequence[Report]) -> str:
    """Return what is wrong, the node and the cure in one line; empty if nothing is.

    Args:
        reports: of all processes, in process order.
    """
    first = reports[0]
    owners: dict[str, int] = {}
    for index, report in enumerate(reports):
        where = f"node {report.node} (process {index})"
        if report.code != first.code:
            return (
                f"{where}: its program, Python or torch is not that of node {first.node}: "
                f"use one checkout and one environment on a file system that all nodes share"
            )
        if report.configuration != first.configuration:
            return (
                f"{where}: its configuration is not that of node {first.node}: start all "
                f"processes by one command, in one folder that all nodes share"
            )
        # Missing everywhere, it is named by who reads it, down to the file.
        if report.data_problem and not first.data_problem:
            return (
                f"data.root: {where}: {report.data_problem}, but node {first.node} can: mount it "
                f"there"
            )
        if report.gpu and owners.setdefault(report.gpu, index) != index:
            return (
                f"{where}: shares the {report.gpu} with process {owners[report.gpu]}: start one "
                f"process per GPU"
            )
        if abs(report.clock - first.clock) > CLOCK_TOLERANCE:
            return (
                f"{where}: its clock differs by {report.clock - first.clock:+.1f} s from that of "
                f"node {first.node}: synchronize the clocks (chronyc tracking)"
            )
    return ""


def unseen_gpus(reports: Sequence[Report]) -> str:
    """Return a warning, in a line, where GPUs were granted and torch sees none; empty if nowhere.

    Not an error: a site may grant GPUs with every node.

    Args:
        reports: of all processes, in process order.
    """
    nodes = {r.node: r for r in reports if r.granted_gpus and not r.visible_gpus}
    if not nodes:
        return ""
    granted = ", ".join(f"{report.granted_gpus} on {node}" for node, report in nodes.items())
    return (
        f"Slurm granted GPUs ({granted}), but torch {torch.__version__} sees none and "
        f"computes on CPUs: is it a build for CPUs, or does the container hide them?"
    )


def _warn_of_unseen_gpus(reports: Sequence[Report]) -> None:
    if warning := unseen_gpus(reports):
        logger.warning(warning)


def table(reports: Sequence[Report]) -> str:
    """Return one line per node: processes, devices, code, configuration, clock."""
    lines = [("node", "processes", "device", "code", "configuration", "clock")]
    first = reports[0]
    for node in dict.fromkeys(report.node for report in reports):
        indices = [i for i, report in enumerate(reports) if report.node == node]
        here = [reports[i] for i in indices]
        offset = max((report.clock - first.clock for report in here), key=abs)
        lines.append(
            (
                node,
                ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else ""),
                _devices(here),
                here[0].code,
                here[0].configuration,
                f"{offset:+.3f} s",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _devices(reports: Sequence[Report]) -> str:
    names = [report.gpu.split(" (")[0] for report in reports if report.gpu]
    if names:
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    unused = max(report.visible_gpus for report in reports)
    return f"cpu, {unused} GPUs unused" if unused else "cpu"


def _granted_gpus() -> int:
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdecimal() else 0


def _gpu(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.uuid})"


def _code_digest() -> str:
    content = [f"{platform.python_version()} {torch.__version__}".encode()]
    for package in (app, oialr):
        assert package.__file__
        root = Path(package.__file__).resolve().parent.parent
        for path in sorted(Path(package.__file__).resolve().parent.rglob("*.py")):
            if not path.is_file():  # an editor's lock is a link that leads nowhere
                continue
            content += [str(path.relative_to(root)).encode(), path.read_bytes()]
    return _digest(b"\0".join(content))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _data_problem(data: DataSection) -> str:
    if not data.data_set.in_root or data.download:
        return ""
    try:
        next(os.scandir(data.root), None)
    except OSError as error:
        return f"cannot read {data.root}: {error.strerror}"
    return ""


def _write_mark(mark: Path) -> str:
    try:
        mark.touch()
    except OSError as error:
        return f"cannot write to {mark.parent}: {error.strerror}"
    return ""
