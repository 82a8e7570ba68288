"""The batch scripts, run with stand-ins for srun and scontrol that record their arguments.

A real Slurm runs them in test_slurm.py.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import TIMEOUT
from support.machine import need

from app.config import load

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
OTHERS = ("env.sh", "job.sh", "submit_with_report.sh")
BATCH_SCRIPTS = [path for path in SCRIPTS if path.name not in OTHERS]
TRAININGS = [path for path in BATCH_SCRIPTS if path.name != "report.sh"]
CONFIGURATION = ROOT / "configs" / "imagenet_resnetrs101.yaml"
JOB = "4711"

FAKE_SRUN = """\
#!/usr/bin/env bash
printf '%s\\n' "$@" >srun_arguments
{body}
"""
FAKE_SRUN_UNTIL_SIGNALLED = f"""\
#!{sys.executable}
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print("step is running", flush=True)
signal.sigwait([signal.SIGUSR1])
raise SystemExit({{exit_code}})
"""
GATE = "head -n 1 gate >/dev/null"
FAKE_SCONTROL = """\
#!/usr/bin/env bash
echo "$*" >>scontrol_arguments
exit {exit_code}
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder to submit from: the launcher's files, and an srun that succeeds."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "bin").mkdir()
    install(tmp_path, "srun", FAKE_SRUN.format(body="exit 0"))
    install(tmp_path, "scontrol", FAKE_SCONTROL.format(exit_code=0))
    return tmp_path


def install(site: Path, name: str, text: str) -> None:
    (site / "bin" / name).write_text(text)
    (site / "bin" / name).chmod(0o755)


def start(
    site: Path, *arguments: str, script: str = "oialr_resnet.sh", **environment: str
) -> subprocess.Popen[str]:
    """Start a script as Slurm does: from a copy that lies elsewhere, in any folder."""
    spool = site / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(site / "slurm" / script, spool / "slurm_script")
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


def submit(site: Path, *arguments: str, **options: str) -> tuple[int, str, str]:
    """Run a script to its end: exit code, stdout, stderr."""
    process = start(site, *arguments, **options)
    output, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, output, errors


def srun_arguments(site: Path) -> list[str]:
    return (site / "srun_arguments").read_text().splitlines()


