"""The program as a user starts it: command line, resume, signals, faults, mistakes."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from support.launching import ROOT, TIMEOUT, command, environment, launch, train
from support.tiny_run import DISTURBED, PAPER, TINY, assert_same_run, last_checkpoint, metrics

from app.recording.store import read_rows
from app.runtime.stop_signal import StopSignal

# Every cut halves all ranks, so that trainings which differ in their last bits keep equal ranks.
HALVED = [*TINY, "oialr.cutoff=0.95"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Run the tiny configuration on 1, 2, 3 processes, each once, on demand."""
    runs = {}

    def run(processes):
        if processes not in runs:
            folder = tmp_path_factory.mktemp(f"undisturbed-{processes}")
            train(processes, *TINY, f"run.dir={folder}")
            runs[processes] = folder
        return runs[processes]

    return run


@pytest.mark.parametrize(
    ("processes", "stops"),
    # 8: the end of an epoch; 14, 15, 16: before, right after and after the conversion; 20, 21: a
    # cut.
    [(0, [8, 15]), (1, [14, 27]), (2, [15, 21]), (3, [3, 16]), (3, [20, 26])],
)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, undisturbed, processes, stops):
    reference = undisturbed(max(1, processes))
    arguments = [*TINY, f"run.dir={tmp_path}"]
    said = []
    for step in stops:
        result = train(processes, *arguments, f"run.stop_after={step}", code=75)
        stopped, drawn = result.stderr.splitlines()[-2:]
        assert (
            stopped
            == f"stopped by run.stop_after after step {step}: go on with --resume {tmp_path}"
        )
        assert drawn == f"draw it: python -m app.report {tmp_path}"
        said += [result.stdout, result.stderr]
        arguments = ["--resume", tmp_path]
    said.append(train(processes, *arguments, "run.stop_after=null").stdout)
    assert said[-1].splitlines()[-1] == f"draw it: python -m app.report {tmp_path}"
    assert (tmp_path / "log.txt").read_text() == "".join(said)
    assert_same_run(tmp_path, reference)


def test_a_run_leaves_everything_in_its_folder(undisturbed):
    folder = undisturbed(2)
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.h5",
        "checkpoints",
        "log.txt",
        "summary.json",
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 32
    assert summary["processes"] == 2
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["trainable_percent"] < 50
    assert summary["tested_step"] == 32
    assert summary["tested_ranks"] == last_checkpoint(folder)["method"]["ranks"]
    assert summary["cpu_seconds"] > 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["oialr"]["delay"] == 15
    (last,) = (folder / "checkpoints").iterdir()  # run.tidy
    assert sorted(path.name for path in last.iterdir()) == [
        "process-00000.pt",
        "process-00001.pt",
        "state.pt",
    ]

    rows = read_rows(folder / "metrics.h5", "lowrank")
    assert list(rows["event"]) == ["convert", "cut", "cut"]
    assert list(rows["step"]) == [15, 21, 27]
    assert (rows["broadcast_bytes"] > 0).all()
    train_rows = read_rows(folder / "metrics.h5", "train")
    assert list(train_rows["step"]) == list(range(1, 33))
    evaluations = read_rows(folder / "metrics.h5", "eval")
    assert list(evaluations["split"]) == ["validation"] * 4 + ["test"]
    group = "layers/blocks.1.mlp.fc1.weight"
    assert read_rows(folder / "metrics.h5", f"{group}/rank")["rank"][0] == 32
    stability = read_rows(folder / "metrics.h5", f"{group}/stability")
    assert list(stability["epoch"]) == [0, 1, 2, 3, 4]
    assert np.isnan(stability["stability"]).tolist() == [True, True, False, False, False]
    assert (stability["stability"][2:] > 0.5).all()
    # NaN at full rank; the conversion lies in the second epoch.
    assert np.isnan(stability["orthonormality_error"]).tolist() == [True, True, False, False, False]
    assert (stability["orthonormality_error"][2:] < 1e-5).all()
    assert (stability["stable_rank"] <= stability["rank"]).all()
    means = read_rows(folder / "metrics.h5", "stability")
    assert list(means["step"]) == [0, 8, 16, 24, 32]
    assert list(means["layers"]) == [10] * 5
    assert (means["seconds"] > 0).all()
    names = [name for name in last_checkpoint(folder)["rows"] if name.endswith("/stability")]
    values = [read_rows(folder / "metrics.h5", name)["stability"] for name in names]
    tokens = [n for n in names if "token" in n or "pos_embed" in n]
    assert len(tokens) == 2
    averaged = [v for n, v in zip(names, values, strict=True) if n not in tokens]
    np.testing.assert_allclose(means["mean_stability"], np.mean(averaged, axis=0))


