"""python -m app.analyze: checkpoints of any origin, measured as during training."""

import argparse
import json
import re
import struct
import sys
import types
import zipfile
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_files import save_series, save_shards
from support.launching import launch
from torch import nn

from app import OIALR, analyze, report
from app.analysis.checkpoint import read_checkpoint
from app.analysis.choice import Found, compare, drop_copies, order, several_series
from app.analysis.files import (
    NamedTimes,
    Source,
    find_checkpoints,
    natural_order,
    without_time,
)
from app.errors import UserError
from app.recording.store import Follower, read_rows
from app.reporting.runs import read_run
from app.training.foreign_files import CheckpointError
from oialr.layer_survey import survey
from oialr.placement.processes import Processes
from oialr.stability.tracker import BasisTracker


class Network(nn.Module):
    """One of each kind of weight that is stored in a way of its own."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 8)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.conv = nn.Conv1d(8, 8, 3, groups=2, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True)
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.tokens(x) + self.position
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.cross(x, x[..., :6], torch.cat([x, x[..., :2]], -1), need_weights=False)[0]
        return self.head(self.fc(x).relu())


def train_and_save(folder, *, checkpoints=6):
    """Train across a conversion and cuts; save each time, and measure as a training does."""
    torch.manual_seed(0)
    folder.mkdir()
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    method = OIALR(
        model, optimizer, delay=6, update_interval=2, cutoff=0.3, layer_fraction=1.0,
        rank_multiple=1,
    )  # fmt: skip
    tracker = BasisTracker(survey(model), Processes(), window=2)
    rows = []
    for epoch in range(checkpoints):
        torch.save({"model": model.state_dict(), "epoch": epoch}, folder / f"epoch-{epoch}.pt")
        rows.append(tracker.measure(model, epoch))
        for _ in range(3):
            x = torch.randint(7, (16, 5))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, 1), (x % 3).flatten()).backward()
            optimizer.step()
            method.step()
    assert min(method.ranks().values()) < 6
    return rows


@pytest.mark.slow
def test_checkpoints_are_measured_as_the_training_was_across_the_conversion(tmp_path, capsys):
    expected = train_and_save(tmp_path / "run")
    code = analyze.main([str(tmp_path / "run"), "--window", "2", "--output", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().err
    metrics = tmp_path / "out" / "metrics.h5"
    reader = Follower(metrics)
    names = [layer.name for layer in reader.layers()]
    shapes = {layer.name: layer.shape for layer in reader.layers()}
    assert sorted(names) == sorted(row.name for row in expected[0])
    assert {name for name in names if "_proj_weight" in name} == {
        "attention.in_proj_weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
    }
    assert shapes["conv.weight"] == (8, 4, 3)
    for name in names:
        stored = read_rows(metrics, f"layers/{name}/stability")
        assert stored["epoch"].tolist() == list(range(6))
        assert stored["step"].tolist() == list(range(6))
        rows = [next(row for row in part if row.name == name) for part in expected]
        for column in ("stability", "mixing_similarity", "rank", "numerical_rank",
                       "reference_rank", "effective_rank"):  # fmt: skip
            np.testing.assert_allclose(
                stored[column], [getattr(row, column) for row in rows], rtol=1e-5, err_msg=name
            )
    reader.close()


def test_tokens_and_positions_are_recorded_and_not_averaged(tmp_path):
    train_and_save(tmp_path / "run", checkpoints=2)
    folder, output = str(tmp_path / "run"), tmp_path / "out"
    analyze.main([folder, "--output", str(output)])
    reader = Follower(output / "metrics.h5")
    left_out = {layer.name for layer in reader.layers() if not layer.averaged}
    assert left_out == {"position"}  # "tokens" is this network's name for an embedding
    reader.close()
    output = tmp_path / "other"
    options = ["--include", "*.weight", "--exclude", "*conv*", "--not-averaged", "tokens.*"]
    analyze.main([folder, "--output", str(output), *options])
    reader = Follower(output / "metrics.h5")
    assert {layer.name: layer.averaged for layer in reader.layers()} == {
        "tokens.weight": False,
        "attention.out_proj.weight": True,
        "cross.out_proj.weight": True,
        "fc.weight": True,
        "head.weight": True,
    }
    reader.close()


@pytest.mark.parametrize("name", [
    "cls_token", "pos_embed", "embeddings.position_embeddings", "encoder.pos_embedding",
    "transformer.wte.weight", "model.embed_tokens.weight", "embeddings.word_embeddings.weight",
    "layers.0.attn.relative_position_bias_table", "h.0.attn.bias", "class_token",
    "fc.weight_scale", "fc.weight_scale_inv",
])  # fmt: skip
def test_names_of_what_is_no_linear_map(name):
    from app.analysis.selection import NOT_AVERAGED, select_weights

    linear = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight",
              "conv_proj.weight", "blocks.0.attn.qkv.weight")  # fmt: skip
    shapes = {key: ((4, 4), 1, False) for key in (name, *linear)}
    options = {"include": ["*"], "exclude": [], "not_averaged": NOT_AVERAGED}
    reports = select_weights([shapes], **options)
    assert {report.name for report in reports if not report.is_linear_map} == {name}


def states():
    """The same weights in every form in which programs store them."""
    state = {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4), "count": torch.tensor(3)}
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    compiled = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    half = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    return state, {
        "plain.pt": state,
        "wrapped.pth": {"state_dict": prefixed, "epoch": 7, "global_step": 70},
        "model.bin": {"model": compiled, "optimizer": {"state": {}}},
        "tree.ckpt": {"model_state_dict": state, "position": {"step": 9, "epoch": 2}},
        "half.pt": half,
    }


def test_every_form_of_a_state_dict_is_read(tmp_path):
    state, forms = states()
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    torch.save(state, tmp_path / "old.tar", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "model.safetensors")
    sources, _ = find_checkpoints([tmp_path])
    found = {source.path.name: read_checkpoint(*source.files) for source in sources}
    assert found.keys() == {*forms, "old.tar", "model.safetensors"}
    for name, checkpoint in found.items():
        assert list(checkpoint.weights) == ["fc.weight"], name
        tolerance = 0.02 if name == "half.pt" else 0
        torch.testing.assert_close(
            checkpoint.weights["fc.weight"].float(), state["fc.weight"], rtol=tolerance, atol=0
        )
    assert (found["wrapped.pth"].epoch, found["wrapped.pth"].step) == (7, 70)
    assert (found["tree.ckpt"].epoch, found["tree.ckpt"].step) == (2, 9)
    assert found["plain.pt"].epoch is None


def test_what_was_exported_is_no_checkpoint(tmp_path):
    state, _ = states()
    for name in ("checkpoints/step-00000009/state.pt", "exported/dense.pt"):
        (tmp_path / name).parent.mkdir(parents=True)
        torch.save(state, tmp_path / name)
    (source,), _ = find_checkpoints([tmp_path])
    assert source.path.name == "state.pt"


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_cannot_be_read_is_named_and_runs_no_code(tmp_path):
    torch.save({"fc.weight": torch.randn(2, 2), "x": Harmful(tmp_path / "ran")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"no checkpoint")
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    torch.save([1, 2], tmp_path / "d.pt")
    torch.save({"optimizer": {"lr": 1}}, tmp_path / "e.pt")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "f.pt")
    for name, message in (
        ("a.pt", r"more than tensors and plain values: (pathlib\.)?_?\w*\.?\w+; save the state"),
        ("b.pt", "cannot be read, it is damaged or no checkpoint"),
        ("c.safetensors", "cannot be read, it is damaged or no checkpoint"),
        ("d.pt", "holds a list, not a dictionary"),
        ("e.pt", "no state_dict, neither at the top nor under state_dict, model"),
        ("f.pt", "no floating tensor of two or more dimensions"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            read_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def write_safetensors(path, kind, size):
    """Write a file with one weight of a type that this version of torch may not know."""
    entry = {"dtype": kind, "shape": [2, 4], "data_offsets": [0, size]}
    header = json.dumps({"fc.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.empty(2, 2, device="meta"), r"has a shape and no values \(device meta\)"),
        (torch.zeros(1).expand(10**6, 10**6), "has far more values than are stored"),
        (torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (10**6, 10**6)),
         "has far more values than are stored"),
        (torch.zeros(2, 2, dtype=torch.float8_e8m0fnu), "is of torch.float8_e8m0fnu, which is no"),
    ],
    ids=["meta", "expanded", "sparse", "scales"],
)  # fmt: skip
def test_weights_without_usable_values_are_named(tmp_path, weight, message):
    torch.save({"fc.weight": weight, "head.weight": torch.ones(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt: 'fc\.weight' .*{message}") as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_files_of_other_programs_are_refused_in_one_line(tmp_path):
    for kind, size, message in (
        ("F4", 4, "is of torch.float4_e2m1fn_x2, which is no number by itself"),
        ("X9", 8, "cannot be read, it is damaged or no checkpoint"),
    ):
        write_safetensors(tmp_path / "a.safetensors", kind, size)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_checkpoint(tmp_path / "a.safetensors")
        assert "\n" not in str(caught.value)
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is a TorchScript program"):
        read_checkpoint(tmp_path / "a.pt")


def test_an_archive_that_grows_is_refused(tmp_path):
    """A few bytes of a compressed archive may stand for gigabytes."""
    torch.save({"fc.weight": torch.zeros(100, 100)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as plain,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(CheckpointError, match="is a compressed archive and not one of torch"):
        read_checkpoint(tmp_path / "b.pt")


def test_files_are_found_below_a_folder_in_natural_order(tmp_path):
    for name in ("step-10/state.pt", "step-9/state.pt", "step-9/process-00000.pt",
                 "step-9/optimizer.pt", "stability-epochs-00000001/process-00000.pt",
                 "partial-11/state.pt", "best/step-9/state.pt", "damaged-step-8/state.pt",
                 "notes.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sources, problems = find_checkpoints([tmp_path, tmp_path / "step-9" / "state.pt"])
    assert not problems
    found = [source.path for source in sources]
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "step-9/state.pt",
        "step-10/state.pt",
    ]
    assert [NamedTimes(found).number(path) for path in found] == [9, 10]
    assert natural_order(Path("a2")) < natural_order(Path("a10")) < natural_order(Path("b1"))


def found_at(name, *, epoch=None, step=None, within=False, weights=""):
    return Found(
        source=Source((Path("f") / name,)), shapes={}, epoch=epoch, step=step, within_epoch=within,
        fingerprint=weights or name,
    )  # fmt: skip


def test_time_is_the_epoch_or_the_step_or_the_name_or_the_order():
    for entries, label, names, times in (
        ([("a.pt", 3, 30), ("b.pt", 1, 10)], "epoch", ["b.pt", "a.pt"], [1, 3]),
        ([("a.pt", 1, 30), ("b.pt", 1, 20)], "optimizer step", ["b.pt", "a.pt"], [20, 30]),
        ([("a5.pt", 1, None), ("a9.pt", 1, None)], "number in the name", ["a5.pt", "a9.pt"],
         [5, 9]),
        ([("a9.pt", None, None), ("b5.pt", None, None)], "checkpoint", ["a9.pt", "b5.pt"],
         [1, 2]),
        ([("a.pt", None, None), ("b5.pt", 2, 3)], "checkpoint", ["a.pt", "b5.pt"], [1, 2]),
        # The initial weights, which hold no epoch, come first, whatever the others count.
        ([("e1.pt", 1, None), ("e2.pt", 2, None), ("init.pt", None, None)], "epoch",
         ["init.pt", "e1.pt", "e2.pt"], [0, 1, 2]),
        ([("e1.pt", None, None), ("e2.pt", None, None), ("init.pt", None, None)],
         "number in the name", ["init.pt", "e1.pt", "e2.pt"], [0, 1, 2]),
        ([("e0.pt", None, None), ("e1.pt", None, None), ("init.pt", None, None)], "checkpoint",
         ["init.pt", "e0.pt", "e1.pt"], [1, 2, 3]),
        # A single one without an epoch does not take it from all, unless names order all of them.
        ([("a.pt", 2, None), ("b.pt", 1, None), ("c.pt", None, None)], "epoch", ["b.pt", "a.pt"],
         [1, 2]),
        ([("e1.pt", 1, None), ("e2.pt", 2, None), ("e3.pt", None, None)], "number in the name",
         ["e1.pt", "e2.pt", "e3.pt"], [1, 2, 3]),
        ([("best-epoch15.pt", None, None), ("epoch10.pt", None, None), ("epoch20.pt", None, None)],
         "number in the name", ["epoch10.pt", "best-epoch15.pt", "epoch20.pt"], [10, 15, 20]),
        # One more of an epoch does not take the epochs away from all: the last step's stays.
        ([("a.pt", 1, 30), ("b.pt", 1, 20), ("c.pt", 2, 40)], "epoch", ["a.pt", "c.pt"], [1, 2]),
    ):  # fmt: skip
        found = [found_at(name, epoch=epoch, step=step) for name, epoch, step in entries]
        series, passed_over = order(found)
        assert (series.label, series.times) == (label, times)
        assert [checkpoint.path.name for checkpoint in series.found] == names
        assert len(passed_over) == len(entries) - len(names)


def test_what_was_written_within_an_epoch_is_not_taken_for_its_end():
    names = [("step-20", 1, 20, False), ("step-40", 2, 40, False), ("step-55", 2, 55, True),
             ("step-60", 3, 60, False)]  # fmt: skip
    found = [found_at(n, epoch=e, step=s, within=within) for n, e, s, within in names]
    series, passed_over = order(found)
    assert (series.label, series.times) == ("epoch", [1, 2, 3])
    assert [(entry.path.name, entry.reason) for entry in passed_over] == [
        ("step-55", "epoch 2 is step-40")
    ]
    # Where the end of its epoch is gone, time is counted in steps.
    series, passed_over = order([found[0], *found[2:]])
    assert (series.label, series.times, passed_over) == ("optimizer step", [20, 55, 60], [])


def test_copies_and_averages_are_passed_over():
    for entries, kept, reasons in (
        # Lightning: the last is a copy; a best one whose epoch is gone is not.
        ([("epoch=1.ckpt", 1, 10, "a"), ("epoch=2.ckpt", 2, 20, "b"), ("last.ckpt", 2, 20, "b")],
         ["epoch=1.ckpt", "epoch=2.ckpt"], ["the same as epoch=2.ckpt"]),
        ([("best.ckpt", 3, 30, "c"), ("e4.ckpt", 4, 40, "d")], ["best.ckpt", "e4.ckpt"], []),
        # Without a time in them, by the weights or by the name.
        ([("m-1.pt", None, None, "a"), ("m-2.pt", None, None, "b"), ("x.bin", None, None, "b"),
          ("model_best.pth.tar", None, None, "q")],
         ["m-1.pt", "m-2.pt"], ["the same as m-2.pt", "a copy by its name"]),
        ([("m-1.pt", None, None, "a"), ("m-1_ema.pt", None, None, "b")], ["m-1.pt"],
         ["an average"]),
        # A training that stands still is no copy, and averages alone are what was asked for.
        ([("m-1.pt", None, None, "a"), ("m-2.pt", None, None, "a")], ["m-1.pt", "m-2.pt"], []),
        ([("a.pt", 1, None, "a"), ("b.pt", 2, None, "a")], ["a.pt", "b.pt"], []),
        ([("ema-1.pt", None, None, "a"), ("ema-2.pt", None, None, "b")],
         ["ema-1.pt", "ema-2.pt"], []),
        ([("last.ckpt", None, None, "a")], ["last.ckpt"], []),
        # A name that tells a time is a copy only of what has that time.
        ([("best_epoch3.pth", None, None, "a"), ("best_epoch7.pth", None, None, "b"),
          ("best_epoch12.pth", None, None, "c")],
         ["best_epoch3.pth", "best_epoch7.pth", "best_epoch12.pth"], []),
        ([("best-3.pt", None, None, "a"), ("best-7.pt", None, None, "b")],
         ["best-3.pt", "best-7.pt"], []),
        ([("epoch-3.pt", None, None, "a"), ("best-epoch3.pt", None, None, "b"),
          ("resnet50_best.pt", None, None, "c")],
         ["epoch-3.pt"], ["a copy by its name", "a copy by its name"]),
        ([("epoch-3/best.pt", None, None, "a"), ("epoch-7/best.pt", None, None, "b")],
         ["best.pt", "best.pt"], []),
        # The number of a folder is no time of a file that lies beside those that tell theirs.
        ([("run-7/final.pt", None, None, "b"), ("run-7/m-10.pt", None, None, "a"),
          ("run-7/m-20.pt", None, None, "b")],
         ["m-10.pt", "m-20.pt"], ["the same as m-20.pt"]),
        ([("run-3/step-500/m.bin", None, None, "a"), ("run-3/step-1000/m.bin", None, None, "b"),
          ("run-3/m.bin", None, None, "b")],
         ["m.bin", "m.bin"], ["the same as m.bin"]),
    ):  # fmt: skip
        found = [found_at(n, epoch=e, step=s, weights=w) for n, e, s, w in entries]
        left, passed_over = drop_copies(found)
        assert [entry.path.name for entry in left] == kept
        assert [entry.reason for entry in passed_over] == reasons


@pytest.mark.parametrize(
    ("entries", "cure"),
    [
        # Seeds in folders, with and without times in the files; of different lengths too.
        ([("s0/e1.pt", 1, None), ("s0/e2.pt", 2, None), ("s1/e1.pt", 1, None)], "the folder of"),
        ([("s0/e1.pt", None, None), ("s1/e1.pt", None, None)], "the folder of"),
        ([("s0/step-20/state.pt", 1, 20), ("s1/step-20/state.pt", 1, 20)], "the folder of"),
        ([("s0/step-20/model.bin", None, None), ("s1/step-20/model.bin", None, None)], "folder"),
        ([("s0/e1.pt", 1, None), ("s1/e1.pt", None, None)], "the folder of"),
        # Networks or seeds beside each other.
        ([("G_0.pt", None, None), ("D_0.pt", None, None)], r"such as f/G_\*\.pt$"),
        ([("s0-epoch1.pt", None, None), ("s1-epoch1.pt", None, None)], r"f/s0-epoch\*\.pt$"),
        ([("a.pt", 3, 30), ("b.pt", 3, 30)], "such as f/a.pt"),
        # One training.
        ([("epoch=0-step=1.ckpt", None, None), ("epoch=0-step=2.ckpt", None, None)], None),
        ([("epoch=0-loss=0.3.ckpt", None, None), ("epoch=0-loss=0.2.ckpt", None, None)], None),
        ([("step-40/state.pt", 2, 40), ("step-55/state.pt", 2, 55)], None),
        ([("step-40/model.bin", None, None), ("step-55/model.bin", None, None)], None),
        ([("epoch-3.pt", 3, None), ("best.pt", 3, None), ("stop.pt", 3, None)], None),
        ([("run-7/a.pt", None, None), ("run-7/b.pt", None, None)], None),
        ([("a/model.pt", None, None), ("b/model.pt", None, None)], None),
    ],
)
def test_several_trainings_or_networks_are_no_series(entries, cure):
    problem = several_series([found_at(name, epoch=e, step=s) for name, e, s in entries])
    assert (problem is None) == (cure is None)
    if problem:
        assert re.search(cure, problem)
        assert problem.startswith(f"f/{entries[0][0]} and f/{entries[-1][0]}: of the same time")


def test_several_trainings_are_refused_and_one_of_them_is_measured(tmp_path, capsys):
    for seed in ("s0", "s1"):
        save_series(tmp_path / seed, count=3)
    torch.save({"fc0.weight": torch.randn(6, 5)}, tmp_path / "s1" / "model-0.pt")
    state = torch.load(tmp_path / "s1" / "model-2.pt")
    torch.save({k: v.flip(0) for k, v in state.items()}, tmp_path / "s1" / "model-2.pt")
    with pytest.raises(UserError, match=r"s0/model-2\.pt and .*s1/model-2\.pt: of the same time"):
        analyze.main([str(tmp_path)])
    assert not (tmp_path / "analysis").exists()
    capsys.readouterr()
    analyze.main([str(tmp_path / "s0"), "--window", "1"])
    ordered = "3 checkpoints, 5 weights, ordered by number in the name 0 ... 2"
    assert ordered in capsys.readouterr().out


def test_a_window_is_a_time_and_not_a_number_of_files():
    for times, window, expected in (
        ([1, 2, 3, 4], 2, ([1, 2, 3, 4], 2, False)),
        ([500, 1000, 1500, 1700, 2000], 2, ([500, 1000, 1500, 1700, 2000], 1000, False)),
        ([1, 2, 4, 5], 1, ([1, 2, 4, 5], 1, False)),
        ([1, 10, 100, 1000], 2, ([0, 1, 2, 3], 2, True)),
        ([7], 5, ([7], 5, False)),
    ):
        comparisons = compare(times, window)
        assert (comparisons.times, comparisons.span, comparisons.by_count) == expected


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("epoch=3-val_loss=0.81.ckpt", 3),
        ("step=1200-epoch=4.ckpt", 4),
        ("global_step1200_acc92.pt", 1200),
        ("val_loss=0.81.ckpt", 7),
        ("resnet50-12.pth.tar", 12),
        ("model-00002-of-00003.safetensors", 7),
        ("iter_0000500.pth", 500),
        ("Epoch_09-v1.pt", 9),
    ],
)
def test_the_number_that_tells_the_time(name, number):
    path = Path("run-7") / name
    assert NamedTimes([path, Path("run-8") / name]).number(path) == number


def test_the_times_in_a_name_and_what_is_left_without_them():
    for name, times, left in (
        ("epoch=3-step=40-loss=0.81.ckpt", {"epoc": 3, "step": 40}, "epoch=*-step=*-loss=*.ckpt"),
        ("s1-Epoch_09.pt", {"epoc": 9}, "s1-Epoch_*.pt"),
        ("resnet50-12.pth.tar", {"": 12}, "resnet50-*.pth.tar"),
        ("m-4-00001-of-00002.safetensors", {"": 4}, "m-*.safetensors"),
        ("model.pt", {"": 7}, "model.pt"),
    ):
        path = Path("run-7") / name
        assert NamedTimes([path, Path("run-8") / name]).times(path) == times
        assert without_time(path) == left


def test_the_number_of_a_folder_is_a_time_where_folders_tell_them_apart(tmp_path, monkeypatch):
    """And not that of a training, whichever folder the path begins with."""
    monkeypatch.chdir(tmp_path)
    for names, numbers in (
        (["run-7/final.pt", "run-7/model-20.pt"], [None, 20]),
        (["run-7/final.pt", "run-7/all/model-20.pt"], [None, 20]),
        (["run-7/a.pt", "run-7/b.pt"], [None, None]),
        (["r-3/step-5/m.pt", "r-3/step-10/m.pt", "r-3/m.pt"], [5, 10, None]),
        (["r-3/step-5/m.pt", "r-4/step-5/m.pt", "r-3/m.pt", "r-4/m.pt"], [5, 5, None, None]),
        (["step-5/m.pt", "./step-10/m.pt", f"{tmp_path}/step-15/m.pt"], [5, 10, 15]),
    ):
        paths = [Path(name) for name in names]
        assert [NamedTimes(paths).number(path) for path in paths] == numbers
    (tmp_path / "step-5").mkdir()
    monkeypatch.chdir(tmp_path / "step-5")
    paths = [Path("m.pt"), Path("../step-10/m.pt"), Path("../m.pt")]
    assert [NamedTimes(paths).number(path) for path in paths] == [5, 10, None]


@pytest.mark.slow
def test_skipped_files_are_named_and_the_rest_is_measured(tmp_path, capsys):
    folder = save_series(tmp_path / "run")
    torch.save({"other.weight": torch.randn(3, 3)}, folder / "model-5.pt")
    broken = torch.load(folder / "model-1.pt")
    broken["fc2.weight"][0, 0] = torch.nan
    torch.save(broken, folder / "model-6.pt")
    (folder / "model-7.pt").write_bytes((folder / "model-1.pt").read_bytes()[:900])
    assert analyze.main([str(folder), "--window", "1"]) == 2
    captured = capsys.readouterr()
    lines = sorted(captured.err.splitlines())
    assert len(lines) == 3
    assert all(line.startswith("skipped: ") for line in lines)
    assert (
        "model-5.pt: of another network than the others: fc0.weight (6, 5) is missing" in lines[0]
    )
    assert "model-6.pt: fc2.weight holds NaN or infinity" in lines[1]
    assert "model-7.pt: cannot be read" in lines[2]
    assert "4 checkpoints, 5 weights" in captured.out
    rows = read_rows(folder / "analysis" / "metrics.h5", "layers/fc2.weight/stability")
    assert rows["step"].tolist() == [0, 1, 2, 3]
    assert np.isfinite(rows["stability"][1:]).all()
    # What was written is what the report reads.
    arguments = [str(folder / "analysis"), "--formats", "svg", "--reference", "vit_b16"]
    assert report.main(arguments) == 0
    assert "--reference counts epochs, and this run number in the name" in capsys.readouterr().err
    page = (folder / "analysis" / "report" / "report.html").read_text()
    assert "number in the name" in page


@pytest.mark.slow
def test_a_folder_with_copies_is_measured_as_without_them(tmp_path, capsys):
    """The last, the best, an average and a stop within an epoch change no figure."""
    train_and_save(tmp_path / "run")
    plain, full = tmp_path / "plain", tmp_path / "full"
    analyze.main([str(tmp_path / "run"), "--window", "2", "--output", str(plain)])
    content = torch.load(tmp_path / "run" / "epoch-5.pt")
    torch.save(content, tmp_path / "run" / "last.ckpt")
    torch.save(content["model"], tmp_path / "run" / "model_best.pth.tar")
    torch.save({**content, "epoch": torch.tensor(4)}, tmp_path / "run" / "epoch-4_ema.pt")
    within = {"model": content["model"], "position": {"epoch": 3, "batch": 2}}
    torch.save(within, tmp_path / "run" / "stop.pt")
    capsys.readouterr()
    assert analyze.main([str(tmp_path / "run"), "--window", "2", "--output", str(full)]) == 0
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("passed over: ")
    for what in (
        "epoch-4_ema.pt (an average)",
        "last.ckpt (the same as epoch-5.pt)",
        "model_best.pth.tar (the same as epoch-5.pt)",
        "stop.pt (epoch 3 is epoch-3.pt)",
    ):
        assert what in line  # fmt: skip
    assert "6 checkpoints" in captured.out
    for name in ("fc.weight", "conv.weight"):
        one, two = (read_rows(f / "metrics.h5", f"layers/{name}/stability") for f in (plain, full))
        for column, values in one.items():
            np.testing.assert_array_equal(two[column], values, err_msg=column)


def test_full_ranks_are_known_where_only_low_rank_checkpoints_are_left(tmp_path):
    folder = tmp_path / "run"
    train_and_save(folder)
    for epoch in (0, 1, 2):
        (folder / f"epoch-{epoch}.pt").unlink()
    analyze.main([str(folder), "--window", "1"])
    run = read_run(folder / "analysis")
    assert max(read_rows(run.metrics, "layers/fc.weight/stability")["rank"]) < 8
    assert run.full_ranks["fc.weight"] == 8
    assert run.full_ranks["conv.weight"] == 4  # of each of its two groups


def test_a_checkpoint_that_is_missing_moves_no_window(tmp_path):
    folder = save_series(tmp_path / "run", count=5)
    whole, part = tmp_path / "whole", tmp_path / "part"
    analyze.main([str(folder), "--window", "2", "--output", str(whole)])
    (folder / "model-1.pt").unlink()
    analyze.main([str(folder), "--window", "2", "--output", str(part)])
    group = "layers/fc2.weight/stability"
    one, two = (read_rows(f / "metrics.h5", group)["stability"] for f in (whole, part))
    np.testing.assert_array_equal(two, [np.nan, one[2], np.nan, one[4]])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("names", ["model-{:05d}-of-{:05d}", "part_{}"])
def test_shards_are_one_checkpoint(tmp_path, capsys, suffix, names):
    torch.manual_seed(0)
    for step in (10, 20):
        states = [{f"fc{number}.weight": torch.randn(4, 3)} for number in (1, 2, 3)]
        save_shards(tmp_path / f"checkpoint-{step}", states, suffix=suffix, names=names)
    assert analyze.main([str(tmp_path), "--window", "1"]) == 0
    assert "2 checkpoints, 3 weights" in capsys.readouterr().out
    rows = read_rows(tmp_path / "analysis" / "metrics.h5", "layers/fc3.weight/stability")
    assert rows["step"].tolist() == [10, 20]
    assert np.isfinite(rows["stability"][1])
    name = f"{names.format(2, 3)}.{suffix}"
    (tmp_path / "checkpoint-20" / name).unlink()
    assert analyze.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert f"index.json: its shard {name} is missing" in capsys.readouterr().err
    # Without the index the names of shards tell of them.
    if names != "part_{}":
        (tmp_path / "checkpoint-20" / f"model.{suffix}.index.json").unlink()
        assert analyze.main([str(tmp_path), "--output", str(tmp_path / "other")]) == 2
        assert "shard 2 of 3 is missing" in capsys.readouterr().err


def test_an_index_may_be_named_and_is_held_against_its_shards(tmp_path, capsys):
    torch.manual_seed(0)
    folder = tmp_path / "checkpoint-1"
    save_shards(folder, [{"a.weight": torch.randn(4, 3)}, {"b.weight": torch.randn(4, 3)}])
    index = folder / "model.safetensors.index.json"
    assert analyze.main([str(index), "--output", str(tmp_path / "one")]) == 0
    assert "1 checkpoints, 2 weights" in capsys.readouterr().out
    content = json.loads(index.read_text())
    content["weight_map"]["c.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"promises 'c\.weight' in model-00002-of-00002\.safetens"):
        analyze.main([str(index), "--output", str(tmp_path / "two")])
    for text, message in (("{}", "its weight_map does not name files"), ("{", "cannot be read")):
        index.write_text(text)
        sources, problems = find_checkpoints([folder])
        assert len(problems) == 1
        assert f"{index}: " in problems[0]
        assert message in problems[0]
        assert len(sources) == 1  # by the shards' names


def foreign_class(monkeypatch, full_name, *bases):
    """Return a class of a package that is not installed here."""
    module, _, name = full_name.rpartition(".")
    for part in (module.partition(".")[0], module):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    kind = type(name, bases, {"__module__": module, "__qualname__": name})
    setattr(sys.modules[module], name, kind)
    return kind


def test_settings_beside_the_weights_are_no_hindrance(tmp_path, monkeypatch):
    container = foreign_class(monkeypatch, "omegaconf.dictconfig.DictConfig")()
    container.__dict__ = {"_metadata": {"ref_type": Any, "key_type": dict}, "_content": {"lr": 1}}
    settings = foreign_class(monkeypatch, "lightning_x.data.AttributeDict", dict)(lr=1)
    settings.lr = 1
    content = {
        "args": argparse.Namespace(lr=0.1, output=Path("x"), started=datetime.now()),
        "hyper_parameters": settings,
        "config": container,
        "best": np.float64(0.5),
        "table": np.arange(3),
        "history": defaultdict(list, loss=[np.float32(1)]),
        "epoch": torch.tensor(4),
        "global_step": np.int64(40),
        "state_dict": {"fc.weight": torch.ones(2, 3)},
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        checkpoint = read_checkpoint(tmp_path / "a.pt")
        assert (checkpoint.epoch, checkpoint.step) == (4, 40)
        assert list(checkpoint.weights) == ["fc.weight"]


def test_wrappers_anywhere_in_a_name_are_dropped(tmp_path):
    names = {
        "module.encoder._orig_mod.fc.weight": "encoder.fc.weight",
        "blocks.0._orig_mod.module.fc.weight": "blocks.0.fc.weight",
        "head._checkpoint_wrapped_module.weight": "head.weight",
    }
    torch.save({name: torch.ones(2, 2) for name in names}, tmp_path / "a.pt")
    assert list(read_checkpoint(tmp_path / "a.pt").weights) == list(names.values())
    # Not where the network itself has a module of that name.
    own = {name: torch.ones(2, 2) for name in ("fc.weight", "fc.module.weight")}
    torch.save(own, tmp_path / "a.pt")
    assert list(read_checkpoint(tmp_path / "a.pt").weights) == list(own)


def test_bad_input_is_one_line_with_culprit_and_cure(tmp_path):
    folder = str(save_series(tmp_path / "run", count=2))
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.pt").write_text("x")
    taken = tmp_path / "taken"
    analyze.main([folder, "--output", str(taken)])
    for arguments, message in (
        ([str(tmp_path / "gone")], "gone: no such file or folder"),
        ([str(empty)], r"empty: no checkpoint there \(no file \.pt"),
        ([str(bad)], r"no checkpoint can be read: .*a\.pt: cannot be read"),
        ([folder, "--window", "0"], "--window: 0 is not a positive number"),
        ([folder, "--include", "no*"], r"--include: 'no\*' matches none of the 5 weights"),
        ([folder, "--exclude", "*"], "--exclude: no weight is left"),
        ([folder, "--output", str(taken)], "--output: .*taken holds metrics already"),
        ([folder, "--output", f"{folder}/model-0.pt"], "--output: cannot write to"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            analyze.main(arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_weights_of_8_bits_sparse_ones_and_names_with_a_slash_are_measured(tmp_path, capsys):
    torch.manual_seed(0)
    for number in range(2):
        weight = torch.randn(8, 6)
        state = {
            "dense.weight": weight.to(torch.float8_e4m3fn).float(),
            "eight.weight": weight.to(torch.float8_e4m3fn),
            "towers.a/b.weight": weight.to(torch.float8_e4m3fn).float(),
            "sparse.weight": weight.to(torch.float8_e4m3fn).float().to_sparse(),
            # Not factors of one weight.
            "other.U": weight,
            "other.core": weight.T,
            "other.Vh": weight,
        }
        torch.save(state, tmp_path / f"{number}.pt")
    assert analyze.main([str(tmp_path), "--window", "1"]) == 0
    assert "2 checkpoints, 7 weights" in capsys.readouterr().out
    metrics = tmp_path / "analysis" / "metrics.h5"
    follower = Follower(metrics)
    assert "towers.a/b.weight" in [layer.name for layer in follower.layers()]
    follower.close()
    dense, *others = (
        read_rows(metrics, f"layers/{name}.weight/stability")["stability"]
        for name in ("dense", "eight", "towers.a/b", "sparse")
    )
    assert np.isfinite(dense[1])
    for values in others:
        np.testing.assert_array_equal(values, dense)
    assert report.main([str(tmp_path / "analysis"), "--formats", "png"]) == 0


def quantized(weight, kind, scale_shape):
    """Values and scales of a weight, each scale the largest of its block."""
    (m, n), (a, b) = weight.shape, scale_shape
    blocks = weight.reshape(a, m // a, b, n // b)
    largest = 127 if kind == torch.int8 else 448
    scale = blocks.abs().amax((1, 3)) / largest
    values = (blocks / scale[:, None, :, None]).reshape(m, n)
    return values.round().to(kind) if kind == torch.int8 else values.to(kind), scale


@pytest.mark.parametrize(
    "case",
    [
        (torch.int8, (8, 1), (8, 1), "_scale"),
        (torch.int8, (8, 1), (8,), "_scale"),
        (torch.int8, (1, 1), (), "_scale"),
        (torch.float8_e4m3fn, (2, 4), (2, 4), "_scale_inv"),
        (torch.float8_e4m3fn, (1, 16), (1, 16), "_scale"),
    ],
)
def test_weights_of_8_bits_are_measured_with_their_scales(tmp_path, capsys, case):
    kind, scale_shape, stored, end = case
    torch.manual_seed(0)
    weight = torch.randn(8, 16) * torch.tensor([1.0, 50.0]).repeat_interleave(4)[:, None]
    for number in range(3):
        weight = weight + 0.3 * torch.randn(8, 16)
        values, scale = quantized(weight, kind, scale_shape)
        whole = scale.repeat_interleave(8 // scale_shape[0], 0)
        whole = whole.repeat_interleave(16 // scale_shape[1], 1)
        state = {
            "dense.weight": values.float() * whole,
            "l.weight": values,
            f"l.weight{end}": scale.reshape(stored),
            "l.index": torch.zeros(3, 3, dtype=torch.int64),
            "l.mask": torch.ones(3, 3, dtype=torch.bool),
        }
        torch.save(state, tmp_path / f"{number}.pt")
    assert analyze.main([str(tmp_path), "--window", "1"]) == 0
    captured = capsys.readouterr()
    assert "3 checkpoints, 2 weights" in captured.out
    assert "left out, since they hold integers: l.index (int64)\n" in captured.err
    one, two = (
        read_rows(tmp_path / "analysis" / "metrics.h5", f"layers/{name}.weight/stability")
        for name in ("dense", "l")
    )
    assert np.isfinite(one["stability"][1:]).all()
    for column, values in one.items():
        np.testing.assert_array_equal(two[column], values, err_msg=column)


@pytest.mark.parametrize(
    "state",
    [
        {"l.weight": torch.int8, "l.SCB": (8,)},
        {"l.weight": torch.int8, "l.weight_scale": (8, 1), "l.weight_zero_point": (8, 1)},
        {"l.weight": torch.int8, "l.weight_scale": (3, 1)},
        {"l.weight": torch.float8_e4m3fn, "l.weight_scale": (1, 2)},  # of 7, or of 8 and 6
        {"l.weight": torch.uint8, "l.weight.absmax": (8,)},
        {"l.qweight": torch.int32, "l.scales": (2, 14), "l.qzeros": (2, 14)},
    ],
)
def test_weights_that_cannot_be_dequantized_with_certainty_are_refused(tmp_path, state):
    (name, kind), *scales = state.items()
    tensors = {key: torch.ones(shape) for key, shape in scales}
    tensors |= {name: torch.ones(8, 14).to(kind), "other.weight": torch.ones(4, 4)}
    torch.save(tensors, tmp_path / "1.pt")
    kind = str(kind).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"1\.pt: '{name}' is {kind} with scales: save it deq"):
        analyze.main([str(tmp_path)])


@pytest.mark.parametrize(
    "name", ["type.weight", "", "a..b", "fc0.weight.b", "training", "a\0b", "a\ud800"]
)
def test_a_file_with_a_name_that_no_module_can_hold_is_skipped(tmp_path, capsys, name):
    folder = save_series(tmp_path / "run", count=2)
    state = torch.load(folder / "model-1.pt")
    torch.save({**state, name: torch.randn(3, 3)}, folder / "model-2.pt")
    assert analyze.main([str(folder), "--window", "1"]) == 2
    captured = capsys.readouterr()
    assert f"model-2.pt: {name!r} is no name" in captured.err
    assert "2 checkpoints" in captured.out


@pytest.mark.slow
def test_names_are_drawn_and_shown_as_they_stand(tmp_path):
    """No name runs as a script on the page, and none is taken for a formula by matplotlib."""
    torch.manual_seed(0)
    names = ["<script>alert(1)</script>.weight", "a$\\frac$.b&\"'.weight", "x$y_^$.weight",
             "two\nlines.weight", "$.weight"]  # fmt: skip
    for number in range(3):
        torch.save({name: torch.randn(6, 5) for name in names}, tmp_path / f"m-{number}.pt")
    assert analyze.main([str(tmp_path), "--window", "1"]) == 0
    assert report.main([str(tmp_path / "analysis"), "--formats", "png"]) == 0
    page = (tmp_path / "analysis" / "report" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert 'b&"' not in page


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    folder = save_series(tmp_path / "run")
    (folder / "model-9.pt").write_text("x")
    analyze.main([str(folder), "--window", "2", "--output", str(tmp_path / "one")])
    arguments = ("-m", "app.analyze", folder, "--window", "2", "--output", tmp_path / "two")
    result = launch(2, *arguments, code=2)
    assert result.stderr.count("skipped:") == 1
    for number in range(5):
        group = f"layers/fc{number}.weight/stability"
        one = read_rows(tmp_path / "one" / "metrics.h5", group)
        two = read_rows(tmp_path / "two" / "metrics.h5", group)
        assert one.keys() == two.keys()
        for column, values in one.items():
            np.testing.assert_array_equal(two[column], values, err_msg=column)


def test_weights_stored_as_two_factors_are_measured_as_their_product(tmp_path, capsys):
    torch.manual_seed(0)
    A, B = torch.randn(12, 2), torch.randn(2, 9)
    for number in range(2):
        A, B = A + 0.1 * torch.randn(12, 2), B + 0.1 * torch.randn(2, 9)
        state = {
            "dense.weight": A @ B,
            "released.A": A,
            "released.B": B,
            "attention.in_proj.A": A,
            "attention.in_proj.B": B,
            # A recurrence of somebody else, that stores more than a product of the two.
            "ssm.A": torch.randn(6, 6),
            "ssm.B": torch.randn(6, 4),
        }
        torch.save(state, tmp_path / f"{number}.pt")
    assert analyze.main([str(tmp_path), "--window", "1"]) == 0
    assert "2 checkpoints, 5 weights" in capsys.readouterr().out
    metrics = tmp_path / "analysis" / "metrics.h5"
    rows = [
        read_rows(metrics, f"layers/{name}/stability")
        for name in ("dense.weight", "released.weight", "attention.in_proj_weight")
    ]
    for other in rows[1:]:
        for column in ("stability", "mixing_similarity", "numerical_rank", "effective_rank"):
            np.testing.assert_allclose(other[column], rows[0][column], rtol=1e-4)