def program(site: Path) -> list[str]:
    """What srun was asked to start, without srun's own options."""
    arguments = srun_arguments(site)
    return arguments[arguments.index("python") :]


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_are_clean(path: Path) -> None:
    subprocess.run(["bash", "-n", path], cwd=ROOT, check=True)
    need("shellcheck")
    result = subprocess.run(
        ["shellcheck", "-x", path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_site_is_written_into_the_scripts(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"(?<![\w.$}/*])/(?!usr/bin/env bash|dev/null)[a-z]+/", text)
    for option in ("--partition", "--account", "--mail"):
        assert f"#SBATCH {option}" not in text


def test_command_forwards_settings_and_overrides(site: Path) -> None:
    exit_code, output, errors = submit(
        site,
        "training.epochs=3",
        "run.name=a b",
        SRUN_MPI="pmix",
        IMAGENET_ROOT="/data/with blank",
        RUNS_ROOT="scratch",
    )
    assert (exit_code, errors) == (0, "")
    assert srun_arguments(site)[0] == "--mpi=pmix"
    assert program(site) == [
        *("python", "-m", "app.train"),
        *("--config", str(CONFIGURATION.relative_to(ROOT))),
        "data.root=/data/with blank",
        "training.epochs=3",
        "run.name=a b",
        f"run.dir=scratch/oialr_resnet-{JOB}",
    ]
    assert shlex.join(program(site)[:4]) in output
    assert "training.epochs=3 run.name=a\\ b" in output


def test_command_has_harmless_defaults(site: Path) -> None:
    assert submit(site)[0] == 0
    assert "--mpi=pmi2" in srun_arguments(site)
    assert f"run.dir=runs/oialr_resnet-{JOB}" in srun_arguments(site)
    assert "data.root=data/imagenet" in srun_arguments(site)


def test_images_are_staged_where_the_site_says_so(site: Path) -> None:
    submit(site)
    assert "data.stage_to" not in " ".join(srun_arguments(site))
    submit(site, STAGE_TO="/local/my images")
    assert "data.stage_to=/local/my images" in srun_arguments(site)


def test_all_processes_are_given_time_to_leave(site: Path) -> None:
    submit(site)
    # Otherwise the first to leave with 75 has the others killed, and srun reports 137.
    assert "--kill-on-bad-exit=0" in srun_arguments(site)
    assert "--wait=60" in srun_arguments(site)


def test_a_container_is_started_within_srun(site: Path) -> None:
    with (site / "slurm" / "env.sh").open("a") as file:
        file.write('WITHIN=(apptainer exec --nv "my image.sif")\n')
    submit(site)
    arguments = srun_arguments(site)
    start = arguments.index("apptainer")
    assert arguments[start : start + 5] == ["apptainer", "exec", "--nv", "my image.sif", "python"]


def test_run_that_was_started_before_is_resumed(site: Path) -> None:
    run_dir = f"runs/oialr_resnet-{JOB}"
    submit(site)
    assert "--resume" not in srun_arguments(site)
    (site / run_dir).mkdir(parents=True)
    (site / run_dir / "config.yaml").touch()
    submit(site, "training.epochs=3")
    assert program(site) == [
        *("python", "-m", "app.train", "--resume", run_dir),
        *("data.root=data/imagenet", "training.epochs=3", f"run.dir={run_dir}"),
    ]


def test_another_job_goes_on_with_a_run(site: Path) -> None:
    (site / "elsewhere").mkdir()
    (site / "elsewhere" / "config.yaml").touch()
    submit(site, RUN_DIR="elsewhere")
    assert program(site)[3:5] == ["--resume", "elsewhere"]


def test_processes_follow_the_nodes_that_the_job_has_now(site: Path) -> None:
    tasks = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
    submit(site, SLURM_JOB_NUM_NODES="1", **tasks)
    assert "--ntasks=4" in srun_arguments(site)


@pytest.mark.parametrize(
    ("tasks", "restarts", "told"), [(8, 0, False), (2, 0, True), (2, 1, False)]
)
def test_tasks_that_do_not_count_are_told(
    site: Path, tasks: int, restarts: int, told: bool
) -> None:
    environment = {"SLURM_NTASKS": str(tasks), "SLURM_RESTART_COUNT": str(restarts)}
    nodes = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    _, _, errors = submit(site, **environment, **nodes)
    assert ("--ntasks=2 is not used" in errors) == told
    assert "--ntasks=8" in srun_arguments(site)


@pytest.mark.parametrize("code", [1, 2, 137])
def test_bad_exit_code_is_handed_on(site: Path, code: int) -> None:
    install(site, "srun", FAKE_SRUN.format(body=f"exit {code}"))
    assert submit(site)[0] == code
    assert not (site / "scontrol_arguments").exists()


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_fault_after_progress_requeues_the_job(site: Path, code: int) -> None:
    """A user's mistake (2) never does."""
    checkpoints = site / "runs" / f"oialr_resnet-{JOB}" / "checkpoints"
    (checkpoints / "step-00000100").mkdir(parents=True)
    body = f"mkdir -p {checkpoints}/step-00000200; exit {code}"
    install(site, "srun", FAKE_SRUN.format(body=body))
    assert submit(site)[0] == code
    assert (site / "scontrol_arguments").exists() == (code != 2)
    (site / "scontrol_arguments").unlink(missing_ok=True)
    assert submit(site)[0] == code  # the same checkpoint as before: it would fail for ever
    assert not (site / "scontrol_arguments").exists()


def test_progress_is_seen_behind_a_link(site: Path) -> None:
    (site / "scratch").mkdir()
    (site / "link").symlink_to("scratch")
    install(
        site, "srun", FAKE_SRUN.format(body="mkdir -p scratch/checkpoints/step-00000200; exit 1")
    )
    assert submit(site, RUN_DIR="link")[0] == 1
    assert (site / "scontrol_arguments").exists()


def test_results_that_are_gone_are_no_new_ones(site: Path) -> None:
    checkpoints = site / "runs" / f"oialr_resnet-{JOB}" / "checkpoints"
    (checkpoints / "step-00000100").mkdir(parents=True)
    install(site, "srun", FAKE_SRUN.format(body=f"rm -r {checkpoints}; exit 1"))
    exit_code, _, errors = submit(site)
    assert exit_code == 1
    assert "without new results" in errors
    assert not (site / "scontrol_arguments").exists()


@pytest.mark.parametrize("code", [1, 75])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_run_that_is_saved_elsewhere_does_not_begin_anew(
    site: Path, code: int, is_link: bool
) -> None:
    """Its folder was moved away; the job came back and trained there from the first step on."""
    folder = site / ("scratch" if is_link else "mine")
    (folder / "checkpoints" / "step-00000100").mkdir(parents=True)
    if is_link:
        (site / "mine").symlink_to("scratch")
    saved = site / f"{folder.name}-rescued"
    made = f"mkdir -p {saved}/checkpoints/step-00000120"
    install(site, "srun", FAKE_SRUN.format(body=f"mv {folder} {site}/moved; {made}; exit {code}"))
    exit_code, _, errors = submit(site, RUN_DIR="mine")
    assert exit_code == code
    assert f"the run is saved in {saved}; " in errors
    assert f"RUN_DIR={saved}" in errors
    assert not (site / "scontrol_arguments").exists()
    body = f"mkdir -p {folder}/checkpoints/step-00000200; exit 1"  # with one that was there before
    install(site, "srun", FAKE_SRUN.format(body=body))
    assert submit(site, RUN_DIR="mine")[0] == 1
    assert (site / "scontrol_arguments").exists()


def test_exit_code_75_requeues_the_job(site: Path) -> None:
    install(site, "srun", FAKE_SRUN.format(body="exit 75"))
    assert submit(site)[0] == 75
    assert (site / "scontrol_arguments").read_text() == f"requeue {JOB}\n"


def test_what_is_stopped_twice_in_vain_is_not_requeued(site: Path) -> None:
    """As a search whose evaluation is longer than the time limit; a result begins anew.

    The first ones end before there is a folder of the run, as in a start that reads all images.
    """
    folder = site / "runs" / f"oialr_resnet-{JOB}"
    step = folder / "checkpoints" / "step-00000100"
    asked = site / "scontrol_arguments"
    recorded = folder / "evaluations" / "00003"
    for body, requeued in (
        ("exit 75", True),
        ("exit 75", False),
        (f"mkdir -p {step}; touch {step}/state.pt; exit 75", True),
        (f"mv {step} {step}-1; exit 75", True),  # the same step once more is nothing new
        ("exit 75", False),
        (f"mkdir -p {recorded}; touch {recorded}/recorded; exit 1", True),
        ("exit 75", True),
        ("exit 75", False),
    ):
        install(site, "srun", FAKE_SRUN.format(body=body))
        asked.unlink(missing_ok=True)
        exit_code, _, errors = submit(site)
        assert exit_code == (1 if "exit 1" in body else 75)
        assert asked.exists() == requeued, body
        assert ("for the second time without new results" in errors) == (not requeued)


def test_failed_requeue_names_the_run(site: Path) -> None:
    install(site, "srun", FAKE_SRUN.format(body="exit 75"))
    install(site, "scontrol", FAKE_SCONTROL.format(exit_code=1))
    exit_code, _, errors = submit(site)
    assert exit_code == 75
    assert f"runs/oialr_resnet-{JOB}" in errors


def signalled(
    site: Path, number: signal.Signals, line: str = "step is running", **options: str
) -> tuple[int, str]:
    """Send a signal to the batch script when it has printed a line: exit code, stderr.

    Only then does what waits at the GATE go on.
    """
    os.mkfifo(site / "gate")
    gate = os.open(site / "gate", os.O_RDWR)  # for writing alone it would wait for a reader
    process = start(site, **options)
    try:
        assert process.stdout
        assert f"{line}\n" in iter(process.stdout.readline, "")
        process.send_signal(number)
        os.write(gate, b"open\n")
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
        os.close(gate)
    return process.returncode, errors


@pytest.mark.parametrize("exit_code", [75, 138], ids=["checkpoint", "killed before it listens"])
def test_signal_is_forwarded_and_the_step_waited_for(site: Path, exit_code: int) -> None:
    install(site, "srun", FAKE_SRUN_UNTIL_SIGNALLED.format(exit_code=exit_code))
    assert signalled(site, signal.SIGUSR1) == (exit_code, "")
    assert (site / "scontrol_arguments").exists()


def test_a_signal_before_the_step_requeues_the_job(site: Path) -> None:
    with (site / "slurm" / "env.sh").open("a") as file:
        file.write(f"echo loading modules; {GATE}\n")
    assert signalled(site, signal.SIGUSR1, "loading modules") == (75, "")
    assert not (site / "srun_arguments").exists()
    assert (site / "scontrol_arguments").read_text() == f"requeue {JOB}\n"


def test_a_signal_after_the_step_does_no_harm(site: Path) -> None:
    """In a script of one's own that goes on after the training."""
    text = (site / "slurm" / "oialr_resnet.sh").read_text()
    (site / "slurm" / "own.sh").write_text(f"{text}echo drawing; {GATE}\n")
    options = {"line": "drawing", "script": "own.sh"}
    assert signalled(site, signal.SIGUSR1, **options) == (0, "")
    assert not (site / "scontrol_arguments").exists()


def test_termination_leaves_the_requeue_to_slurm(site: Path) -> None:
    install(site, "srun", FAKE_SRUN.format(body=f'echo "step is running"; {GATE}; exit 75'))
    assert signalled(site, signal.SIGTERM) == (75, "")
    assert not (site / "scontrol_arguments").exists()


def test_run_directory_cannot_be_overridden(site: Path) -> None:
    exit_code, _, errors = submit(site, "training.epochs=3", "run.dir=elsewhere")
    assert exit_code == 2
    assert re.fullmatch(r"run\.dir: .*RUN_DIR.*\n", errors)
    assert not (site / "srun_arguments").exists()


def test_other_folders_are_refused(site: Path) -> None:
    (site / "slurm" / "job.sh").unlink()
    exit_code, _, errors = submit(site)
    assert exit_code == 2
    assert re.fullmatch(r".*slurm/job\.sh: not found; .*repository root\n", errors)


def header(path: Path) -> dict[str, str]:
    """The options of sbatch that a script sets."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.name)
def test_every_header_allows_to_go_on(path: Path) -> None:
    options = header(path)
    assert options["signal"] == "B:USR1@120"
    assert {"requeue", "open-mode", "output"} <= set(options)
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"
    assert ("%A_%a" if "array" in options else "%j") in options["output"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_configuration_exists(path: Path) -> None:
    for name in re.findall(r"configs/[\w/]+\.yaml", path.read_text()):
        assert (ROOT / name).exists()
    assert os.access(path, os.X_OK) == (path.name not in ("env.sh", "job.sh"))


@pytest.mark.parametrize("config", [None, "configs/cifar10_vit.yaml"])
def test_seeds_are_the_indices_of_the_array(site: Path, config: str | None) -> None:
    arguments = ["run.seed=7", "training.epochs=3"]
    variables = {"SLURM_ARRAY_JOB_ID": "90", "SLURM_ARRAY_TASK_ID": "3"}
    asked = [config, *arguments] if config else arguments
    assert submit(site, *asked, script="seeds.sh", **variables)[0] == 0
    assert program(site)[3:] == [
        *("--config", config or "configs/digits_vit.yaml", "data.root=data", *arguments),
        *("run.seed=3", "run.dir=runs/seed-90_3"),
    ]


@pytest.mark.parametrize(
    ("config", "data"),
    [
        ("configs/ettm2_autoformer.yaml", ["data.root=sets"]),
        ("configs/imagenet_vit_b16.yaml", ["data.root=sets/imagenet", "data.stage_to=/local/a b"]),
    ],
)
def test_any_configuration_is_trained_on_its_data(site: Path, config: str, data: list[str]) -> None:
    variables = {"DATA_ROOT": "sets", "STAGE_TO": "/local/a b"}
    assert submit(site, config, "training.epochs=3", script="train.sh", **variables)[0] == 0
    assert program(site)[3:] == [
        *("--config", config, *data, "training.epochs=3"),
        f"run.dir=runs/{Path(config).stem}-{JOB}",
    ]


@pytest.mark.parametrize("arguments", [[], ["training.epochs=3"], ["configs/nothing.yaml"]])
def test_a_configuration_that_is_not_there_is_one_line(site: Path, arguments: list[str]) -> None:
    exit_code, _, errors = submit(site, *arguments, script="train.sh")
    assert exit_code == 2
    assert re.fullmatch(r"(configs/nothing\.yaml|CONFIG): not found; name a .*\n", errors)
    assert not (site / "srun_arguments").exists()


def test_a_search_is_resumed_as_it_was_started(site: Path) -> None:
    (site / "mine.yaml").touch()
    submit(site, "mine.yaml", "search.evaluations=4", script="search.sh")
    run_dir = f"runs/search-{JOB}"
    assert program(site) == [
        *("python", "-m", "app.search", "--config", "mine.yaml"),
        *("data.root=data", "search.evaluations=4", f"run.dir={run_dir}"),
    ]
    (site / run_dir / "evaluations" / "00000").mkdir(parents=True)
    (site / run_dir / "search.yaml").touch()
    body = f"touch {run_dir}/evaluations/00000/summary.json; exit 1"
    install(site, "srun", FAKE_SRUN.format(body=body))
    submit(site, "search.evaluations=4", script="search.sh")
    assert program(site) == ["python", "-m", "app.search", "--resume", run_dir]
    assert (site / "scontrol_arguments").exists()  # an evaluation was finished


@pytest.mark.parametrize(
    ("made", "variables", "reported"),
    [
        (["seed-90_0", "seed-90_10", "seed-9_0", "vit-190"], {}, ["seed-90_0", "seed-90_10"]),
        (["vit-90", "report_of_90"], {}, ["vit-90"]),
        (["vit-90"], {"RUN_DIR": "runs/vit-7"}, ["vit-7"]),
        (["seed-90_0"], {"RUN_DIR": "runs/vit-7"}, ["seed-90_0"]),
        (["vit-9"], {}, None),
    ],
)
def test_the_report_is_of_all_that_a_job_has_brought(
    site: Path, made: list[str], variables: dict[str, str], reported: list[str] | None
) -> None:
    install(site, "python", '#!/usr/bin/env bash\nprintf "%s " "$@" >report_arguments\n')
    for name in made:
        (site / "runs" / name).mkdir(parents=True)
    exit_code, _, errors = submit(site, "90", "--formats", "png", script="report.sh", **variables)
    if reported is None:
        assert (exit_code, errors) == (1, "runs: job 90 has left no run here\n")
        return
    assert (exit_code, errors) == (0, "")
    assert (site / "report_arguments").read_text().split() == [
        *("-m", "app.report", *(f"runs/{name}" for name in reported)),
        *("--output", "runs/report_of_90", "--formats", "png"),
    ]


@pytest.mark.parametrize("name", ["oialr_resnet.sh", "train.sh"])
def test_configuration_fits_the_header(name: str) -> None:
    configuration = load(CONFIGURATION, ["data.root=imagenet"])
    options = header(ROOT / "slurm" / name)
    processes = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert configuration.training.batch_size % processes == 0
    assert configuration.data.workers < int(options["cpus-per-task"])
    assert configuration.model.name == "resnetrs101"
    images = round(1_281_167 * (1 - configuration.data.validation_fraction))
    steps = images // configuration.training.batch_size
    paper = load(CONFIGURATION.parent / "paper" / CONFIGURATION.name)
    assert paper.oialr.delay == 10 * steps  # as the comments in the file say
    assert paper.oialr.update_interval == steps // 2
    configuration.check_steps(configuration.training.epochs * steps)


def test_nothing_is_submitted_where_no_script_is_named(site: Path) -> None:
    """sbatch would read one from the terminal, and seem to hang."""
    install(site, "sbatch", "#!/usr/bin/env bash\ntouch submitted\n")
    path = f"{site / 'bin'}:{os.environ['PATH']}"
    result = subprocess.run(
        ["slurm/submit_with_report.sh"],
        cwd=site,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("usage: slurm/submit_with_report.sh ")
    assert not (site / "submitted").exists()
