"""The example of a loop of one's own: what docs/integrations.md says of it."""

import pytest
from support.examples import added_lines, check_output, described

EXAMPLE = "with_a_loop"


@pytest.mark.slow
def test_the_example_prints_what_the_page_shows(tmp_path):
    command = f"torchrun --nproc-per-node 2 -m examples.{EXAMPLE}"
    (plain, distributed, stability), output = described(command, parts=3)
    assert plain == added_lines(EXAMPLE, "either", "the method")
    assert distributed == added_lines(EXAMPLE, "DistributedDataParallel")
    assert stability == added_lines(EXAMPLE, "either", "stability")
    assert (len(plain), len(plain + distributed), len(stability)) == (3, 5, 4)
    check_output(command, output, tmp_path)
