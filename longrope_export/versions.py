"""Versions of what a result depends on, for model cards and results."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from longrope_export import __version__

_PACKAGES = ("torch", "transformers", "gguf", "xllamacpp")


def versions(*more: str) -> dict[str, str]:
    """Name → version of this package, of Python, and of those packages (and `more`) that are installed.

    Imports none of them.
    """
    found = {"longrope-export": __version__, "python": platform.python_version()}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
