"""What a run's state is on this rank, and how it comes into and out of a checkpoint.

`LLM3DStrategy` is this and a model that is cut; the format itself is the room `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_llm.checkpoint import distributed as checkpoint_format
from lightning_llm.strategies.plan import ParallelPlan
from lightning_llm.strategies.processes import ProcessGrid
from lightning_llm.strategies.sharding import reshard_all


class ShardedState(ProcessGrid):
    """Processes of which each holds, saves and loads its part of weights and optimizer states.

    Attributes:
        plan: Of the model, once it is cut.
    """

    plan: ParallelPlan | None = None

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded into the parts that this rank holds, so the model must be cut first."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """`load_checkpoint` has restored the optimizers already."""
        return False

    def _aliases(self) -> dict[str, str]:
        """Names under which a tied tensor's copy is stored: its owner's."""
        tied = self.plan.tied if self.plan is not None else ()
        return {f"model.{copy}": f"model.{owner}" for owner, copy in tied}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's parts of the weights."""
        assert self.lightning_module is not None
        return checkpoint_format.model_state(self.lightning_module, self._aliases())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's parts of an optimizer's state, keyed by parameter names."""
        assert self.lightning_module is not None
        raw = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return checkpoint_format.optimizer_state(self.lightning_module, raw, self._aliases())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes a sharded checkpoint folder; every rank writes what it holds."""
        if storage_options is not None:
            raise TypeError("LLM3DStrategy.save_checkpoint() takes no storage_options: it does not use a CheckpointIO.")
        write_assets = getattr(self.lightning_module, "write_assets", None)
        checkpoint_format.save(checkpoint, Path(self.broadcast(filepath)), write_assets=write_assets)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and optimizer states in place, whatever layout they were saved in; returns the rest."""
        assert self.lightning_module is not None
        path = Path(self.broadcast(checkpoint_path))
        reshard_all(self.lightning_module)
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING  # validation must not touch optimizers
        optimizers = self.optimizers if fitting else []
        return checkpoint_format.load(path, self.lightning_module, optimizers, self._aliases())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing is left to do after `load_checkpoint`."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing is left to do after `load_checkpoint`."""
