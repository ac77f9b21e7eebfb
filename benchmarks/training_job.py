"""What the benchmarks of training share: a rank's orders, data, Trainer and module, and what they make of times.

train_overhead.py and engines.py add their sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from bare_loop import Recipe
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_llm import DecoderConfig, LLMModule

# Of losses, nats per token, and of gradient norms, relative; and in how many steps. Kernels that add up in any order
# part two runs in bfloat16 sooner or later.
TOLERANCES = {"32-true": (1e-4, 1e-4, None), "bf16-mixed": (0.02, 0.05, 3)}


class BatchLayout(Protocol):
    """One row of a table, as far as data goes."""

    @property
    def name(self) -> str: ...

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step over all data ranks."""

    @property
    def data(self) -> int:
        """Ranks with different samples."""


LayoutT = TypeVar("LayoutT", bound=BatchLayout)


class TokenRows(Dataset):
    """Predictable rows of tokens in memory, so that no side waits for a disk. Every label counts."""

    def __init__(self, rows: int, seq_len: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(7)
        start = torch.randint(0, vocab_size, (rows, 1), generator=generator)
        stride = torch.randint(1, 5, (rows, 1), generator=generator)
        self.tokens = (start + torch.arange(seq_len + 1) * stride) % vocab_size

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index, :-1], "labels": self.tokens[index, 1:]}


@dataclass(frozen=True, kw_only=True)
class Job(Generic[LayoutT]):
    """What every rank of every side is told."""

    layout: LayoutT
    config: DecoderConfig
    seq_len: int
    steps: int
    warmup: int
    threads: int
    folder: str
    profile: bool
    recipe: Recipe

    @property
    def total_steps(self) -> int:
        """Steps of each side; under the profiler one more, in which collectives are counted."""
        return self.warmup + self.steps + self.profile

    def loader(self, data_rank: int, microbatches: int = 1) -> DataLoader:
        """The batches of one data rank, or the microbatches that they are cut into."""
        batch_size, data = self.layout.batch_size, self.layout.data
        rows = TokenRows(batch_size * (self.total_steps + 1), self.seq_len, self.config.vocab_size)
        sampler: DistributedSampler = DistributedSampler(rows, num_replicas=data, rank=data_rank, shuffle=False)
        return DataLoader(rows, batch_size=batch_size // data // microbatches, sampler=sampler)

    def trainer(self, strategy: Strategy, callback: Callback, log_name: str) -> Trainer:
        """A Trainer as users have it, on this group's ranks; without files and bars, which no bare loop has."""
        return Trainer(
            accelerator=self.recipe.accelerator,
            precision=self.recipe.precision,  # type: ignore[arg-type]
            devices=dist.get_world_size(),
            strategy=strategy,
            max_steps=self.total_steps,
            gradient_clip_val=self.recipe.max_norm,
            callbacks=[callback],
            logger=CSVLogger(self.folder, name=log_name),
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def module(self, kind: type[LLMModule] = LLMModule) -> LLMModule:
        """The model and optimizer of the recipe."""
        return kind(
            self.config,
            learning_rate=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
            betas=self.recipe.betas,
            schedule="constant",
            warmup_steps=self.recipe.warmup_steps,
        )

    def step_times(self, ranks: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
        """Of one side's timed steps: the slowest rank's seconds by the clock, and all ranks' seconds of CPU.

        Args:
            ranks: By rank and step, `(wall, cpu)` in seconds, warm-up included.
        """
        by_step = list(zip(*ranks, strict=True))[self.warmup : self.warmup + self.steps]
        wall = [max(seconds for seconds, _ in step) for step in by_step]
        return wall, [sum(seconds for _, seconds in step) for step in by_step]

    def check_equal_work(self, losses: Mapping[str, Sequence[float]], norms: Mapping[str, Sequence[float]]) -> None:
        """Refuses to compare sides whose losses or gradient norms differ at any step, warm-up included.

        Args:
            losses: By side and step, in nats per token. The first side is what the others are held against.
            norms: The same of gradients.

        Raises:
            RuntimeError: Two sides did not compute the same.
        """
        first, *others = losses
        of_losses, of_norms, steps = TOLERANCES[self.recipe.precision]
        for side in others:
            for step in range(steps or self.total_steps):
                here, there = losses[side][step], losses[first][step]
                if not abs(here - there) <= of_losses:
                    raise RuntimeError(f"{self.layout.name}, step {step}: loss {here} of {side}, {there} of {first}")
                here, there = norms[side][step], norms[first][step]
                if not abs(here - there) <= of_norms * max(1.0, there):
                    raise RuntimeError(f"{self.layout.name}, step {step}: norm {here} of {side}, {there} of {first}")
