"""`SpikeGuard`: batches that would break a run are left out, and a run that is broken goes back.

NaN, Inf and spikes of the loss or of the gradient norm: what is cheap to undo is undone first.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_llm.callbacks._lightning import end_run
from lightning_llm.callbacks.agreement import Reading, maximum_over_ranks
from lightning_llm.callbacks.checkpoint import AsyncDistributedCheckpoint
from lightning_llm.checkpoint.plugin import VerifiedCheckpointIO
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.selection import saved_before
from lightning_llm.errors import ConfigurationError, DivergedError, NoGoodCheckpointError
from lightning_llm.strategies.deepspeed.strategy import LLM3DDeepSpeedStrategy
from lightning_llm.strategies.precision import LLMPrecision
from lightning_llm.strategies.state import ShardedState

log = logging.getLogger(__name__)

# A loss that hardly moves has next to no deviation: nothing within a hundredth of the median counts as one.
LEAST_DEVIATION = 0.01


@dataclass
class Fault:
    """An optimizer step that was left out.

    Attributes:
        step: Its number, from 1.
        epoch: Of its batches.
        batches: Their numbers in the epoch, the same on every data rank, from 0.
        loss: Mean over all ranks.
        grad_norm: Over all axes, before clipping.
        ids: By data rank, what the batches say of themselves under `id_key`, if they do.
    """

    step: int
    epoch: int
    batches: list[int]
    loss: float = 0.0
    grad_norm: float = 0.0
    ids: dict[int, list[Any]] = field(default_factory=dict)


@dataclass
class _Open:
    """A step whose verdict is on its way to the host."""

    fault: Fault
    own_ids: list[Any]
    verdict: Reading  # whether it was left out, loss, gradient norm


class SpikeGuard(Callback):
    """Leaves out optimizer steps whose loss or gradient norm is not finite, or far above what it was lately.

    In this order:

    1. *Skip.* The step is left out on all ranks: weights and optimizer states are as if the batch had not been there.
       It counts as a step all the same, for `max_steps` and the learning rate.
    2. *Rewind.* Where more than `max_skips` of the last `window` steps were left out: weights and optimizer states go
       back to the newest verified checkpoint of the trainer's `AsyncDistributedCheckpoint` from before the first of
       them. Steps, data and learning rate go on from where they are, so the data since that checkpoint is skipped and
       no sample is seen twice (as in PaLM, https://arxiv.org/abs/2204.02311, section 5.1).
    3. *Stop.* Where that was done `max_rewinds` times, or there is no such checkpoint: exit code 76, `DivergedError`.

    A spike is a value more than `mads` median absolute deviations above the median of the last `window` steps that were
    not left out, once there are `warmup` of them. All ranks decide the same, by one all-reduce(MAX) of the decision.

    The host waits for nothing. Decisions are taken on the device; a fused optimizer (`LLMModule`'s AdamW, and
    torch's with `fused=True`) is told by its `found_inf`, as a loss scaler tells it. On CUDA what was decided is read,
    logged and acted upon one step later. Other optimizers, float16 with a loss scale, and DeepSpeed's engine are asked
    to step by the host: there it reads the decision at each step, which on CUDA waits for the backward.

    With a loss scale, an overflowing gradient is the scaler's own to skip. The load-balancing biases of experts, and
    hooks of one's own before the optimizer's step, see also batches that are left out.

    Logs `spike_guard/skipped` and `spike_guard/rewinds`, both counted since the run began, and each fault with where
    its batches are.

    Args:
        max_skips: Steps of the last `window` that may be left out.
        max_rewinds: Of the whole run.
        mads: None leaves spikes alone.
        window: Steps.
        warmup: Steps.
        id_key: Where a batch (a mapping) may have a tensor or a list with the ids of its samples.

    Attributes:
        skipped: Steps that were left out.
        rewinds: How often the run went back.
        faults: The last hundred of them.

    Raises:
        ConfigurationError: A number out of its range, or a strategy of Lightning's that shards.
    """

    def __init__(
        self,
        max_skips: int = 3,
        max_rewinds: int = 2,
        mads: float | None = 6.0,
        window: int = 128,
        warmup: int = 32,
        id_key: str = "ids",
    ) -> None:
        if max_skips < 0 or max_rewinds < 0 or not 1 <= warmup <= window or (mads is not None and mads <= 0):
            raise ConfigurationError(
                f"SpikeGuard(max_skips={max_skips}, max_rewinds={max_rewinds}, mads={mads}, window={window}, "
                f"warmup={warmup}): max_skips and max_rewinds must be at least 0, mads above 0, and warmup from 1 to "
                "window."
            )
        self.max_skips = max_skips
        self.max_rewinds = max_rewinds
        self.mads = mads
        self.window = window
        self.warmup = warmup
        self.id_key = id_key
        self.skipped = 0
        self.rewinds = 0
        self.faults: list[Fault] = []
        self._recent: list[int] = []  # steps that were left out since the last rewind, within the window
        self._history = torch.full((2, window), torch.nan)  # of losses and norms; NaN where a step was left out
        self._row = 0
        self._loss: Tensor | None = None
        self._batches: list[int] = []
        self._ids: list[Any] = []
        self._open: deque[_Open] = deque()
        self._optimizers: set[Optimizer] = set()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "rewinds": self.rewinds,
            "faults": [{**asdict(fault), "ids": list(fault.ids.items())} for fault in self.faults],
            "recent": list(self._recent),
            "history": self._history,
            "row": self._row,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.rewinds = int(state_dict["skipped"]), int(state_dict["rewinds"])
        self.faults = [Fault(**{**fault, "ids": dict(fault["ids"])}) for fault in state_dict["faults"]]
        self._recent = list(state_dict["recent"])
        if state_dict["history"].shape == self._history.shape:  # else of another window: it begins anew
            self._history, self._row = state_dict["history"].clone(), int(state_dict["row"])

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise ConfigurationError(
                f"SpikeGuard does not know how {type(trainer.strategy).__name__} shards gradients. Use "
                "strategy='llm3d' or 'llm3d_deepspeed'."
            )

    # -- within the step, on the device --

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._history = self._history.to(trainer.strategy.root_device)
        self._forget_step()
        self._open.clear()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append(batch_idx)
        if isinstance(batch, Mapping) and self.id_key in batch:
            self._ids.append(batch[self.id_key])

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        loss = loss.detach().float() / _loss_scale(trainer)
        self._loss = loss if self._loss is None else self._loss + loss

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        device = trainer.strategy.root_device
        loss = torch.zeros((), device=device) if self._loss is None else self._loss
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        figures = torch.stack([loss, _gradient_norm(trainer, optimizer).to(device, torch.float32)])
        left_out = maximum_over_ranks(self._is_fault(figures, _has_scaler(trainer)).float())
        self._history[:, self._row % self.window] = torch.where(left_out > 0, torch.nan, figures)
        self._row += 1
        verdict = Reading(torch.cat([left_out.reshape(1), figures]))
        self._leave_out(trainer, optimizer, left_out, verdict)
        place = Fault(trainer.global_step + 1, trainer.current_epoch, self._batches)
        self._open.append(_Open(place, self._ids, verdict))
        self._forget_step()

    def _forget_step(self) -> None:
        self._loss, self._batches, self._ids = None, [], []

    def _is_fault(self, figures: Tensor, overflow_is_usual: bool) -> Tensor:
        finite = figures.isfinite()
        fault = ~finite[0] if overflow_is_usual else ~finite.all()
        if self.mads is None:
            return fault
        median = _median(self._history)
        deviation = _median((self._history - median[:, None]).abs())
        deviation = torch.maximum(deviation, LEAST_DEVIATION * median.abs())
        enough = (~self._history.isnan()).sum(dim=1) >= self.warmup
        spikes = finite & enough & (figures > median + self.mads * deviation)
        return fault | spikes.any()

    def _leave_out(self, trainer: pl.Trainer, optimizer: Optimizer, left_out: Tensor, verdict: Reading) -> None:
        """Leaves out the optimizer's step that is to come, if it is to be."""
        if _asks_the_device(optimizer) and not _has_scaler(trainer) and not _is_deepspeed(trainer):
            optimizer.found_inf = left_out  # type: ignore[attr-defined]
            self._optimizers.add(optimizer)
        elif bool(verdict.value()[0]):
            if isinstance(trainer.strategy, LLM3DDeepSpeedStrategy):
                assert trainer.strategy.gradients is not None
                trainer.strategy.gradients.discard()
            else:  # optimizers pass over parameters without a gradient
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None

    # -- after the step, on the host --

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._read(trainer, leave=1)
        for name, value in {"skipped": self.skipped, "rewinds": self.rewinds}.items():
            pl_module.log(f"spike_guard/{name}", torch.tensor(value, dtype=torch.float32), batch_size=1)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read(trainer, leave=0)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for optimizer in self._optimizers:
            vars(optimizer).pop("found_inf", None)
        self._optimizers.clear()

    def _read(self, trainer: pl.Trainer, leave: int) -> None:
        """Acts upon verdicts; the last `leave` are left for later where they are still on their way."""
        while self._open and (len(self._open) > leave or not self._open[-1].verdict.costs_a_wait):
            step = self._open.popleft()
            left_out, loss, norm = step.verdict.value().tolist()
            if left_out:
                step.fault.loss, step.fault.grad_norm = loss, norm
                step.fault.ids = self._ids_of_all(trainer, step.own_ids)
                self._on_fault(trainer, step.fault)

    def _ids_of_all(self, trainer: pl.Trainer, own: list[Any]) -> dict[int, list[Any]]:
        ids = [item for part in own for item in (part.tolist() if isinstance(part, Tensor) else list(part))]
        mine = int((trainer.distributed_sampler_kwargs or {}).get("rank", 0)), ids
        found: list[Any] = [mine]
        if trainer.world_size > 1:
            found = [None] * trainer.world_size
            dist.all_gather_object(found, mine)
        return {rank: ids for rank, ids in sorted(found, key=lambda pair: pair[0]) if ids}

    def _on_fault(self, trainer: pl.Trainer, fault: Fault) -> None:
        self.skipped += 1
        self.faults = [*self.faults, fault][-100:]
        self._recent = [step for step in self._recent if step > fault.step - self.window] + [fault.step]
        text = (
            f"Step {fault.step} was left out: loss {fault.loss:.6g}, gradient norm {fault.grad_norm:.6g}; epoch "
            f"{fault.epoch}, batches {fault.batches} of each data rank" + (f", ids {fault.ids}" if fault.ids else "")
        )
        if trainer.is_global_zero:
            log.warning(text)
        if len(self._recent) <= self.max_skips:
            return
        many = f"{len(self._recent)} of the last {self.window} steps were left out ({self._recent})"
        if self.rewinds >= self.max_rewinds:
            self._diverged(trainer, f"{many}, after {self.rewinds} rewinds. {text}")
        checkpoint = _checkpoint_before(trainer, self._recent[0])
        if checkpoint is None:
            self._diverged(trainer, f"{many}, and there is no good checkpoint from before to go back to. {text}")
        _rewind(trainer, checkpoint)
        self.rewinds += 1
        self._recent = []
        if trainer.is_global_zero:
            log.warning(
                f"{many}: weights and optimizer are those of {checkpoint.path} again; the data of steps "
                f"{checkpoint.manifest.step + 1} to {trainer.global_step} is skipped."
            )

    def _diverged(self, trainer: pl.Trainer, why: str) -> NoReturn:
        end_run(trainer, DivergedError(f"Training has diverged: {why}"))


def _median(rows: Tensor) -> Tensor:
    """Of each row's values that are not NaN; the lower one of two in the middle.

    Not `nanmedian`: on CUDA it refuses to run under `Trainer(deterministic=True)`.
    """
    return rows.nanquantile(0.5, dim=1, interpolation="lower")


def _has_scaler(trainer: pl.Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None or (
        _is_deepspeed(trainer) and str(trainer.precision_plugin.precision).startswith("16")
    )


def _is_deepspeed(trainer: pl.Trainer) -> bool:
    return isinstance(trainer.strategy, LLM3DDeepSpeedStrategy)


def _loss_scale(trainer: pl.Trainer) -> Any:
    """What `on_before_backward` finds the loss multiplied by."""
    precision = trainer.precision_plugin
    scaler = getattr(precision, "scaler", None)
    if scaler is None:
        return 1.0
    if isinstance(precision, LLMPrecision):
        return precision.loss_scale
    return scaler.scale(torch.ones((), device=trainer.strategy.root_device))


def _gradient_norm(trainer: pl.Trainer, optimizer: Optimizer) -> Tensor:
    norm = getattr(trainer.strategy, "gradient_norm", None)
    if norm is not None:
        return norm()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _asks_the_device(optimizer: Optimizer) -> bool:
    """Whether a step is left out where the tensor `found_inf` says so: torch's fused optimizers."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and getattr(optimizer, "_step_supports_amp_scaling", False)


def _checkpoint_before(trainer: pl.Trainer, step: int) -> Checkpoint | None:
    """The newest good one of the run that was saved before a step. Collective."""
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, AsyncDistributedCheckpoint) and not saver.save_weights_only:
            saver.settle(trainer)
            for path in saved_before(str(saver.dirpath), step):
                try:
                    return Checkpoint.open(path)
                except (NoGoodCheckpointError, ConfigurationError):  # damaged, or removed just now
                    continue
    return None


def _rewind(trainer: pl.Trainer, checkpoint: Checkpoint) -> None:
    strategy = trainer.strategy
    stepped = strategy.stepped_optimizers if isinstance(strategy, ShardedState) else strategy.optimizers
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in stepped]
    if isinstance(strategy, ShardedState):
        strategy.rewind(checkpoint)
    else:
        state = VerifiedCheckpointIO().load_checkpoint(checkpoint.path)
        strategy.load_model_state_dict(state)
        strategy.load_optimizer_state_dict(state)
    for optimizer, before in zip(stepped, rates, strict=True):  # the schedule goes on
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
