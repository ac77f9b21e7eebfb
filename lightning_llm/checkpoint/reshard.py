"""A checkpoint rewritten as another number of files of equal size, or without optimizers. `lightning-llm reshard`.

Every layout loads any checkpoint; what changes is how many files there are and how evenly they fill.
"""

from __future__ import annotations

from pathlib import Path

from lightning_llm.checkpoint.committing import INDEX, TRAINER, TRAINER_TENSORS
from lightning_llm.checkpoint.manifest import Manifest
from lightning_llm.checkpoint.planning import rank_file
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.writing import Content, write_checkpoint


def reshard(checkpoint: str | Path, output: str | Path, *, ranks: int, weights_only: bool = False) -> Manifest:
    """Writes a checkpoint anew.

    Tensors, values and the trainer's state stay as they are. Of what each rank had for itself (random generators), rank
    r keeps what rank r had, as far as there was one. Pieces of tensors are in memory, not tensors.

    Args:
        checkpoint: One, or a folder of several, of which the newest good one is taken.
        output: Folder or URL of the new one.
        ranks: How many files.
        weights_only: Leave out optimizers, schedulers and callbacks.

    Returns:
        The new manifest; its `source` is the old one's `uuid`.

    Raises:
        ConfigurationError: There is no checkpoint, or one at `output`.
        NoGoodCheckpointError: It does not verify.
    """
    content = content_of(Checkpoint.open(checkpoint, alone=True))
    return write_checkpoint(output, content.without_optimizers() if weights_only else content, ranks=ranks)


def content_of(checkpoint: Checkpoint) -> Content:
    """All that a checkpoint holds, its tensors yet to be read."""
    manifest = checkpoint.manifest
    of_ranks = [rank_file(rank) for rank in range(manifest.world_size)]
    assets = manifest.files.keys() - {*of_ranks, INDEX, TRAINER, TRAINER_TENSORS}
    return Content(
        step=manifest.step,
        tensors=checkpoint.lazy(),
        values=checkpoint.values,
        trainer=checkpoint.trainer_state(),
        ranks=[checkpoint.rank_state(rank) for rank in range(manifest.world_size)],
        mesh=manifest.mesh,
        weights_only=manifest.weights_only,
        assets={name: (checkpoint.local(name) / name).read_bytes() for name in sorted(assets)},
        source=manifest.uuid,
    )
