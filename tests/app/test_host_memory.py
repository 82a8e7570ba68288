"""Memory that is freed in one step and needed in the next."""

import ctypes
import os

import pytest
from support.launching import ROOT, launch

from app import command
from app.runtime import host_memory
from app.runtime.host_memory import keep_freed_memory

WORKER = ROOT / "tests" / "support" / "workers" / "freed_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="there is no glibc")
def test_what_was_freed_needs_no_new_pages():
    kept, given_back = (int(launch(0, WORKER, how).stdout) for how in ("kept", "given-back"))
    assert kept < given_back / 3


def test_every_front_door_keeps_its_memory_before_anything_else(monkeypatch):
    called = []
    monkeypatch.setattr(command, "keep_freed_memory", lambda: called.append("kept"))
    with pytest.raises(SystemExit):
        command.run_command(lambda: called.append("main") or 0)
    assert called == ["kept", "main"]


@pytest.mark.parametrize(
    ("variables", "tuned"),
    [
        ({}, True),
        ({"MALLOC_ARENA_MAX": "2"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, False),
        ({"GLIBC_TUNABLES": "glibc.rtld.nns=4"}, True),
    ],
)
def test_what_the_user_has_set_stays_as_it_is(monkeypatch, variables, tuned):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = []

    class Library:
        @staticmethod
        def mallopt(parameter, value):
            calls.append((parameter, value))

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: Library)
    keep_freed_memory()
    assert bool(calls) == tuned


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
