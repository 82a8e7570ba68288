"""Data that are the same on all processes, and as those that a checkpoint was trained on."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.digit_tasks import digits
from support.image_folders import SIZE, folder_task, write_images
from support.launching import launch, train
from support.tiny_run import PAPER

from app.errors import UserError
from app.training.same_data import check_same_data, check_stored_data, describe_data
from oialr.placement.processes import Processes


class Pair(Processes):
    """Two processes, of which this one is the first."""

    def __init__(self, second):
        super().__init__()
        self.count, self._second = 2, second

    def gather(self, value):
        theirs = {**value[0], "samples": self._second.digest}
        return [value, (theirs, "node7")]


def test_processes_that_read_other_images_are_refused():
    """Such as those of MNIST on one node and of Fashion-MNIST on another, of the same sizes."""
    task, other = digits(), digits()
    check_same_data(task, Pair(digits()))
    images, labels = other._parts["validation"]
    other._parts["validation"] = images, labels.flip(0)
    with pytest.raises(UserError, match=r"process 1 on node7 reads other data than .* \(samples "):
        check_same_data(task, Pair(other))


@pytest.fixture
def images(tmp_path):
    """Return a folder of images of three classes."""
    for part, count in {"train": 6, "val": 2}.items():
        write_images(tmp_path / "images" / part, count)
    return tmp_path / "images"


def test_other_samples_are_told_of_and_other_classes_refused(images, caplog):
    was = describe_data(folder_task(images))
    assert was["class_names"] == ("ant", "bee", "cat")
    moved = shutil.copytree(images, images.with_name("moved"))
    check_stored_data(describe_data(folder_task(moved)), was)
    assert not caplog.records

    shutil.copy(moved / "train" / "bee" / "1.png", moved / "train" / "bee" / "more.png")
    check_stored_data(describe_data(folder_task(moved)), was)
    (record,) = caplog.records
    assert "(other samples, more or fewer), and are divided anew: what is" in record.message

    for part in ("train", "val"):
        (moved / part / "ant").rename(moved / part / "dog")
    with pytest.raises(UserError, match=r"not the classes that the .* \(ant, dog\): its outputs"):
        check_stored_data(describe_data(folder_task(moved)), was)


def test_a_task_of_ones_own_may_say_nothing_of_its_data(caplog):
    class Plain:
        train_size = steps_per_epoch = 3
        outputs, input_shape = 2, (4,)

    check_stored_data(describe_data(Plain()), describe_data(Plain()))
    assert not caplog.records


def test_what_is_made_of_an_image_is_described(images):
    """Somebody who has the description alone makes the same of an image."""
    task = folder_task(images)
    told = task.preprocessing
    batch = next(task.evaluation_batches("test"))
    paths = sorted((images / "val" / "ant").iterdir())
    with Image.open(paths[0]) as image:  # 40 x 30: the shorter side is the height
        side, crop = told["shorter_side"], told["central_crop"]
        width = side * 40 // 30
        resized = np.asarray(image.resize((width, side), Image.Resampling.BILINEAR), float)
    top, left = round((side - crop) / 2), round((width - crop) / 2)
    values = resized[top : top + crop, left : left + crop].transpose(2, 0, 1)
    mean, std = (np.array(told[key])[:, None, None] for key in ("mean", "std"))
    np.testing.assert_allclose(batch.inputs[0], (values - mean) / std, rtol=1e-5, atol=1e-6)


def test_a_network_keeps_the_normalization_that_it_was_trained_with():
    other = digits(data={"train_samples": 20})
    trained = digits()
    assert other.preprocessing != trained.preprocessing
    other.restore_preprocessing(json.loads(json.dumps(trained.preprocessing)))
    batches = [next(task.evaluation_batches("test")).inputs for task in (other, trained)]
    assert torch.equal(*batches)


@pytest.mark.slow
def test_a_run_that_goes_on_or_is_evaluated_knows_its_data(images, tmp_path):
    run = tmp_path / "run"
    train(
        0,
        f"run.dir={run}",
        f"data.root={images}",
        "data.name=image_folder",
        "data.validation_fraction=0.3",
        f"data.image_size={SIZE}",
        "data.augmentation=none",
        "data.workers=0",
        "training.batch_size=8",
        "training.epochs=2",
        "training.warmup_epochs=0",
        "model.arguments={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}",
        *PAPER,
        "oialr.enabled=false",
        "run.stop_after=2",
        code=75,
    )
    told = "these are not the data that the network was trained with"
    evaluated = launch(0, "-m", "app.evaluate", run)
    assert told not in evaluated.stderr
    shutil.copy(images / "train" / "bee" / "1.png", images / "train" / "bee" / "more.png")
    assert told in launch(0, "-m", "app.evaluate", run).stderr
    assert told in train(0, "--resume", run, "run.stop_after=null").stderr
    for part in ("train", "val"):
        (images / part / "ant").rename(images / part / "dog")
    refused = launch(0, "-m", "app.evaluate", run, code=2)
    assert "error: data.root: these are not the classes" in refused.stderr
