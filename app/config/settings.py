"""The typed sections of the configuration: every field, documented and checked.

:mod:`app.config` reads them from YAML and from the command line.
"""

import math
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from app.config.data_section import DataSection
from app.config.method_section import OIALRSection
from app.config.optimizers import OptimizerName
from app.config.run_section import RunSection
from app.config.search_section import SearchSection
from app.config.section import Section, expand_home
from app.errors import UserError
from oialr.placement.assignment import Factorization

PrecisionName = Literal["float32", "bfloat16", "float16"]

LONGEST_CYCLE_EXPONENT = 9
"""Power of ten that the last cycle of the learning rate is at most longer than the first."""


class ModelSection(Section):
    """The network, by name, built full-rank."""

    name: str = Field(
        "vision_transformer",
        description="vision_transformer, cifar_resnet, lenet5, autoformer (for time series), or a "
        "name of timm, such as resnetrs101; or a function of your own by its import path, "
        "package.module:function.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the network's constructor."
    )
    initial: str | None = Field(
        None,
        description="File of the weights to start from, in place of random ones: a state_dict of "
        "torch.save or safetensors, or a run's checkpoint (FOLDER/checkpoints/step-N/state.pt, or "
        "the run's folder for its newest).",
    )
    _expand = field_validator("initial")(expand_home)


class TrainingSection(Section):
    """The optimizer and its schedule."""

    epochs: int = Field(20, gt=0, description="Passes over the training part.")
    batch_size: int = Field(64, gt=0, description="Global batch: samples per optimizer step.")
    accumulation: int = Field(
        1,
        gt=0,
        description="Backward passes per optimizer step that a process splits its share into.",
    )
    precision: PrecisionName = Field(
        "float32",
        description="Of products in forward and backward; float16 scales the loss. Weights, "
        "factors, factorizations and optimizer state stay in float32.",
    )
    compile: bool = Field(
        False, description="torch.compile, anew after events that changed shapes."
    )
    deterministic: bool = Field(
        False,
        description="torch's deterministic algorithms: on GPUs too, a run gives the same bits each "
        "time, resumed or not, and steps may take longer. On CPUs it does so anyway.",
    )
    channels_last: bool = Field(
        False,
        description="Images lie in memory with their channels last, in which convolutions may be "
        "faster: --dry-run tells the time of a step with and without.",
    )
    optimizer: OptimizerName = Field(
        "adamw",
        description="torch's, and lion and lamb of timm; sgd is Nesterov's if momentum > 0.",
    )
    learning_rate: float = Field(1e-3, gt=0, le=1000, description="Peak learning rate.")
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Not applied to biases, normalization weights, tokens and positions.",
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="Of sgd and rmsprop; the first beta of those that have one."
    )
    schedule: Literal["cosine", "constant"] = Field(
        "cosine",
        description="After the warm-up: cosine to the minimum at the last step, or constant.",
    )
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs of linear warm-up.")
    warmup_learning_rate: float = Field(
        1e-6, ge=0, le=1000, description="Learning rate of the first step."
    )
    minimum_learning_rate: float = Field(0.0, ge=0, description="Learning rate of the last step.")
    cycle_limit: int = Field(
        1, gt=0, le=1000, description="Cycles of the cosine, each from the top again."
    )
    cycle_mul: float = Field(
        1.0, ge=1, le=100, description="Length of a cycle over that of the last one."
    )
    cycle_decay: float = Field(1.0, gt=0, le=1, description="Peak of a cycle over the last one's.")
    k_decay: float = Field(
        1.0,
        ge=0.1,
        le=20,
        description="Exponent of time in the cosine: more than 1 stays high for longer.",
    )
    warmup_after_conversion: int = Field(
        0,
        ge=0,
        description="Steps of linear warm-up after oialr.delay, where layers turn low-rank; with "
        "delay: stability or defer_conversion it begins anew whenever layers do.",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Evaluate an exponential moving average of the weights; share of it that "
        "remains at a step.",
    )
    synchronize_batch_norm: bool = Field(
        False, description="Batch statistics over all processes (GPUs only: torch has no other)."
    )
    early_stopping: int | None = Field(
        None,
        gt=0,
        description="Epochs without a smaller validation loss after which training stops; the "
        "weights of the best epoch are tested. Both begin anew where layers turn low-rank.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Of the cross entropy.")
    gradient_clip: float | None = Field(
        None, gt=0, description="Largest norm of the gradient over all trained parameters."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation: {self.accumulation} backward passes cannot share "
                f"a batch_size of {self.batch_size}"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs} must be less than epochs, {self.epochs}"
            )
        if (self.cycle_limit - 1) * math.log10(self.cycle_mul) > LONGEST_CYCLE_EXPONENT:
            raise ValueError(
                f"cycle_limit: of {self.cycle_limit} cycles, each {self.cycle_mul} times as long "
                f"as the last one, the first would be shorter than a step; lower one of both"
            )
        if self.minimum_learning_rate > self.learning_rate:
            raise ValueError(
                f"minimum_learning_rate: {self.minimum_learning_rate} exceeds "
                f"learning_rate, {self.learning_rate}"
            )
        return self


