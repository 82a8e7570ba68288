"""What is done before an optimizer's step, and undone behind it, whatever happens in between."""

from collections.abc import Callable
from functools import wraps
from types import MethodType
from typing import Any

from torch.optim import Optimizer


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer, in its step under GradScaler, has left everything as it was.

    GradScaler does not call the step of another one where a gradient is infinite. A fused one
    it calls, and tells it by a number on the device, for which the host waits here, as it does
    with any other optimizer under GradScaler.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


class AroundSteps:
    """Hangs on to the steps of an optimizer.

    A closure may make the gradients within the step, as in Lightning, whose batch is all in there:
    it may fail, and it may store the optimizer's state, which must be that between two steps. Any
    step may fail, for want of memory or by an interrupt, and whoever goes on behind it, such as a
    schedule, must find what was there before: torch calls no hook then, so the step itself is
    watched.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Hang on."""
        self._in_closure = False
        self._put_back: Callable[[], None] | None = None
        """Undoes :meth:`suspend`, while the optimizer's state is stored."""
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        optimizer.register_state_dict_pre_hook(self._before_storing)
        optimizer.register_state_dict_post_hook(self._after_storing)
        optimizer.register_load_state_dict_pre_hook(self._after)
        self._watch_failures(optimizer)

    def enter(self, optimizer: Optimizer) -> None:
        """Do what is to be done before a step."""
        raise NotImplementedError

    def with_gradients(self, optimizer: Optimizer) -> None:
        """Do what is to be done in a step when its gradients are there."""

    def leave(self, optimizer: Optimizer) -> None:
        """Undo what :meth:`enter` has done, if it has not been undone."""
        raise NotImplementedError

    def suspend(self, optimizer: Optimizer) -> Callable[[], None]:
        """Undo what :meth:`enter` has done, and return what does it again."""
        raise NotImplementedError

    def _watch_failures(self, optimizer: Optimizer) -> None:
        """Let the optimizer have a step that leaves nothing behind where it fails.

        It is a bound method, as the one of the class: a schedule that is made afterwards takes it
        apart for its own. One that is there already is known by attributes of the step.
        """
        step = optimizer.step

        @wraps(getattr(step, "__func__", step))
        def watched(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            except BaseException:
                self.leave(optimizer)
                raise

        optimizer.step = MethodType(watched, optimizer)  # type: ignore[method-assign]

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Prepare a step, and let it go on with a closure of ours if it has one."""
        self.leave(optimizer)  # if a step failed that somebody has kept from before
        self.enter(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the optimizer comes first
        if closure is None:
            self.with_gradients(optimizer)
            return None

        def ours() -> Any:
            self._in_closure = True
            try:
                loss = closure()
            except BaseException:
                self.leave(optimizer)
                raise
            finally:
                self._in_closure = False
            self.with_gradients(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], ours, *args[2:]), kwargs
        return args, {**kwargs, "closure": ours}

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        self.leave(optimizer)

    def _before_storing(self, optimizer: Optimizer) -> None:
        self._put_back = None  # of a state that could not be stored
        if self._in_closure:
            self._put_back = self.suspend(optimizer)
        else:
            self.leave(optimizer)

    def _after_storing(self, *_: Any) -> None:
        if self._put_back:
            self._put_back()
        self._put_back = None
