"""The configuration: what is wrong is one line that names the key."""

import os
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from support.launching import ROOT, TIMEOUT, environment
from support.tiny_run import PAPER

import oialr
from app import config
from app.command import Parser
from app.config import yaml_text
from app.config.settings import Configuration
from app.errors import UserError


def test_default_configuration_loads_and_survives_a_round_trip():
    loaded = config.load()
    assert loaded.run.name == "digits_vit"
    assert config.build(config.parse(config.to_yaml(loaded), source="")) == loaded


def test_overrides():
    loaded = config.load(
        None,
        [
            "training.learning_rate=3e-4",
            "model.arguments.depth=2",
            "oialr.enabled=false",
            "run.dir=x",
        ],
    )
    assert loaded.training.learning_rate == 3e-4
    assert loaded.model.arguments["depth"] == 2
    assert loaded.model.arguments["embed_dim"] == 64
    assert not loaded.oialr.enabled
    assert loaded.run.dir == "x"


@pytest.mark.parametrize(
    "text",
    ["2024", "007", "1e3", "1.0", "yes", "a #b", "a: b", "[x]", "{x", "*", "a b/", "Ü", " a"],
)
def test_a_string_is_what_was_typed(text):
    loaded = config.load(None, [f"run.dir={text}", f"data.root={text}", f"run.name={text}"])
    assert (loaded.run.dir, loaded.data.root, loaded.run.name) == (text, text, text)
    assert config.build(config.parse(config.to_yaml(loaded), source="")) == loaded


def test_cycles_that_grow_too_fast_leave_none_for_the_first():
    """100^999 is no float, and the first of ten such cycles would be a fraction of a step."""
    for limit, factor in ((1000, 100), (10, 20)):
        keys = [f"training.cycle_limit={limit}", f"training.cycle_mul={factor}"]
        with pytest.raises(UserError, match=rf"^training\.cycle_limit: of {limit} cycles, each"):
            config.load(None, keys)
    config.load(None, ["training.cycle_limit=1000", "training.cycle_mul=1"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("010", 10), ("08", 8), ("-08", -8), ("1_000", 1000), ("0x1f", 31), ("0b11", 3)),
        *(("3e-4", 3e-4), ("1.5e3", 1500.0), ("1.e2", 100.0), (".5", 0.5), ("-.5e+1", -5.0)),
        *(("1:30", "1:30"), ("1_e5", "1_e5"), ("1.2.3", "1.2.3"), ("'010'", "010")),
    ],
)
def test_numbers_are_what_people_write(text, number):
    """The seeds 008 and 010 of a shell's loop are 8 and 10; nothing is in base 60."""
    value = config.load(None, [f"model.arguments.x={text}"]).model.arguments["x"]
    assert value == number
    assert type(value) is type(number)
    # A text that would be read as a number is written in quotes.
    for written in (text, number):
        assert yaml_text.load(yaml_text.dump({"x": written})) == {"x": written}
        assert yaml_text.load(yaml_text.dump_value(written)) == written


def test_null_is_none_where_a_key_may_have_none():
    loaded = config.load(None, ["run.dir=null", "data.root=null", "training.ema_decay=null"])
    assert (loaded.run.dir, loaded.data.root, loaded.training.ema_decay) == (None, "null", None)
    assert config.load(None, ["run.dir="]).run.dir is None
    assert config.load(None, ["run.dir='null'"]).run.dir == "null"


