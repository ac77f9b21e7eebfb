"""What happens to checkpoints: tests do it on purpose."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lightning_llm.checkpoint.manifest import MANIFEST, Manifest
from tests.checkpoint.digests import digest_of


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Changes one bit of a file, in place."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def reseal(checkpoint: Path) -> None:
    """Makes the manifest agree with what is in the folder now, as one who wants to deceive would."""
    manifest = Manifest.from_bytes((checkpoint / MANIFEST).read_bytes())
    files = {
        path.name: digest_of([path.read_bytes()], manifest.algorithm)
        for path in sorted(checkpoint.iterdir())
        if path.name != MANIFEST
    }
    (checkpoint / MANIFEST).write_bytes(dataclasses.replace(manifest, files=files).to_bytes())
