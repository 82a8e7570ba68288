"""The Slurm launcher, run with stand-ins for srun and scontrol that record their arguments."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.config import load

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "slurm" / "oialr_resnet.sh"
CONFIGURATION = ROOT / "configs" / "imagenet_resnetrs101.yaml"
JOB = "4711"

FAKE_SRUN = """\
#!/usr/bin/env bash
printf '%s\\n' "$@" >srun_arguments
{body}
"""
FAKE_SRUN_WITH_CHECKPOINT = f"""\
#!{sys.executable}
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print("step is running", flush=True)
signal.sigwait([signal.SIGUSR1])
raise SystemExit(75)
"""
FAKE_SCONTROL = """\
#!/usr/bin/env bash
echo "$*" >>scontrol_arguments
exit {exit_code}
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder to submit from: the launcher's files, and an srun that succeeds."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "bin").mkdir()
    install(tmp_path, "srun", FAKE_SRUN.format(body="exit 0"))
    install(tmp_path, "scontrol", FAKE_SCONTROL.format(exit_code=0))
    return tmp_path


def install(site: Path, name: str, text: str) -> None:
    (site / "bin" / name).write_text(text)
    (site / "bin" / name).chmod(0o755)


def start(site: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the script as Slurm does: from a copy that lies elsewhere, in any folder."""
    spool = site / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(site / "slurm" / "oialr_resnet.sh", spool / "slurm_script")
    return subprocess.Popen(
        ["bash", str(spool / "slurm_script"), *arguments],
        cwd=spool,
        env={
            "PATH": f"{site / 'bin'}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(site),
            "SLURM_JOB_ID": JOB,
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def submit(site: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run the script to its end: exit code, stdout, stderr."""
    process = start(site, *arguments, **environment)
    output, errors = process.communicate(timeout=30)
    return process.returncode, output, errors


def srun_arguments(site: Path) -> list[str]:
    return (site / "srun_arguments").read_text().splitlines()


@pytest.mark.parametrize("path", ["slurm/env.sh", "slurm/oialr_resnet.sh", ".ci/run"])
def test_scripts_are_clean(path: str) -> None:
    subprocess.run(["bash", "-n", path], cwd=ROOT, check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(
        ["shellcheck", path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_command_forwards_settings_and_overrides(site: Path) -> None:
    exit_code, output, errors = submit(
        site,
        "training.epochs=3",
        "run.name=a b",
        SRUN_MPI="pmix",
        DATA_ROOT="/data/with blank",
        RUNS_ROOT="scratch",
    )
    assert (exit_code, errors) == (0, "")
    arguments = srun_arguments(site)
    assert arguments == [
        "--mpi=pmix",
        *("python", "-m", "app.train"),
        *("--config", str(CONFIGURATION.relative_to(ROOT))),
        "data.root=/data/with blank",
        f"run.dir=scratch/oialr_resnet-{JOB}",
        "training.epochs=3",
        "run.name=a b",
    ]
    assert "srun --mpi=pmix python -m app.train" in output
    assert "training.epochs=3 run.name=a\\ b" in output


def test_command_has_harmless_defaults(site: Path) -> None:
    assert submit(site)[0] == 0
    assert "--mpi=pmi2" in srun_arguments(site)
    assert f"run.dir=runs/oialr_resnet-{JOB}" in srun_arguments(site)


def test_run_that_was_started_before_is_resumed(site: Path) -> None:
    run_dir = f"runs/oialr_resnet-{JOB}"
    submit(site)
    assert "--resume" not in srun_arguments(site)
    (site / run_dir).mkdir(parents=True)
    (site / run_dir / "config.yaml").touch()
    submit(site)
    arguments = srun_arguments(site)
    assert arguments[arguments.index("--resume") + 1] == run_dir
    assert f"run.dir={run_dir}" in arguments


@pytest.mark.parametrize("code", [1, 2, 137])
def test_bad_exit_code_is_handed_on(site: Path, code: int) -> None:
    install(site, "srun", FAKE_SRUN.format(body=f"exit {code}"))
    assert submit(site)[0] == code
    assert not (site / "scontrol_arguments").exists()


def test_exit_code_75_requeues_the_job(site: Path) -> None:
    install(site, "srun", FAKE_SRUN.format(body="exit 75"))
    assert submit(site)[0] == 75
    assert (site / "scontrol_arguments").read_text() == f"requeue {JOB}\n"


def test_failed_requeue_names_the_run(site: Path) -> None:
    install(site, "srun", FAKE_SRUN.format(body="exit 75"))
    install(site, "scontrol", FAKE_SCONTROL.format(exit_code=1))
    exit_code, _, errors = submit(site)
    assert exit_code == 75
    assert f"runs/oialr_resnet-{JOB}" in errors


def test_signal_is_forwarded_and_the_step_waited_for(site: Path) -> None:
    install(site, "srun", FAKE_SRUN_WITH_CHECKPOINT)
    process = start(site)
    try:
        assert process.stdout
        assert "step is running\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, errors) == (75, "")
    assert (site / "scontrol_arguments").exists()


def test_run_directory_cannot_be_overridden(site: Path) -> None:
    exit_code, _, errors = submit(site, "training.epochs=3", "run.dir=elsewhere")
    assert exit_code == 2
    assert re.fullmatch(r"run\.dir: .*RUNS_ROOT.*\n", errors)
    assert not (site / "srun_arguments").exists()


def test_other_folders_are_refused(site: Path) -> None:
    (site / "slurm" / "env.sh").unlink()
    exit_code, _, errors = submit(site)
    assert exit_code == 2
    assert re.fullmatch(r".*slurm/env\.sh: not found; .*repository root\n", errors)


def test_configuration_fits_the_header() -> None:
    configuration = load(CONFIGURATION, ["data.root=imagenet"])
    header = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SCRIPT.read_text(), re.MULTILINE))
    assert header["signal"] == "B:USR1@120"
    assert header["gres"] == f"gpu:{header['ntasks-per-node']}"
    processes = int(header["nodes"]) * int(header["ntasks-per-node"])
    assert configuration.training.batch_size % processes == 0
    assert configuration.data.workers < int(header["cpus-per-task"])
    assert configuration.model.name == "resnetrs101"
    images = round(1_281_167 * (1 - configuration.data.validation_fraction))
    steps = images // configuration.training.batch_size
    assert configuration.oialr.delay == 10 * steps  # as the comments in the file say
    assert configuration.oialr.update_interval == steps // 2
    configuration.check_steps(configuration.training.epochs * steps)
