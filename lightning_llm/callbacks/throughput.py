"""How fast a run trains: tokens per second, step time, tokens seen, model FLOPs utilisation.

A callback for any Lightning strategy; the progress bar and the loggers read what it logs.
"""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.devices import device_named


def dense_bf16_peak(device_name: str) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s, or None when it is not known.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it. A slice of a device (MIG) counts as unknown.
    """
    row = device_named(device_name)
    return None if row is None else row.bfloat16


def model_flops_utilization(tokens_per_second: float, flops_per_token: float, peak_flops: float, devices: int) -> float:
    """Share of the devices' peak that goes into the model's own arithmetic (recomputation does not count).

    MFU as defined in PaLM (https://arxiv.org/abs/2204.02311, appendix B).

    Args:
        tokens_per_second: Of all devices together.
        flops_per_token: Of forward and backward.
        peak_flops: Of one device, FLOP/s.
        devices: How many devices share the work.
    """
    return tokens_per_second * flops_per_token / (peak_flops * devices)


class _Mark(NamedTuple):
    """Where the run stood after an optimizer step."""

    seconds: float
    tokens: int
    step: int


class _Stopwatch:
    """Seconds of wall clock, without those between `pause` and `resume`. Both may be called twice in a row."""

    def __init__(self) -> None:
        self._total = 0.0
        self._since: float | None = None

    @property
    def running(self) -> bool:
        return self._since is not None

    @property
    def seconds(self) -> float:
        return self._total + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def pause(self) -> None:
        self._total, self._since = self.seconds, None

    def resume(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()


class Throughput(Callback):
    """Logs how fast the run trains, over all data ranks together.

    Logged at every optimizer step:

    - `tokens_per_second`: over the last `every_n_steps` optimizer steps. Waiting for data counts, validation and
      checkpoints do not (a save with `save_weights_only=True` is not announced to callbacks, so it counts), and neither
      does the first step of a run, which allocates and compiles.
    - `step_time`: seconds per optimizer step, over the same steps.
    - `tokens_seen`: since the run's first step, kept in checkpoints.
    - `mfu`: only where the device's dense bfloat16 peak is known and `LightningModule.config` has
      `flops_per_token(seq_len)`; never on a CPU. See `model_flops_utilization`.

    Tokens are those of this rank's `input_ids` times the number of data ranks, which is the `num_replicas` that the
    strategy gives to samplers: ranks that share a batch (tensor, pipeline) are not counted twice.

    On CUDA the host waits for the device only once in `every_n_steps` steps, so the figures change that often; on a CPU
    they slide with every step.

    Args:
        every_n_steps: Length of the window, optimizer steps.

    Raises:
        ConfigurationError: `every_n_steps` below 1, or batches without `input_ids`.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ConfigurationError(f"Throughput(every_n_steps={every_n_steps}): it must be 1 or more")
        self.every_n_steps = every_n_steps
        self.tokens_seen = 0
        self._data_ranks = 1
        self._last_step = 0
        self._marks: deque[_Mark] = deque()
        self._stopwatch = _Stopwatch()
        self._figures: dict[str, float] = {}
        self._peak: float | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tokens_seen": self.tokens_seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_seen = int(state_dict["tokens_seen"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._data_ranks = int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))
        self._last_step = trainer.global_step
        self._marks.clear()
        self._figures = {}
        self._stopwatch = _Stopwatch()
        device = pl_module.device
        self._peak = dense_bf16_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stopwatch.resume()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        input_ids = _input_ids(batch)
        self.tokens_seen += input_ids.numel() * self._data_ranks
        if trainer.global_step == self._last_step:  # gradients are still being accumulated
            return
        self._last_step = trainer.global_step
        if self._is_due(pl_module.device):
            self._mark(trainer, pl_module, seq_len=input_ids.shape[-1])
        # Values on the CPU and in float64: nothing waits for a device, and tokens_seen stays exact.
        logged = {"tokens_seen": float(self.tokens_seen), **self._figures}
        for name, value in logged.items():
            pl_module.log(
                name, torch.tensor(value, dtype=torch.float64), prog_bar=name == "tokens_per_second", batch_size=1
            )

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause(pl_module.device)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Called before the write, and no hook follows it: the clock runs again at the next batch.
        self._pause(pl_module.device)

    def _is_due(self, device: torch.device) -> bool:
        """Whether a mark may be taken now: anywhere on a CPU, once a window where it costs a wait for the device."""
        if device.type == "cpu" or not self._marks:
            return True
        return self._last_step - self._marks[-1].step >= self.every_n_steps

    def _mark(self, trainer: Trainer, pl_module: LightningModule, seq_len: int) -> None:
        _wait_for(pl_module.device)
        self._marks.append(_Mark(self._stopwatch.seconds, self.tokens_seen, self._last_step))
        while self._last_step - self._marks[0].step > self.every_n_steps:
            self._marks.popleft()
        first, last = self._marks[0], self._marks[-1]
        if last.step == first.step:  # the first step of the run: only where the clock starts
            return
        seconds = last.seconds - first.seconds
        self._figures = {
            "tokens_per_second": (last.tokens - first.tokens) / seconds,
            "step_time": seconds / (last.step - first.step),
        }
        flops_per_token = getattr(getattr(pl_module, "config", None), "flops_per_token", None)
        if self._peak is not None and flops_per_token is not None:
            self._figures["mfu"] = model_flops_utilization(
                self._figures["tokens_per_second"], flops_per_token(seq_len), self._peak, trainer.world_size
            )

    def _pause(self, device: torch.device) -> None:
        if self._stopwatch.running:
            _wait_for(device)  # work that is still queued belongs to training
            self._stopwatch.pause()


def _input_ids(batch: Any) -> Tensor:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ConfigurationError(
            f"Throughput counts the tokens of batch['input_ids'], but a batch is a {type(batch).__name__}"
            + (f" with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else "")
            + ": give batches as {'input_ids', 'labels'} or take Throughput out of the callbacks"
        )
    return batch["input_ids"]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
