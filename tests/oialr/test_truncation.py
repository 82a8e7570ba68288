"""Cuts that keep what a layer computes: against closed forms, and dense layers, in float64."""

import copy
import gc
import logging

import pytest
import torch
from support.kinds import CASES, Conv1D, batch_for, dense_layer, make, reading_of, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

from oialr import OIALR, Processes, WeightAverage, compress, events, to_dense
from oialr.input_moments import InputMoments
from oialr.layer_survey import survey
from oialr.layers.registry import kind_of
from oialr.linalg.svd import economy_svd
from oialr.linalg.weighting import DAMPING, root_of, taken_back, weighted


def hooks():
    """Of all modules, without those of methods that earlier tests have left."""
    gc.collect()
    kept = vars(torch.nn.modules.module).items()
    return [hook for name, all_ in kept if name.startswith("_global_") and all_ for hook in all_]


@pytest.fixture(autouse=True, scope="module")
def nothing_stays():
    """Networks that later tests compile would find the hooks of methods that are not collected."""
    yield
    assert not hooks()


def seen_by(method):
    return method._inputs._moments._moments


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(side, groups=()):
    """Of inputs that lie mostly in a few directions, with a mean that is not 0."""
    x = normal(*groups, 50, side, seed=1) * 0.7 ** torch.arange(side) + 0.2
    return x.mT @ x


def symmetric_root(moment):
    scaled = moment / moment.diagonal().mean() + DAMPING * torch.eye(len(moment))
    values, Q = torch.linalg.eigh(scaled)
    return Q @ values.sqrt().diag() @ Q.T, Q @ values.rsqrt().diag() @ Q.T


def best(W, moment, r):
    """W_r of the least |(W - W_r) S|, by the symmetric root in place of Cholesky's."""
    S, inverse = symmetric_root(moment)
    U, s, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    return U[:, :r] * s[:r] @ Vh[:r] @ inverse


@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
@pytest.mark.parametrize("r", [1, 3, 7])
def test_what_is_kept_is_best_for_the_inputs(shape, r):
    W, moment = normal(*shape), moments(shape[1])
    S = root_of(moment)
    U, s, Vh = taken_back(economy_svd(weighted(W, S, "columns")), r, S, "columns")
    torch.testing.assert_close(U * s @ Vh, best(W, moment, r))
    torch.testing.assert_close(U.T @ U, torch.eye(r, dtype=U.dtype))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(r, dtype=U.dtype))
    assert (s.diff() <= 0).all()
    # Rows that meet the inputs are the columns of the transposed matrix.
    U, s, Vh = taken_back(economy_svd(weighted(W.T, S, "rows")), r, S, "rows")
    torch.testing.assert_close((U * s @ Vh).T, best(W, moment, r))
    torch.testing.assert_close(U.T @ U, torch.eye(r, dtype=U.dtype))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(r, dtype=U.dtype))


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_each_matrix_of_a_stack_has_inputs_of_its_own(side):
    W, moment = normal(3, 8, 8), moments(8, groups=(3,))
    S = root_of(moment)
    U, s, Vh = taken_back(economy_svd(weighted(W, S, side)), 2, S, side)
    for i in range(3):
        expected = best(W[i] if side == "columns" else W[i].T, moment[i], 2)
        found = U[i] * s[i] @ Vh[i]
        torch.testing.assert_close(found if side == "columns" else found.T, expected)


def test_the_scale_of_inputs_does_not_matter_and_none_have_no_root():
    moment = moments(6)
    torch.testing.assert_close(root_of(moment), root_of(1e9 * moment))
    assert root_of(torch.zeros(4, 4)) is None
    assert root_of(torch.full((4, 4), torch.nan)) is None
    assert root_of(torch.ones(4, 4)) is not None  # of rank one


def output_of(layer, x):
    """What a layer computes, without its bias."""
    layer = copy.deepcopy(layer)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer(x)


LINEAR = [case for case in CASES if case not in ("Embedding", "Conv2d, spatial")]


