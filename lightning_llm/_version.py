"""Versions, for those who must not import a whole package to learn its."""

import importlib.metadata

__version__ = "0.1.0"


def lightning_version() -> str:
    """Of Lightning."""
    return importlib.metadata.version("lightning")
