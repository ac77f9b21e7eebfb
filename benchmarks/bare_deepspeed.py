"""The peer of `LLM3DDeepSpeedStrategy` in engines.py: the loop that an engineer would write around DeepSpeed's engine.

`deepspeed.initialize`, then forward, backward, step; in a pipeline `train_batch`. No Trainer, no strategy, nothing
logged. What is the package's own here are the decoder and, in a pipeline, the function that leaves a stage its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from bare_loop import Recipe
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.initialization import RandomInit
from lightning_llm.models.weights import load_weights
from lightning_llm.strategies.deepspeed.cutting import partition_config
from lightning_llm.strategies.deepspeed.pipeline import Stage
from lightning_llm.strategies.plan import plan_of
from lightning_llm.strategies.stages import keep_stages, split_units


class BareDeepSpeed:
    """Trains a decoder on DeepSpeed's engine.

    Args:
        config: The decoder.
        recipe: Optimizer settings.
        loader: Batches of this rank, in a pipeline microbatches: `{"input_ids": [batch, seq], "labels": [batch, seq]}`,
            every label counts.
        zero: DeepSpeed's `zero_optimization`.
        tensor: Ranks that AutoTP shards over.
        stages: Of a pipeline, on a rank each.
        microbatches: Batches of the loader in a step.
    """

    def __init__(
        self,
        config: DecoderConfig,
        recipe: Recipe,
        loader: DataLoader,
        zero: dict[str, Any],
        *,
        tensor: int = 1,
        stages: int = 1,
        microbatches: int = 1,
    ) -> None:
        import deepspeed

        self.batches = _endless(loader)
        self.pipelined = stages > 1
        with torch.device("meta"):
            decoder = Decoder(config)
        plan = plan_of(decoder)
        assert plan is not None
        if self.pipelined:
            stage = torch.distributed.get_rank()
            keep_stages(decoder, plan, [stage], split_units(plan, decoder, stages))
        decoder.to_empty(device="cpu")
        load_weights(decoder, RandomInit(config, seed=0))

        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": loader.batch_size,
            "gradient_accumulation_steps": microbatches,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": recipe.max_norm,
            "steps_per_print": None,
        }
        if tensor > 1:
            settings["tensor_parallel"] = {
                "autotp_size": tensor,
                "partition_config": partition_config(decoder, plan),
            }
        optimizer = make_optimizer(list(decoder.parameters()), recipe, on_host="offload_optimizer" in zero)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / recipe.warmup_steps)
        )
        model: Any = decoder
        if self.pipelined:
            from deepspeed.pipe import LayerSpec, PipelineModule

            layers = [LayerSpec(Stage, decoder, stage == stages - 1) for stage in range(stages)]
            model = PipelineModule(layers, num_stages=stages, loss_fn=cross_entropy, partition_method="uniform")
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings, dist_init_required=False
        )

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns this data rank's loss, nats per token, and the gradient norm."""
        if self.pipelined:
            loss = self.engine.train_batch((batch["input_ids"], batch["labels"]) for batch in self.batches)
        else:
            batch = next(self.batches)
            loss = cross_entropy(self.engine(batch["input_ids"]), batch["labels"])
            self.engine.backward(loss)
            self.engine.step()
        return loss.detach(), self.engine.get_global_grad_norm()


def make_optimizer(parameters: list[torch.nn.Parameter], recipe: Recipe, *, on_host: bool) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only: torch's fused one, or DeepSpeed's for states in host memory."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=recipe.learning_rate, betas=recipe.betas)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=recipe.fused)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all tokens, nats; logits `[batch, seq, vocab]`."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _endless(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from loader
