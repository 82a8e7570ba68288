"""Autocast in bfloat16, and in float16 with scaled losses, over a conversion and a cut."""

import pytest
import torch
from support.gpu.networks import batches, build, input_shape, training
from torch.nn import functional

from app.training.precision import DTYPES, Precision
from oialr.convert import get_layer
from oialr.linalg.svd import ORTHONORMAL, orthonormality_error

STEPS = 12
CLIP = 1.0


def adamw(model, fused):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)


def train(name, size, device, precision_name, fused):
    model = build(name, size).to(device)
    trained = training(model, adamw(model, fused), delay=3)
    precision = Precision(precision_name, device)
    outputs = []
    for inputs, labels in trained.placed(batches(input_shape(name, size), size, 1) * STEPS):
        trained.optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            out = model(inputs)
            loss = functional.cross_entropy(out, labels)
        outputs.append(out.dtype)
        precision.backward(loss)
        precision.step(trained.optimizer, model, CLIP)
        trained.losses.append(loss.detach())
        if event := trained.method.step():
            trained.events[event.step] = event
    return trained, precision, outputs


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("precision_name", DTYPES)
@pytest.mark.parametrize("name", ["linear", "convolution", "attention"])
def test_mixed_precision_trains_alike_and_keeps_all_state_in_float32(
    name, precision_name, fused, size, device
):
    exact, _, _ = train(name, size, device, "float32", fused)
    mixed, precision, outputs = train(name, size, device, precision_name, fused)
    assert set(outputs) == {DTYPES[precision_name]}
    assert [e.kind for e in mixed.events.values()][:2] == ["convert", "cut"]
    for parameter in mixed.model.parameters():
        assert parameter.dtype == torch.float32
        for value in mixed.optimizer.state.get(parameter, {}).values():
            assert value.dtype == torch.float32
    for report in mixed.method.layers:
        layer = get_layer(mixed.model, report.name)
        for factor in (layer.U, layer.Vh.mT):
            for vectors in factor.reshape(-1, *factor.shape[-2:]):
                assert orthonormality_error(vectors) < 4 * ORTHONORMAL[torch.float32]
    losses = torch.stack(mixed.losses).float()
    assert losses.isfinite().all()
    if precision_name == "float16":
        # The first steps may overflow and be skipped, with the scale halved each time.
        scale = precision.state_dict()["scale"]
        assert 1 <= scale <= 2**16
        assert losses[-1] < 0.95 * losses[0]
    else:
        # bfloat16 has 8 bits: a logit, and so a loss, is off by some 1e-2.
        torch.testing.assert_close(losses, torch.stack(exact.losses), rtol=0.05, atol=0.05)