class DistributedSection(Section):
    """Processes and devices."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto: a GPU for each process if there are enough, otherwise CPUs.",
    )
    factorization: Factorization = Field(
        "auto",
        description="owner: each layer is factorized by one process and sent to the others; heat: "
        "layers that can be are split over the processes by Heat; auto: where that ends an event "
        "clearly earlier; replicated: every process factorizes every layer.",
    )
    calibration: str | None = Field(
        None,
        description="File of app.calibrate: what factorizations cost on this machine. Default: "
        "costs that were measured elsewhere.",
    )
    timeout: float = Field(
        1800.0,
        gt=0,
        le=1e7,
        description="Seconds without progress (step, evaluation, checkpoint, event) after which a "
        "run of several processes ends and says what each of them waits for.",
    )
    _expand = field_validator("calibration")(expand_home)


class StabilitySection(Section):
    """The measurement of basis stability (arXiv 2401.08505, section 3)."""

    enabled: bool = Field(True, description="Measure it.")
    unit: Literal["epochs", "steps"] = Field(
        "epochs", description="In which window and interval are counted."
    )
    window: int = Field(
        5, gt=0, description="Epochs or steps between the two bases that are compared."
    )
    interval: int = Field(
        1,
        gt=0,
        description="Epochs or steps between two measurements. window / interval bases of every "
        "weight are kept in host memory, each as large as the weight.",
    )
    background_steps: int = Field(
        0,
        ge=0,
        description="A worker thread measures a copy of the weights while training goes on, and "
        "the results are fetched after so many steps, or before the next measurement, event or "
        "checkpoint (with run.checkpoint_epochs=1 and unit=epochs only the evaluation goes on "
        "beside it); 0: training waits.",
    )
    reference_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the bases that are kept; bfloat16 halves them."
    )
    include: list[str] = Field(
        ["*"], description="Patterns (blocks.*) of names of the weights that are measured."
    )
    exclude: list[str] = Field([], description="Patterns of weights that are not measured.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.window % self.interval:
            raise ValueError(
                f"window: {self.window} must be a multiple of interval, {self.interval}"
            )
        return self


class Configuration(Section):
    """The whole configuration of a run."""

    run: RunSection = Field(default_factory=RunSection)
    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection = Field(default_factory=ModelSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    oialr: OIALRSection = Field(default_factory=OIALRSection)
    distributed: DistributedSection = Field(default_factory=DistributedSection)
    stability: StabilitySection = Field(default_factory=StabilitySection)
    search: SearchSection = Field(default_factory=SearchSection)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.data.data_set.has_classes and self.training.label_smoothing:
            raise ValueError(
                f"training.label_smoothing: is not for data.name={self.data.name}; set it to 0 (it "
                f"is {self.training.label_smoothing:g})"
            )
        return self

    def check_steps(self, steps: int) -> None:
        """Reject a delay or release that a run of ``steps`` optimizer steps would never reach.

        Raises:
            UserError: the delay or the release is not less than the number of steps, or a share of
                the run lies before the delay.
        """
        delay = self.oialr.step_of("delay", steps)
        if self.oialr.enabled and delay is not None and delay >= steps:
            raise UserError(
                f"oialr.delay: {self.oialr.delay} is not less than the {steps} steps of this run; "
                f"lower it, or set oialr.enabled=false for full-rank training"
            )
        release = self.oialr.step_of("release", steps)
        if not self.oialr.enabled:
            return
        if release is not None and release >= steps:
            raise UserError(
                f"oialr.release: {self.oialr.release} is not less than the {steps} steps of this "
                f"run; lower it, or leave it out"
            )
        if delay is not None and release is not None and release < delay:
            raise UserError(
                f"oialr.release: {self.oialr.release} of {steps} steps is step {release}, before "
                f"oialr.delay, {delay}; raise it, or lower the delay"
            )
        try:
            options = self.oialr.options(steps)
        except ValueError as error:  # only now is it known whether a share and a step are one
            name, _, rest = str(error).partition(" ")
            raise UserError(f"oialr.{name}: {rest}") from None
        latest = options.latest_conversion
        if delay is None and release is None and latest is not None and latest >= steps:
            raise UserError(
                f"oialr.latest_delay: {self.oialr.latest_delay} is step {latest} in whole steps of "
                f"oialr.update_interval, {options.update_interval}, and not less than the {steps} "
                f"steps of this run; lower one of them"
            )