@pytest.mark.parametrize("case", [case for case in LINEAR if "Transpose" not in case])
def test_a_layer_computes_its_matrix_times_its_inputs(case):
    layer, x = dense_layer(case), batch_for(case)
    reading, kind = reading_of(layer, case), kind_of(layer)
    inputs, W = kind.inputs(layer, reading, x), reading.to_matrix(layer.weight)
    product = inputs @ (W.mT if kind.inputs_meet == "columns" else W)  # (b, m), or (g, b, m)
    product = product.movedim(0, 1).flatten(1) if reading.groups > 1 else product
    output = output_of(layer, x)
    if "Conv2d" in case or "Transpose" in case:
        output = output.movedim(1, -1)
    torch.testing.assert_close(product, output.reshape(product.shape))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3, stride=2, padding=2, padding_mode="circular"),
        nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1), groups=2),
        nn.Conv2d(2, 4, 3, padding=(1, 0), padding_mode="reflect", stride=(1, 2)),
        nn.Conv3d(2, 3, 2, padding=1),
    ],
)
def test_patches_are_those_of_any_geometry(layer):
    layer = layer.double()
    x = normal(2, layer.in_channels, *(7, 6, 5)[: len(layer.kernel_size)])
    kind = kind_of(layer)
    reading = kind.reading(layer, "weight")
    inputs, W = kind.inputs(layer, reading, x), reading.to_matrix(layer.weight)
    product = inputs @ W.mT
    product = product.movedim(0, 1).flatten(1) if reading.groups > 1 else product
    torch.testing.assert_close(product.flatten(), output_of(layer, x).movedim(1, -1).flatten())
    # One volume without a batch is a batch of one.
    torch.testing.assert_close(
        kind.inputs(layer, reading, x[0]), kind.inputs(layer, reading, x[:1])
    )


def test_patches_of_a_kernel_by_its_directions_are_those_of_the_width():
    case = "Conv2d, spatial"
    layer, x = dense_layer(case), batch_for(case)
    reading = reading_of(layer, case)
    inputs = kind_of(layer).inputs(layer, reading, x)
    W = reading.to_matrix(layer.weight)  # (o kh, i kw)
    rows = W.view(6, 2, -1)[:, 0]  # of the kernel's first row
    kernel = layer.weight[:, :, :1]
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    expected = nn.functional.conv2d(padded, kernel, stride=(1, 2), dilation=(1, 1))
    torch.testing.assert_close((inputs @ rows.T).flatten(), expected.movedim(1, -1).flatten())


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_spreads_its_inputs(groups):
    # Patches of the output do not overlap where the stride is the kernel.
    layer = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups, bias=False).double()
    x, kind = normal(3, 4, 5, 2), kind_of(layer)
    reading = kind.reading(layer, "weight")
    product = kind.inputs(layer, reading, x) @ reading.to_matrix(layer.weight)
    torch.testing.assert_close(product.square().sum(), layer(x).square().sum())
    torch.testing.assert_close(
        kind.inputs(layer, reading, x[0]), kind.inputs(layer, reading, x[:1])
    )


def test_of_a_large_batch_the_first_images_count(monkeypatch):
    layer = nn.Conv2d(2, 4, 3)
    reading = kind_of(layer).reading(layer, "weight")
    x = torch.randn(8, 2, 5, 5)
    monkeypatch.setattr("oialr.layers.conv.LARGEST_PATCHES", 3 * 2 * 25 * 9)
    inputs = kind_of(layer).inputs(layer, reading, x)
    torch.testing.assert_close(inputs, kind_of(layer).inputs(layer, reading, x[:3]))


def test_of_patches_without_overlap_all_are_looked_at(monkeypatch):
    """And a part of them lies on the grid of the whole."""
    layer = nn.Conv2d(3, 8, 4, stride=4, padding=2)
    reading = kind_of(layer).reading(layer, "weight")
    x = torch.randn(6, 3, 36, 12)
    whole = kind_of(layer).inputs(layer, reading, x)
    monkeypatch.setattr("oialr.layers.conv.LARGEST_PATCHES", 6 * 3 * 36 * 12)
    torch.testing.assert_close(kind_of(layer).inputs(layer, reading, x), whole)
    monkeypatch.setattr("oialr.layers.conv.LARGEST_PATCHES", 3 * 20 * 12)
    part = kind_of(layer).inputs(layer, reading, x)
    by_row = {tuple(row.tolist()) for row in whole}
    inner = [row for row in part if row.all()]  # without padding
    assert len(inner) >= 3 * 2
    assert all(tuple(row.tolist()) in by_row for row in inner)


def few_directions(step, dtype=torch.float64):
    """Inputs (16, 12) that lie in three directions, the same in all steps."""
    x = normal(16, 3, seed=step) @ normal(3, 12, seed=99)
    return x.to(dtype), (x[:, 0] > 0).long()


