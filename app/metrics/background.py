"""One computation at a time beside the training."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


class Background(Generic[Result]):
    """A worker thread, with a stream of its own on a GPU.

    torch lets go of Python's lock inside its operators, so the training's thread goes on meanwhile.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._future: Future[Result] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is a result to be fetched, ready or not."""
        return self._future is not None

    def start(self, function: Callable[[], Result], device: torch.device) -> None:
        """Begin a computation without gradients; the result of the last one has been fetched.

        Args:
            function: works on tensors that nobody changes meanwhile, and brings its result to host
                memory.
            device: where the tensors are; what was asked of it before is waited for, there.
        """
        assert not self.busy
        before = None
        if device.type == "cuda":
            before = torch.cuda.Event()
            before.record()

        def run() -> Result:
            stream = torch.cuda.Stream(device) if before else None
            with torch.no_grad(), torch.cuda.stream(stream) if stream else nullcontext():
                if stream and before:
                    stream.wait_event(before)
                return function()

        self._future = self._thread.submit(run)

    def result(self) -> Result:
        """Wait for the computation and return its result, or raise what it raised."""
        assert self._future
        future, self._future = self._future, None
        return future.result()
