"""What a study holds against each other: networks with data, methods, seeds, learning rates.

A study is a YAML file that may extend another one, as a configuration may; docs/accuracy.md shows
one. Values may be shares of a run's steps, ``33 %``, and those of other keys, such as ``=
training.weight_decay``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from app import config
from app.config.section import Section
from app.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


class Network(Section):
    """A network with its data and training: an ordinary configuration, and what is changed."""

    config: str
    set: dict[str, Any] = Field(default_factory=dict)
    width: dict[str, int] = Field(default_factory=dict)
    """Keys that make the network narrower, each with its unit: they are multiplied alike."""
    seeds: int | None = Field(None, ge=0)
    """In place of the study's; 0: it is there for its learning rates alone, and has no table."""
    rates_of: str | None = None
    """Another network, such as the same one trained for shorter: the learning rates that are chosen
    there count here."""
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Keys that methods set otherwise here, above their own and those that they extend."""


class Method(Section):
    """A way to train: keys of the configuration that it sets, and perhaps what follows others."""

    config: str | None = None
    """In place of the network's."""
    extends: str | None = None
    """Another method, whose keys count where this one sets none."""
    set: dict[str, Any] = Field(default_factory=dict)
    networks: list[str] | None = None
    """Those that it is tried with; None: all."""
    as_small_as: str | None = None
    """A method: the network is made so narrow that it stores as much as that one's."""
    as_fast_as: str | None = None
    """A method: the epochs are made so few that they take the CPU time of that one's training."""
    stable_ranks_of: str | None = None
    """A method, full-rank and watched: delay and ranks by its stable ranks (Cuttlefish)."""

    @property
    def follows(self) -> list[str]:
        """Methods whose results it needs."""
        named = (self.as_small_as, self.as_fast_as, self.stable_ranks_of)
        return [name for name in named if name is not None]


class Study(Section):
    """Networks, methods, and how often and with which learning rates each pair is trained."""

    networks: dict[str, Network]
    methods: dict[str, Method]
    rows: list[str] | None = None
    """Methods of the table, in its order; None: all."""
    baseline: str = "full-rank"
    """The method that all others are compared with."""
    seeds: int = Field(2, gt=0)
    first_seed: int = Field(0, ge=0)
    learning_rates: list[float] = Field([1.0], min_length=1)
    """Factors of the configuration's learning rate. The best one on validation data counts, found
    with the first seed, for every network and method by itself."""
    timed: list[str] | None = None
    """Methods that --time runs with the machine to itself, beside the baseline; None: all."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys for all cells."""

    @model_validator(mode="after")
    def _check(self) -> "Study":
        for name, method in self.methods.items():
            related = [*method.follows, *([method.extends] if method.extends else [])]
            for other in related:
                if other not in self.methods:
                    raise ValueError(f"methods.{name}: there is no method {other!r}")
            for other in method.follows:
                if self.methods[other].follows:
                    raise ValueError(f"methods.{name}: {other!r} follows another method itself")
            for other in method.networks or ():
                if other not in self.networks:
                    raise ValueError(f"methods.{name}.networks: there is no network {other!r}")
        for name, network in self.networks.items():
            for other in network.methods:
                if other not in self.methods:
                    raise ValueError(f"networks.{name}.methods: there is no method {other!r}")
            rates_of = network.rates_of
            if rates_of is None:
                continue
            if rates_of not in self.networks or self.networks[rates_of].rates_of is not None:
                raise ValueError(
                    f"networks.{name}.rates_of: there is no network {rates_of!r} with rates of its "
                    "own"
                )
        for key in ("rows", "timed"):
            for other in getattr(self, key) or ():
                if other not in self.methods:
                    raise ValueError(f"{key}: there is no method {other!r}")
        if self.baseline not in self.table_rows:
            raise ValueError(f"baseline: {self.baseline!r} is not among the methods of the table")
        return self

    @property
    def table_rows(self) -> list[str]:
        """Methods of the table, in its order."""
        return list(self.methods) if self.rows is None else self.rows

    def seeds_of(self, network: str) -> range:
        """Return the seeds that a network is trained with."""
        own = self.networks[network].seeds
        count = self.seeds if own is None else own
        return range(self.first_seed, self.first_seed + count)

    @property
    def table_networks(self) -> list[str]:
        """Networks that have a table."""
        return [name for name in self.networks if self.seeds_of(name)]

    def methods_for(self, network: str) -> list[str]:
        """Return the methods that a network is trained with, in the order of the table."""
        return [
            name
            for name in self.table_rows
            if self.methods[name].networks is None or network in (self.methods[name].networks or ())
        ]

    def keys_of(self, name: str, network: str | None = None) -> dict[str, Any]:
        """Return what a method sets (with a network), those that it extends included."""
        method = self.methods[name]
        inherited = self.keys_of(method.extends, network) if method.extends else {}
        own = self.networks[network].methods.get(name, {}) if network else {}
        return {**inherited, **method.set, **own}


def read_study(path: Path) -> Study:
    """Read a study from its file.

    Raises:
        UserError: one line with the culprit and what would be right.
    """
    return _build(config.read(path, "--study"), str(path))


def compare(
    configurations: Mapping[str, str] | None, config_path: str, *, seeds: int, first_seed: int
) -> Study:
    """Make a study of configurations as they are.

    Args:
        configurations: paths by name, the first one being the baseline; None: full-rank and OIALR
            with ``config_path``.
        config_path: what they have in common; its name is that of the network.
        seeds, first_seed: how many, and from where on.
    """
    methods: dict[str, Any] = {
        name: {"config": str(Path(path).resolve())} for name, path in (configurations or {}).items()
    } or {
        "full-rank": {"set": {"oialr.enabled": False}},
        "OIALR": {"set": {"oialr.enabled": True}},
    }
    first = next(iter(methods))
    path = str(Path(config_path).resolve()) if Path(config_path).exists() else config_path
    if configurations:
        path = methods[first]["config"]
    values = {
        "networks": {Path(path).stem: {"config": path}},
        "methods": methods,
        "baseline": first,
        "seeds": seeds,
        "first_seed": first_seed,
    }
    return _build(values, "--compare")


def restrict(study: Study, *, methods: Sequence[str], networks: Sequence[str]) -> Study:
    """Leave only some methods, and the baseline, and some networks in the table.

    Raises:
        UserError: one of them does not exist.
    """
    for kind, names, known in (
        ("--methods", methods, study.table_rows),
        ("--networks", networks, list(study.networks)),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"{kind}: {name!r} is none of {', '.join(known)}")
    update: dict[str, Any] = {}
    if methods:
        wanted = {study.baseline, *methods}
        update["rows"] = [name for name in study.table_rows if name in wanted]
    if networks:
        needed = {study.networks[name].rates_of for name in networks}
        update["networks"] = {
            name: network
            for name, network in study.networks.items()
            if name in networks or name in needed
        }
    return study.model_copy(update=update)


def _build(values: dict[str, Any], source: str) -> Study:
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        location = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"{source}: {location + ': ' if location else ''}{message}") from None