def two_layers(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 2)).to(dtype)


def run(model, steps, *, first=0, method=None, look=lambda step: None, **options):
    if method is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        options = {"rank_multiple": 1, "update_interval": 50, **options}
        method = OIALR(model, optimizer, **options)
    events = []
    for step in range(first, first + steps):
        x, y = few_directions(step, next(model.parameters()).dtype)
        method.optimizer.zero_grad()
        look(step)
        nn.functional.cross_entropy(model(x), y).backward()
        method.optimizer.step()
        look(step)
        events.append(method.step())
    return method, [event for event in events if event]


AT_ONCE = {"delay": 4, "release": 4, "target_size": 0.75}
# Three of twelve ranks, whatever the spectrum is.
IN_PARTS = {"delay": 4, "cut_at_conversion": True, "retained_energy": 1e-9, "largest_cut": 0.75}


@pytest.mark.parametrize("delay", [1, 4])
@pytest.mark.parametrize("options", [AT_ONCE, IN_PARTS], ids=["released", "cores"])
def test_a_cut_to_the_directions_of_the_inputs_leaves_what_is_computed(options, delay):
    options = {**options, "delay": delay, **({"release": delay} if "release" in options else {})}
    lost = {}
    for truncation in ("weights", "outputs"):
        model = two_layers()
        method, _ = run(model, delay - 1, truncation=truncation, **options)
        x, y = few_directions(7)
        method.optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        method.optimizer.step()
        before = model(x)
        event = method.step()
        assert 3 <= method.ranks()["0.weight"] <= 5
        assert event.shapes_changed
        lost[truncation] = float(((model(x) - before).norm() / before.norm()).detach())
    assert lost["outputs"] < 1e-2
    assert lost["weights"] > 0.05


@pytest.mark.parametrize("case", [case for case in CASES if case != "Embedding"])
@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_every_kind_is_cut_by_its_inputs_and_goes_on(case, kind, caplog):
    options = {"release": 3, "target_size": 0.9, "truncation": "outputs"}
    model, optimizer, method = make(case, kind, cutoff=0.1, **options)
    (event,) = train(case, model, optimizer, method, 5)
    assert event.kind == "release"
    assert "inputs" not in caplog.text
    assert method.missed_target() is None
    assert method.ranks()["0.weight"] < method.layers[0].full_rank
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_kind_that_does_not_tell_is_cut_by_its_weight(caplog):
    options = {"release": 3, "target_size": 0.7}
    states = []
    for truncation in ("weights", "outputs"):
        with caplog.at_level(logging.WARNING):
            model, optimizer, method = make("Embedding", truncation=truncation, **options)
            train("Embedding", model, optimizer, method, 4)
        states.append(model.state_dict())
    assert "1 weights are cut by their own spectra" in caplog.text
    assert "0.weight" in caplog.text
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])


def test_only_the_step_of_the_event_is_looked_at_and_no_trace_is_left():
    seen = []
    model = two_layers()
    method, _ = run(model, 3, truncation="outputs", **AT_ONCE)
    assert method.watches_inputs
    assert len(hooks()) == 1
    with torch.no_grad():  # a validation between
        model.eval()(normal(16, 12, seed=5))
    method, (event,) = run(
        model.train(),
        3,
        first=3,
        method=method,
        look=lambda step: seen.append((step, method.watches_inputs)),
    )
    assert event.step == 4
    assert [step for step, watches in seen if watches] == [3]
    assert not hooks()
    other = two_layers()
    run(other, 6, truncation="outputs", **AT_ONCE)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resume_next_to_the_cut_changes_no_bit(stop):
    options = {"truncation": "outputs", **AT_ONCE}
    whole = two_layers()
    run(whole, 6, **options)
    model = two_layers()
    method, _ = run(model, stop, **options)
    stored = copy.deepcopy((model.state_dict(), method.optimizer.state_dict(), method.state_dict()))
    resumed = two_layers()
    again, _ = run(resumed, 0, **options)
    again.load_state_dict(stored[2])
    resumed.load_state_dict(stored[0])
    again.optimizer.load_state_dict(stored[1])
    # A pass that is thrown away, such as that after DistributedDataParallel is made.
    resumed(normal(16, 12, seed=5)).sum().backward()
    again.optimizer.zero_grad()
    run(resumed, 6 - stop, first=stop, method=again)
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_method_that_is_given_up_leaves_no_hook():
    method, _ = run(two_layers(), 3, truncation="outputs", **AT_ONCE)
    assert hooks()
    del method
    assert not hooks()


