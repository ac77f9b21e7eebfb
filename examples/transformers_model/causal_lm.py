"""A model of transformers, used as it is: the strategy takes its plan from what transformers says about it.

Copy this file. Without `weights` in a folder the model starts from random numbers; nothing is fetched.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_llm import ConfigurationError


class CausalLMModule(pl.LightningModule):
    """Trains a causal language model of transformers.

    Batches are `{"input_ids": [batch, seq], "labels": [batch, seq]}`; labels are shifted already, -100 does not count.

    Args:
        model: A local folder with config and weights, or a model type of transformers ("llama", "qwen3", ...).
        config: Fields of the transformers configuration to set, for example `{hidden_size: 128}`.
        learning_rate: Of AdamW.
    """

    def __init__(self, model: str = "llama", config: dict[str, Any] | None = None, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.folder = Path(model) if Path(model).is_dir() else None
        if self.folder is None and model not in CONFIG_MAPPING:
            raise ConfigurationError(f"model={model!r} is neither a folder nor a model type of transformers.")
        if self.folder is None:
            self.config = AutoConfig.for_model(model, **(config or {}))
        else:
            self.config = AutoConfig.from_pretrained(self.folder, local_files_only=True, **(config or {}))
        self.model: PreTrainedModel | None = None

    def build_model(self) -> PreTrainedModel:
        """The model with random weights; asked for on the meta device to check sizes before any process starts."""
        return AutoModelForCausalLM.from_config(self.config)

    def configure_model(self) -> None:
        """The strategy cuts `self.model` after this, and hands every rank the first one's weights."""
        if self.model is not None:
            return
        if self.folder is None:
            self.model = self.build_model()
        else:
            self.model = AutoModelForCausalLM.from_pretrained(
                self.folder, config=self.config, dtype=torch.float32, local_files_only=True
            )
        self.model.train()  # from_pretrained gives models in evaluation mode

    def check(self, datamodule: Any) -> None:
        """Asked before any process starts."""
        tokens = getattr(datamodule, "vocab_size", 0)
        if tokens > self.config.vocab_size:
            raise ConfigurationError(
                f"The data's tokenizer has {tokens} tokens, but the model's vocab_size is {self.config.vocab_size}. "
                f"Set config.vocab_size to {tokens} or more, or tokenize with the model's own tokenizer."
            )

    def write_assets(self, folder: Path) -> None:
        """Adds to a checkpoint what `lightning-llm export` makes a transformers folder of."""
        assert self.model is not None
        self.model.config.save_pretrained(folder)
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer_file", None)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / "tokenizer.json")

    def forward(self, input_ids: Tensor) -> Tensor:
        assert self.model is not None
        return self.model(input_ids, use_cache=False).logits

    # A pipeline calls the first two, once for each microbatch and for each batch, and runs in place of the third.

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def loss_denominator(self, labels: Tensor) -> Tensor:
        """Labels that count, averaged over the data ranks, which may have unequal numbers of them."""
        return self.trainer.strategy.reduce((labels != -100).sum().float(), reduce_op="mean")

    def forward_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.loss(self(batch["input_ids"]), batch["labels"]) / self.loss_denominator(batch["labels"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.forward_loss(batch)
        self.log("train_loss", loss.detach(), prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.forward_loss(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], betas=(0.9, 0.95))
