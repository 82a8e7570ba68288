"""A folder of another user's, simulated: who runs the tests may enter all of them."""

import builtins
import errno
import io
import os


def close(folder, monkeypatch):
    """Refuse what is asked of a path below a folder, and to list it, as the system does."""

    def guarded(function, *, itself):
        def ask(path=".", *arguments, **options):
            place = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
            inside = place.startswith(f"{folder}/") or (itself and place == str(folder))
            if inside:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *arguments, **options)

        return ask

    for module, name in (
        (os, "stat"),
        (os, "lstat"),
        (os, "readlink"),
        (os, "open"),
        (io, "open"),
        (builtins, "open"),
    ):
        monkeypatch.setattr(module, name, guarded(getattr(module, name), itself=False))
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name), itself=True))