def test_under_autocast_moments_are_of_the_weights_precision():
    model = two_layers(torch.float32)
    method, _ = run(model, 3, truncation="outputs", **AT_ONCE)
    x, y = few_directions(3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x).float(), y)
    assert seen_by(method)["0.weight"].dtype == torch.float32
    torch.testing.assert_close(seen_by(method)["0.weight"], x.T @ x)
    loss.backward()
    method.optimizer.step()
    assert method.step().kind == "release"


def step_to_the_cut(model, method, *, inputs=None):
    """Take the step that ends with the cut; return the method's event."""
    x, y = few_directions(7)
    method.optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    method.optimizer.step()
    return method.step()


@pytest.mark.parametrize("kind", ["linear", "rows"])
def test_an_average_keeps_what_the_network_keeps(kind):
    model = two_layers()
    if kind == "rows":
        model[0] = Conv1D(20, 12).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    average = WeightAverage(model, optimizer, decay=0.01)
    followed = AveragedModel(model)
    method = OIALR(
        model, optimizer, update_interval=50, rank_multiple=1, truncation="outputs", **AT_ONCE
    )
    method.follow(followed)
    run(model, 3, method=method)
    followed.module.load_state_dict(model.state_dict())
    average.update(3)
    x = few_directions(7)[0]

    def averages():
        with torch.no_grad(), average.applied():
            return followed(x), model(x)

    before = averages()
    step_to_the_cut(model, method)
    assert method.ranks()["0.weight"] <= 5
    for one, other in zip(before, averages(), strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-2


def test_a_layer_is_seen_in_all_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(12, 20), nn.Linear(20, 2)

        def forward(self, x):
            return self.head(self.layer(x) + self.layer(0.01 * x.flip(0)))

    model = Twice().double()
    method, _ = run(model, 3, truncation="outputs", **AT_ONCE)
    x, y = few_directions(3)
    model(normal(16, 12, seed=8)).sum().backward()  # thrown away
    nn.functional.cross_entropy(model(x), y).backward()
    moment = seen_by(method)["layer.weight"]
    torch.testing.assert_close(moment, (1 + 0.01**2) * x.T @ x)


def test_a_method_that_is_asked_seldom_sees_the_step_of_the_cut(caplog):
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    options = {"update_interval": 50, "rank_multiple": 1, "truncation": "outputs", **AT_ONCE}
    method = OIALR(model, optimizer, **options)
    for step in range(6):
        x, y = few_directions(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step % 2:
            model(normal(16, 12, seed=5)).sum().backward()  # after the step: does not count
            event = method.step()
            assert (event is not None) == (step == 3)
    assert not caplog.text


def test_nothing_is_looked_at_where_no_layer_tells():
    options = {**IN_PARTS, "update_interval": 2, "truncation": "outputs"}
    method, events = run(two_layers(), 9, **options)
    assert [event.step for event in events] == [4, 6, 8]
    assert not method.watches_inputs  # though an update comes after the next step
    assert not hooks()


def test_a_state_that_is_loaded_into_a_running_method_changes_no_bit(caplog):
    options = {**IN_PARTS, "update_interval": 3, "truncation": "outputs"}
    model, whole = two_layers(), two_layers()
    method, _ = run(model, 3, **options)
    states = copy.deepcopy((model.state_dict(), method.state_dict(), method.optimizer.state_dict()))
    run(model, 3, first=3, method=method)  # to the step before an update
    model.load_state_dict(states[0])
    method.load_state_dict(states[1])
    method.optimizer.load_state_dict(states[2])
    run(model, 4, first=3, method=method)
    run(whole, 7, **options)
    assert not caplog.text
    for one, two in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)


def transformed(model, x):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)


