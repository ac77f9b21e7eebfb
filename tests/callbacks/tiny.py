"""A language model and batches small enough that a real Trainer runs them in milliseconds."""

from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

VOCABULARY = 32


class TokenBatches(Dataset[dict[str, Tensor]]):
    """Random sequences of tokens with shifted labels."""

    def __init__(self, sequences: int, seq_len: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(VOCABULARY, (sequences, seq_len + 1), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index, :-1], "labels": self.tokens[index, 1:]}


def batches(steps: int, batch_size: int = 2, seq_len: int = 8) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(TokenBatches(steps * batch_size, seq_len), batch_size=batch_size)


class Bigram(LightningModule):
    """Predicts the next token from the last one. Logs train_loss and val_loss, as any module of ours does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.config = SimpleNamespace(flops_per_token=lambda seq_len: 6.0 * VOCABULARY**2)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.table(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Any, **arguments: Any) -> Trainer:
    """A CPU Trainer that writes only into `folder` and shows nothing unless told to."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **arguments})
