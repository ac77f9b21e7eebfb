"""A small run that every test of a layout shares: fixed data, a small decoder, the real Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_llm import DecoderConfig, LLM3DDeepSpeedStrategy, LLM3DStrategy, LLMModule
from lightning_llm.strategies.deepspeed.ops import op_states
from lightning_llm.strategies.steps import ParallelSteps

VOCAB = 96
SEQ_LEN = 16
BATCH_SIZE = 8
SMALL = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def on_deepspeed(zero_stage: int, **settings: Any) -> dict[str, Any]:
    """Settings for `make_strategy`."""
    return {"engine": "deepspeed", "zero_stage": zero_stage, **settings}


def skip_unless_built(settings: dict[str, Any]) -> None:
    """Leaves a test out that would compile one of DeepSpeed's operators first, which takes minutes."""
    if settings.get("engine") == "deepspeed" and "offload_optimizer" in settings:
        needed = {"cpu_adam", "async_io"} if settings["offload_optimizer"] == "nvme" else {"cpu_adam"}
        missing = needed - {state.op.name for state in op_states() if state.state in ("built", "installed")}
        if missing:
            pytest.skip(f"not built: DeepSpeed's {', '.join(sorted(missing))}")


class TokenRows(Dataset):
    """Rows of predictable tokens, some labels ignored, unevenly over the rows."""

    def __init__(self, rows: int = 64, ignore: bool = True, documents: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        steps = torch.randint(1, 5, (rows, 1), generator=generator)
        self.tokens = (torch.arange(SEQ_LEN + 1) * steps + torch.arange(rows)[:, None]) % VOCAB
        self.ignore = ignore
        self.documents = documents

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.tokens[index, 1:].clone()
        if self.ignore:
            labels[: index % SEQ_LEN] = -100
        row = {"input_ids": self.tokens[index, :-1], "labels": labels}
        if self.documents:
            row["document_ids"] = torch.arange(SEQ_LEN) // (3 + index % 5)
        return row


class Recorder(Callback):
    """Keeps what a user would see of each batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        # Of optimizer steps: the mean over the tokens of their batches, and the norm.
        self.step_losses: list[float] = []
        self.step_norms: list[float] = []
        self._parts: list[tuple[float, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.grad_norms.append(float(trainer.callback_metrics.get("grad_norm", float("nan"))))
        count = trainer.strategy.reduce((batch["labels"] != -100).sum().double(), reduce_op="mean")
        self._parts.append((self.losses[-1], float(count)))
        if trainer.global_step > len(self.step_losses):
            total = sum(tokens for _, tokens in self._parts)
            self.step_losses.append(sum(loss * tokens for loss, tokens in self._parts) / total)
            self.step_norms.append(self.grad_norms[-1])
            self._parts.clear()


def make_module(config: DecoderConfig = SMALL, **arguments: Any) -> LLMModule:
    return LLMModule(config, **{"learning_rate": 5e-3, "warmup_steps": 2, **arguments})


def make_strategy(settings: dict[str, Any]) -> ParallelSteps:
    """`LLM3DStrategy`, or with `engine="deepspeed"` among the settings the one on DeepSpeed."""
    engine = settings.get("engine", "fsdp2")
    arguments = {name: value for name, value in settings.items() if name != "engine"}
    return {"fsdp2": LLM3DStrategy, "deepspeed": LLM3DDeepSpeedStrategy}[engine](**arguments)


def make_trainer(strategy: ParallelSteps | str, devices: int, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 20,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 1.0,
    }
    return Trainer(strategy=strategy, devices=devices, **{**defaults, **arguments})


def loader(trainer: Trainer, strategy: ParallelSteps | None, accumulate: int = 1, **arguments: Any) -> DataLoader:
    """`BATCH_SIZE` rows per optimizer step over all data ranks. Lightning adds the sampler."""
    data_ranks = 1
    if strategy is not None and strategy.dims is not None:
        data_ranks = strategy.dims.data_parallel_size
    return DataLoader(TokenRows(**arguments), batch_size=BATCH_SIZE // data_ranks // accumulate, shuffle=False)


def train(
    world_size: int,
    sizes: dict[str, Any],
    config: DecoderConfig = SMALL,
    accumulate: int = 1,
    module_arguments: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """One run in one layout; what this rank saw. `arguments` are the Trainer's."""
    strategy = make_strategy(sizes)
    recorder = Recorder()
    trainer = make_trainer(strategy, world_size, callbacks=[recorder], accumulate_grad_batches=accumulate, **arguments)
    module = make_module(config, **(module_arguments or {}))
    trainer.fit(module, loader(trainer, strategy, accumulate), loader(trainer, strategy, rows=16))
    return {
        "losses": recorder.losses,
        "grad_norms": recorder.grad_norms,
        "step_losses": recorder.step_losses,
        "step_norms": recorder.step_norms,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "global_step": trainer.global_step,
    }
