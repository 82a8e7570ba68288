"""The example of FSDP2: what docs/integrations.md says of it."""

import inspect

import pytest
from support.examples import added_lines, check_output, described

from examples import with_fsdp


@pytest.mark.slow
def test_the_example_prints_what_the_page_shows(tmp_path):
    command = "torchrun --nproc-per-node 2 -m examples.with_fsdp"
    (method, sharding), output = described(command, parts=2)
    assert method == added_lines("with_fsdp")
    functions = with_fsdp.shard, with_fsdp.store, with_fsdp.restore
    lines = [line for each in functions for line in inspect.getsource(each).splitlines()]
    assert sharding == [line.strip() for line in lines]
    added = [line for line in sharding if "method" in line and "def " not in line]
    assert (len(method), len(added)) == (5, 4)  # one of which calls a function of the example
    check_output(command, output, tmp_path)