@pytest.mark.parametrize(
    "call",
    [
        transformed,
        lambda model, x: model(torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)),
        lambda model, x: model[0](x.relu().to_sparse()),
    ],
    ids=["functional", "nested", "sparse"],
)
def test_what_cannot_be_seen_runs_all_the_same(call):
    model = two_layers()
    options = {"delay": 1, "release": 1, "target_size": 0.75}
    method, _ = run(model, 0, truncation="outputs", **options)
    call(model, few_directions(0)[0])
    assert method.watches_inputs
    assert not seen_by(method)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_network_compiled_as_one_graph_runs_and_is_not_seen(caplog):
    torch.compiler.reset()
    assert not hooks()  # one that goes while a network is compiled is missed
    model = two_layers()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    method, _ = run(model, 0, truncation="outputs", delay=1, release=1, target_size=0.75)
    compiled(few_directions(0)[0]).sum().backward()
    method.optimizer.step()
    assert method.step().kind == "release"
    assert "1 weights are cut by their own spectra" in caplog.text


def test_a_factorization_that_cannot_be_taken_back_leaves_the_layer_for_now(monkeypatch, caplog):
    def fails(*_):
        raise torch.linalg.LinAlgError("does not converge")

    model = two_layers()
    method, _ = run(model, 3, truncation="outputs", **AT_ONCE)
    monkeypatch.setattr("oialr.transitions.taken_back", fails)
    event = step_to_the_cut(model, method)
    assert not event.layers
    assert "0.weight keeps its present full-rank weight" in caplog.text
    assert method.ranks()["0.weight"] == 12


def test_it_is_told_once_which_weights_are_cut_by_themselves(caplog):
    class Called(nn.Linear):
        """Tells nothing, since nobody calls it."""

    class Net(nn.Sequential):
        def forward(self, x):
            weight, bias = self[0].weight, self[0].bias
            return self[2](torch.tanh(nn.functional.linear(x, weight, bias)))

    model = Net(*two_layers()).double()
    options = {"delay": 2, "update_interval": 2, "defer_conversion": True, "cutoff": 1e-9}
    _, events = run(model, 9, truncation="outputs", **options)
    assert len(events) == 4
    assert caplog.text.count("cut by their own spectra") == 1


@pytest.mark.parametrize("count", [3, 64])
def test_it_is_told_which_weights_are_cut_by_few_inputs(caplog, count):
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    options = {"delay": 1, "release": 1, "update_interval": 9, "target_size": 0.7}
    method = OIALR(model, optimizer, truncation="outputs", rank_multiple=1, **options)
    model(normal(count, 12)).square().sum().backward()
    optimizer.step()
    assert method.step().kind == "release"
    line = "1 weights are cut by what they compute of fewer inputs than their rank: 0.weight"
    assert (f"{line} (3 inputs, rank 12)" in caplog.text) == (count == 3)
    assert len(caplog.records) == (count == 3)


class Two(Processes):
    """Two processes, of which the other has seen as much of each layer as it is told."""

    def __init__(self, theirs):
        super().__init__()
        self.theirs = theirs

    def gather(self, value):
        return [value, self.theirs]

    def sum(self, tensor):
        return tensor


@pytest.mark.parametrize("theirs", [0, None])
def test_a_layer_that_no_row_came_to_on_one_process_is_seen(theirs):
    """As an expert of a mixture; and one that is not called there is not."""
    model = two_layers()
    reports = survey(model)[:1]
    moments = InputMoments(model)
    moments.watch(reports)
    model(normal(20, 12))
    roots, few = moments.roots(reports, Two([theirs]))
    assert list(roots) == ([] if theirs is None else ["0.weight"])
    assert not few


def test_padding_counts_nothing_beside_the_samples_of_another_process():
    """A share without samples is one sample of another's again."""
    model = two_layers()
    reports = survey(model)[:1]
    theirs = InputMoments(model)
    theirs.watch(reports)
    model(normal(20, 12))
    theirs.end()
    moment = theirs._moments["0.weight"].clone()

    class Both(Two):
        def sum(self, tensor):
            return tensor + moment

    mine = InputMoments(model)
    mine.watch(reports)
    model(normal(1, 12))
    mine.disregard()
    roots, few = mine.roots(reports, Both([5]))
    assert few == {"0.weight": (5, reports[0].full_rank)}
    expected, _ = theirs.roots(reports)
    torch.testing.assert_close(roots["0.weight"], expected["0.weight"], rtol=0, atol=0)


