"""The application: trains, measures, searches and reports with the library ``oialr``.

``from app import OIALR`` gives the method too. It is handed out lazily, so that
``python -m app.train --help`` does not pay for importing torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oialr import OIALR as OIALR

__all__ = ["OIALR"]


def __getattr__(name: str) -> Any:
    if name == "OIALR":
        from oialr import OIALR

        return OIALR
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
