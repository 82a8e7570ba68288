"""The front doors to a run's trained network: app.export and app.evaluate."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.launching import train
from support.tiny_run import TINY
from torch import nn

from app import config, evaluate, export
from app.command import how_to_use
from app.data import datasets
from app.errors import UserError
from app.training.trained import has_weights
from oialr.errors import ExportError
from oialr.export import files
from oialr.export.formats import READ_BY_SUFFIX, check_name, read_exported

FILES = {
    "dense": "dense.pt",
    "factors": "factors.safetensors",
    "onnx": "onnx.onnx",
    "torch-export": "torch-export.pt2",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An averaged training that converts and cuts: what is tested is not what was trained last."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    said = train(0, *TINY, "training.ema_decay=0.9", f"run.dir={folder}").stdout
    assert said.splitlines()[-2] == how_to_use(folder)
    return folder


def figures(folder, part="test"):
    summary = json.loads((folder / "summary.json").read_text())
    return [f"{part}_{name}: {summary[f'{part}_{name}']:.4f}" for name in ("loss", "accuracy")]


@pytest.mark.slow
def test_a_run_gives_the_figures_of_its_test(run, capsys):
    assert evaluate.main([str(run)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{run}: weights after step 32"
    assert lines == figures(run)
    assert evaluate.main([str(run), "--part", "validation"]) == 0
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == ["validation_loss", "validation_accuracy"]


@pytest.mark.slow
def test_a_state_dict_of_anybody_gives_the_figures_of_the_run(run, capsys):
    """Of an older torch.save, within a checkpoint, of safetensors, with a wrapper's names."""
    assert export.main([str(run)]) == 0
    state = torch.load(run / "exported" / "dense.pt")
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(state, run / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": wrapped, "epoch": 3}, run / "nested.pt")
    save_file(state, run / "plain.safetensors")
    for name in ("old.pt", "nested.pt", "plain.safetensors"):
        capsys.readouterr()
        assert evaluate.main([str(run / name)]) == 0
        assert capsys.readouterr().out.splitlines()[1:] == figures(run)
    # What oialr.save has written has a checksum, and is read by that alone.
    assert (
        export.main([str(run), "--format", "factors", "--output", str(run / "f.safetensors")]) == 0
    )
    content = (run / "f.safetensors").read_bytes()
    (run / "f.safetensors").write_bytes(content[:-3] + bytes(byte ^ 1 for byte in content[-3:]))
    with pytest.raises(UserError, match=r"f\.safetensors is damaged"):
        evaluate.main([str(run / "f.safetensors")])


@pytest.mark.slow
@pytest.mark.parametrize("form", FILES)
def test_a_file_gives_the_figures_of_the_run(run, form, capsys):
    assert export.main([str(run), "--format", form, "--samples", "5"]) == 0
    first, told, how = capsys.readouterr().out.splitlines()
    path = run / "exported" / FILES[form]
    assert first == f"{run}: weights after step 32, 5 samples to compare"
    assert re.match(rf"{path}: {form}, largest difference \d\.\de-\d+ of outputs", told)
    assert how == f"evaluate it: python -m app.evaluate {path}"
    assert evaluate.main([str(path)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == str(path)
    assert lines == figures(run)


@pytest.mark.slow
def test_a_file_is_used_by_what_its_description_says(run, tmp_path, capsys):
    """And by nothing else: from stored pixels to the accuracy of the run."""
    path = tmp_path / "digits.onnx"
    assert export.main([str(run), "--format", "onnx", "--output", str(path)]) == 0
    told = json.loads((tmp_path / "digits.onnx.json").read_text())
    assert told["input"]["shape"] == ["batch", 1, 8, 8]
    assert told["output"] == {"shape": ["batch", 10], "class_names": []}
    test = datasets.load(config.load(run / "config.yaml").data).test
    mean, std = (np.array(told["input"]["preprocessing"][key]) for key in ("mean", "std"))
    images = (test.images - mean[:, None, None]) / std[:, None, None]
    (outputs,) = read_exported(path)(torch.tensor(images.astype(told["input"]["dtype"])))
    right = (np.asarray(outputs).argmax(1) == test.labels).mean()
    assert f"test_accuracy: {right:.4f}" in figures(run)
    # Whatever the data are that it is evaluated on, it is normalized as it was trained.
    assert evaluate.main([str(path), "--run", str(run), "data.train_samples=20"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == figures(run)
    (tmp_path / "digits.onnx.json").write_text("{}")
    with pytest.raises(UserError, match=r"digits.onnx.json is damaged: export the network anew"):
        evaluate.main([str(path), "--run", str(run)])


@pytest.mark.slow
@pytest.mark.parametrize("method", [["oialr.delay=0.5"], ["oialr.delay=stability"]])
def test_a_run_of_shares_is_read_with_other_data_and_batches(method, tmp_path, capsys):
    """A share is one of that run, though with these the numbers of steps are others."""
    run = tmp_path / "run"
    shares = ["oialr.update_interval=0.2", "oialr.release=0.9", "oialr.latest_delay=0.6"]
    train(0, *TINY, *shares, *method, f"run.dir={run}")
    for other in ("training.batch_size=125", "data.train_samples=70", "training.epochs=9"):
        assert evaluate.main([str(run), other]) == 0
        assert capsys.readouterr().out.splitlines()[1:] == figures(run)
        assert export.main([str(run), "--format", "factors", other]) == 0
        assert evaluate.main([str(run / "exported" / "factors.safetensors"), other]) == 0
        assert capsys.readouterr().out.splitlines()[-2:] == figures(run)


@pytest.mark.parametrize(("asked", "there"), [(1, 1), (100, 100), (10**6, 180)])
def test_samples_to_compare_are_those_of_several_batches(run, capsys, asked, there):
    assert export.main([str(run), "--samples", str(asked)]) == 0
    assert f", {there} samples to compare\n" in capsys.readouterr().out


@pytest.mark.slow
def test_the_weights_that_a_run_began_with_need_not_be_there(tmp_path, capsys):
    for name, keys in (("first", ["oialr.enabled=false"]), ("second", ["model.initial=first"])):
        train(0, *TINY, *keys, f"run.dir={name}", cwd=tmp_path)
    shutil.rmtree(tmp_path / "first")
    second = tmp_path / "second"
    assert evaluate.main([str(second)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == figures(second)
    assert export.main([str(second)]) == 0
    assert evaluate.main([str(second / "exported" / "dense.pt")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == figures(second)


def test_a_file_elsewhere_is_evaluated_by_its_run(run, tmp_path, capsys):
    path = tmp_path / "model of mine.pt"
    assert export.main([str(run), "--output", str(path)]) == 0
    how = capsys.readouterr().out.splitlines()[-1]
    assert how == f"evaluate it: python -m app.evaluate '{path}' --run {run}"
    assert evaluate.main([str(path), "--run", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == figures(run)
    assert evaluate.main([str(path), "--run", str(run / "config.yaml")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == figures(run)
    with pytest.raises(UserError, match=r"lies in the folder of no run: .* by --run"):
        evaluate.main([str(path)])
    state = torch.load(path, weights_only=True)
    assert "blocks.0.attn.qkv.weight" in state
    assert not any(name.endswith((".U", ".core", ".Vh", ".A", ".B")) for name in state)


@pytest.mark.slow
def test_the_best_weights_are_those_that_were_tested(tmp_path, capsys):
    stopped = [*TINY, "training.early_stopping=1", "training.learning_rate=0.05"]
    train(0, *stopped, "training.epochs=6", f"run.dir={tmp_path / 'run'}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tested_step"] < summary["steps"]
    assert evaluate.main([str(tmp_path / "run")]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith(f"weights after step {summary['tested_step']}")
    assert lines == figures(tmp_path / "run")


def test_without_a_checkpoint_there_are_no_weights(run, tmp_path):
    assert has_weights(run)
    (tmp_path / "checkpoints" / "partial-00000008").mkdir(parents=True)
    assert not has_weights(tmp_path)
    assert not has_weights(tmp_path / "nothing")


@pytest.mark.parametrize("form", FILES)
def test_files_have_names_by_which_they_are_read(form):
    own = Path(FILES[form]).suffix
    for name in ("a", "a.pt", "a.ONNX", "a.onnx", "a.pt2", "a.safetensors"):
        read_by = READ_BY_SUFFIX.get(Path(name).suffix)
        if (form, name) == ("dense", "a.safetensors"):
            with pytest.raises(
                UserError, match=r"^a\.safetensors: .* written by torch\.save: name"
            ):
                check_name(form, Path(name))
        elif read_by == form or (read_by is None and own not in READ_BY_SUFFIX):
            check_name(form, Path(name))
        else:
            with pytest.raises(UserError, match=rf"^{name}: .*: name the file a.*{own}$"):
                files.EXPORTERS[form](nn.Linear(2, 2), name, torch.ones(1, 2))


@pytest.mark.parametrize(
    ("door", "arguments", "message"),
    [
        (export, ["{}/nothing"], "nothing is no folder of a run"),
        (export, ["{}/empty"], r"empty holds no run \(no config.yaml there\)"),
        (export, ["{}/begun"], "begun has no checkpoint: there are no weights as yet"),
        (export, ["{}/tiny", "--samples", "0"], "--samples: 0 is not a positive number"),
        (export, ["{}/tiny", "--format", "onx"], "invalid choice: 'onx'"),
        (export, ["{}/tiny", "oialr.cutof=1"], "oialr.cutof"),
        (
            export,
            ["{}/tiny", "--format", "onnx", "--output", "{}/digits"],
            "digits: onnx is read by the suffix .onnx: name the file .*/digits.onnx$",
        ),
        (
            export,
            ["{}/tiny", "--output", "{}/digits.pt2"],
            "digits.pt2: .pt2 is the suffix of torch-export, and this is dense: .*/digits.pt$",
        ),
        (
            export,
            ["{}/tiny", "--output", "{}/digits.safetensors"],
            "digits.safetensors: .safetensors is the suffix of safetensors, .*/digits.pt, or exp",
        ),
        (evaluate, ["{}/nothing"], "there is no such folder or file"),
        (evaluate, ["{}/tiny", "--run", "{}/tiny"], "--run is for a file"),
        (evaluate, ["{}/tiny/metrics.h5"], "metrics.h5 is no file of weights"),
        (evaluate, ["{}/tiny/other.pt"], "other.pt belongs to another network: "),
    ],
)
def test_a_mistake_is_one_line(run, door, arguments, message):
    folder = run.parent
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "begun").mkdir(exist_ok=True)
    shutil.copy(run / "config.yaml", folder / "begun")
    torch.save({"weight": torch.ones(3)}, run / "other.pt")
    with pytest.raises(UserError, match=message) as raised:
        door.main([argument.format(folder) for argument in arguments])
    assert "\n" not in str(raised.value)


def test_a_network_that_cannot_be_written_ends_with_one(run, monkeypatch, capsys):
    def fail(*_):
        raise ExportError("torch finds no ONNX for this network: x")

    monkeypatch.setitem(files.EXPORTERS, "onnx", fail)
    assert export.main([str(run), "--format", "onnx", "--output", str(run / "no.onnx")]) == 1
    assert capsys.readouterr().err == "error: torch finds no ONNX for this network: x\n"
    assert not (run / "no.onnx").exists()
