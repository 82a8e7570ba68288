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
        self._stream: torch.cuda.Stream | None = None
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
        if device.type == "cuda":
            # One for all measurements: freed memory is used again on the stream it was taken on.
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

        def run() -> Result:
            with (
                torch.no_grad(),
                torch.cuda.stream(self._stream) if self._stream else nullcontext(),
            ):
                return function()

        self._future = self._thread.submit(run)

    def result(self) -> Result:
        """Wait for the computation and return its result, or raise what it raised."""
        assert self._future
        future, self._future = self._future, None
        return future.result()

    def close(self) -> None:
        """Wait for a computation that is under way, and let go of its result and of the thread."""
        self._thread.shutdown()
        self._future = None
