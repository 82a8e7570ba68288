"""Which modules of the packages a session has entered, in its own process or in xdist's workers.

``pytest --every-module`` fails where a module of app/ or oialr/ is left out: where none of its
functions was called or, of a module without functions, where nobody imported it. Of the cases of
one test the first alone counts: tracing takes longer than the tests. Of a program that a test
starts what it has loaded counts.
"""

import inspect
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    str(path): str(path.relative_to(ROOT))
    for package in ("app", "oialr")
    for path in sorted((ROOT / package).rglob("*.py"))
}
"""Every module by its file, as code objects name it."""


class Entered:
    """A plugin of pytest that notes the modules whose functions are called."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._of_workers: set[str] = set()
        self._tests: set[tuple[Path, str]] = set()
        self._folder = tempfile.TemporaryDirectory()
        os.environ["NOTE_MODULES_IN"] = self._folder.name  # for noting/sitecustomize.py
        os.environ["PYTHONPATH"] = with_noting(os.environ.get("PYTHONPATH", ""))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Trace a test, if it is the first of its cases."""
        test = item.path, getattr(item, "originalname", item.name)
        traced = test not in self._tests
        self._tests.add(test)
        if traced:
            self._trace(self._note)
        try:
            return (yield)
        finally:
            self._trace(None)

    @staticmethod
    def _trace(function: Any) -> None:
        threading.settrace(function)
        sys.settrace(function)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename in MODULES and is_function(frame.f_code):
            self._files.add(frame.f_code.co_filename)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker has ended."""
        self._of_workers |= set(getattr(node, "workeroutput", {}).get("entered", ()))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for notes in Path(self._folder.name).iterdir():
            self._files |= set(notes.read_text().splitlines()) & set(MODULES)
        imported = {getattr(module, "__file__", None) for module in [*sys.modules.values()]}
        self._files |= {file for file in imported & set(MODULES) if not has_functions(file)}
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["entered"] = sorted(self._files)
        elif session.exitstatus == pytest.ExitCode.OK and self.left_out():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for name in self.left_out():
            terminalreporter.write_line(f"{name}: no test has entered it", red=True)

    def left_out(self) -> list[str]:
        """Return the modules that no test has entered."""
        seen = self._files | self._of_workers
        return [name for file, name in MODULES.items() if file not in seen]


def with_noting(path: str) -> str:
    """Return a PYTHONPATH whose programs note what they load, where it was asked for."""
    if "NOTE_MODULES_IN" not in os.environ:
        return path
    return os.pathsep.join([str(Path(__file__).parent / "noting"), *filter(None, [path])])


def is_function(code: CodeType) -> bool:
    """Return whether code is that of a function; those of modules and classes are not."""
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and not code.co_name.startswith("<")


def has_functions(file: str) -> bool:
    """Return whether a module has a function, at its top or in a class."""

    def all_code(code: CodeType) -> Iterator[CodeType]:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from all_code(constant)

    return any(map(is_function, all_code(compile(Path(file).read_text(), file, "exec"))))
