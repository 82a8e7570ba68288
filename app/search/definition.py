"""What a search is: a base configuration, a space, and how to search it. Read from YAML."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app import config
from app.config import yaml_text
from app.config.settings import Configuration
from app.data.sharding import steps_per_epoch
from app.errors import UserError
from app.search.space import Space, read_space

STORED = "search.yaml"
"""Name of the resolved definition in a search's folder."""


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A search, resolved and checked."""

    base: Configuration
    """What all candidates share; its section search says how to search."""
    space: Space
    entries: Mapping[str, Any]
    """The space as the file gives it."""

    def counted(self, workers: int) -> "Definition":
        """Return the definition with search.generations as a number of evaluations.

        So a search that is stopped ends where it would have, whoever goes on with it.

        Args:
            workers: of the search's first start.
        """
        section = self.base.search
        if section.generations is None:
            return self
        limits = [section.generations * workers, section.evaluations]
        least = min(limit for limit in limits if limit is not None)
        section = section.model_copy(update={"evaluations": least, "generations": None})
        return replace(self, base=self.base.model_copy(update={"search": section}))

    def seed(self, number: int) -> int:
        """Return the seed of an evaluation: the base's plus its number."""
        return (self.base.run.seed + number) % 2**32

    def candidate(self, number: int, values: Mapping[str, Any], folder: Path) -> Configuration:
        """Return the configuration of an evaluation.

        Args:
            number: of the evaluation; its seed is the base's plus this.
            values: of the parameters, by key.
            folder: where it runs.
        """
        configuration = self.space.configure(self.base, values)
        run = configuration.run.model_copy(
            update={
                "dir": str(folder),
                "name": f"{configuration.run.name}-{number}",
                "seed": self.seed(number),
                **({} if configuration.search.keep_checkpoints else {"keep_checkpoints": 0}),
            }
        )
        return configuration.model_copy(update={"run": run})

    def check_candidates(self, train_size: int, *, resume: bool = False) -> None:
        """Hold every delay against the number of steps, and every parameter against the others.

        Args:
            train_size: samples of the training part.
            resume: of a search that goes on, whose space cannot change any more.

        Raises:
            UserError: candidates at an end of the space would fail, or a parameter is without
                effect in all of them.
        """
        if any(key.startswith("data.") for key in self.space.keys):
            return  # the size of the training part may be searched over
        in_vain: dict[str, str] | None = None
        for values in self.space.corners(self.base):
            configuration = self.space.configure(self.base, values)
            training = configuration.training
            steps = training.epochs * steps_per_epoch(
                train_size, training.batch_size, drop_last=configuration.data.drop_last
            )
            try:
                configuration.check_steps(steps)
            except UserError as error:
                raise UserError(f"space: {error}") from None
            unused = configuration.oialr.unused(steps)
            in_vain = {key: unused[key] for key in unused if in_vain is None or key in in_vain}
        for key, reason in (in_vain or {}).items():
            if key in self.space.keys and not resume:
                raise UserError(
                    f"space: {key} has no effect in any candidate: {reason}; take it out, or "
                    "extend a configuration in which it has one, such as those in configs/paper/"
                )

    def best(self, number: int, values: Mapping[str, Any]) -> Configuration:
        """Return the configuration that trains an evaluation anew, as a run of its own."""
        candidate = self.candidate(number, values, Path())
        run = candidate.run.model_copy(
            update={
                "dir": None,
                "name": f"{self.base.run.name}-best",
                "keep_checkpoints": self.base.run.keep_checkpoints,
            }
        )
        return candidate.model_copy(update={"run": run})

    def to_yaml(self) -> str:
        """Return the definition as YAML, readable by :func:`load`."""
        return config.to_yaml(self.base) + yaml_text.dump({"space": dict(self.entries)})


def train_again(folder: Path, processes: int, number: int | None = None) -> str:
    """Return the command that trains an evaluation of a search again, with the same result.

    Args:
        folder: of the search.
        processes: that the evaluation had.
        number: of the evaluation; None: left to be filled in.
    """
    launcher = f"mpirun -n {processes} " if processes > 1 else ""
    place = (
        evaluation_folder(folder, number)
        if number is not None
        else folder / "evaluations" / "NUMBER"
    )
    return (
        f"{launcher}python -m app.train --config {shlex.quote(str(place / 'config.yaml'))} "
        f"run.dir=DIR run.keep_checkpoints=1"
    )


def evaluation_folder(folder: Path, number: int) -> Path:
    """Return where an evaluation of a search runs."""
    return folder / "evaluations" / f"{number:05d}"


def load(
    path: str | Path, overrides: Iterable[str] = (), *, folder: str | None = None
) -> Definition:
    """Read a search configuration, apply ``section.key=value`` overrides, check everything.

    The file extends its base configuration, as any may (:func:`app.config.load`), by a space.

    Args:
        path: YAML file with ``space`` and sections of the configuration.
        overrides: assignments, as :func:`app.config.parse_override` reads them.
        folder: of a search that is resumed, which is run.dir; None: none is.

    Raises:
        UserError: one line with the culprit and what would be right.
    """
    path = Path(path)
    values = config.read(path, "--config")
    entries = values.pop("space", None)
    config.set_default_name(values, path.stem)
    config.apply_overrides(values, overrides, folder=folder)
    configuration = config.build(values)
    return Definition(base=configuration, space=read_space(entries, configuration), entries=entries)
