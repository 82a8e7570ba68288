"""The memory of a conversion: what an event tells, against what the device's allocator saw."""

import torch
from support.gpu.accelerator import allocated_bytes, peak_memory
from support.gpu.networks import training
from torch.nn import functional

from app import models
from oialr.memory import tensors_of

GRANULE = 512
"""Bytes that the allocator rounds every tensor up to."""


def test_the_peak_of_a_conversion_is_as_told_but_for_the_workspace_of_one_factorization(
    size, device
):
    """ViT-B/16 with AdamW: one layer at a time is there both dense and as factors."""
    pixels = size.image
    model = models.build(
        "vision_transformer", size.vision_transformer, input_shape=(3, pixels, pixels), outputs=10
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    trained = training(model, optimizer, delay=1, update_interval=10, measure_memory=True)
    images = torch.randn(2, 3, pixels, pixels).to(device)
    functional.cross_entropy(model(images), torch.tensor([1, 2]).to(device)).backward()
    optimizer.step()
    del images
    stored = list(tensors_of(model, optimizer))
    before = sum(tensor.nbytes for tensor in stored)
    # What others left: cuBLAS's workspace, the tests' own.
    foreign = allocated_bytes(device, stored) - before
    largest = max(p.numel() for p in model.parameters() if p.requires_grad)
    del stored
    with peak_memory(device, tensors_of(model, optimizer)) as peak:
        event = trained.method.step()
    assert event
    assert event.kind == "convert"
    assert event.shapes_changed
    after = sum(tensor.nbytes for tensor in tensors_of(model, optimizer))
    measured = peak.bytes - foreign

    # The figure of the event leaves nothing out but the workspace inside the SVD of one matrix.
    granules = GRANULE * 8 * len(list(model.parameters()))
    workspace = 16 * 4 * largest
    assert event.peak_bytes <= measured + granules
    assert measured <= event.peak_bytes + workspace + granules
    # Beside what is stored before or after there are one layer's factors and transported state.
    assert event.peak_bytes <= max(before, after) + 8 * 4 * largest
