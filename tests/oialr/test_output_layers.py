"""keep_last_layer: every layer that produces a network's outputs stays full-rank, and no other."""

import pytest
import torch
from torch import nn

from oialr.compatibility import import_torchvision
from oialr.layer_survey import survey

import_torchvision()
timm = pytest.importorskip("timm")

KEPT = "the network's last layer (keep_last_layer)"


def kept(model):
    reports = survey(model, minimum_rank_fraction=0.0)
    return [report.name for report in reports if report.stays_dense == KEPT]


TIMM = {
    "deit_tiny_distilled_patch16_224": ["head.weight", "head_dist.weight"],
    "levit_128s": ["head.linear.weight", "head_dist.linear.weight"],
    "crossvit_tiny_240": ["head.0.weight", "head.1.weight"],
    "efficientformer_l1": ["head.weight", "head_dist.weight"],
    "repvit_m0_9": ["head.head.l.weight", "head.head_dist.l.weight"],
    "caformer_s18": ["head.fc.fc2.weight"],
    "resnet18": ["fc.weight"],
    "vit_tiny_patch16_224": ["head.weight"],
    "vgg11": ["head.fc.weight"],
    "convnext_atto": ["head.fc.weight"],
}


@pytest.mark.parametrize("name", TIMM)
def test_heads_of_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert kept(model) == TIMM[name]
    assert kept(nn.Sequential(nn.Identity(), model)) == [f"1.{head}" for head in TIMM[name]]


def test_without_a_head_it_is_the_last_layer():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    assert kept(model) == ["blocks.11.mlp.fc2.weight"]


class Encoder(nn.Module):
    """As a body of transformers: its embeddings may be registered last."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.rel_embeddings = nn.Embedding(8, 16)


def network(**children):
    """Make a network of named children, in their order, behind a body."""
    model = nn.Module()
    model.body = Encoder()
    for name, child in children.items():
        setattr(model, name, child)
    return model


def mlp():
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


def linear():
    return nn.Linear(16, 16)


NETWORKS = {
    "a body alone": (network(), ["body.layer.1.weight"]),
    "deberta": (
        network(classifier=linear(), pooler=mlp(), dropout=nn.Dropout()),
        ["classifier.weight"],
    ),
    "distilbert": (
        network(pre_classifier=linear(), classifier=linear()),
        ["classifier.weight"],
    ),
    "deit with teacher": (
        network(cls_classifier=linear(), distillation_classifier=linear()),
        ["cls_classifier.weight", "distillation_classifier.weight"],
    ),
    "roberta": (network(classifier=mlp(), pooler=linear()), ["classifier.2.weight"]),
    "gpt": (network(score=linear()), ["score.weight"]),
    "question answering": (network(qa_outputs=linear()), ["qa_outputs.weight"]),
    "several tasks": (
        network(heads=nn.ModuleDict({"a": linear(), "b": mlp()}), value_head=linear()),
        ["heads.a.weight", "heads.b.2.weight", "value_head.weight"],
    ),
    "a hidden fc": (network(fc=linear(), out=linear()), ["out.weight"]),
    "a wrapper": (nn.Sequential(network(head=linear(), tail=linear())), ["0.head.weight"]),
    "a list of blocks": (nn.Sequential(nn.ModuleList([linear(), linear()])), ["0.1.weight"]),
    "convolutions": (nn.Sequential(nn.Conv1d(8, 16, 3), nn.Conv1d(16, 16, 3)), ["1.weight"]),
    "no head to speak of": (network(head=nn.Identity()), ["body.layer.1.weight"]),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_heads_by_name(case):
    model, expected = NETWORKS[case]
    assert kept(model) == expected


def test_output_embeddings_of_transformers_beside_a_head():
    class Pretraining(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Encoder()
            self.cls = nn.Module()
            self.cls.predictions, self.cls.seq_relationship = mlp(), linear()
            self.late = linear()

        def get_output_embeddings(self):
            return self.cls.predictions[2]

    class Body(Encoder):
        def get_output_embeddings(self):
            return None

    assert kept(Pretraining()) == ["cls.predictions.2.weight", "cls.seq_relationship.weight"]
    assert kept(Body()) == ["layer.1.weight"]


@pytest.mark.parametrize("case", NETWORKS)
def test_nothing_is_kept_on_request(case):
    reports = survey(NETWORKS[case][0], keep_last_layer=False, minimum_rank_fraction=0.0)
    assert not any(report.stays_dense == KEPT for report in reports)