def test_the_process_count_does_not_change_what_is_learned(undisturbed):
    losses = [read_rows(undisturbed(count) / "metrics.h5", "train")["loss"] for count in (1, 2, 3)]
    # The order of samples is the same; dropout differs, and summation in its last bits.
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
    np.testing.assert_allclose(losses[2], losses[0], rtol=0.05)


def test_a_conversion_that_leaves_all_layers_full_rank_leaves_the_replicas_together(tmp_path):
    """The wrapper is let go of before it, and gradients must be averaged after it still."""
    options = ["oialr.defer_conversion=true", "oialr.cutoff=1e-4", "oialr.largest_cut=0.1"]
    options += ["oialr.exclude=[patch_embed*]", "training.epochs=3", f"run.dir={tmp_path}"]
    result = train(2, *TINY, *options)
    for event in ("step 15: convert of 8 layers", "step 21: update of 4 layers"):
        assert event in result.stdout


def test_split_factorizations_train_like_whole_ones(tmp_path):
    """Two whole trainings, one with every layer split by Heat that can be."""
    whole, split = (tmp_path / name for name in ("whole", "split"))
    train(2, *HALVED, f"run.dir={whole}")
    result = train(2, *HALVED, "distributed.factorization=heat", f"run.dir={split}")
    assert "imbalance" in result.stdout
    assert " 7 layers split over processes" in result.stdout
    for group, columns, tolerance in (
        ("train", ["loss"], 1e-3),
        ("lowrank", ["step", "trainable_parameters", "broadcast_bytes"], 0),
        ("eval", ["loss"], 1e-3),
    ):
        mine, theirs = (read_rows(folder / "metrics.h5", group) for folder in (split, whole))
        for column in columns:
            np.testing.assert_allclose(mine[column], theirs[column], rtol=tolerance)


def test_a_calibration_that_is_not_there_is_the_users_mistake(tmp_path):
    path = tmp_path / "none.json"
    result = train(2, *TINY, f"run.dir={tmp_path}", f"distributed.calibration={path}", code=2)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: distributed.calibration: {path}: No such file or directory")


def test_heat_without_mpi_is_refused(tmp_path):
    result = launch(
        0,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "-m",
        "app.train",
        *TINY,
        f"run.dir={tmp_path}",
        "distributed.factorization=heat",
        code=1,
    )
    assert "distributed.factorization: heat needs the processes of mpirun or srun" in result.stderr


STEPS = ["stability.unit=steps", "stability.interval=2", "stability.window=6"]
STEPS += ["stability.reference_dtype=bfloat16", "stability.exclude=[cls_token]"]