def test_a_resumed_folder_is_what_was_typed():
    assert config.load(folder="null").run.dir == "null"
    assert config.load(None, ["run.dir=1e3/"], folder="1e3").run.dir == "1e3"
    with pytest.raises(UserError, match=r"run\.dir: b is not a, which is resumed; leave it out"):
        config.load(None, ["run.dir=b"], folder="a")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "training.epoch: unknown key; did you mean training.epochs?"),
        ("trainin.epochs=3", "trainin: unknown key; did you mean training?"),
        ("training.lr=1", "training.lr: unknown key; did you mean training.learning_rate?"),
        ("training.wd=1", "training.wd: unknown key; did you mean training.weight_decay?"),
        ("training.bs=1", "training.bs: unknown key; did you mean training.batch_size?"),
        ("data.path=x", "data.path: unknown key; did you mean data.root?"),
        ("model.depth=3", "model.depth: unknown key; what the network is built with is in model.a"),
        ("run.epochs=3", "run.epochs: unknown key; did you mean training.epochs?"),
        ("oialr.energy=3", "oialr.energy: unknown key"),
        ("training.epochs=1:30", "training.epochs: should be a valid integer (got '1:30')"),
        ("data.cutoff=0.1", "data.cutoff: unknown key; did you mean oialr.cutoff?"),
        ("training.epochs=true", "training.epochs: should be a valid integer (got True)"),
        ("training.epochs=1.5", "training.epochs: should be a valid integer (got 1.5)"),
        ("training.epochs=many", "training.epochs: should be a valid integer (got 'many')"),
        ("training.epochs=0", "training.epochs: should be greater than 0 (got 0)"),
        ("training.learning_rate=.nan", "training.learning_rate: should be a finite number"),
        ("oialr.cutoff=1", "oialr.cutoff: should be less than 1 (got 1)"),
        ("oialr.layer_fraction=0", "oialr.layer_fraction: should be greater than 0"),
        ("data.name=cifar", "'cifar' is not one of cifar10, cifar100, digits"),
        ("data.name=cifar", "did you mean cifar10?"),
        ("data.name=007", "data.name: '007' is not one of cifar10, cifar100, digits"),
        ("data.root=", "data.root: should be a valid string (got None)"),
        ("training.warmup_epochs=60", "training.warmup_epochs: 60.0 must be less than epochs, 60"),
        ("training.minimum_learning_rate=1", "training.minimum_learning_rate: 1.0 exceeds"),
        ("training.accumulation=100", "training.accumulation: 100 backward passes cannot share"),
        ("stability.interval=2", "stability.window: 5 must be a multiple of interval, 2"),
        ("training.cycle_limit=1000000000", "training.cycle_limit: should be less than or equal"),
        ("training.k_decay=1e300", "training.k_decay: should be less than or equal to 20"),
        ("training.k_decay=1e-20", "training.k_decay: should be greater than or equal to 0.1"),
        ("training.learning_rate=3e38", "training.learning_rate: should be less than or equal to"),
        ("training.gradient_clip=1e-40", "gradient_clip: should be 0 or at least 1e-30 in size"),
        ("search.step_price=1e300", "search.step_price: should be at most 1e9 in size (got 1e+30"),
        ("training.epochs=" + "9" * 400, "training.epochs: should be at most 2^32 in size"),
        ("distributed.timeout=1e300", "distributed.timeout: should be less than or equal to 1000"),
        ("epochs=3", "'epochs=3': expected section.key=value"),
        ("training.epochs", "'training.epochs': expected section.key=value"),
        ("training.epochs=[", "training.epochs: '[' is not a YAML value"),
        ("run.dir.x=1", "run.dir: should be a valid string"),
        ("training={epochs: 3}", "expected section.key=value"),
    ],
)
def test_mistakes_are_one_line(override, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        config.load(None, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {epochs: 1, epochs: 2}", "the key 'epochs' is given twice"),
        ("training: [", "a.yaml"),
        (
            "training.epochs: 3",
            "training.epochs: unknown key; in a file it is a key of a section, training: {epochs",
        ),
        ("- training", "expected sections such as 'training:', found one list"),
        ("training: {epochs: !!int abc}", "line 1, column 20: this cannot be read as int"),
        ("training: {epochs: 2020-13-45}", "line 1, column 20: this cannot be read as timestamp"),
        ("training: {epochs: " + "1" * 5000 + "}", "column 20: this cannot be read as int"),
        ("training: {epochs: 1_e5}", "training.epochs: should be a valid integer (got '1_e5')"),
        ("? [a, b]\n: 3", "a.yaml: line 1, column 3: a list or mapping cannot be a key"),
        ("run:\n  name: a\n  <<: 5", "line 3, column 7: expected a mapping or list of mappings"),
        ("a: &a [*a]", "line 1, column 8: *a repeats what it lies in"),
        ("a: \x07", "line 1, column 4: the character '\\x07' is not allowed"),
        ("a: " + "[" * 100, "column 43: more than 40 levels within each other"),
        ("[" * 100_000, "column 41: more than 40 levels within each other"),
        ("a: " + "a" * 2**20, "it is longer than 1048576 characters"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
        ("---\na: 1\n---\nb: 2", "line 3, column 1: but found another document"),
        ('"a\\nb": 3', "'a\\nb': unknown key"),
        ("training: {learning_rate: " + "9" * 400 + "}", "should be a valid number (got 999"),
        ("training: 3", "training: expected keys below this section, got 3"),
        ("training: {epochs: 0, batch_size: 0}", "(and 1 more)"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        config.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_aliases_stand_for_what_they_repeat(tmp_path):
    """Nine levels of nine stand for 387 million values, in 500 bytes."""
    path = tmp_path / "a.yaml"
    levels = [f"    {b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")]
    path.write_text("model:\n  arguments:\n    a: &a [1, 2, 3]\n" + "\n".join(levels))
    with pytest.raises(UserError, match=r"line 7, column \d+: more than 20000 values, aliases wri"):
        config.load(path)
    path.write_text("run: &a {seed: 3}\nmodel: {arguments: {x: *a, y: [*a, *a]}}")
    assert config.load(path).model.arguments == {"x": {"seed": 3}, "y": [{"seed": 3}] * 2}


def test_mappings_may_be_merged(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("run: &a {seed: 3, log_interval: 7}\nmodel: {arguments: {<<: *a, seed: 4}}")
    assert config.load(path).model.arguments == {"seed": 4, "log_interval": 7}


def test_only_regular_files_of_some_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"#" * (2**22 + 1))
    for path, message in (
        ("/dev/zero", "cannot read /dev/zero: it is no regular file"),
        (tmp_path / "fifo", "it is no regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "large", "it is too large for a configuration"),
        ("a\0b", r"cannot read 'a\x00b': embedded null byte"),
        ("a" * 5000, "File name too long"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            config.load(path)
        assert len(str(caught.value)) < 400


def test_a_file_that_is_extended_is_not_shown(tmp_path):
    (tmp_path / "secret").write_text("root:x:0:0:root:/root:/bin/bash\n")
    path = write(tmp_path, a="extends: secret")
    with pytest.raises(UserError, match=r"secret: expected sections") as caught:
        config.load(path)
    assert "root" not in str(caught.value).replace(str(tmp_path), "")


def test_a_chain_of_files_has_an_end(tmp_path):
    write(tmp_path, **{f"a{i}": f"extends: a{i + 1}.yaml" for i in range(17)}, a17="run: {seed: 3}")
    with pytest.raises(UserError, match="more than 16 files extend each other"):
        config.load(tmp_path / "a0.yaml")
    assert config.load(tmp_path / "a1.yaml").run.seed == 3


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_a_file_may_extend_another(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, base="extends: sub/root.yaml\ntraining: {epochs: 7}\noialr: {delay: 9}")
    write(
        tmp_path / "sub",
        root="training: {epochs: 3, batch_size: 5}\nmodel: {name: a, arguments: {x: 1, y: 2}}",
    )
    path = write(tmp_path, top="extends: base.yaml\nmodel: {arguments: {y: 3}}")
    loaded = config.load(path, ["oialr.cutoff=0.3"])
    assert loaded.run.name == "top"
    assert (loaded.training.epochs, loaded.training.batch_size) == (7, 5)
    assert (loaded.oialr.delay, loaded.oialr.cutoff) == (9, 0.3)
    assert (loaded.model.name, loaded.model.arguments) == ("a", {"y": 3})
    assert "extends" not in config.to_yaml(loaded)


def test_a_file_may_extend_several_of_which_the_last_counts_most(tmp_path):
    write(tmp_path, network="model: {name: a}\noialr: {delay: 9, cutoff: 0.3}")
    write(tmp_path, recipe="oialr: {delay: 0.2, target_size: 0.3}")
    path = write(tmp_path, top="extends: [network.yaml, recipe.yaml]\noialr: {target_size: 0.25}")
    oialr = config.load(path).oialr
    assert (oialr.delay, oialr.cutoff, oialr.target_size) == (0.2, 0.3, 0.25)
    assert config.load(path).model.name == "a"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: a.yaml"}, "a.yaml: extends: .*a.yaml extends itself"),
        ({"a": "extends: b.yaml", "b": "extends: a.yaml"}, "b.yaml: extends: .* extends itself"),
        ({"a": "extends: gone.yaml"}, "a.yaml: extends: cannot read .*gone.yaml: No such file"),
        ({"a": "extends: [3]"}, r"a.yaml: extends: expected the path .* got \[3\]"),
        ({"a": "extends: []"}, r"a.yaml: extends: expected the path .* got \[\]"),
        ({"a": "extends: [b.yaml, a.yaml]", "b": ""}, "a.yaml: extends: .*a.yaml extends itself"),
        ({"a": "extends: b.yaml", "b": "- 3"}, "b.yaml: expected sections"),
        ({"a": "extends: b.yaml\nrun: 3", "b": "run: {seed: 1}"}, "run: expected keys below"),
    ],
)
def test_mistakes_in_extending(tmp_path, files, message):
    with pytest.raises(UserError, match=message) as caught:
        config.load(write(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "metrics.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(UserError, match=r"cannot read .*metrics\.h5: it is no text"):
        config.load(tmp_path / "metrics.h5")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.yaml: No such file"):
        config.load(tmp_path / "gone.yaml")


def test_a_delay_beyond_the_last_step():
    with pytest.raises(UserError, match=r"oialr\.delay: 360 is not less than the 360 steps"):
        config.load(None, [*PAPER, "oialr.delay=360"]).check_steps(360)
    config.load(None, [*PAPER, "oialr.delay=360"]).check_steps(361)
    config.load(None, ["oialr.enabled=false"]).check_steps(1)


def test_every_key_is_documented():
    text = config.describe_keys(config.load())
    for key in config.documented_keys():
        assert f"  {key}=" in text
    assert "None\n" not in text.replace("=None", "")


def test_keys_show_the_value_beside_the_default():
    lines = config.describe_keys(config.load(None, ["training.epochs=7"])).splitlines()
    assert "  training.epochs=7  (default: 20)" in lines
    assert "  training.ema_decay=null" in lines  # as it is by default


def run_door(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT,
    ).stdout


def test_the_configuration_can_be_printed_and_read_again(tmp_path):
    overrides = ["training.epochs=7", "run.name=mine", "model.arguments.depth=2"]
    path = tmp_path / "printed.yaml"
    path.write_text(run_door("app.train", "--print-config", *overrides))
    assert config.load(path) == config.load(None, overrides)


@pytest.mark.parametrize("door", ["train", "search", "report", "analyze", "calibrate"])
def test_every_front_door_tells_versions(door):
    said = run_door(f"app.{door}", "--version")
    assert said.startswith(f"OIALR {oialr.__version__}, python 3.")
    assert "torch 2." in said
    assert said.count("\n") == 1


PATHS = ["run.dir", "data.root", "data.stage_to", "model.initial", "distributed.calibration"]


@pytest.mark.parametrize("key", PATHS)
def test_a_path_may_begin_at_home(monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/me")
    for given, path in (
        ("~/x", "/home/me/x"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("x~/~", "x~/~"),
        ("/x", "/x"),
    ):
        changes = ["data.name=image_folder", f"{key}={given}"]
        section, _, name = key.partition(".")
        loaded = config.load(None, changes)
        assert getattr(getattr(loaded, section), name) == path
        assert f"{key}={path}" in config.describe_keys(loaded).replace("'", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    message = re.escape(f"{key}: should not begin with ~: no home folder is known (got '~/x')")
    with pytest.raises(UserError, match=message):
        config.load(None, ["data.name=image_folder", f"{key}=~/x"])


def test_every_key_that_is_a_path_begins_at_home():
    """A key whose text speaks of a file or folder, as far as it is its value."""
    texts = {
        f"{section}.{key}": entry.description
        for section, field in Configuration.model_fields.items()
        for key, entry in field.annotation.model_fields.items()
        if str in (entry.annotation, *getattr(entry.annotation, "__args__", ()))
    }
    said = {key for key, text in texts.items() if re.match("File|Folder", text)}
    assert said == set(PATHS)


def test_a_run_that_is_resumed_may_be_named_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = str(tmp_path / "run")
    assert config.load(None, ["run.dir=~/run"], folder=folder).run.dir == folder
    assert config.load(None, folder="~/run").run.dir == "./~/run"  # what the shell left as it is


def test_files_at_home_may_be_extended(monkeypatch, tmp_path):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home", base="run: {seed: 3}")
    assert config.load(write(tmp_path, top="extends: ~/base.yaml")).run.seed == 3


def test_an_option_with_its_path_in_one_word_begins_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser(prog="program")
    parser.add_argument("--output")
    parser.add_argument("others", nargs="*")
    parsed = parser.parse_intermixed_args(["run.name=~", "--output=~/x", "~/y"])
    assert (parsed.output, parsed.others) == ("/home/me/x", ["run.name=~", "~/y"])


@pytest.mark.parametrize(
    "value",
    [
        {f"argument_{number}": number for number in range(40)},
        ["word " * 40],
        "a line\nand another\n",
        {"text": ["a\n", "\r\n", ""]},
        "word " * 40,
        None,
        1e-3,
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_value_is_shown_whole_and_in_one_line(value):
    shown = yaml_text.dump_value(value)
    assert "\n" not in shown
    assert yaml_text.load(shown) == value
