"""What a run's state is on this rank, and how it comes into and out of a checkpoint.

`LLM3DStrategy` is this and a model that is cut; the format itself is the room `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_llm.checkpoint.assets import module_assets
from lightning_llm.checkpoint.module_state import collect, model_state, optimizer_state, restore
from lightning_llm.checkpoint.planning import rank_file
from lightning_llm.checkpoint.random_state import derived_state, random_state, set_random_state
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver, RunState
from lightning_llm.checkpoint.store import open_store, split_url
from lightning_llm.strategies.mesh import ParallelDims
from lightning_llm.strategies.plan import ParallelPlan
from lightning_llm.strategies.processes import ProcessGrid
from lightning_llm.strategies.sharding import reshard_all


class ShardedState(ProcessGrid):
    """Processes of which each holds, saves and loads its part of weights and optimizer states.

    Attributes:
        plan: Of the model, once it is cut.
        restored_from: The checkpoint that was loaded last.
    """

    plan: ParallelPlan | None = None
    restored_from: str | None = None
    _saver: CheckpointSaver | None = None
    _random_state: dict[str, Any] | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded into the parts that this rank holds, so the model must be cut first."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """`load_checkpoint` has restored the optimizers already."""
        return False

    @property
    def stepped_optimizers(self) -> list[Optimizer]:
        """Those whose step changes weights and states; torch's own, whatever an engine has around them."""
        return self.optimizers

    def _aliases(self) -> dict[str, str]:
        """Names under which a tied tensor's copy is stored: its owner's."""
        tied = self.plan.tied if self.plan is not None else ()
        return {f"model.{copy}": f"model.{owner}" for owner, copy in tied}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's parts of the weights."""
        assert self.lightning_module is not None
        return model_state(self.lightning_module, self._aliases())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's parts of an optimizer's state, keyed by parameter names."""
        assert self.lightning_module is not None
        raw = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return optimizer_state(self.lightning_module, raw, self._aliases())

    def run_state(self, checkpoint: dict[str, Any]) -> RunState:
        """What `Trainer.dump_checkpoint` collected and this rank's own state, as a checkpoint holds it."""
        assert self.lightning_module is not None
        return collect(
            checkpoint,
            names=[name for name, _ in self.lightning_module.named_parameters(remove_duplicate=False)],
            mesh=self.mesh_sizes(),
            rank={"random": random_state()},
            write_assets=module_assets(self.lightning_module.trainer),
        )

    def mesh_sizes(self) -> dict[str, int]:
        """Sizes of the parallel axes by their arguments' names."""
        return asdict(self.meshes.dims)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Saves a verified checkpoint; every rank writes what it holds, and all return when it is committed."""
        if storage_options is not None:
            raise TypeError("LLM3DStrategy.save_checkpoint() takes no storage_options: it does not use a CheckpointIO.")
        if self._saver is None:
            self._saver = CheckpointSaver(self.root_device)
        self._saver.save(self.run_state(checkpoint), self.broadcast(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and optimizer states in place, whatever layout they were saved in; returns the rest.

        Args:
            checkpoint_path: Of a checkpoint, or of a folder with several, of which the newest good one is taken.
            weights_only: Nothing: no checkpoint of this project can run code.
        """
        assert self.lightning_module is not None
        checkpoint = Checkpoint.open(self.broadcast(checkpoint_path))
        reshard_all(self.lightning_module)
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING  # validation must not touch optimizers
        optimizers = self.optimizers if fitting else []
        self._restore(checkpoint, optimizers)
        self.restored_from = checkpoint.path
        if fitting:
            rank_zero_info(f"Going on from {checkpoint.path}, step {checkpoint.manifest.step}")
        self._random_state = self._saved_random_state(checkpoint) if fitting else None
        return checkpoint.trainer_state()

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Puts weights and optimizer states where a checkpoint has them, in the midst of a fit. Collective.

        Loops, data, schedulers and random generators go on from where they are.
        """
        assert self.lightning_module is not None
        reshard_all(self.lightning_module)
        self._restore(checkpoint, self.optimizers)

    def _restore(self, checkpoint: Checkpoint, optimizers: list[Optimizer]) -> None:
        assert self.lightning_module is not None
        restore(checkpoint, self.lightning_module, optimizers, self._aliases())

    def _saved_random_state(self, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """Where this rank's random generators go on.

        In the layout that was saved, where they were. In another one, or where `reshard` has left fewer files than
        ranks saved, every rank takes the state of the first saved rank with its data coordinate, so that ranks that
        share samples draw alike; a data coordinate that is not there gets a state of its own, derived from that of the
        first.
        """
        manifest, data_rank = checkpoint.manifest, self.meshes.dims.data_rank(self.global_rank)
        saved = ParallelDims(**manifest.mesh) if manifest.mesh else ParallelDims.resolve(manifest.world_size)
        candidates = [self.global_rank] if dict(manifest.mesh) == self.mesh_sizes() else []
        if data_rank < saved.data_parallel_size:
            # Stages and replicas come first in the grid of ranks, so this is the first rank with that coordinate.
            candidates.append(data_rank * saved.context_parallel_size * saved.tensor_parallel_size)
        for rank in candidates:
            if rank_file(rank) in manifest.files:
                return checkpoint.rank_state(rank).get("random")
        first = checkpoint.rank_state(0).get("random")
        return derived_state(first, data_rank) if first is not None else None

    def on_train_start(self) -> None:
        """Puts the random generators where they were when the run was saved.

        All that is set up has drawn by now, and nothing that follows a save has: no validation, no batch is read yet.
        """
        super().on_train_start()
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def remove_checkpoint(self, filepath: Any) -> None:
        """Removes a checkpoint, on rank 0."""
        if self.is_global_zero:
            url, name = split_url(filepath)
            open_store(url).remove(name)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing is left to do after `load_checkpoint`."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing is left to do after `load_checkpoint`."""
