"""How this process was started: by mpirun, srun, torchrun, or alone. Environment variables only.

Nothing is imported or connected here, so that a mistake of the user can be reported by one process
before anything is started.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# What each launcher tells its processes: index and count. Those of PMI come last: also a shell that
# srun --mpi=pmi2 has started hands them on to whatever mpirun is called there.
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI, srun --mpi=pmi2
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the environment says of the start."""

    launcher: Literal["alone", "mpi", "srun", "torchrun"]
    process_index: int
    process_count: int
    agent: str = ""
    """The agent of torchrun that started this process and starts it anew where one fails: the same
    in all its attempts, and of no other start. Empty: nobody does, or it cannot be told."""
    disputed: str = ""
    """The variables that were believed, where those of another launcher say otherwise: only MPI
    itself knows which of them are left over. Empty: there are no others."""

    @property
    def name(self) -> str:
        """What this process is called in messages."""
        return f"process {self.process_index} of {self.process_count}"


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables; the innermost launcher counts.

    torchrun or mpirun may run inside a Slurm job, whose variables describe the job and not this
    program. SLURM_STEP_NUM_TASKS is there in the tasks of srun only, not in the batch script. Of
    two kinds of mpirun, one within the other, the variables do not tell which is the inner one:
    :func:`app.runtime.processes.connect_mpi` asks MPI.

    Args:
        environment: names and values of the environment variables.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return Launch(
            launcher="torchrun",
            process_index=int(environment["RANK"]),
            process_count=int(environment["WORLD_SIZE"]),
            agent=_agent(environment),
        )
    told = [pair for pair in _MPI_VARIABLES if all(name in environment for name in pair)]
    if told:
        index, count = told[0]
        said = {(environment[one], environment[other]) for one, other in told}
        # Slurm names its step in PMI_JOBID. Helpers of mpirun may be tasks of a step as well.
        of_slurm = count == "PMI_SIZE" and "PMI_JOBID" in environment
        as_many = environment.get("SLURM_STEP_NUM_TASKS") == environment[count]
        return Launch(
            launcher="srun" if of_slurm and as_many else "mpi",
            process_index=int(environment[index]),
            process_count=int(environment[count]),
            disputed=f"{index} and {count}" if len(said) > 1 else "",
        )
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return Launch(
            launcher="srun",
            process_index=int(environment["SLURM_PROCID"]),
            process_count=int(environment["SLURM_STEP_NUM_TASKS"]),
        )
    return Launch(launcher="alone", process_index=0, process_count=1)


def _agent(environment: Mapping[str, str]) -> str:
    """Name torchrun's agent by the folder, new for each, that it keeps its workers' errors in.

    The path of a worker's file in it is FOLDER/attempt_ATTEMPT/LOCAL_RANK/error.json.
    """
    attempt = Path(environment.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent
    if not attempt.name.startswith("attempt_"):
        return ""
    return f"{node_name(environment)}:{attempt.parent}"


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return the name of this node, by Slurm's word where there is one."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()
