"""The configuration: what is wrong is one line that names the key."""

import re

import pytest

from app import config
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
        ("data.cutoff=0.1", "data.cutoff: unknown key; did you mean oialr.cutoff?"),
        ("training.epochs=true", "training.epochs: should be a valid integer (got True)"),
        ("training.epochs=1.5", "training.epochs: should be a valid integer (got 1.5)"),
        ("training.epochs=many", "training.epochs: should be a valid integer (got 'many')"),
        ("training.epochs=0", "training.epochs: should be greater than 0 (got 0)"),
        ("training.learning_rate=.nan", "training.learning_rate: should be a finite number"),
        ("oialr.cutoff=1", "oialr.cutoff: should be less than 1 (got 1)"),
        ("oialr.layer_fraction=0", "oialr.layer_fraction: should be greater than 0"),
        ("data.name=cifar", "'cifar' is not one of digits, mnist"),
        ("data.name=cifar", "did you mean cifar10?"),
        ("data.name=007", "data.name: '007' is not one of digits, mnist"),
        ("data.root=", "data.root: should be a valid string (got None)"),
        ("training.warmup_epochs=60", "training.warmup_epochs: 60.0 must be less than epochs, 60"),
        ("training.minimum_learning_rate=1", "training.minimum_learning_rate: 1.0 exceeds"),
        ("training.accumulation=100", "training.accumulation: 100 backward passes cannot share"),
        ("stability.interval=2", "stability.window: 5 must be a multiple of interval, 2"),
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
        ("- training", "expected sections"),
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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: a.yaml"}, "a.yaml: extends: .*a.yaml extends itself"),
        ({"a": "extends: b.yaml", "b": "extends: a.yaml"}, "b.yaml: extends: .* extends itself"),
        ({"a": "extends: gone.yaml"}, "a.yaml: extends: cannot read .*gone.yaml: No such file"),
        ({"a": "extends: [b]"}, r"a.yaml: extends: expected the path .* got \['b'\]"),
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
        config.load().check_steps(360)
    config.load().check_steps(361)
    config.load(None, ["oialr.enabled=false"]).check_steps(1)


def test_every_key_is_documented():
    text = config.describe_keys()
    for key in config.documented_keys():
        assert f"  {key}=" in text
    assert "None\n" not in text.replace("=None", "")
