"""The tracker: what it measures, in full-rank and low-rank training and from one to the other."""

import copy
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.errors import DivergedError, UserError
from oialr.convert import get_layer
from oialr.layer_survey import survey
from oialr.linalg.svd import economy_svd
from oialr.method import OIALR
from oialr.placement.processes import Processes
from oialr.stability import measurement
from oialr.stability import tracker as stability
from oialr.stability.tracker import (
    BasisTracker,
    mean_mixing_similarity,
    mean_stability,
    select_weights,
)


class Network(nn.Module):
    """One of each kind: a token, an embedding, a convolution, attention, linear layers."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 20))
        self.embedding = nn.Embedding(30, 20)
        self.conv = nn.Conv1d(20, 24, 3, padding=1)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.fc = nn.Linear(24, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, tokens):
        x = torch.cat([self.token.expand(len(tokens), -1, -1), self.embedding(tokens)], 1)
        x = torch.relu(self.conv(x.mT)).mT
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(torch.relu(self.fc(x[:, 0])))


AVERAGED = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
AVERAGED += ["fc.weight", "head.weight"]
DELAY = 6


def make(seed=0, **options):
    torch.manual_seed(seed)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"delay": DELAY, "update_interval": 4, "cutoff": 0.5, "rank_multiple": 1, **options}
    method = OIALR(model, optimizer, layer_fraction=1.0, **options)
    return model, optimizer, method


def train(model, optimizer, method, steps):
    for _ in range(steps):
        generator = torch.Generator().manual_seed(method.step_count)
        tokens = torch.randint(30, (16, 7), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens[:, 0] % 5).backward()
        optimizer.step()
        method.step()


def tracker_of(method, **options):
    return BasisTracker(method.survey, Processes(), **{"window": 1, **options})


def dense_weight(model, name):
    """The weight as a float64 matrix, whatever form it has."""
    layer = get_layer(model, name)
    weight = layer.weight if hasattr(layer, "core") else model.get_parameter(name)
    return weight.detach().double().flatten(1)


def expected_stability(before, after, rank):
    """By the definition, with (m, n) products, in float64."""
    bases = []
    for matrix, r in ((before, None), (after, rank)):
        U, _, Vh = economy_svd(matrix)
        bases.append(U[:, :r] @ Vh[:r])
    return float((bases[0] * bases[1]).sum()) / rank


def expected_mixing(before, after, rank):
    factors = []
    for matrix, r in ((before, None), (after, rank)):
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        R = torch.linalg.qr(tall).R
        R = R * torch.sign(R.diagonal())[:, None]
        R[len(R) if r is None else r :] = 0  # rounding noise
        factors.append(R)
    difference = torch.linalg.norm(factors[0] - factors[1])
    return 1 - float(difference / (torch.linalg.norm(factors[0]) + torch.linalg.norm(factors[1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numerical_rank_is_that_of_the_weight_in_every_form(dtype):
    """Singular values between r eps and max(m, n) eps of the largest one are noise in all forms."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(512, 3, generator=generator, dtype=dtype)).Q for _ in "UV")
    eps = torch.finfo(dtype).eps
    s = torch.tensor([1.0, 1e3 * eps, 50 * eps], dtype=dtype)
    forms = (
        measurement.measure_dense((U * s @ V.mT)[None]),
        measurement.measure_factored(U[None], torch.diag(s)[None], V.mT[None]),
        measurement.measure_released((U * s.sqrt())[None], (V * s.sqrt()).mT[None]),
    )
    assert [form.compare(None, name="", averaged=True).numerical_rank for form in forms] == [2] * 3


