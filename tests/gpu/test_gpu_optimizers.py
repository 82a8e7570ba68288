"""Transport of the optimizer's state by every implementation of AdamW."""

import pytest
import torch
from support.gpu.networks import batches, build, input_shape, relative_error, training

IMPLEMENTATIONS = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def adamw(model, implementation):
    # With an eps of the order of the gradients, so that the noise in those that are zero stays so.
    return torch.optim.AdamW(
        model.parameters(), lr=1e-3, eps=1e-4, **IMPLEMENTATIONS[implementation]
    )


@pytest.mark.parametrize("name", ["linear", "convolution"])
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_the_implementations_agree_over_conversion_and_cut(implementation, name, size, device):
    data = batches(input_shape(name, size), size, 8)
    results = {}
    for each in ("for-loop", implementation):
        model = build(name, size, torch.float64).to(device)
        trained = training(model, adamw(model, each)).run(data)
        assert [e.kind for e in trained.events.values()][:2] == ["convert", "cut"]
        results[each] = trained
    mine, theirs = results[implementation], results["for-loop"]
    assert mine.method.ranks() == theirs.method.ranks()
    # float64; a step of Adam is no smoother than 1 / eps.
    assert relative_error(mine.weights(), theirs.weights()) < 1e-9


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_moments_and_step_counts_follow_the_core(implementation, size, device):
    model = build("linear", size, torch.float64).to(device)
    optimizer = adamw(model, implementation)
    trained = training(model, optimizer, delay=3)
    data = batches(input_shape("linear", size), size, 4)
    trained.run(data[:2])
    weight = model[0].weight
    placed = trained.placed(data)
    # The third step converts: what it leaves in the state of the dense weight is kept aside.
    seen = {}
    optimizer.register_step_post_hook(
        lambda *_: seen.update({k: v.clone() for k, v in optimizer.state.get(weight, {}).items()})
    )
    trained.step(model, *placed[2])
    assert trained.events[3].kind == "convert"
    layer = model[0]
    state = optimizer.state[layer.core]
    U, V = layer.U, layer.Vh.mT
    torch.testing.assert_close(state["exp_avg"], U.mT @ seen["exp_avg"] @ V)
    expected = U.square().mT @ seen["exp_avg_sq"] @ V.square()
    torch.testing.assert_close(state["exp_avg_sq"], expected)
    assert float(state["step"]) == 3
    assert state["step"].device == seen["step"].device
    assert weight not in optimizer.state
    trained.step(model, *placed[3])
    assert float(optimizer.state[layer.core]["step"]) == 4
