"""What a run would be, looked at before anything is trained or written."""

from collections.abc import Callable
from pathlib import Path

from app.config.settings import Configuration
from app.errors import AgreedUserError
from app.runtime.processes import Runtime
from app.training.build import build
from app.training.checkpoint import Checkpoints
from app.training.layer_table import explain, rows_per_sample


def explain_run(
    configuration: Configuration,
    runtime: Runtime,
    *,
    resume: bool,
    tell: Callable[[str], None] = lambda what: None,
) -> str:
    """Return a table of what execution by cost does in each layer; nothing is trained or written.

    Args:
        configuration: checked.
        runtime: this process alone, or one of those that would train.
        resume: at the ranks of the newest checkpoint in run.dir; otherwise at several.
        tell: told of what begins now, such as :meth:`app.runtime.watchdog.Watchdog.progress`.

    Raises:
        UserError: as :func:`app.training.run.train`.
    """
    parts = build(configuration, runtime, initial=not resume, tell=tell)
    method, model, training = parts.method, parts.model, configuration.training
    if method is None:
        raise AgreedUserError("--explain: oialr.enabled is false: no layer is factorized")
    ranks, released = None, {}
    if resume:
        folder = Path(configuration.run.dir or "")
        state = Checkpoints(
            folder / "checkpoints", runtime.processes, keep=1, read_only=True
        ).load()
        if state and (stored := state[0]["method"]) is None:
            raise AgreedUserError(
                f"--explain: {folder} is a full-rank training: oialr.enabled was false"
            )
        if state:
            ranks, released = stored["ranks"], stored.get("released", {})
        if ranks and not any(ranks.values()):
            ranks = None  # before the conversion
    tell("the layers' shapes")
    batch = parts.task.example_batch()
    rows = rows_per_sample(model, method.layers, lambda: model(batch.inputs), len(batch.inputs))
    samples = -(-training.batch_size // (runtime.process_count * training.accumulation))
    return explain(
        method.survey,
        rows,
        samples,
        ranks,
        configuration.oialr.execution,
        released=released,
        will_release=method.options.release is not None,
        has_target=method.options.target_size is not None,
    )


def check_run(configuration: Configuration, runtime: Runtime) -> int:
    """Build what a run is built of, and throw it away. A collective call.

    Returns:
        Samples of the training part.

    Raises:
        UserError: as :func:`app.training.run.train`.
    """
    return build(configuration, runtime, check_steps=False).task.train_size