@pytest.mark.parametrize("background", [0, 1, 3])
def test_stability_by_steps_continues_exactly(tmp_path, background):
    """In the background too, where the undisturbed run is measured in the foreground."""
    train(2, *TINY, *STEPS, f"run.dir={tmp_path / 'whole'}")
    arguments = [*TINY, *STEPS, f"run.dir={tmp_path / 'parts'}"]
    arguments.append(f"stability.background_steps={background}")
    for step in (9, 16):
        train(2, *arguments, f"run.stop_after={step}", code=75)
        arguments = ["--resume", tmp_path / "parts"]
    train(2, *arguments, "run.stop_after=null")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    file = tmp_path / "whole" / "metrics.h5"
    rows = read_rows(file, "stability")
    assert list(rows["step"]) == list(range(0, 33, 2))
    assert list(rows["epoch"]) == [step // 8 for step in rows["step"]]
    assert np.isnan(rows["mean_stability"]).tolist() == [step < 6 for step in rows["step"]]
    assert len(read_rows(file, "layers/pos_embed/stability")["step"]) == 17
    assert len(read_rows(file, "layers/cls_token/stability")["step"]) == 0


def test_stability_by_epochs_in_the_background_is_that_of_the_foreground(tmp_path):
    options = [*TINY, "stability.window=1", "run.checkpoint_epochs=4"]
    files, shown = [], []
    for steps in (0, 3):
        folder = tmp_path / str(steps)
        result = train(0, *options, f"stability.background_steps={steps}", f"run.dir={folder}")
        files.append(folder / "metrics.h5")
        lines = [line for line in result.stdout.splitlines() if "  stability " in line]
        shown.append([line.split("/")[0] for line in lines])
    for group in ("stability", "layers/pos_embed/stability"):
        mine, theirs = (read_rows(file, group) for file in files)
        for column in set(mine) - {"seconds"}:
            np.testing.assert_array_equal(mine[column], theirs[column])
    # A line never shows another epoch's: only with the checkpoint at the end it is there in time.
    assert shown == [["epoch 1", "epoch 2", "epoch 3", "epoch 4"], ["epoch 4"]]


@pytest.mark.parametrize("background", [0, 3])
def test_a_weight_that_diverged_is_named_with_the_step(tmp_path, background):
    options = [*TINY, f"stability.background_steps={background}", f"run.dir={tmp_path}"]
    result = launch(2, DISTURBED, "nan", 1, 8, *options, code=1)  # at the end of the first epoch
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "blocks.1.mlp.fc2.weight holds NaN or infinity" in lines[0]
    assert lines[0].endswith("(step 8)")
    assert f"draw it: python -m app.report {tmp_path}" in result.stderr


def test_a_finished_run_goes_on_for_more_epochs(tmp_path):
    """Tidied or not, the training is the same; tidied, the bases begin anew."""
    for name in ("tidied", "kept"):
        folder = tmp_path / name
        train(0, *TINY, f"run.dir={folder}", f"run.tidy={str(name == 'tidied').lower()}")
        assert len(list((folder / "checkpoints").glob("step-*"))) == (1 if name == "tidied" else 2)
        result = train(0, "--resume", folder, "training.epochs=6")
        assert ("no bases of stability" in result.stderr) == (name == "tidied")
    mine, theirs = metrics(tmp_path / "tidied"), metrics(tmp_path / "kept")
    np.testing.assert_array_equal(mine["train/loss"], theirs["train/loss"])
    for known, values in ((2, mine), (4, theirs)):
        assert np.isfinite(values["stability/mean_stability"]).sum() == known + 1


def test_resume_on_another_number_of_processes(tmp_path):
    train(2, *TINY, f"run.dir={tmp_path}", "run.stop_after=16", code=75)
    train(1, "--resume", tmp_path, "run.stop_after=null")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 32
    rows = read_rows(tmp_path / "metrics.h5", "sessions")
    assert list(rows["process_count"]) == [2, 1]
    assert list(rows["first_step"]) == [0, 16]
    stability = read_rows(tmp_path / "metrics.h5", "stability")  # no reference is lost
    assert np.isnan(stability["mean_stability"]).tolist() == [True, True, False, False, False]


def test_resume_of_a_finished_run_changes_nothing(undisturbed):
    folder = undisturbed(1)
    before = (folder / "metrics.h5").read_bytes()
    result = train(0, "--resume", folder)
    assert "test_accuracy" in result.stdout
    *_, told, used, drawn = result.stdout.splitlines()
    assert told == f"{folder} was finished before: nothing was trained now"
    assert used.startswith(f"use it: python -m app.export {folder} ")
    assert drawn == f"draw it: python -m app.report {folder}"
    assert (folder / "metrics.h5").read_bytes() == before


def test_resume_before_the_first_checkpoint_starts_over(tmp_path):
    launch(0, DISTURBED, "kill", 0, 3, *TINY, f"run.dir={tmp_path}", code=-signal.SIGKILL)
    assert not (tmp_path / "checkpoints").exists()
    train(0, "--resume", tmp_path, "training.epochs=3")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 24


def test_a_resume_that_does_not_fit_changes_nothing(tmp_path):
    train(0, *TINY, f"run.dir={tmp_path}", "run.stop_after=16", code=75)
    files = [tmp_path / "config.yaml", tmp_path / "metrics.h5"]
    before = [file.read_bytes() for file in files]
    result = train(0, "--resume", tmp_path, "model.arguments.depth=1", code=2)
    assert "the checkpoint does not fit the configuration" in result.stderr
    for key, value, old in (("optimizer", "sgd", "adamw"), ("weight_decay", "0.5", "0.05")):
        result = train(0, "--resume", tmp_path, f"training.{key}={value}", code=2)
        line = f"error: training.{key}: cannot change when a run is resumed: it was {old}\n"
        assert result.stderr == line
    result = train(0, "--resume", tmp_path, "oialr.enabled=false", code=2)
    assert result.stderr.startswith("error: oialr.enabled: cannot change when a run is resumed")
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("keys", [["oialr.release=delay"], ["oialr.release=0.75"]])
def test_a_share_that_is_another_step_now_is_told_with_the_one_that_it_was(tmp_path, keys):
    train(0, *TINY, "oialr.delay=0.5", *keys, f"run.dir={tmp_path}")
    result = train(0, "--resume", tmp_path, "training.epochs=6", code=2)
    cure = "oialr.delay=16" + (" oialr.release=24" if len(keys[0]) < 19 else "")
    told = "oialr.delay: 0.5 of the run was step 16, and is step 24 of its 48 steps now"
    assert result.stderr.startswith(f"error: {told}")
    assert result.stderr.endswith(f": add {cure} to go on\n")
    train(0, "--resume", tmp_path, "training.epochs=6", *cure.split())
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 48


def test_a_damaged_checkpoint_is_passed_over(tmp_path, undisturbed):
    train(1, *TINY, f"run.dir={tmp_path}", "run.stop_after=20", code=75)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    state = newest / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    result = train(1, "--resume", tmp_path, "run.stop_after=null")
    assert f"{newest} cannot be read" in result.stderr
    assert_same_run(tmp_path, undisturbed(1))


def test_a_signal_that_reaches_one_process_stops_all_at_one_step(tmp_path, undisturbed):
    arguments = [*TINY, f"run.dir={tmp_path}"]
    result = launch(3, DISTURBED, "signal", 1, 7, *arguments, code=75)
    assert result.stderr.count("stopped by signal") == 1
    assert last_checkpoint(tmp_path)["position"]["step"] in range(7, 11)
    train(3, "--resume", tmp_path)
    assert_same_run(tmp_path, undisturbed(3))


def test_a_signal_ends_an_evaluation_too(tmp_path, undisturbed):
    """Which may take long; it is repeated, and the bases are not measured twice."""
    arguments = [*TINY, f"run.dir={tmp_path}"]
    result = launch(2, DISTURBED, "evaluation", 1, 16, *arguments, code=75)
    assert "stopped by signal 15 after step 16" in result.stderr
    assert last_checkpoint(tmp_path)["position"] == {"step": 16, "epoch": 1, "batch": 8}
    result = launch(2, DISTURBED, "evaluation", 0, 32, "--resume", tmp_path, code=75)
    assert "epoch 2/4" in result.stdout
    train(2, "--resume", tmp_path)
    assert_same_run(tmp_path, undisturbed(2))


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_to_a_single_process(tmp_path, number):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
    try:
        process = subprocess.Popen(
            command(0, "-m", "app.train", "training.epochs=500", f"run.dir={tmp_path}"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                process.send_signal(number)
                break
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 75
    assert f"stopped by signal {number:d} after step" in errors
    assert "Traceback" not in errors
    assert ("Ctrl-C: stops after a checkpoint" in errors) == (number == signal.SIGINT)
    assert last_checkpoint(tmp_path)["position"]["step"] >= 20


@pytest.mark.parametrize(("what", "code"), [("fault", 1), ("kill", 9)])
def test_a_fault_on_one_process_ends_all(tmp_path, what, code):
    result = launch(3, DISTURBED, what, 1, 20, *TINY, f"run.dir={tmp_path}", code=code)
    if what == "fault":
        assert "process 1 of 3 failed" in result.stderr
        assert "the machine is on fire" in result.stderr
        assert f"draw it: python -m app.report {tmp_path}" in result.stderr
    # Nothing is lost: the last checkpoint and the metrics are readable.
    assert last_checkpoint(tmp_path)["position"]["step"] == 16
    assert len(read_rows(tmp_path / "metrics.h5", "train")["step"]) >= 16


MISTAKES = [
    (["training.epoch=3"], "error: training.epoch: unknown key; did you mean training.epochs?"),
    ([*PAPER, "oialr.delay=5000"], "error: oialr.delay: 5000 is not less than the 1200 steps"),
    (["--config", "gone.yaml"], "error: --config: cannot read gone.yaml"),
    (["--bogus"], "error: unrecognized arguments: --bogus"),
    (["--resume", "gone"], "error: --resume: gone holds no run"),
    (["model.name=resnet5"], "error: model.name"),
    (["model.arguments.embed_dim=63"], "error: model.arguments"),
    (["data.name=mnist", "data.root=gone"], "error: "),
    (["stability.include=[x]"], "error: stability.include: the pattern 'x' matches no weight"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda v: str(v)[:30])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    result = train(0, *arguments, f"run.dir={tmp_path / 'run'}", code=2)
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert not (tmp_path / "run").exists()  # made when everything fits together


def test_a_folder_that_cannot_be_made_is_told_before_the_data_are_read(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        place = tmp_path / folder
        result = train(0, "data.name=mnist", "data.root=gone", f"run.dir={place}", code=2)
        line = f"error: run.dir: cannot write to {place}: {tmp_path / 'file'} is no folder\n"
        assert result.stderr == line


@pytest.mark.parametrize("arguments", [["training.epoch=3"], [*PAPER, "oialr.delay=5000"]])
def test_a_mistake_is_reported_by_one_process(tmp_path, arguments):
    result = train(2, *arguments, f"run.dir={tmp_path / 'run'}", code=2)
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr


def test_a_mistake_that_shows_on_one_process_ends_all(tmp_path):
    result = launch(2, DISTURBED, "mistake", 1, 5, *TINY, f"run.dir={tmp_path}", code=2)
    assert result.stderr.count("error: image 7 is damaged") == 1
    assert "Traceback" not in result.stderr


def test_a_folder_that_holds_a_run_is_not_overwritten(undisturbed):
    folder = undisturbed(1)
    result = train(0, *TINY, f"run.dir={folder}", code=2)
    assert f"--resume {folder}" in result.stderr


@pytest.mark.parametrize(
    "pmi2", [{}, {"PMI_RANK": "0", "PMI_SIZE": "2", "PMI_JOBID": "7.0"}], ids=["none", "pmi2"]
)
def test_a_launch_of_n_copies_is_refused(tmp_path, pmi2):
    variables = {**environment(), "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", **pmi2}
    result = subprocess.run(
        command(0, "-m", "app.train", f"run.dir={tmp_path}"),
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert result.returncode == 2
    assert "srun started 2 processes, but each sees 1" in result.stderr
    assert "--mpi=pmi2" in result.stderr


def test_one_process_needs_no_mpi_heat_or_propulate(tmp_path):
    program = (
        "import sys\n"
        "for name in ('mpi4py', 'heat', 'propulate'): sys.modules[name] = None\n"
        "from app.train import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    launch(0, "-c", program, *TINY, f"run.dir={tmp_path}")


def test_torchrun_is_the_same_program(tmp_path, undisturbed):
    arguments = ["--standalone", "--nproc-per-node=2", "-m", "app.train"]
    launch(0, "-m", "torch.distributed.run", *arguments, *TINY, f"run.dir={tmp_path}")
    assert_same_run(tmp_path, undisturbed(2))


def test_help_imports_nothing_heavy():
    program = (
        "import sys, app.train\n"
        "try: app.train.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    result = launch(0, "-c", program)
    assert "mpirun -n 8 python -m app.train" in result.stdout
    assert "oialr.cutoff" in train(0, "--keys").stdout


def test_explain_prints_a_table_and_trains_nothing(tmp_path, undisturbed):
    result = train(0, *TINY, "--explain", f"run.dir={tmp_path / 'run'}")
    assert "blocks.0-1.mlp.fc2.weight" in result.stdout
    assert not (tmp_path / "run").exists()
    folder = undisturbed(1)
    lines = train(0, "--explain", "--resume", folder).stdout.splitlines()
    name = "patch_embed.proj.weight"
    (line,) = [line.split() for line in lines if line.startswith(name)]
    assert line[3] == str(last_checkpoint(folder)["method"]["ranks"][name])


def test_full_rank_baseline(tmp_path):
    train(0, *TINY, "oialr.enabled=false", f"run.dir={tmp_path}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["trainable_percent"] == 100
    assert summary["trained_parameters"] == summary["stored_parameters"]
    assert summary["tested_ranks"] == {}
    assert len(read_rows(tmp_path / "metrics.h5", "lowrank")["step"]) == 0
    result = train(0, "--explain", "--resume", tmp_path, "oialr.enabled=true", code=2)
    assert f"--explain: {tmp_path} is a full-rank training" in result.stderr


@pytest.mark.parametrize("accumulation", [3])
def test_gradient_accumulation_gives_the_same_losses(tmp_path, accumulation):
    options = [*HALVED, "model.arguments.proj_drop_rate=0"]
    train(2, *options, f"run.dir={tmp_path / 'a'}")
    train(2, *options, f"training.accumulation={accumulation}", f"run.dir={tmp_path / 'b'}")
    losses = [read_rows(tmp_path / name / "metrics.h5", "train")["loss"] for name in "ab"]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_global_generators_are_left_alone(tmp_path):
    program = (
        "import sys, torch, random, numpy\n"
        "from app.train import main\n"
        "before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())\n"
        "main(sys.argv[1:])\n"
        "assert torch.equal(torch.get_rng_state(), before[0])\n"
        "assert random.getstate() == before[1]\n"
        "assert str(numpy.random.get_state()) == before[2]\n"
    )
    launch(0, "-c", program, *TINY, "training.epochs=2", f"run.dir={tmp_path}")


def test_the_environment_is_not_inherited():
    assert "PMI_RANK" not in environment()
    assert os.path.exists(command(1)[0])
    assert sys.executable in command(0)


def test_what_no_process_can_compute_deterministically_is_one_mistake(tmp_path):
    result = train(
        2,
        *("model.name=tests.support.scatters:Scatters", "model.arguments={}"),
        *("training.epochs=1", "training.warmup_epochs=0", "oialr.enabled=false"),
        *("training.deterministic=true", f"run.dir={tmp_path / 'run'}"),
        code=2,
    )
    assert result.stderr.count("error: training.deterministic: put_") == 1
