"""The section of the configuration that says how to search for hyperparameters."""

from typing import Literal, Self

from pydantic import Field, model_validator

from app.config.section import Section


class SearchSection(Section):
    """The hyperparameter search (python -m app.search); app.train does not read it."""

    evaluations: int | None = Field(
        40, gt=0, description="Trainings in total, failed ones too; null: no such limit."
    )
    generations: int | None = Field(
        None,
        gt=0,
        description="Trainings per worker of the first start, on average; null: no such limit.",
    )
    hours: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Start no training after these hours, those of all sessions; null: no limit.",
    )
    processes_per_worker: int = Field(
        1, gt=0, description="Processes that train together; a worker is one such group."
    )
    propagator: Literal["genetic", "cma_es", "particle_swarm", "nelder_mead"] = Field(
        "genetic", description="How Propulate breeds the next candidate from what it knows."
    )
    population: int | None = Field(
        None,
        ge=4,
        le=100_000,
        description="Parents on an island; null: twice its workers, at least 4.",
    )
    islands: int | None = Field(
        None, gt=0, description="Groups of workers that breed apart; null: one per four workers."
    )
    exchange: Literal["pollination", "migration"] = Field(
        "pollination", description="Between islands copies of candidates go, or they themselves."
    )
    migration_probability: float = Field(
        0.9, ge=0, le=1, description="Chance of an exchange, per generation of an island."
    )
    trainable_price: float = Field(
        0.0, ge=0, description="Added to the error, times trained parameters over all."
    )
    step_price: float = Field(
        0.0, ge=0, description="Added to the error, times the mean seconds of a step."
    )
    trainable_bound: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Largest trainable percent: what exceeds it loses against all that does not.",
    )
    evaluation_timeout: float | None = Field(
        None, gt=0, description="Seconds after which a training is given up; null: never."
    )
    median_stop_epoch: int | None = Field(
        None,
        gt=0,
        description="From this epoch on, give up what is worse than the median of at least five "
        "trainings that finished within the bound, at the same epoch; null: never.",
    )
    keep_checkpoints: bool = Field(False, description="Keep the checkpoints of all trainings.")
    train_best: bool = Field(
        True, description="Train the best once more at the end and evaluate its test part."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.evaluations is None and self.generations is None and self.hours is None:
            raise ValueError("evaluations: null, and there is no other limit: set one")
        return self