def test_a_large_sample_is_looked_at_in_its_middle(monkeypatch):
    layer = nn.Conv2d(2, 4, 3)
    reading = kind_of(layer).reading(layer, "weight")
    x = torch.randn(2, 2, 40, 5)
    monkeypatch.setattr("oialr.layers.conv.LARGEST_PATCHES", 10 * 2 * 5 * 9)
    inputs = kind_of(layer).inputs(layer, reading, x)
    expected = kind_of(layer).inputs(layer, reading, x[:1, :, 15:25])
    torch.testing.assert_close(inputs, expected)


def test_what_cuts_no_full_rank_weight_is_refused():
    run(two_layers(), 0, truncation="outputs", delay="stability", release=6)
    with pytest.raises(ValueError, match="truncation 'outputs' is for cuts of full-rank weights"):
        run(two_layers(), 0, truncation="outputs", delay=4, release=6)


# A network that is trained already.
def test_compress_keeps_what_is_computed_of_the_inputs():
    x = torch.cat([few_directions(step)[0] for step in range(3)])
    lost = {}
    for name, inputs in (("weights", ()), ("outputs", [x[:20], (x[20:30],), {"input": x[30:]}])):
        model = two_layers()
        before = model(x)
        (layer,) = compress(model, target_size=0.75, inputs=inputs, rank_multiple=1)
        assert layer.rank < 12
        lost[name] = float(((model(x) - before).norm() / before.norm()).detach())
        dense = to_dense(model)[0].weight
        if inputs:
            expected = best(two_layers()[0].weight.detach(), x.T @ x, layer.rank)
            torch.testing.assert_close(dense.detach(), expected)
            assert layer.lost < 1e-2
    assert lost["outputs"] < 1e-2
    assert lost["weights"] > 0.05


def test_compress_sees_the_layers_of_a_fused_encoder(caplog):
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 64), encoder, nn.Linear(64, 4)).eval()
    compress(model, target_size=0.8, inputs=[torch.randn(8, 5, 16)], rank_multiple=1)
    assert "2 weights are cut" in caplog.text  # the projections of the attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_compress_computes_in_full_precision_whatever_is_around_it():
    model, x = two_layers(torch.float32), few_directions(0, torch.float32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compress(model, target_size=0.75, inputs=[x], rank_multiple=1, release=False)
    U = model[0].U
    assert float((U.T @ U - torch.eye(U.shape[1])).norm()) < 1e-5


def test_compress_takes_batches():
    for inputs in (few_directions(0)[0], {"input": few_directions(0)[0]}):
        with pytest.raises(TypeError, match="inputs are a list of batches"):
            compress(two_layers(), target_size=0.75, inputs=inputs)


def test_compress_leaves_modes_and_hooks_as_they_were(caplog):
    model = nn.Sequential(two_layers(), nn.Dropout(0.5), nn.Linear(2, 2).double())
    model[1].eval()
    compress(model, target_size=0.75, inputs=[few_directions(0)[0]], rank_multiple=1)
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert not hooks()
    with pytest.raises(TypeError):
        compress(two_layers(), target_size=0.75, inputs=[{"wrong": 1}])
    assert not hooks()
    assert not caplog.text


@pytest.mark.parametrize(("count", "is_told"), [(11, True), (12, False)])
def test_inputs_of_a_pass_that_was_thrown_away_are_not_counted(caplog, count, is_told):
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    options = {"delay": 1, "release": 1, "update_interval": 9, "target_size": 0.7}
    method = OIALR(model, optimizer, truncation="outputs", rank_multiple=1, **options)
    model(normal(64, 12))  # thrown away
    model(normal(count, 12)).square().sum().backward()
    optimizer.step()
    method.step()
    assert (f"0.weight ({count} inputs, rank 12)" in caplog.text) == is_told


def test_a_target_sees_the_inputs_of_layers_that_have_no_turn(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 24), nn.Linear(24, 2))
    options = {"delay": 2, "update_interval": 2, "layer_fraction": 0.1, "largest_cut": 0.01}
    options |= {"defer_conversion": True, "truncation": "outputs", "target_size": 0.9}
    seen, gather = [], events.gather_energies

    def record(*arguments):
        seen.append({*method._events._roots})
        return gather(*arguments)

    monkeypatch.setattr(events, "gather_energies", record)
    method, found = run(model.double(), 0, **options)
    _, found = run(model, 4, method=method)
    assert [[layer.name for layer in event.layers] for event in found] == [
        ["0.weight", "2.weight"],
        ["2.weight"],
    ]
    assert seen == [{"0.weight", "2.weight"}] * 2
