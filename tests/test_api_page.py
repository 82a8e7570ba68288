"""The pages of the API, as ``make docs`` writes them."""

import re

import pytest
from support.launching import launch

import oialr


@pytest.mark.slow
def test_every_public_name_is_on_the_page_with_its_text(tmp_path):
    """A warning, such as of a name that leads nowhere, would be an error."""
    launch(0, "-m", "docs.make_api", tmp_path)
    page = (tmp_path / "oialr.html").read_text()
    for name in oialr.__all__:
        section = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
        assert section, name
        assert 'class="docstring"' in section[1], name
    for name in ("lightning", "huggingface", "timm"):
        assert (tmp_path / "oialr" / "integrations" / f"{name}.html").exists()
