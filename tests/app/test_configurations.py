"""Every file in configs/: its network and its steps as they are, and a small run of each."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.image_folders import write_images
from support.image_sets import expect_small_sets, write_cifar, write_mnist
from support.series import write_ett

from app import config, models
from app.data.official import OfficialSet
from app.data.sets import DATA_SETS, ett
from app.recording.store import read_rows
from app.runtime.processes import start_runtime
from app.runtime.stop_signal import StopSignal
from app.training.run import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATHS = sorted(CONFIGS.glob("*.yaml"))
PAPER = [CONFIGS / "paper" / path.name for path in PATHS]
TRAIN_SIZES = {
    "digits": 1257,
    "image_folder": 1_255_544,  # 98 % of ImageNet-2012
}
AS_THEY_ARE = dict(DATA_SETS)  # before a fixture makes them small
DAY = 24 * 60
SMALL_NETWORKS = {
    "vision_transformer": "{patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}",
    "vit_base_patch16_224": "{embed_dim: 24, depth: 1, num_heads: 2}",
    "resnetrs101": "{layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], stem_width: 8}",
    "vgg16_bn": "{mlp_ratio: 0.005}",
    "cifar_resnet": "{depth: 8, width: 8}",
    "lenet5": "{}",
    "autoformer": "{width: 16, heads: 2, feed_forward: 32, label_length: 6}",
}


def _id(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    expect_small_sets(monkeypatch)


def test_there_are_the_named_ones() -> None:
    names = {path.stem for path in PATHS}
    assert names >= {
        *("cifar10_vit", "cifar10_vgg16", "cifar10_resnet", "mnist_lenet5", "fashion_mnist_vit"),
        *("imagenet_resnetrs101", "imagenet_vit_b16", "ettm2_autoformer", "digits_vit"),
    }
    beside = {path.stem for path in (CONFIGS / "paper").glob("*.yaml")}
    assert beside == {*names, "settings"}


def test_the_recipes_and_the_paper_s_settings_set_the_same_keys() -> None:
    """A key that one of them left out would be that of the file before it in `extends`."""
    files = [*(CONFIGS / "recipes").glob("*.yaml"), CONFIGS / "paper" / "settings.yaml"]
    own = {"delay"}  # which each file beside settings.yaml says for itself
    keys = [yaml.safe_load(path.read_text()) for path in files]
    method = [set(one["oialr"]) - own | {"frobenius_decay"} for one in keys]
    assert len(files) == 3
    assert method == [method[0]] * 3
    training = [set(one["training"]) for one in keys if "training" in one]
    assert training == [training[0]] * 2


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_paper_s_settings_are_those_of_the_method_alone(path: Path) -> None:
    recipe, paper = (config.load(one).model_dump() for one in (path, CONFIGS / "paper" / path.name))
    for section in recipe:
        assert section == "oialr" or recipe[section] == paper[section]
    assert recipe["oialr"]["release"] == "delay"
    assert recipe["oialr"]["target_size"] <= 0.35
    assert (recipe["oialr"]["frobenius_decay"] or 0) == recipe["training"]["weight_decay"]
    assert not paper["oialr"]["release"]
    assert not paper["oialr"]["target_size"]


@pytest.mark.parametrize("path", PATHS + PAPER, ids=_id)
def test_configuration_fits_its_data(path: Path) -> None:
    """The network as it is takes the data, and the conversion comes within the run, in both twins.

    What is said of steps in a comment beside oialr.delay is right.
    """
    configuration = config.load(path)
    data, training = configuration.data, configuration.training
    if data.name in ett.STEP_MINUTES:
        length = data.input_length + data.horizon
        part = ett.split(ett.STEP_MINUTES[data.name], data.input_length)["train"]
        size = part.stop - length + 1
        shape, outputs = (length, 7 + 5), (data.horizon, 7)
    elif data.name == "image_folder":
        size = TRAIN_SIZES[data.name]
        shape, outputs = (3, data.image_size, data.image_size), 1000
    elif isinstance(official := AS_THEY_ARE[data.name], OfficialSet):
        size = round(official.train_size * (1 - data.validation_fraction))
        shape, outputs = official.shape, official.classes
    else:
        size = TRAIN_SIZES[data.name]
        shape, outputs = (1, 8, 8), 10
    models.check(configuration.model, input_shape=shape, outputs=outputs)

    per_epoch = size // training.batch_size if data.drop_last else -(-size // training.batch_size)
    steps = training.epochs * per_epoch
    configuration.check_steps(steps)
    options = configuration.oialr.options(steps)
    if options.release is None:
        updates = (steps - options.delay) // options.update_interval
        assert updates * options.layer_fraction >= 1  # all layers get their turn
    config.load(path, ["oialr.enabled=false"]).check_steps(steps)
    if said := re.search(r"delay: .*[^\d,]([\d,]+) steps$", path.read_text(), re.MULTILINE):
        assert int(said[1].replace(",", "")) == steps


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets in their official layouts, small."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def data_root(root: Path, _small_sets: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(ett.STEP_MINUTES, "ettm2", DAY)
    if not any(root.iterdir()):
        write_cifar(root)
        for source in DATA_SETS.values():
            if isinstance(source, OfficialSet) and source.label_key is None:
                write_mnist(root, source.torchvision)
        write_images(root / "train", 14)
        write_images(root / "val", 3, first=10)
        write_ett(root, "ETTm2", 20 * 30, minutes=DAY)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS + PAPER, ids=_id)
def test_a_small_run_does_what_is_said(path: Path, data_root: Path, tmp_path: Path) -> None:
    """The recipe releases at once, the paper's algorithm converts and cuts."""
    plain = config.load(path)
    is_recipe = path in PATHS
    options = [
        f"run.dir={tmp_path / 'run'}",
        f"data.root={data_root}",
        f"model.arguments={SMALL_NETWORKS[plain.model.name]}",
        "training.epochs=2",
        "training.batch_size=12",
        "training.warmup_epochs=0.2",
        "oialr.rank_multiple=1",
        "stability.window=1",
        "distributed.device=cpu",
    ]
    if plain.data.name == "image_folder":
        options += ["data.image_size=32", "data.workers=0", "data.validation_fraction=0.1"]
    elif plain.model.name == "vgg16_bn":  # all layers are in test_networks.py
        options += [
            "oialr.include=[features.0, features.3, pre_logits.*]",
            "stability.enabled=false",
            *(["oialr.target_size=0.98"] if is_recipe else []),  # the others count too
        ]
    elif plain.data.name == "digits":
        options += ["data.train_samples=36"]
    elif plain.data.name in ett.STEP_MINUTES:
        options += ["data.input_length=12", "data.horizon=20", "data.train_samples=36"]
    if not is_recipe:
        options += ["oialr.delay=2", "oialr.update_interval=2"]
        options += ["oialr.layer_fraction=1", "oialr.cutoff=0.95"]
    configuration = config.load(path, options)
    with start_runtime(device="cpu", timeout=60) as runtime:
        summary = train(configuration, runtime, StopSignal(), resume=False).summary
    assert summary["steps"] == 6
    assert summary["trainable_percent"] < 100
    assert np.isfinite(summary["test_loss"])
    events = read_rows(tmp_path / "run" / "metrics.h5", "lowrank")
    assert list(events["event"]) == (["release"] if is_recipe else ["convert", "cut", "cut"])
    losses = read_rows(tmp_path / "run" / "metrics.h5", "train")["loss"]
    assert np.isfinite(losses).all()
