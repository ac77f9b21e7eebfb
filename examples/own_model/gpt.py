"""A model of your own, trained in every dimension: a GPT-2-like network, its plan, and a LightningModule around it.

Copy this file. The network is plain torch and knows nothing of parallelism; four habits make it cuttable, and each is
marked where it appears (1 to 4). README.md tells why.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_llm import ConfigurationError
from lightning_llm.models.attention import AttentionFunction, causal_attention
from lightning_llm.strategies.plan import ParallelPlan


class Attention(nn.Module):
    """Causal self-attention with one fused projection. Its features are ordered (heads, q/k/v, head_dim)."""

    def __init__(self, hidden_size: int, num_heads: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, attention: AttentionFunction) -> Tensor:
        # (1) Heads come first and are counted by -1: a tensor rank has some of them, each with its q, k and v.
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim)).permute(3, 0, 2, 1, 4)  # [batch, heads, seq, dim]
        mixed = attention(q, k, v, layer=self.layer, scale=self.head_dim**-0.5, sliding_window=None)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """up, GELU, down."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and a residual."""

    def __init__(self, hidden_size: int, num_heads: int, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads, layer)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size)

    def forward(self, x: Tensor, attention: AttentionFunction) -> Tensor:
        x = x + self.attention(self.attention_norm(x), attention)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Learned positions, LayerNorms with biases, an output layer tied to the embedding."""

    def __init__(self, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_seq_len: int) -> None:
        super().__init__()
        self.sizes = {"num_heads": num_heads, "vocab_size": vocab_size, "max_seq_len": max_seq_len}
        self.tokens: nn.Embedding | None = nn.Embedding(vocab_size, hidden_size)
        self.positions: nn.Embedding | None = nn.Embedding(max_seq_len, hidden_size)
        self.blocks = nn.ModuleList([Block(hidden_size, num_heads, layer) for layer in range(num_layers)])
        self.norm: nn.LayerNorm | None = nn.LayerNorm(hidden_size)
        self.head: nn.Linear | None = nn.Linear(hidden_size, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # as GPT-2: smaller where a block adds to the residual stream
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.head.weight = self.tokens.weight

    def forward(
        self, x: Tensor, *, positions: Tensor | None = None, attention: AttentionFunction = causal_attention
    ) -> Tensor:
        """Token ids `[batch, seq]` -> logits `[batch, seq, vocab]`.

        A pipeline stage takes and returns hidden states instead. (3) `positions` and `attention` come from the strategy
        when ranks share a sequence; leave them out if you never will.
        """
        if self.tokens is not None and self.positions is not None:  # (2) a stage has None for what others have
            positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions
            x = self.tokens(x) + self.positions(positions[None])
        for block in self.blocks:  # (4) by iteration: a stage has some of the blocks, under their own numbers
            x = block(x, attention)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))

    def parallel_plan(self) -> ParallelPlan:
        """What is cut, and how. The only part that speaks of parallelism."""
        return ParallelPlan(
            tensor_parallel={
                "tokens": "embedding",
                "positions": "embedding",
                "blocks.*.attention_norm": "norm",
                "blocks.*.attention": "gather",
                "blocks.*.attention.qkv": "column",
                "blocks.*.attention.out": "row",
                "blocks.*.mlp_norm": "norm",
                "blocks.*.mlp": "gather",
                "blocks.*.mlp.up": "column",
                "blocks.*.mlp.down": "row",
                "norm": "norm",
                "head": "vocabulary",
            },
            tensor_divides=self.sizes,
            pipeline_first=("tokens", "positions"),
            pipeline_units="blocks",
            pipeline_last=("norm", "head"),
            tied=(("tokens.weight", "head.weight"),),
            attention_heads=(self.sizes["num_heads"], self.sizes["num_heads"]),
        )


class GPTModule(pl.LightningModule):
    """Trains a `GPT` on batches of `{"input_ids": [batch, seq], "labels": [batch, seq]}`.

    Args:
        vocab_size: Rows of the embedding; at least as many as the data's tokenizer has tokens.
        hidden_size: Features of a token.
        num_layers: Blocks.
        num_heads: Attention heads.
        max_seq_len: Positions that are learned.
        learning_rate: Of AdamW.
    """

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        max_seq_len: int = 512,
        learning_rate: float = 3e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = GPT(vocab_size, hidden_size, num_layers, num_heads, max_seq_len)

    def check(self, datamodule: Any) -> None:
        """Asked before any process starts. Optional."""
        for needed, size in (("vocab_size", "vocab_size"), ("seq_len", "max_seq_len")):
            wanted, there = getattr(datamodule, needed, 0), self.hparams[size]
            if wanted > there:
                raise ConfigurationError(f"{size}({there}) is less than the data's {needed}({wanted}). Raise it.")

    # A pipeline calls the first two, once for each microbatch and for each batch, and runs in place of the third.

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def loss_denominator(self, labels: Tensor) -> Tensor:
        return torch.tensor(float(labels.numel()), device=labels.device)

    def forward_loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.loss(self.model(batch["input_ids"]), batch["labels"]) / self.loss_denominator(batch["labels"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.forward_loss(batch)
        self.log("train_loss", loss.detach(), prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.forward_loss(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], betas=(0.9, 0.95))
