"""From a study to its cells: configurations, with what other cells have come to."""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import config
from app.errors import UserError
from benchmarks.study import derived
from benchmarks.study.cell import Cell, read_record, validation_figure, write_record
from benchmarks.study.definition import ROOT, Study

if TYPE_CHECKING:
    from app.config.settings import Configuration
    from app.data import Task

LATEST_SETTLED = 0.5
"""Share of the epochs after which Cuttlefish's full-rank phase ends at the latest."""
SHARE = re.compile(r"(\d+(?:\.\d+)?) %")
REFERENCE = re.compile(r"= (\w+)\.(\w+)")
_NOT_PART = {"run": {"name", "dir", "stop_after"}, "data": {"root", "download"}}
"""Keys that change where a run is and where its data lie, and not the run."""


class Waiting(Exception):  # noqa: N818 - it is no error
    """A cell that cannot be trained yet; the message says what it waits for."""


class Plan:
    """Knows every cell of a study, and which of them are done."""

    def __init__(self, study: Study, folder: Path, overrides: Sequence[str] = ()) -> None:
        """Look at nothing yet.

        Args:
            study: what is held against each other.
            folder: where the cells are.
            overrides: ``section.key=value`` for all cells, after everything else.
        """
        self.study = study
        self._folder = folder.resolve()
        self._overrides = overrides
        # Read once: every cell asks for them.
        self._load = cache(config.load)
        self._tasks = cache(self._task)
        self._full_ranks = cache(self._factorized)
        self._sizes = cache(self._parameter_count)

    def cell(self, network: str, method: str, seed: int, factor: float) -> Cell:
        """Return a cell.

        Raises:
            Waiting: for another cell, or for an option that the program does not know.
            UserError: the network's configuration is not right, or its data are not there.
        """
        path, base = self._path(network, method), self._base(network)
        self._load(path, (*base, *self._overrides))  # what is wrong from here on is the method's
        set_keys = self.study.keys_of(method, network)
        # What shares of the steps are shares of, and what other keys' values are.
        run = tuple(
            _assignments(
                {
                    key: value
                    for key, value in set_keys.items()
                    if not key.startswith("oialr.") and not _follows(value)
                }
            )
        )
        try:
            common = self._load(path, (*base, *run, *self._overrides))
        except UserError as error:
            raise Waiting(str(error)) from None
        follows, ranks = self._follow(network, method, seed, factor)
        epochs = follows.get("training.epochs", common.training.epochs)
        steps = epochs * self._tasks(network, path, run).steps_per_epoch
        rate = common.training.learning_rate
        if factor != 1:  # of readable figures; the configuration's own rate stays as it is
            rate = float(f"{factor * rate:.6g}")
        follows |= {"training.learning_rate": rate, "run.seed": seed}
        keys = {key: _resolve(value, steps, common) for key, value in set_keys.items()}
        arguments = [*base, *_assignments(keys), *self._overrides, *_assignments(follows)]
        try:
            configuration = self._load(path, tuple(arguments))
        except UserError as error:
            raise Waiting(str(error)) from None
        settings = _settings(configuration)
        if self.study.methods[method].as_fast_as and epochs == common.training.epochs:
            same = self.cell(network, self.study.baseline, seed, factor)
            if same.settings == settings:  # one training for both
                return same
        text = json.dumps([settings, ranks], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        folder = re.sub(r"[^\w.-]+", "-", network)
        name = re.sub(r"[^\w.-]+", "-", f"{method}-{factor:g}-{seed}-{digest}")
        return Cell(
            network=network,
            method=method,
            seed=seed,
            factor=factor,
            place=self._folder / folder / name,
            arguments=("--config", path, *arguments),
            settings=settings,
            ranks=ranks,
        )

    def tuning(self, network: str, method: str) -> list[tuple[str, str, int, float]]:
        """Return the cells that the learning rate is chosen from, as arguments of :meth:`cell`."""
        network = self.study.networks[network].rates_of or network
        seed, rates = self.study.first_seed, self.study.learning_rates
        return [(network, method, seed, factor) for factor in rates]

    def chosen(self, network: str, method: str) -> float:
        """Return the factor of the learning rate that is the best on validation data.

        Raises:
            Waiting: for a cell, or all of them failed.
        """
        if len(self.study.learning_rates) == 1:
            return self.study.learning_rates[0]
        figures = {}
        for arguments in self.tuning(network, method):
            cell = self.cell(*arguments)
            summary = cell.summary()
            if summary is not None:
                figures[cell.factor] = validation_figure(summary)
            elif "failed" not in read_record(cell.place):
                raise Waiting(f"{cell}")
        if not figures:
            raise Waiting("all of its learning rates failed")
        return min(figures, key=lambda factor: (figures[factor], factor))

    def ended(self) -> list[Path]:
        """Return the folders of all cells that are finished or diverged, watched ones included."""
        places = []
        pairs = [(n, m) for n in self.study.networks for m in self.study.methods_for(n)]
        for network, method in pairs:
            wanted = self.tuning(network, method)
            try:
                factor = self.chosen(network, method)
                seeds = self.study.seeds_of(network)
                wanted += [(network, method, seed, factor) for seed in seeds]
            except Waiting:
                pass
            if watched := self.study.methods[method].stable_ranks_of:
                wanted += [(name, watched, seed, factor) for name, _, seed, factor in wanted]
            for arguments in dict.fromkeys(wanted):
                try:
                    cell = self.cell(*arguments)
                except Waiting:
                    continue
                both = (cell.place, cell.alone.place)
                places += [place for place in both if (place / "summary.json").exists()]
                places += [place for place in both[:1] if "failed" in read_record(place)]
        return places

    def alone(self, network: str, method: str) -> Path | None:
        """Return the folder of a finished run that had the machine to itself; None: there is none.

        It is that of the first seed, with the learning rate that was chosen.
        """
        try:
            seed, factor = self.study.first_seed, self.chosen(network, method)
            place = self.cell(network, method, seed, factor).alone.place
        except Waiting:
            return None
        return place if (place / "summary.json").exists() else None

    def time_ratio(self, network: str, method: str, *, by_step: bool = False) -> float | None:
        """Return CPU seconds over the baseline's, of runs that had one machine to themselves."""
        places = (self.alone(network, name) for name in (method, self.study.baseline))
        return _time_ratio(*places, by_step=by_step)

    def step_ratio(self, network: str, method: str) -> float | None:
        """Return CPU seconds of a step over the baseline's, on the mean over a training.

        It is that of the pair that had the machine to itself, and without one the median over the
        seeds of pairs that ran beside others: of what early stopping ended, each by its own steps.
        """
        if (ratio := self.time_ratio(network, method, by_step=True)) is not None:
            return ratio
        ratios = []
        for seed in dict.fromkeys([self.study.first_seed, *self.study.seeds_of(network)]):
            try:
                cells = [
                    self.cell(network, name, seed, self.chosen(network, name))
                    for name in (method, self.study.baseline)
                ]
            except Waiting:
                return None
            mine, baseline = (cell.finished for cell in cells)
            if (ratio := _time_ratio(mine, baseline, by_step=True)) is not None:
                ratios.append(ratio)
        return statistics.median(ratios) if ratios else None

    def _path(self, network: str, method: str) -> str:
        """Return the path of a configuration."""
        return str(
            ROOT / (self.study.methods[method].config or self.study.networks[network].config)
        )

    def _base(self, network: str) -> list[str]:
        """Return the assignments that are no method's."""
        return _assignments({**self.study.set, **self.study.networks[network].set})

    def _task(self, network: str, path: str, assignments: tuple[str, ...] = ()) -> "Task":
        """Read the data of a network once: it knows the steps of an epoch.

        Args:
            network: its name.
            path: of the configuration.
            assignments: of a method's keys of the run.
        """
        import torch

        from app.data import build_task

        configuration = self._load(path, (*self._base(network), *assignments, *self._overrides))
        device = torch.device("cpu")
        return build_task(configuration, process_index=0, process_count=1, device=device)

    def _follow(
        self, network: str, method: str, seed: int, factor: float
    ) -> tuple[dict[str, Any], dict[str, int] | None]:
        """Return the keys, and the ranks, that follow from what other methods have come to.

        Raises:
            Waiting: they have not come to it yet.
        """
        definition = self.study.methods[method]
        if definition.as_small_as:
            return self._narrower(network, method, definition.as_small_as), None
        if definition.as_fast_as:
            path = self._path(network, method)
            epochs = self._load(path, (*self._base(network), *self._overrides)).training.epochs
            ratio = self.step_ratio(network, definition.as_fast_as)
            if ratio is None:
                raise Waiting(f"the CPU time of {definition.as_fast_as}")
            return {"training.epochs": derived.shorten(epochs, ratio)}, None
        if definition.stable_ranks_of:
            watched = self.cell(network, definition.stable_ranks_of, seed, factor)
            return self._settled(network, method, watched)
        return {}, None

    def _narrower(self, network: str, method: str, other: str) -> dict[str, Any]:
        """Return the keys of a network that stores as much as another method's."""
        width = self.study.networks[network].width
        if not width:
            raise Waiting(f"networks.{network}.width, the keys that make it narrower")
        cell = self.cell(network, other, self.study.first_seed, self.chosen(network, other))
        if (summary := cell.summary()) is None:
            raise Waiting(f"the size of {cell}")
        path, base = self._path(network, method), self._base(network)

        def count(values: dict[str, int]) -> int:
            return self._sizes(network, path, (*base, *self._overrides, *_assignments(values)))

        return dict(derived.narrow(width, summary["stored_parameters"], count))

    def _parameter_count(self, network: str, path: str, assignments: tuple[str, ...]) -> int:
        """Return the number of parameters of a network."""
        return derived.parameter_count(self._load(path, assignments), self._tasks(network, path))

    def _factorized(self, network: str, path: str, assignments: tuple[str, ...]) -> dict[str, int]:
        """Return the full rank of every layer that the method factorizes, by name."""
        return derived.full_ranks(self._load(path, assignments), self._tasks(network, path))

    def _settled(
        self, network: str, method: str, watched: Cell
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """Return delay and release at the end of the full-rank phase, and ranks, as Cuttlefish."""
        if (place := watched.finished) is None:
            raise Waiting(f"{watched}")
        keys = self.study.keys_of(method, network)
        kept = {key: keys[key] for key in keys if re.match(r"oialr.(keep|in|ex)", key)}
        path = self._path(network, method)
        assignments = (*self._base(network), *_assignments(kept), *self._overrides)
        full = self._full_ranks(network, path, assignments)
        latest = max(1, round(LATEST_SETTLED * self._load(path, assignments).training.epochs))
        record = read_record(place)
        known = record.get("settled", {})
        if (place / "metrics.h5").exists():
            epochs = derived.read_stable_ranks(place, full)
            epoch = derived.settled([list(ranks.values()) for ranks in epochs], latest=latest)
            ranks = derived.scaled_stable_ranks(epochs[epoch], epochs[0], full)
            # An archive has the record alone.
            now = {**known, method: {"epoch": epoch, "ranks": ranks}}
            if now != known:
                write_record(place, {**record, "settled": now})
        elif known.get(method, {"ranks": {}})["ranks"].keys() == full.keys():
            epoch, ranks = known[method]["epoch"], known[method]["ranks"]
        else:
            raise Waiting(f"the metrics of {watched}: delete {place} to watch it again")
        step = epoch * self._tasks(network, path).steps_per_epoch
        is_released = keys.get("oialr.release") is not None
        released = {"oialr.release": step} if is_released else {}
        return {"oialr.delay": step, **released}, ranks


def _time_ratio(mine: Path | None, baseline: Path | None, *, by_step: bool) -> float | None:
    """Return the ratio of the CPU seconds of two finished runs, whole or of a step.

    Returns:
        None: one is not there, or they are of two machines.
    """
    if mine is None or baseline is None:
        return None
    records = [read_record(place) for place in (mine, baseline)]
    # The digest is of the processor, too: it tells of the first cells, which name no machine.
    machines = [record.get("machine") or record.get("digest") for record in records]
    if machines[0] != machines[1]:
        return None
    seconds = []
    for place in (mine, baseline):
        summary = json.loads((place / "summary.json").read_text())
        seconds.append(float(summary["cpu_seconds"]) / (summary["steps"] if by_step else 1))
    return seconds[0] / seconds[1]


def _settings(configuration: "Configuration") -> dict[str, Any]:
    """Return what is not as by default: so an option that comes to the program changes nothing."""
    settings: dict[str, Any] = configuration.model_dump(exclude_defaults=True)
    for section, names in _NOT_PART.items():
        for name in names:
            settings.get(section, {}).pop(name, None)
    return {section: keys for section, keys in settings.items() if keys}


def _follows(value: Any) -> bool:
    """Whether a value is a share of the steps, or another key's."""
    return isinstance(value, str) and bool(SHARE.fullmatch(value) or REFERENCE.fullmatch(value))


def _resolve(value: Any, steps: int, common: "Configuration") -> Any:
    """Replace a share of the steps, ``33 %``, and the value of another key, ``= section.key``.

    A share is at least one step, and leaves at least one.
    """
    if not isinstance(value, str):
        return value
    if share := SHARE.fullmatch(value):
        return min(steps - 1, max(1, math.floor(float(share[1]) / 100 * steps + 0.5)))
    if key := REFERENCE.fullmatch(value):
        return getattr(getattr(common, key[1]), key[2])
    return value


def _assignments(keys: dict[str, Any]) -> list[str]:
    """Return ``section.key=value`` for the command line."""
    return [f"{key}={_text(value)}" for key, value in keys.items()]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "null" if value is None else json.dumps(value)
