"""`LLMModule`: a decoder as a LightningModule. What users hand to the Trainer; strategies ask it for its seams.

The seams, all optional for a module of your own: `build_model()` (checked on the meta device before anything starts),
`weight_source()` (fills a model that was built on the meta device), `check(datamodule)`, `loss()`,
`loss_denominator()` and `forward_loss()` (what a pipeline schedules), `write_assets()` (files that a checkpoint
carries along).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.expert_weights import PretrainedWeights
from lightning_llm.models.initialization import RandomInit
from lightning_llm.models.moe import Router
from lightning_llm.models.muon import AdjustLearningRate
from lightning_llm.models.optimizers import (
    LearningRateFactor,
    LearningRateSchedule,
    OptimizerName,
    OptimizerSettings,
    Schedule,
    StateDtype,
)
from lightning_llm.models.weights import WeightSource, load_weights

IGNORED = -100


class LLMModule(LightningModule):
    """Trains a decoder on next-token prediction.

    Batches are `{"input_ids": [batch, seq], "labels": [batch, seq]}` of token ids; labels are shifted already and -100
    marks positions that do not count. Logs `train_loss`, `val_loss`, `grad_norm` (nats per token; Euclidean norm).

    Args:
        model: A preset ("tiny", "llama3-8b", ...), a `DecoderConfig`, or a Hugging Face folder whose weights are
            loaded.
        vocab_size: Overrides the preset's vocabulary, for a tokenizer of another size.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay of matrices; norms and biases have none.
        betas: AdamW's moving-average factors.
        eps: AdamW's epsilon.
        optimizer: "adamw", or "muon" for the matrices between hidden states and AdamW for the rest; see `Muon`.
        optimizer_state_dtype: Of moments and momentum. "bfloat16" halves their memory; see `CastingAdamW`.
        muon_learning_rate: Peak for Muon's matrices; None: `learning_rate`.
        momentum: Muon's moving-average factor.
        nesterov: Whether Muon looks one step ahead.
        adjust_lr_fn: "match_rms_adamw" makes Muon's updates as large as AdamW's, so that one learning rate serves both;
            "original" goes with a `muon_learning_rate` of its own, usually 0.02 or so.
        schedule: After the warm-up: "cosine" to the minimum, "wsd" (constant, then linear to the minimum over the last
            `decay_fraction`; https://arxiv.org/abs/2404.06395), or "constant".
        warmup_steps: Linear warm-up, optimizer steps.
        min_learning_rate_ratio: Minimum as a fraction of the peak.
        decay_fraction: Part of the run that "wsd" decays over.
        seed: Of the initial weights; they do not depend on the layout.
        router_z_loss_coef: Weight of the routers' z-loss, for models with experts; the load-balancing loss's is the
            model's `router_aux_loss_coef`.
        router_bias_update_rate: Step of the routers' biases, for models with `use_routing_bias`.
        force_balanced_routing: Tokens go to experts in turn, for benchmarks.

    Raises:
        ConfigurationError: Unknown preset, a folder that holds no model, or a setting out of range.
    """

    def __init__(
        self,
        model: str | DecoderConfig = "tiny",
        vocab_size: int | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        optimizer: OptimizerName = "adamw",
        optimizer_state_dtype: StateDtype = "float32",
        muon_learning_rate: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: AdjustLearningRate = "match_rms_adamw",
        schedule: Schedule = "cosine",
        warmup_steps: int = 100,
        min_learning_rate_ratio: float = 0.1,
        decay_fraction: float = 0.2,
        seed: int = 0,
        router_z_loss_coef: float = 0.0,
        router_bias_update_rate: float = 1e-3,
        force_balanced_routing: bool = False,
    ) -> None:
        super().__init__()
        if schedule not in ("cosine", "wsd", "constant"):
            raise ConfigurationError(f"schedule={schedule!r} must be one of cosine, wsd, constant.")
        self.folder = Path(model) if isinstance(model, str) and Path(model).is_dir() else None
        self.config = resolve_config(model, vocab_size)
        self.optimizer_settings = OptimizerSettings(
            optimizer=optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
            optimizer_state_dtype=optimizer_state_dtype,
            muon_learning_rate=muon_learning_rate,
            momentum=momentum,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr_fn,
        )
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.min_learning_rate_ratio = min_learning_rate_ratio
        self.decay_fraction = decay_fraction
        self.seed = seed
        self.router_z_loss_coef = router_z_loss_coef
        self.router_bias_update_rate = router_bias_update_rate
        self.force_balanced_routing = force_balanced_routing
        self.model: Decoder | None = None
        self.save_hyperparameters(
            {
                "model": self.config.to_dict(),
                "optimizer": optimizer,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "schedule": schedule,
                "warmup_steps": warmup_steps,
                "seed": seed,
            }
        )

    # -- the model --

    def build_model(self) -> Decoder:
        """The decoder with weights yet to come."""
        decoder = Decoder(self.config)
        decoder.router_losses.z_loss_coef = self.router_z_loss_coef
        for module in decoder.modules():
            if isinstance(module, Router):
                module.force_balance = self.force_balanced_routing
        return decoder

    def weight_source(self) -> WeightSource:
        """Where the first weights come from: the folder, or seeded random numbers.

        Raises:
            ConfigurationError: The folder lacks tensors, has others, or of other shapes; lists them.
        """
        if self.folder is None:
            return RandomInit(self.config, self.seed)
        return PretrainedWeights(self.folder, self.config)

    def configure_model(self) -> None:
        """Builds the decoder. A strategy that cuts models gets it on the meta device and fills it afterwards."""
        if self.model is not None:
            return
        with self.trainer.init_module(empty_init=True):
            self.model = self.build_model()
        if not any(parameter.is_meta for parameter in self.model.parameters()):
            load_weights(self.model, self.weight_source())

    def setup(self, stage: str) -> None:
        """Checks the data against the model, for strategies that did not before they started processes."""
        self.check(getattr(self.trainer, "datamodule", None))

    def check(self, datamodule: Any) -> None:
        """Refuses data whose token ids the model has no embedding for.

        Raises:
            ConfigurationError: with both sizes.
        """
        needed = getattr(datamodule, "vocab_size", None)
        if needed is not None and needed > self.config.vocab_size:
            raise ConfigurationError(
                f"The data's tokenizer has {needed} tokens, but the model's vocab_size is {self.config.vocab_size}. "
                f"Set vocab_size={needed} (or more) on the module, or tokenize with a smaller vocabulary."
            )

    def write_assets(self, folder: Path) -> None:
        """Adds config.json and, where known, tokenizer.json to a checkpoint, so that it can be exported on its own."""
        datamodule = getattr(self.trainer, "datamodule", None)
        config, end_of_text = self.config, getattr(datamodule, "end_of_text_id", None)
        if config.eos_token_id is None and end_of_text is not None:
            config = config.replace(eos_token_id=end_of_text)
        config.save(folder)
        for origin in (getattr(datamodule, "tokenizer_file", None), self.folder and self.folder / "tokenizer.json"):
            if origin is not None and Path(origin).is_file():
                shutil.copyfile(origin, folder / "tokenizer.json")
                return

    # -- the loss --

    def forward(self, input_ids: Tensor, **keywords: Tensor) -> Tensor:
        """Token ids `[batch, seq]` -> logits `[batch, seq, vocab]`; for the keywords see `Decoder.forward`."""
        assert self.model is not None
        return self.model(input_ids, **keywords)

    def model_keywords(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model is called with beside `input_ids`: the batch's `positions` and `document_ids`, if any."""
        return {name: batch[name] for name in ("positions", "document_ids") if name in batch}

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy summed over the labels that count, nats. A pipeline calls it once per microbatch."""
        return sum_cross_entropy(logits, labels)

    def loss_denominator(self, labels: Tensor) -> Tensor:
        """Labels that count, averaged over the data ranks.

        Summed losses divided by it, averaged over the data ranks as every strategy averages gradients, are the mean
        over all tokens of the global batch, however unevenly those are spread over ranks and microbatches.
        """
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)  # bfloat16 cannot count beyond 256
        count = (labels != IGNORED).sum().to(exact)
        return self.trainer.strategy.reduce(count, reduce_op="mean").clamp(min=torch.finfo(count.dtype).tiny)

    def forward_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The batch's loss, nats per token. Under a pipeline the strategy puts its schedule in this method's place."""
        logits = self(batch["input_ids"], **self.model_keywords(batch))
        return self.loss(logits, batch["labels"]) / self.loss_denominator(batch["labels"])

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """One batch's loss, logged as `train_loss`."""
        self._weigh_router_losses(len(batch["input_ids"]))
        loss = self.forward_loss(batch)
        self.log("train_loss", loss.detach(), prog_bar=self._bar_is_told, sync_dist=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """One batch's loss, logged as `val_loss`, the mean over all tokens of all batches."""
        self._log_evaluation("val_loss", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """One batch's loss, logged as `test_loss`."""
        self._log_evaluation("test_loss", batch)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Logits `[batch, seq, vocab]`."""
        return self(batch["input_ids"], **self.model_keywords(batch))

    def _log_evaluation(self, name: str, batch: Mapping[str, Tensor]) -> None:
        loss = self.forward_loss(batch)
        # Lightning weighs batches by this number when it averages over them.
        ranks = getattr(self.trainer.strategy, "gradient_ranks", self.trainer.world_size)
        tokens = round(float(self.loss_denominator(batch["labels"])) * ranks)
        self.log(name, loss, prog_bar=True, sync_dist=True, on_epoch=True, batch_size=max(1, tokens))

    @property
    def _bar_is_told(self) -> bool:
        """Whether the progress bar must be told of the loss, rather than look at it when it draws (`StepProgressBar`).

        What Lightning tells a bar it reads off the device at every step, and so waits for it.
        """
        bar = self.trainer.progress_bar_callback
        return bar is not None and not getattr(bar, "shows_train_loss", False)

    # -- mixture of experts --

    def _weigh_router_losses(self, sequences: int) -> None:
        """Has the auxiliary losses of this batch's sequences averaged as the loss is: over the batches of all ranks."""
        losses = getattr(self.model, "router_losses", None)  # a module of one's own may build another model
        if losses is None:
            return
        strategy, precision = self.trainer.strategy, self.trainer.precision_plugin
        scaler = getattr(precision, "scaler", None)
        loss_scale = getattr(precision, "loss_scale", None) or (scaler.get_scale() if scaler is not None else 1.0)
        ranks_per_sequence = getattr(strategy, "ranks_per_sequence", 1)
        parts = self.trainer.accumulate_grad_batches
        # A tensor: a strategy that weighs batches by their tokens multiplies it before the backward.
        # Filled, not copied from the host, which would wait for the device.
        losses.scale = torch.full((), loss_scale * ranks_per_sequence / (sequences * parts), device=self.device)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Logs how balanced the experts are, over all ranks, and corrects the biases of routers that have them.

        `router_aux_loss` (`num_experts_per_tok` when balanced), `router_z_loss`, and `expert_load_max`, the tokens of
        the fullest expert over the average; all of them averaged over the layers.
        """
        if self.config.num_moe_layers == 0:
            return
        assert self.model is not None
        routers = [module for module in self.model.modules() if isinstance(module, Router)]
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for router in routers:
            if router.statistics is None:
                continue
            statistics = torch.cat([x.double().flatten() for x in router.statistics])
            *counted, aux_loss, z_loss, sequences = router.data_sum(statistics).unbind()
            counts = torch.stack(counted)
            sums += torch.stack(
                [aux_loss / sequences, z_loss / sequences, counts.max() / counts.mean(), sums.new_ones(())]
            )
        for router in routers:
            if router.e_score_correction_bias is not None:
                router.update_bias(self.router_bias_update_rate)
            router.statistics = None
        # Pipeline stages have layers of their own.
        *means, layers = self.trainer.strategy.reduce(sums, reduce_op="mean")
        for name, mean in zip(("router_aux_loss", "router_z_loss", "expert_load_max"), means, strict=True):
            self.log(name, (mean / layers).float())

    # -- optimization --

    def configure_optimizers(self) -> Any:
        """The optimizer, with decay on matrices only, and the schedule per optimizer step."""
        optimizer = self.optimizer_settings.build(self)
        factor = LearningRateFactor(
            self.schedule, self.warmup_steps, self._total_steps(), self.min_learning_rate_ratio, self.decay_fraction
        )
        scheduler = LearningRateSchedule(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Logs `grad_norm` before clipping, where the strategy can tell it over all axes."""
        norm = getattr(self.trainer.strategy, "gradient_norm", None)
        if norm is not None:
            self.log("grad_norm", norm())
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _total_steps(self) -> int:
        """Optimizer steps of the run.

        Not `trainer.estimated_stepping_batches`: reading it drops a resumed loader's position (Lightning issue 20550).
        """
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        steps_per_epoch = getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
        if steps_per_epoch and trainer.max_epochs and trainer.max_epochs > 0:
            parts = trainer.accumulate_grad_batches
            limit = trainer.limit_train_batches  # a number of batches, or a share of them
            batches = steps_per_epoch * parts
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
            return math.ceil(batches / parts) * trainer.max_epochs
        if self.schedule != "constant":
            raise ConfigurationError(
                f"schedule={self.schedule!r} needs to know the length of the run. Set Trainer(max_steps=...), or use "
                "schedule='constant'."
            )
        return 0


def resolve_config(model: str | DecoderConfig, vocab_size: int | None = None) -> DecoderConfig:
    """The configuration behind a preset's name, a Hugging Face folder, or itself."""
    if isinstance(model, DecoderConfig):
        config = model
    elif Path(model).is_dir():
        config = DecoderConfig.load(model)
    elif "/" in model or model.startswith("."):
        raise ConfigurationError(f"There is no model folder {model!r}.")
    else:
        config = DecoderConfig.preset(model)
    if vocab_size is not None and vocab_size != config.vocab_size:
        if isinstance(model, str) and Path(model).is_dir():
            raise ConfigurationError(
                f"vocab_size={vocab_size}, but the weights in {model} are for {config.vocab_size} tokens. Leave it out."
            )
        config = config.replace(vocab_size=vocab_size)
    return config


def sum_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of `[batch, seq, vocab]` logits summed over the labels that are not -100, at least in float32.

    Logits that a strategy has split over the vocabulary stay split; the sum is a plain tensor all the same.
    """
    logits = logits.flatten(0, 1)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss.to_local() if hasattr(loss, "to_local") else loss
