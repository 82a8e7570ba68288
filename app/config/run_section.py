"""The section of the configuration that says where a run lives and how it is reported."""

import difflib
from typing import Self

from pydantic import Field, field_validator, model_validator

from app.config.section import Section, expand_home
from app.import_path import is_import_path

LOGGERS = ("tensorboard", "csv")
"""Names of the loggers that come along."""


class RunSection(Section):
    """Where a run lives and how it is reported."""

    name: str = Field(
        "run", min_length=1, description="Name of the run, part of the default run.dir."
    )
    dir: str | None = Field(
        None,
        description="Folder of everything the run writes. Default: runs/NAME-TIME. In all keys "
        "that are paths a leading ~ is the home folder.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of initialization, order and dropout.")
    log_interval: int = Field(
        50, gt=0, description="Steps between two progress lines and two writes to metrics.h5."
    )
    checkpoint_epochs: int = Field(
        1, ge=0, description="Epochs between two checkpoints; 0: only at the end and when stopped."
    )
    keep_checkpoints: int = Field(
        2,
        ge=0,
        description="Number of newest checkpoints that are kept; 0: none is written, but for the "
        "best weights of training.early_stopping, which are tested.",
    )
    loggers: list[str] = Field(
        [],
        description="Who is told of everything while a run goes on: tensorboard, csv, or "
        "package.module:Class (docs/loggers.md).",
    )
    tidy: bool = Field(
        True,
        description="When the run has finished, drop the bases that stability was measured against "
        "and, if keep_checkpoints is no more than 2, all checkpoints but the newest.",
    )
    stop_after: int | None = Field(
        None, gt=0, description="Stop after this step as on a signal: checkpoint, exit code 75."
    )

    _expand = field_validator("dir")(expand_home)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.loggers:
            if name not in LOGGERS and not is_import_path(name):
                near = difflib.get_close_matches(name, LOGGERS, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"loggers: {name[:100]!r} is not one of {', '.join(LOGGERS)}, nor a "
                    f"package.module:Class{hint}"
                )
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError("loggers: a name is given twice")
        return self
