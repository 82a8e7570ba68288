"""The options of the method, each said once: default, range, meaning.

:class:`Options` is all of them. Its parts are what functions below ask for: a rank rule, a
selection of layers, and so on. The constructor of :class:`oialr.OIALR` takes them as keywords, and
the application's section ``oialr`` has the same fields, defaults, ranges and texts. A new option is
a field here, and its use.

Options are the paper's (arXiv 2401.08505) unless their text says that they are ours.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from inspect import Signature, signature
from numbers import Real
from types import NoneType
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

Execution = Literal["auto", "factored", "folded", "dense"]
AttentionProjection = Literal["packed", "separate"]
Convolutions = Literal["matrix", "spatial"]
UnknownState = Literal["error", "reset"]
FrozenDtype = Literal["bfloat16"]
Truncation = Literal["weights", "outputs"]
ByStability = Literal["stability"]

READINGS = ("attention_projection", "convolutions")
"""Options that say how a weight is read as a matrix."""
RATE_FACTORS = ("core_learning_rate_factor", "factor_learning_rate_factor")
"""Options that the optimizer's parameter groups, and schedules, are made by."""

BOUNDS = ("gt", "ge", "lt", "le")
"""Names of the bounds of a range, as pydantic has them: >, >=, <, <=."""


def option(text: str, default: Any = MISSING, **bounds: float) -> Any:
    """Return the field of an option.

    Args:
        text: what it means.
        default: its value if nobody sets it; MISSING: somebody must.
        **bounds: of its range, named as in :data:`BOUNDS`.
    """
    assert set(bounds) <= set(BOUNDS)
    return field(default=default, metadata={"text": text, **bounds})


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When layers are converted and updated."""

    delay: int | ByStability = option(
        "Optimizer steps of full-rank training, d. Ours: stability, which converts each layer by "
        "itself, at an update interval, when its basis has stood still over a window.",
        ge=1,
    )
    update_interval: int = option("Optimizer steps between updates, nu.", ge=1)
    layer_fraction: float = option(
        "Share of the layers, the last first, that each update adds, alpha.", 0.1, gt=0, le=1
    )
    stability_threshold: float = option(
        "Ours, with delay: stability: a basis has stood still if its stability over a window "
        "(section 3 of the paper, 1 for equal ones) is at least this.",
        0.95,
        gt=0,
        le=1,
    )
    stability_window: int | None = option(
        "Ours, with delay: stability: optimizer steps between the bases that are compared, rounded "
        "up to whole update intervals. None: one of these.",
        None,
        ge=1,
    )
    stability_start: int = option(
        "Ours, with delay: stability: steps before which no window begins, at least those of a "
        "warm-up of the learning rate, since small steps look like stability.",
        0,
        ge=0,
    )
    latest_delay: int | None = option(
        "Ours, with delay: stability, which needs it or a release: steps after which all layers "
        "are converted that are full-rank still.",
        None,
        ge=1,
    )


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """Which rank a layer keeps."""

    cutoff: float = option(
        "Singular values below cutoff times the largest are cut, beta.", 0.1, gt=0, lt=1
    )
    minimum_rank_fraction: float = option(
        "No rank falls below this share of k = min(m, n).", 0.01, ge=0, le=1
    )
    largest_cut: float = option(
        "Largest share of a layer's rank that one update may cut.", 0.5, gt=0, lt=1
    )
    retained_energy: float | None = option(
        "Ours: keep the fewest singular values that hold this share of a layer's spectral energy, "
        "the sum of their squares; it takes the place of the cutoff.",
        None,
        gt=0,
        lt=1,
    )
    largest_energy_cut: float = option(
        "Ours: largest share of the spectral energy that one update may cut.", 1.0, gt=0, le=1
    )
    target_size: float | None = option(
        "Ours: stored parameters that the network ends with, over those of the full-rank one. The "
        "ranks are those that lose the least energy per parameter; they take the place of cutoff "
        "and energies, are approached at the updates, and met at a release whatever largest_cut.",
        None,
        gt=0,
        le=1,
    )
    rank_multiple: int = option(
        "Ours: ranks are rounded up to a multiple of this in layers with min(m, n) of at least "
        "twelve times as much; 1: not at all.",
        16,
        ge=1,
    )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which layers are factorized."""

    keep_first_layer: bool = option("The network's first layer stays full-rank.", False)
    keep_last_layer: bool = option(
        "The layers that produce the network's outputs stay full-rank: its heads by name, or its "
        "last layer.",
        True,
    )
    include: Sequence[str] = option(
        "Ours: shell-style patterns of module names, such as blocks.*.attn.*: what matches none of "
        "them stays full-rank.",
        ("*",),
    )
    exclude: Sequence[str] = option("Ours: patterns of what stays full-rank.", ())
    attention_projection: AttentionProjection = option(
        "Ours: in_proj_weight of nn.MultiheadAttention is one matrix (packed), or one each for "
        "query, key and value, all cut to the same rank (separate).",
        "packed",
    )
    convolutions: Convolutions = option(
        "How the kernel of a convolution in two dimensions is read: as a matrix of a row for each "
        "output channel (matrix, the paper's), or ours, of a row for each output channel and row "
        "of the kernel (spatial), whose factors are a kernel in each direction.",
        "matrix",
    )
    include_embeddings: bool = option(
        "Ours: weights of nn.Embedding are factorized too. It saves what is stored and the "
        "optimizer's state, and no time; so defer_conversion leaves them full-rank until a "
        "release.",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How a layer turns low-rank, and how it is run and trained then."""

    cut_at_conversion: bool = option("Ours: cut at the conversion itself already.", False)
    defer_conversion: bool = option(
        "Ours: a layer is converted, and cut at once, only when its spectrum leaves a rank with "
        "which a step takes less time than full-rank; judged at the conversion and every update.",
        False,
    )
    truncation: Truncation = option(
        "What a cut of a full-rank weight loses least of, at its rank: the weight (the paper's), "
        "or ours, what the layer computes of the inputs of that step (outputs). Full-rank weights "
        "are cut by a release at the delay, cut_at_conversion and defer_conversion.",
        "weights",
    )
    execution: Execution = option(
        "Ours: how factorized weights are applied; auto: the cheapest exact way for each layer and "
        "rank.",
        "auto",
    )
    recompute_convolutions: bool = option(
        "Ours: form the product with Vh again in backward, which saves its memory and costs its "
        "time.",
        False,
    )
    frozen_dtype: FrozenDtype | None = option(
        "Ours: dtype in which the frozen bases are stored, in memory and in files, half the bytes "
        "of float32; they are rounded at every event, and events compute as the weights do. None: "
        "that of the weights.",
        None,
    )
    core_learning_rate_factor: float = option(
        "Ours: learning rate of cores over that of full-rank weights, since a step on a core moves "
        "the weight less. Other than 1 it adds parameter groups, or makes them for each step where "
        "there is a learning-rate schedule already.",
        1.0,
        gt=0,
        le=1000,
    )
    unknown_optimizer_state: UnknownState = option(
        "Ours: reset accepts any optimizer, and drops what it knows of a weight at every event "
        "where the transport of that is not known.",
        "error",
    )


@dataclass(frozen=True, kw_only=True)
class Release:
    """When both factors are trained, and how. All of it is ours."""

    release: int | None = option(
        "Ours: optimizer steps, at least the delay, after which ranks are fixed and both factors "
        "of W = A B are trained. It is a last update, of all layers; those in which the factors "
        "store no less than the weight are dense from then on.",
        None,
        ge=1,
    )
    release_warmup: int = option(
        "Ours: steps after a release in which the learning rate of what it made rises to its own, "
        "so that the first of them changes no weight more than the one before.",
        20,
        ge=0,
    )
    factor_learning_rate_factor: float = option(
        "Ours: learning rate of the factors over that of full-rank weights; "
        "core_learning_rate_factor is not for them. A release adds parameter groups too.",
        1.0,
        gt=0,
        le=1000,
    )
    frobenius_decay: float | None = option(
        "Ours: decay of the factors by that of their product, lambda / 2 |A B|^2 (arXiv "
        "2105.01029), in place of the weight decay of their parameter group.",
        None,
        ge=0,
        le=1000,
    )


@dataclass(frozen=True, kw_only=True)
class Options(Release, Conversion, Selection, RankRule, Schedule):  # the last one's fields first
    """All options of the method.

    Raises:
        ValueError: one of them is out of its range, none of its choices, or contradicts another;
            the message begins with its name.
    """

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            if isinstance(patterns := getattr(self, name), str):
                raise ValueError(f"{name} must be a list of patterns, not {patterns!r}")
            object.__setattr__(self, name, tuple(patterns))
        for each in fields(self):
            value = getattr(self, each.name)
            check(each, value)
            object.__setattr__(self, each.name, _as_plain_number(each, value))
        if self.delay == "stability":
            self._check_stability()
        elif self.release is not None and self.release < self.delay:
            raise ValueError(f"release must be at least delay, {self.delay}, not {self.release!r}")
        if self.release is None and self.frobenius_decay is not None:
            raise ValueError(
                "frobenius_decay is for the factors that a release makes: set release too"
            )
        at_release = self.release is not None and self.delay in (self.release, "stability")
        cuts_dense = self.cut_at_conversion or self.defer_conversion or at_release
        if self.truncation == "outputs" and not cuts_dense:
            raise ValueError(
                "truncation 'outputs' is for cuts of full-rank weights, and there are none: let "
                "release be the delay, set cut_at_conversion or defer_conversion, or truncation "
                "to 'weights'"
            )
        if self.frozen_dtype is not None and self.release == self.delay:
            raise ValueError(
                "frozen_dtype is for bases that are frozen, and a release at the delay leaves "
                "none: leave one of the two out, or let the release come later"
            )

    @property
    def latest_conversion(self) -> int | None:
        """With a delay by stability, the step of ``latest_delay``: a multiple of the interval."""
        if self.latest_delay is None:
            return None
        return -(-self.latest_delay // self.update_interval) * self.update_interval

    def conversion_in_words(self) -> str:
        """Say when layers turn low-rank, for the middle of a sentence."""
        if self.delay != "stability":
            return f"after step {self.delay}"
        return f"each when its basis stands still, after step {self.end_of_waiting} at the latest"

    @property
    def end_of_waiting(self) -> int:
        """With a delay by stability, the step after which no layer waits any more."""
        ends = [step for step in (self.latest_conversion, self.release) if step is not None]
        return min(ends)

    def _check_stability(self) -> None:
        """Reject bounds between which no layer could be found stable."""
        if self.latest_delay is None and self.release is None:
            raise ValueError("latest_delay must be set, or release, where delay is stability")
        first = self.stability_start + (self.stability_window or self.update_interval)
        if self.latest_delay is not None and self.latest_delay < first:
            raise ValueError(
                f"latest_delay must be at least {first}, the first window's end (stability_start "
                f"and stability_window), not {self.latest_delay}"
            )


@cache
def kinds() -> dict[str, Any]:
    """Return the type of each option by name."""
    return get_type_hints(Options)


def is_whole(option: "Field[Any]") -> bool:
    """Whether an option's numbers are whole ones."""
    kind = kinds()[option.name]
    return {int, float} & {kind, *get_args(kind)} == {int}


def check(option: "Field[Any]", value: Any) -> None:
    """Reject a value that is out of an option's range, or none of its choices.

    Raises:
        ValueError: naming the option, its value and what would be right.
    """
    kind = kinds()[option.name]
    words, is_optional = choices(kind), NoneType in get_args(kind)
    has_range = bool(set(BOUNDS) & set(option.metadata))
    if not (words or has_range) or value in words or (value is None and is_optional):
        return
    # No step is 70.5, a share of 235: nothing would ever be due.
    is_between = is_whole(option) and isinstance(value, Real) and bool(value % 1)
    is_number = isinstance(value, Real) and not is_between
    if has_range and is_number and _is_within(option.metadata, value):
        return
    right = [("a whole number, " * is_between) + described(option.metadata)] if has_range else []
    if words:
        right.append(f"one of {', '.join(words)}" if len(words) > 1 else words[0])
    right += ["None"] if is_optional else []
    raise ValueError(f"{option.name} must be {', or '.join(right)}, not {value!r}")


def _as_plain_number(option: "Field[Any]", value: Any) -> Any:
    """Return a number as Python's: checkpoints hold none of NumPy's, and 16.0 is no length."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if is_whole(option):
        return int(cast(int, value))
    return value if isinstance(value, int) else float(value)


def signature_with_options(constructor: Callable[..., None]) -> Signature:
    """Return the signature of a constructor with every option as a keyword, for help() and editors.

    Args:
        constructor: takes the options as ``**keywords``.
    """
    own = signature(constructor).parameters
    named = [own[name] for name in own if name not in ("self", "keywords")]
    return Signature([*named, *signature(Options).parameters.values()])


def choices(kind: Any) -> tuple[str, ...]:
    """Return the words that a type allows: a Literal, or one among others."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(word for each in get_args(kind) for word in choices(each))


def described(bounds: Mapping[str, Any]) -> str:
    """Say a range in words: "in (0, 1]", "at least 1", "positive"."""
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if high is None:
        return "positive" if bounds.get("gt") == 0 else f"at least {low}"
    return f"in {'[' if 'ge' in bounds else '('}{low}, {high}{']' if 'le' in bounds else ')'}"


def _is_within(bounds: Mapping[str, Any], value: Any) -> bool:
    return (
        ("gt" not in bounds or value > bounds["gt"])
        and ("ge" not in bounds or value >= bounds["ge"])
        and ("lt" not in bounds or value < bounds["lt"])
        and ("le" not in bounds or value <= bounds["le"])
    )