@pytest.mark.parametrize(
    ("first", "steps"),
    [(2, 3), (4, 2), (4, 3), (DELAY, 2), (DELAY + 1, 6)],
    ids=["full-rank", "to the conversion", "over it", "low-rank", "over a cut"],
)
def test_every_figure_is_that_of_the_dense_weights(first, steps):
    model, optimizer, method = make()
    tracker = tracker_of(method)
    train(model, optimizer, method, first)
    tracker.measure(model, 0)
    before = {report.name: dense_weight(model, report.name) for report in method.survey}
    train(model, optimizer, method, steps)
    rows = tracker.measure(model, 1)
    assert [row.name for row in rows] == [report.name for report in method.survey]
    assert [row.name for row in rows if row.averaged] == AVERAGED
    for row in rows:
        W = dense_weight(model, row.name)
        layer = get_layer(model, row.name)
        low_rank = hasattr(layer, "core")
        s = torch.linalg.svdvals(W)[: row.rank]
        assert row.rank == (layer.core.shape[0] if low_rank else min(W.shape))
        assert row.numerical_rank == row.rank
        assert row.reference_rank == min(W.shape) if first <= DELAY else row.reference_rank
        torch.testing.assert_close(row.singular_values.double(), s, rtol=1e-4, atol=1e-6)
        assert row.stable_rank == pytest.approx(float((s / s[0]).square().sum()), rel=1e-4)
        p = s / s.sum()
        assert row.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-4)
        stability = expected_stability(before[row.name], W, row.rank)
        assert row.stability == pytest.approx(stability, abs=1e-3)
        if first <= DELAY:  # else the reference is noise below its rank too
            mixing = expected_mixing(before[row.name], W, row.rank)
            assert row.mixing_similarity == pytest.approx(mixing, abs=1e-4)
        if low_rank:
            assert 0 < row.orthonormality_error < 1e-5
        else:
            assert math.isnan(row.orthonormality_error)
    if first > DELAY:
        assert any(row.rank < row.reference_rank for row in rows), "no cut: this shows nothing"
    averaged = [row for row in rows if row.averaged]
    assert mean_stability(rows) == pytest.approx(sum(r.stability for r in averaged) / 5)
    assert mean_mixing_similarity(rows) == pytest.approx(
        sum(r.mixing_similarity for r in averaged) / 5
    )


def test_a_conversion_by_itself_changes_nothing():
    model, optimizer, method = make()
    tracker = tracker_of(method)
    train(model, optimizer, method, DELAY - 1)
    twin, twin_optimizer, twin_method = make(delay=DELAY - 1)
    train(twin, twin_optimizer, twin_method, DELAY - 1)
    assert twin_method.converted
    tracker.measure(model, 0)
    for row in tracker.measure(twin, 1):
        assert row.stability == pytest.approx(1, abs=1e-4), row.name
        assert row.mixing_similarity == pytest.approx(1, abs=1e-4), row.name


def test_a_broken_basis_shows_in_the_orthonormality_error():
    model, optimizer, method = make()
    train(model, optimizer, method, DELAY)
    layer = get_layer(model, "fc.weight")
    layer.Vh.data[0] *= 1.1
    rows = {row.name: row for row in tracker_of(method).measure(model, 0)}
    assert rows["fc.weight"].orthonormality_error == pytest.approx(0.21 / math.sqrt(24), rel=1e-3)
    assert rows["conv.weight"].orthonormality_error < 1e-5


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.slow
def test_in_the_low_rank_phase_no_product_of_the_size_of_a_weight_is_formed():
    model, optimizer, method = make()
    train(model, optimizer, method, DELAY + 5)
    names = [layer.name for layer in method.layers]
    shapes = {name: dense_weight(model, name).shape for name in names}
    reports = [report for report in method.survey if report.name in names]
    tracker = BasisTracker(reports, Processes(), window=1)
    tracker.measure(model, 0)
    with Shapes() as recorded:
        rows = tracker.measure(model, 1)
    assert all(row.stability == pytest.approx(1, abs=1e-5) for row in rows)
    for name, (m, n) in shapes.items():
        r = method.ranks()[name]
        assert r < min(m, n), "full rank: the test shows nothing"
        assert (m, r) in recorded.seen
        assert not {(m, n), (n, m), (1, m, n)} & recorded.seen, (name, r)


