"""The same checkpoints for Lightning's own strategies: `Trainer(plugins=[VerifiedCheckpointIO()])`.

Strategies that gather the whole state on rank 0 and hand it to a `CheckpointIO` (one device, DDP) save and load
verified folders with it instead of pickled files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_llm.checkpoint.encoding import decode, encode
from lightning_llm.checkpoint.random_state import set_random_state
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver, RunState
from lightning_llm.checkpoint.store import open_store, split_url

OPTIMIZERS = "optimizer_states"


def collect_whole(
    checkpoint: Mapping[str, Any],
    *,
    write_assets: Callable[[Path], None] | None = None,
    rank: Mapping[str, Any] | None = None,
) -> RunState:
    """A checkpoint as Lightning makes it, with all tensors whole, as it is saved.

    Args:
        checkpoint: What `Trainer.dump_checkpoint` returns under a strategy that does not shard.
        write_assets: What makes the weights usable on their own; see `module_assets`.
        rank: State of this process alone, such as its random generators'.
    """
    state = {f"model.{name}": value for name, value in checkpoint.get("state_dict", {}).items()}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if name not in tensors}
    trainer = {name: value for name, value in checkpoint.items() if name not in ("state_dict", OPTIMIZERS)}
    if OPTIMIZERS in checkpoint:
        trainer[OPTIMIZERS] = encode(checkpoint[OPTIMIZERS], tensors, OPTIMIZERS)
    return RunState(
        step=checkpoint.get("global_step", 0),
        tensors=tensors,
        values=values,
        trainer=trainer,
        rank=rank or {},
        weights_only=OPTIMIZERS not in checkpoint,
        write_assets=write_assets,
    )


class VerifiedCheckpointIO(CheckpointIO):
    """Saves folders of safetensors with a manifest, and loads nothing that does not match it.

    Lightning hands it the state and nothing else. So what it saves by itself has no assets of the module (`export`
    needs `config.json`) and no random generators; `AsyncDistributedCheckpoint` adds both under these strategies too.

    Attributes:
        restored_from: The checkpoint that was loaded last.
    """

    restored_from: str | None = None
    _random_state: dict[str, Any] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves a checkpoint; Lightning calls it on rank 0."""
        CheckpointSaver(alone=True).save(collect_whole(checkpoint), path)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a checkpoint, or the newest good one in a folder. Lightning calls it on all ranks.

        Args:
            path: Of the one or the other.
            map_location: Device of the tensors; None is the host.
            weights_only: Nothing: no checkpoint of this project can run code.
        """
        checkpoint = Checkpoint.open(path)
        self.restored_from = checkpoint.path
        rank_zero_info(f"Going on from {checkpoint.path}, step {checkpoint.manifest.step}")
        self._random_state = checkpoint.rank_state(0).get("random")
        state = checkpoint.trainer_state()
        tensors = _Tensors(checkpoint, map_location)
        if OPTIMIZERS in state:
            state[OPTIMIZERS] = decode(state[OPTIMIZERS], tensors)
        state["state_dict"] = {
            name.removeprefix("model."): tensors[name] if name in checkpoint.tensors else checkpoint.values[name]
            for name in (*checkpoint.tensors, *checkpoint.values)
            if name.startswith("model.")
        }
        return state

    def restore_random_state(self) -> None:
        """Puts the random generators where those of the process that saved were. For when all is set up."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint."""
        url, name = split_url(path)
        open_store(url).remove(name)


class _Tensors(Mapping[str, Tensor]):
    """A checkpoint's tensors, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, device: Any) -> None:
        self._checkpoint = checkpoint
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._checkpoint.read(name)
        return tensor if self._device is None else tensor.to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)
