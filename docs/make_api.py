"""Write the pages of the API from docstrings: ``make docs``. A warning is an error."""

import importlib
import sys
import warnings
from pathlib import Path

import pdoc

import oialr
from oialr.compatibility import import_torchvision

INTEGRATIONS = [f"oialr.integrations.{name}" for name in ("lightning", "huggingface", "timm")]


def main() -> None:
    """Write into the folder that is named, or into docs/api."""
    import_torchvision()
    for module in INTEGRATIONS:
        importlib.import_module(module)
    warnings.simplefilter("error")  # only now: the frameworks have warnings of their own
    for name in oialr.__all__:  # each is imported when it is asked for, which pdoc does not do
        vars(oialr)[name] = getattr(oialr, name)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "api")
    pdoc.render.configure(docformat="google", math=True, search=True)
    pdoc.pdoc("oialr", r"!oialr\.", *INTEGRATIONS, output_directory=folder)
    print(f"{folder}/index.html")


if __name__ == "__main__":
    main()
