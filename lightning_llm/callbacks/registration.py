"""A checkpoint that turned out to be the best -> a version in the registry, as the folder that serving takes.

`AsyncDistributedCheckpoint(register_on_best=True)` calls it beside the training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from lightning_llm.checkpoint.export import export
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.registry import Lineage, ModelVersion, register


def register_checkpoint(path: str, name: str, registry: str | None, metrics: Mapping[str, float]) -> ModelVersion:
    """Registers a committed checkpoint under the alias "best".

    Args:
        path: Its folder or URL.
        name: Of the model in the registry.
        registry: See `open_registry`.
        metrics: That it was chosen by.

    Returns:
        The new version: the model as a Hugging Face folder, or the checkpoint as it is if it is not a decoder's.
    """
    checkpoint = Checkpoint.open(path, alone=True)
    manifest = checkpoint.manifest
    lineage = Lineage(checkpoint=checkpoint.path, checkpoint_uuid=manifest.uuid, step=manifest.step)
    with tempfile.TemporaryDirectory(prefix="lightning-llm-") as place:
        folder = Path(place) / name
        if "config.json" in manifest.files:
            export(checkpoint, folder)
        else:
            checkpoint.link_into(folder)
        return register(folder, name, registry=registry, metrics=metrics, lineage=lineage, aliases=("best",))