def test_undetermined_directions_are_left_out():
    torch.manual_seed(0)
    model, _, method = make()
    with torch.no_grad():
        model.fc.weight.copy_(torch.randn(40, 9) @ torch.randn(9, 24))
        model.head.weight.zero_()
    tracker = tracker_of(method)
    tracker.measure(model, 0)
    with torch.no_grad():  # as rounding would: noise in what is not determined
        model.fc.weight.add_(1e-7 * torch.randn(40, 24))
    rows = {row.name: row for row in tracker.measure(model, 1)}
    assert rows["fc.weight"].numerical_rank == rows["fc.weight"].reference_rank == 9
    assert rows["fc.weight"].stability == pytest.approx(1, abs=1e-5)
    assert rows["fc.weight"].rank == 24
    for name in ("head.weight", "token"):
        assert rows[name].numerical_rank == 0
        assert math.isnan(rows[name].stability)
        assert math.isnan(rows[name].effective_rank)
    averaged = [rows[name].stability for name in AVERAGED if name != "head.weight"]
    assert mean_stability(list(rows.values())) == pytest.approx(sum(averaged) / 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)], ids=str
)
def test_references_are_kept_in_their_dtype_and_survive_a_checkpoint(tmp_path, dtype, tolerance):
    model, optimizer, method = make()
    exact, tracker = tracker_of(method), tracker_of(method, reference_dtype=dtype)
    for time in range(4):  # full-rank, full-rank, converted, low-rank
        torch.save(tracker.state_dicts(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        resumed = tracker_of(method, reference_dtype=dtype)
        resumed.load_state_dicts([state])
        expected = exact.measure(model, time)
        measured = tracker.measure(model, time)
        again = resumed.measure(model, time)
        for row, mine, theirs in zip(expected, measured, again, strict=True):
            assert mine.stability == pytest.approx(row.stability, abs=tolerance, nan_ok=True)
            assert mine.mixing_similarity == pytest.approx(row.mixing_similarity, nan_ok=True)
            assert repr(mine.stability) == repr(theirs.stability)
            assert repr(mine.mixing_similarity) == repr(theirs.mixing_similarity)
        (references,) = tracker.state_dicts().values()
        assert len(references) == len(method.survey)
        for reference in references.values():
            for basis in reference["bases"]:
                tensors = [x for x in basis.values() if isinstance(x, torch.Tensor)]
                assert {x.dtype for x in tensors} == {dtype}
        train(model, optimizer, method, 3)


def test_what_is_remembered_does_not_change_with_the_network():
    model, optimizer, method = make()
    train(model, optimizer, method, DELAY)
    tracker = tracker_of(method)
    tracker.measure(model, 0)
    before = copy.deepcopy(tracker.state_dicts())
    for part in model.parameters():  # in place, as an update without a cut does
        part.data.add_(1)
    after = tracker.state_dicts()
    for name, reference in before["stability-epochs-00000000"].items():
        same = after["stability-epochs-00000000"][name]
        for mine, theirs in zip(reference["bases"], same["bases"], strict=True):
            for key, value in mine.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), name


def test_references_of_another_unit_or_before_the_window_are_of_no_use():
    model, _, method = make()
    tracker = tracker_of(method, window=2)
    for time in range(4):
        rows = tracker.measure(model, time)
        assert math.isnan(rows[-1].stability) == (time < 2)
    parts = tracker.state_dicts()
    assert list(parts) == ["stability-epochs-00000002", "stability-epochs-00000003"]
    steps = tracker_of(method, window=2, unit="steps")
    steps.load_state_dicts([parts])
    assert not steps.state_dicts()


@pytest.mark.slow
def test_a_measurement_in_the_background_is_that_of_the_moment_it_began():
    model, optimizer, method = make()
    tracker, reference = tracker_of(method), tracker_of(method)
    for time in range(4):  # full-rank, full-rank, converted, low-rank
        expected = reference.measure(model, time)
        before = copy.deepcopy(model.state_dict())
        random_state = torch.get_rng_state()
        tracker.start(model, time)
        assert tracker.under_way
        assert torch.equal(torch.get_rng_state(), random_state)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        train(model, optimizer, method, 3)
        rows = tracker.finish()
        assert not tracker.under_way
        assert [repr(row) for row in rows] == [repr(row) for row in expected]


def test_a_copy_is_made_before_training_goes_on(monkeypatch):
    """The worker is held back until the network is another one."""
    model, _, method = make()
    expected = tracker_of(method).measure(model, 0)
    changed = threading.Event()
    real = stability._measure

    def wait(taken):
        changed.wait(30)
        return real(taken)

    tracker = tracker_of(method)
    monkeypatch.setattr(stability, "_measure", wait)
    tracker.start(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    changed.set()
    assert [repr(row) for row in tracker.finish()] == [repr(row) for row in expected]


def test_a_fault_in_the_background_is_not_lost():
    model, _, method = make()
    tracker = tracker_of(method)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    tracker.start(model, 3)
    with pytest.raises(DivergedError, match="after 3 epochs"):
        tracker.finish()


@pytest.mark.parametrize("low_rank", [False, True])
def test_a_weight_of_which_no_decomposition_converges_is_named_and_left_out(
    monkeypatch, caplog, low_rank
):
    model, optimizer, method = make()
    train(model, optimizer, method, DELAY if low_rank else 1)
    tracker = tracker_of(method)
    tracker.measure(model, 0)
    real = measurement.polar

    def polar(matrix, **options):
        if matrix.shape == shape:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **options)

    layer = get_layer(model, "fc.weight")
    shape = (layer.core if low_rank else layer.weight).shape
    monkeypatch.setattr(measurement, "polar", polar)
    rows = {row.name: row for row in tracker.measure(model, 1)}
    assert math.isnan(rows["fc.weight"].stability)
    assert rows["fc.weight"].singular_values.shape == (min(shape),)
    assert "fc.weight is not measured" in caplog.text
    monkeypatch.undo()
    rows = {row.name: row for row in tracker.measure(model, 2)}
    assert rows["fc.weight"].numerical_rank == min(shape)
    assert math.isnan(rows["fc.weight"].stability)  # nothing to compare with


def test_what_is_closed_leaves_nothing_under_way(monkeypatch):
    model, _, method = make()
    tracker, done, real = tracker_of(method), [], stability._measure
    monkeypatch.setattr(stability, "_measure", lambda taken: done.append(real(taken)))
    tracker.start(model, 0)
    tracker.close()
    assert len(done) == len(tracker._mine)
    assert not tracker.under_way


class Pair:
    """Stands in for two processes that are measured one after the other."""

    count = 2

    def __init__(self, index, gathered):
        self.index = index
        self.gathered = gathered

    def gather(self, value):
        self.gathered[self.index] = value
        nothing = SimpleNamespace(rows=[], diverged=[], failed=[])
        return [self.gathered.get(i, nothing) for i in (0, 1)]


def test_two_processes_share_the_weights_and_give_the_rows_of_one():
    model, optimizer, method = make()
    gathered = {}
    alone = tracker_of(method)
    pair = [BasisTracker(method.survey, Pair(i, gathered), window=1) for i in (0, 1)]
    for time in (0, 1):
        expected = alone.measure(model, time)
        gathered.clear()
        with pytest.raises(KeyError):  # the other's rows are not there yet
            pair[0].measure(model, time)
        rows = pair[1].measure(model, time)
        assert [(row.name, repr(row.stability)) for row in rows] == [
            (row.name, repr(row.stability)) for row in expected
        ]
        train(model, optimizer, method, 2)
    owned = [set(next(iter(tracker.state_dicts().values()))) for tracker in pair]
    assert not owned[0] & owned[1]
    assert owned[0] | owned[1] == {report.name for report in method.survey}
    assert all(len(names) > 1 for names in owned)
    # On one process, from the parts of both.
    alone_again = tracker_of(method)
    alone_again.load_state_dicts([tracker.state_dicts() for tracker in pair])
    assert [repr(r.stability) for r in alone_again.measure(model, 2)] == [
        repr(r.stability) for r in alone.measure(model, 2)
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("low_rank", [False, True])
def test_a_diverged_weight_is_named(value, low_rank):
    model, optimizer, method = make()
    train(model, optimizer, method, DELAY if low_rank else 1)
    layer = get_layer(model, "fc.weight")
    (layer.core if low_rank else layer.weight).data[0, 0] = value
    with pytest.raises(DivergedError, match=r"fc\.weight holds NaN or infinity after 3 epochs"):
        tracker_of(method).measure(model, 3)


def test_weights_are_chosen_by_pattern():
    _, _, method = make()
    chosen = select_weights(method.survey, include=["attention.*", "fc.*"], exclude=["*out_proj*"])
    assert [report.name for report in chosen] == ["attention.in_proj_weight", "fc.weight"]
    with pytest.raises(
        UserError, match=r"stability\.include: the pattern 'atention\.\*' matches no weight"
    ):
        select_weights(method.survey, include=["atention.*"], exclude=[], section="stability.")
    with pytest.raises(UserError, match=r"^exclude: the pattern 'x' matches no weight"):
        select_weights(method.survey, include=["*"], exclude=["x"])


def test_complex_weights_are_left_out():
    """Such as those of a Fourier layer, of a module of no known kind."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(4, 4, dtype=torch.complex64))
    model.modes = nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))
    layers = survey(model)
    assert {report.name for report in layers if report.is_complex} == {"modes", "1.weight"}
    rows = BasisTracker(layers, Processes(), window=1).measure(model, 0)
    assert [row.name for row in rows] == ["0.weight"]
