"""Whether a stored state of the method fits the method as it is configured now."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from oialr.forms import DENSE, Form, form_of
from oialr.layer_survey import LayerReport


def check_stored_state(
    state: Mapping[str, Any],
    *,
    names: Sequence[str],
    delay: int | str,
    release: int | None,
    frobenius_decay: float | None,
    readings: Mapping[str, str],
    rate_factors: Mapping[str, float],
) -> None:
    """Reject a state that cannot be gone on with.

    Args:
        state: of :meth:`oialr.method.OIALR.state_dict`, of this or an earlier version.
        names: of the layers that the method factorizes.
        delay, release, frobenius_decay: as they are now.
        readings: options that say how weights are read as matrices, by name, as they are now.
        rate_factors: learning rates over that of full-rank weights, by option, as they are now.

    Raises:
        ValueError: the state is of another network; or a step of an event is another one now, and
            either of them is over; or what the optimizer's groups were made by is another; or the
            layers turned low-rank in another reading.
    """
    if list(state["ranks"]) != list(names):
        other = sorted(set(state["ranks"]) ^ set(names))
        raise ValueError(f"the stored state is of another network: {', '.join(other)}")
    handled = state["handled"]
    stored = state.get("delay", delay)  # states of earlier versions are without
    converted = bool((state.get("turns") or {}).get("had"))
    over = [converted if each == "stability" else each <= handled for each in (delay, stored)]
    if delay != stored and any(over):
        raise ValueError(
            f"oialr.delay: cannot change from {stored} to {delay} after step {handled}; layers "
            "turn low-rank once"
        )
    was = state.get("release")
    if release != was and (release is None or was is None):
        raise ValueError(
            f"oialr.release: cannot change from {was} to {release}, which changes the optimizer's "
            "parameter groups"
        )
    if release is not None and release != was and min(release, was or 0) <= handled:
        raise ValueError(
            f"oialr.release: cannot change from {was} to {release} after step {handled}; layers "
            "are released once"
        )
    if (decay := state.get("frobenius_decay")) != frobenius_decay:
        raise ValueError(
            f"oialr.frobenius_decay: cannot change from {decay} to {frobenius_decay}: the "
            "optimizer's stored state has the weight decay that goes with it"
        )
    for name, factor in rate_factors.items():
        if name == "factor_learning_rate_factor" and release is None:
            continue  # there are no factors to come
        if (before := state.get(name, factor)) != factor:
            raise ValueError(
                f"oialr.{name}: cannot change from {before} to {factor}: the optimizer's stored "
                "state has the learning rates that go with it"
            )
    for name, reading in readings.items():
        if (was := state.get(name, reading)) != reading:
            raise ValueError(
                f"oialr.{name}: cannot change from {was} to {reading}: bases, also those that "
                "stability is measured against, are those of another matrix"
            )


def forms_of_state(state: Mapping[str, Any], layers: Sequence[LayerReport]) -> dict[str, Form]:
    """Return the forms that a state of the method tells of its layers, by name."""
    released = state.get("released", {})
    return {
        layer.name: Form(
            rank,
            released.get(layer.name) == "factors",
            layer.groups,
            layer.reading.is_by_direction,
        )
        if (rank := state["ranks"][layer.name]) is not None
        else DENSE
        for layer in layers
    }


def forms_here(
    model: nn.Module, survey: Sequence[LayerReport], stored: Mapping[str, Form]
) -> dict[str, Form]:
    """Return the forms that the method's layers get from stored weights, by name.

    Args:
        model: the network.
        survey: of all its weights.
        stored: forms of those that are stored; the method's others stay as they are.

    Raises:
        ValueError: a weight cannot have its form here.
    """
    reports = {report.name: report for report in survey}
    forms = {r.name: form_of(model, r.name) for r in survey if r.stays_dense is None}
    for name, form in stored.items():
        if name not in forms and form != (present := form_of(model, name)):
            why = reports[name].stays_dense if name in reports else "no layer of the method"
            raise ValueError(f"{name} is stored {form}, and stays {present} here: {why}")
        if name in forms and form.rank and not form.is_read_alike(reports[name].reading):
            raise ValueError(
                f"{name} is stored {form}, and is read otherwise here, as {reports[name].reading}: "
                "does attention_projection or convolutions differ?"
            )
    return forms | {name: form for name, form in stored.items() if name in forms}
