"""What every room that writes files needs: to know that they are on the disk."""

from __future__ import annotations

import os
from pathlib import Path


def make_folder(path: Path) -> None:
    """Makes a folder and those that it is in, as far as they are missing; returns when their names are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
