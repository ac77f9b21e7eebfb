"""`AsyncDistributedCheckpoint`: a ModelCheckpoint whose checkpoints are written while training goes on, and verified.

What is saved when, under which name and what is kept is Lightning's ModelCheckpoint; how it is saved is the room
`checkpoint`. What this file adds is the time between: nothing that was decided at a save is final until it is
committed.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_llm.callbacks._lightning import checkpoint_folder, dump_checkpoint, end_run
from lightning_llm.callbacks.bucket_files import register_bucket_files
from lightning_llm.callbacks.housekeeping import Housekeeping, PendingSave, attempt, place_of
from lightning_llm.callbacks.interval import IntervalAdvice
from lightning_llm.callbacks.registration import register_checkpoint
from lightning_llm.checkpoint.assets import module_assets
from lightning_llm.checkpoint.claim import claim, taken_over
from lightning_llm.checkpoint.plugin import VerifiedCheckpointIO, collect_whole
from lightning_llm.checkpoint.random_state import random_state
from lightning_llm.checkpoint.saver import CheckpointSaver, Outcome, check_numbers
from lightning_llm.checkpoint.selection import newest_step
from lightning_llm.checkpoint.store import open_store, split_url
from lightning_llm.checkpoint.worker import Verify
from lightning_llm.errors import CheckpointError, ConfigurationError, TakenOverError
from lightning_llm.strategies.state import ShardedState

log = logging.getLogger(__name__)

FAREWELL = 60.0  # seconds that a save in the background gets to its end when the run fails
# What ModelCheckpoint changes when it decides to save, and what must be taken back if nothing comes of it.
_DECISIONS = (
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
    "best_model_path",
    "best_model_score",
    "current_score",
    "last_model_path",
    "_last_checkpoint_saved",
    "_last_global_step_saved",
)


class AsyncDistributedCheckpoint(ModelCheckpoint):
    """Saves verified checkpoints in the background; every argument of ModelCheckpoint means what it means there.

    Training stands still for the snapshot alone: a copy into host memory, or what is left of it at the next optimizer
    step. A process of its own writes it, reads back what `verify` asks for, and the ranks commit together. One save is
    in flight at a time. An older checkpoint is removed only when the one that takes its place is committed, and the one
    that the run was resumed from is never removed.

    `fit(ckpt_path="last")` goes on from the newest checkpoint in `dirpath` that verifies; if there are some and none
    does, the run ends with exit code 77. Under strategies other than `llm3d` that gather their state on rank 0 (one
    device, DDP) that rank saves alone.

    Args:
        dirpath: Folder, or `s3://bucket/prefix`.
        snapshot: "copy" copies the state before training goes on; "overlapped" copies parameters and optimizer states
            during the next forward and backward, in which no hook may edit them: the save fails if one does.
        verify: What is read back before a commit: "full", "sample" (some chunks of each file) or "none".
        when_busy: What to do when the next save is due and the last one is not committed: "wait" for it, or "skip" the
            new one; `skipped` counts them.
        on_failure: "retry" makes `retries` further attempts from the same snapshot, then warns, and raises after
            `max_failures` saves in a row; "warn" never raises; "raise" does at once.
        retries: Attempts after the first one.
        backoff: Seconds before the second attempt, doubled for each further one.
        max_failures: Saves in a row that may fail.
        timeout: Seconds for one rank to write its file, and for waiting for the other ranks.
        background: False writes in the training process, and training waits for the commit.
        mtbf_hours: Hours between failures of the whole run, for the advice on how often to save; None takes what is
            published for clusters of this size.
        register_on_best: Put each new best checkpoint (by `monitor`) into the registry when it is committed, as a
            Hugging Face folder with the alias "best".
        registry: Where; see `lightning_llm.registry.open_registry`. None is `LIGHTNING_LLM_REGISTRY`, or the folder
            `registry`.
        registry_name: The model's name there; None takes that of the folder which `dirpath` is in.
        kwargs: ModelCheckpoint's: filename, monitor, mode, every_n_train_steps, every_n_epochs, train_time_interval,
            save_top_k, save_last, save_weights_only, save_on_exception, ...

    Attributes:
        skipped: Saves that were due and not made.
        failures: Saves in a row that failed until now.
        latest: What became of the last save that ended.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        snapshot: Literal["copy", "overlapped"] = "copy",
        verify: Verify = "sample",
        when_busy: Literal["wait", "skip"] = "wait",
        on_failure: Literal["retry", "warn", "raise"] = "retry",
        retries: int = 3,
        backoff: float = 1.0,
        max_failures: int = 3,
        timeout: float = 1800.0,
        background: bool = True,
        mtbf_hours: float | None = None,
        register_on_best: bool = False,
        registry: str | None = None,
        registry_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        _check_choice("snapshot", snapshot, ("copy", "overlapped"))
        _check_choice("verify", verify, ("full", "sample", "none"))
        _check_choice("when_busy", when_busy, ("wait", "skip"))
        _check_choice("on_failure", on_failure, ("retry", "warn", "raise"))
        check_numbers(retries, backoff, timeout)
        if snapshot == "overlapped" and not background:
            raise ConfigurationError(
                "snapshot='overlapped' copies the state while training goes on, and with background=False it does not. "
                "Leave one of them out."
            )
        if max_failures < 1:
            raise ConfigurationError(f"max_failures={max_failures} must be at least 1.")
        if dirpath is not None and str(dirpath).startswith("s3://"):
            register_bucket_files()
        super().__init__(dirpath, **kwargs)
        if register_on_best and self.monitor is None:
            raise ConfigurationError("register_on_best=True needs monitor=..., which tells what the best one is.")
        self.register_on_best = register_on_best
        self.registry = registry
        self.registry_name = registry_name
        self.snapshot = snapshot
        self.when_busy = when_busy
        self.on_failure = on_failure
        self.max_failures = max_failures
        self._advice = IntervalAdvice(mtbf_hours)
        self.skipped = 0
        self.failures = 0
        self.latest: Outcome | None = None
        self._settings: dict[str, Any] = {
            "verify": verify,
            "retries": retries if on_failure == "retry" else 0,
            "backoff": backoff,
            "timeout": timeout,
            "background": background,
        }
        self._saver: CheckpointSaver | None = None
        self._housekeeping = Housekeeping()
        self._due: tuple[float, dict[str, Any]] | None = None  # when a save was due, and the decisions before it
        self._in_flight: PendingSave | None = None
        self._kept: list[str] = []  # that runs were resumed from, and that are not needed for anything else
        self._skipped_at = -1

    # -- when to save: ModelCheckpoint's hooks, with a look at what became of the last save --

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise ConfigurationError(
                f"AsyncDistributedCheckpoint does not know how {type(strategy).__name__} shards. Use strategy='llm3d', "
                "or Lightning's ModelCheckpoint."
            )
        super().setup(trainer, pl_module, stage)
        if not isinstance(strategy, ShardedState) and not isinstance(strategy.checkpoint_io, VerifiedCheckpointIO):
            strategy.checkpoint_io = VerifiedCheckpointIO()
        if stage == "fit" and trainer.is_global_zero:
            store = open_store(str(self.dirpath))
            attempt(store.sweep)
            attempt(claim, store)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._advice.start(trainer.global_step)
        checkpoint_io = trainer.strategy.checkpoint_io
        if isinstance(checkpoint_io, VerifiedCheckpointIO) and trainer.is_global_zero:
            checkpoint_io.restore_random_state()
        restored = self._restored_from(trainer)
        if restored is not None and split_url(restored)[0] == str(self.dirpath) and restored not in self._kept:
            self._kept.append(restored)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._in_flight is not None:
            busy = self._saver is not None and self._saver.busy
            if not trainer.strategy.reduce_boolean_decision(busy, all=False):
                self._settle(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    # Others may edit weights when an epoch has ended, and put averaged ones in their place to validate those.

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._wait_for_snapshot()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._wait_for_snapshot()

    def _wait_for_snapshot(self) -> None:
        if self._saver is not None:
            self._saver.wait_for_snapshot()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._settle(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets what is being written come to its end: the other ranks still have the threads that this needs."""
        before = self._in_flight
        super().on_exception(trainer, pl_module, exception)
        if self._saver is None:
            return
        self._saver.wait(FAREWELL if self._in_flight is before else None)
        flight, outcome = self._in_flight, self._saver.finished()
        if flight is not None and outcome is not None and trainer.is_global_zero:
            if outcome.error is None:
                attempt(flight.tidy)
            else:
                log.warning("The checkpoint %s could not be saved: %s", outcome.path, outcome.error)
        self._in_flight = None
        if not self._saver.busy:
            self._close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._settle(trainer)
            self._close()
            trainer.strategy.barrier("AsyncDistributedCheckpoint.teardown")  # all ranks find the folder as it stays
        super().teardown(trainer, pl_module, stage)

    def _close(self) -> None:
        if self._saver is not None:
            self._saver.close()
            self._saver = None
        self._housekeeping.finish()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kept": list(self._kept)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.dirpath == state_dict.get("dirpath", self.dirpath):
            self._kept = list(state_dict.get("kept", []))

    @override
    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._may_save(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)
            self._due = None  # it may not have been among the best

    @override
    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """`last` is another name of what was just saved; only where nothing was, a checkpoint of its own."""
        if not self.save_last:
            return
        saved_now = self._last_global_step_saved == trainer.global_step
        links = self.save_last == "link" and self.save_top_k != 0
        if not self._last_checkpoint_saved or not (saved_now or links):
            if self._may_save(trainer):
                super()._save_last_checkpoint(trainer, monitor_candidates)
            return
        if self._in_flight is None:  # nothing new to name
            return
        previous, self.last_model_path = self.last_model_path, self._free_name_for_last(trainer, monitor_candidates)
        self._in_flight.aliases.append(self.last_model_path)
        if previous and self._should_remove_checkpoint(trainer, previous, self.last_model_path):
            self._remove_checkpoint(trainer, previous)

    def _free_name_for_last(self, trainer: pl.Trainer, candidates: dict[str, Tensor]) -> str:
        path = self.format_checkpoint_name(candidates, self.CHECKPOINT_NAME_LAST)
        # The state of a run's first checkpoint does not know its alias yet: a resumed run goes on with what it finds.
        ours = self.last_model_path or (path if trainer.ckpt_path is not None else "")
        version = self.STARTING_VERSION
        while self._enable_version_counter and path != ours and self.file_exists(path, trainer):
            path = self.format_checkpoint_name(candidates, self.CHECKPOINT_NAME_LAST, ver=version)
            version += 1
        return path

    def _may_save(self, trainer: pl.Trainer) -> bool:
        """Whether a save that is due now is made; then the one before has come to its end."""
        due = time.monotonic()
        busy = self._saver is not None and self._saver.busy
        if self.when_busy == "skip" and trainer.strategy.reduce_boolean_decision(busy, all=False):
            if self._skipped_at != trainer.global_step:
                self._skipped_at = trainer.global_step
                self.skipped += 1
                rank_zero_warn(
                    f"The checkpoint of step {trainer.global_step} is skipped, since the one before is still being "
                    f"written ({self.skipped} skipped until now). Save less often, or set when_busy='wait'."
                )
            return False
        self._settle(trainer)
        before = {name: getattr(self, name) for name in _DECISIONS if hasattr(self, name)}
        self._due = (due, {**before, "best_k_models": dict(self.best_k_models)})
        return True

    # -- saving --

    def save_now(self, trainer: pl.Trainer) -> str:
        """Saves the state as it is, whatever is due, and returns when it is committed. Collective.

        Where the last save was of this very step, it only waits for that one. What is saved here counts as resumed
        from: it does not take the place of any other checkpoint, and is removed once nothing needs it.

        Returns:
            The checkpoint's path.

        Raises:
            CheckpointError: It could not be saved.
        """
        self._settle(trainer)
        if self._last_global_step_saved != trainer.global_step or not self._last_checkpoint_saved:
            candidates = self._monitor_candidates(trainer)
            self._due = (time.monotonic(), {name: getattr(self, name) for name in _DECISIONS if hasattr(self, name)})
            self._save_checkpoint(trainer, self._get_metric_interpolated_filepath_name(candidates, trainer))
            self._save_last_checkpoint(trainer, candidates)
            self._settle(trainer)
            if self.latest is not None and self.latest.error is not None:
                raise CheckpointError(f"The checkpoint {self.latest.path} could not be saved: {self.latest.error}")
        return self._last_checkpoint_saved

    def settle(self, trainer: pl.Trainer) -> None:
        """Waits until nothing is being written. Collective.

        Raises:
            CheckpointError: The save failed, and as many before it as `on_failure` allows.
        """
        self._settle(trainer)

    @override
    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self._settle(trainer)
        due, decisions = self._due or (time.monotonic(), {})
        flight = self._in_flight = PendingSave(filepath, decisions, _numbers(trainer), due)
        self._due = None
        checkpoint = dump_checkpoint(trainer, self.save_weights_only)
        strategy = trainer.strategy
        sharded = isinstance(strategy, ShardedState)
        if self._saver is None and (sharded or trainer.is_global_zero):
            self._saver = CheckpointSaver(strategy.root_device, alone=not sharded, **self._settings)
        if self._saver is not None:
            stepped = trainer.optimizers
            if isinstance(strategy, ShardedState):
                state, stepped = strategy.run_state(checkpoint), strategy.stepped_optimizers
            else:
                own = {"random": random_state()}
                state = collect_whole(checkpoint, write_assets=module_assets(trainer), rank=own)
            with suppress(CheckpointError):  # in the foreground: `finished` tells it too
                self._saver.save(state, filepath, stepped if self.snapshot == "overlapped" else ())
        flight.blocked = time.monotonic() - flight.due
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath

    @override
    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if trainer.is_global_zero and self._in_flight is not None:
            self._in_flight.remove(filepath)

    @override
    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        restored = self._restored_from(trainer)
        if restored is not None and place_of(restored) == place_of(previous):
            return False
        return super()._should_remove_checkpoint(trainer, previous, current)

    @staticmethod
    def _restored_from(trainer: pl.Trainer) -> str | None:
        strategy = trainer.strategy
        keeper = strategy if isinstance(strategy, ShardedState) else strategy.checkpoint_io
        path = getattr(keeper, "restored_from", None)
        return path if path is None or "://" in path else place_of(path)

    @override
    def file_exists(self, filepath: str | Path, trainer: pl.Trainer) -> bool:
        there = False
        if trainer.is_global_zero:
            url, name = split_url(filepath)
            with suppress(OSError, ConfigurationError):  # the save itself will tell, and is subject to `on_failure`
                there = os.path.lexists(filepath) or bool(open_store(url).manifest(name))
        others = [other for other in trainer.checkpoint_callbacks if isinstance(other, AsyncDistributedCheckpoint)]
        there |= any(other._in_flight is not None and other._in_flight.path == str(filepath) for other in others)
        return trainer.strategy.reduce_boolean_decision(there, all=False)

    @override
    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        """The folder, if there is any checkpoint in it: which one is good is found when it is loaded.

        Of several such callbacks the one answers that has the newest checkpoint.
        """
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, AsyncDistributedCheckpoint)]
        folders = [checkpoint_folder(callback, trainer) for callback in callbacks]
        newest = max(folders, key=newest_step)
        mine = checkpoint_folder(self, trainer)
        store = open_store(mine)
        store.recover()  # a commit that was interrupted, before Lightning asks whether there is anything
        return {mine} if mine == newest and store.names() else set()

    # -- what became of it --

    def _settle(self, trainer: pl.Trainer) -> None:
        """Waits for the save in flight, if there is one, and acts upon what became of it, on all ranks alike.

        Raises:
            CheckpointError: It failed, and as many before it as `on_failure` allows.
        """
        flight = self._in_flight
        if flight is None:
            return
        mine = None
        if self._saver is not None:
            self._saver.wait()
            mine = self._saver.finished()
        told: Any = trainer.strategy.broadcast(mine)  # by rank 0, which is the one that commits
        self._in_flight = None
        self.latest = outcome = replace(told, blocked=flight.blocked + told.waited)
        if outcome.error is None:
            self.failures = 0
            if trainer.is_global_zero:
                self._on_committed(trainer, flight, outcome)
            self._kept = [path for path in self._kept if path == self._restored_from(trainer) or self._needs(path)]
            return
        self.failures += 1
        for name, value in flight.decisions.items():
            setattr(self, name, value)
        text = (
            f"The checkpoint {outcome.path} of step {outcome.step} could not be saved ({outcome.attempts} attempts): "
            f"{outcome.error}"
        )
        if trainer.strategy.broadcast(bool(taken_over(open_store(split_url(flight.path)[0])))):
            end_run(trainer, TakenOverError(text))
        limit = {"retry": self.max_failures, "raise": 1}.get(self.on_failure)
        if limit is not None and self.failures >= limit:
            raise CheckpointError(f"{text}. It is the {self.failures}. in a row; earlier checkpoints are as they were.")
        rank_zero_warn(text)

    def _needs(self, path: str) -> bool:
        """Whether ModelCheckpoint counts a checkpoint among those to keep."""
        return self.save_top_k == -1 or path in (*self.best_k_models, self.best_model_path, self.last_model_path)

    def _on_committed(self, trainer: pl.Trainer, flight: PendingSave, outcome: Outcome) -> None:
        """On rank 0: tells loggers and people, and lets the housekeeping do the rest."""
        figures = {
            "checkpoint/blocked_seconds": outcome.blocked,
            "checkpoint/write_seconds": outcome.written,
            "checkpoint/bytes": outcome.size,
        }
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=outcome.step)
            logger.after_save_checkpoint(self)
        if self.verbose:
            rank_zero_info(
                f"Committed {outcome.path}: {outcome.size / 1e6:.1f} MB, training stood still for "
                f"{outcome.blocked:.2f} s, written in {outcome.written:.1f} s"
            )
        advice = self._advice.of(outcome, trainer.global_step, trainer.world_size)
        if advice is not None:
            rank_zero_info(advice)
        restored = self._restored_from(trainer)
        for path in self._kept:
            if path != restored and not self._needs(path):
                flight.remove(path)
        if self.register_on_best and flight.path == self.best_model_path:
            assert self.monitor is not None and self.best_model_score is not None
            metrics = {**flight.metrics, self.monitor: float(self.best_model_score)}
            self._housekeeping.submit(self._register, flight.path, metrics)
        self._housekeeping.submit(flight.tidy)

    def _register(self, path: str, metrics: dict[str, float]) -> None:
        name = self.registry_name or Path(str(self.dirpath)).parent.name.rstrip(":")
        version = register_checkpoint(path, name, self.registry, metrics)
        rank_zero_info(f"Registered {path} as {name} version {version.version}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r} is not one of {', '.join(choices)}.")


def _numbers(trainer: pl.Trainer) -> dict[str, float]:
    """The metrics that are logged now."""
    return {key: float(value) for key, value in trainer.callback_metrics.items() if value.numel() == 1}
