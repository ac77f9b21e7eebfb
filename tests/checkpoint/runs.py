"""Runs over a real corpus that are saved and continued, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from lightning_llm import DecoderConfig, LLM3DStrategy, LLMModule, TokenDataModule
from tests.distributed import full
from tests.strategies.training import Recorder, make_trainer

CONFIG = DecoderConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
TIED = CONFIG.replace(tie_word_embeddings=True)
EXPERTS = CONFIG.replace(
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_shared_experts=1,
    scoring_func="sigmoid",
    use_routing_bias=True,
    qk_norm=True,
    model_type="dots1",
)
STEPS = 8


def run(
    world_size: int,
    sizes: dict[str, Any],
    corpus: Path,
    *,
    config: DecoderConfig = CONFIG,
    save_at: dict[int, Path] | None = None,
    resume: Path | None = None,
    steps: int = STEPS,
    num_workers: int = 0,
    module_arguments: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Trains to `steps`, saving at the given steps; returns what this rank saw and its whole weights at the end."""
    recorder = Recorder()
    saver = _SaveAt(save_at or {})
    trainer = make_trainer(
        LLM3DStrategy(**sizes),
        world_size,
        callbacks=[recorder, saver],
        max_steps=steps,
        limit_val_batches=2,
        val_check_interval=4,
        **arguments,
    )
    module = LLMModule(config, learning_rate=3e-3, warmup_steps=2, **(module_arguments or {}))
    data = TokenDataModule(corpus, batch_size=8, seq_len=32, num_workers=num_workers)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return {
        "losses": recorder.losses,
        "weights": {name: full(p).detach().clone() for name, p in module.named_parameters()},
        "buffers": {name: full(b).detach().clone() for name, b in module.named_buffers()},
        "val_loss": float(trainer.callback_metrics.get("val_loss", float("nan"))),
        "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
    }


class _SaveAt(Callback):
    """Saves at chosen steps."""

    def __init__(self, steps: dict[int, Path]) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        path = self.steps.get(trainer.global_step)
        if path is not None and index % trainer.accumulate_grad_batches == trainer.accumulate_grad_batches - 1:
            trainer.save_checkpoint(path)
