"""What a strategy does with batches, whichever engine computes: its share of each, steps, losses that weigh by tokens.

`LLM3DStrategy` (llm3d.py) and `LLM3DDeepSpeedStrategy` (deepspeed/strategy.py) add the engine.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.module import LLMModule
from lightning_llm.strategies.context import SEQUENCE_DIM, ContextParallel
from lightning_llm.strategies.optimization import AccumulatedTokens, PipelineOptimization
from lightning_llm.strategies.resumption import ResumableEpochLoop
from lightning_llm.strategies.state import ShardedState
from lightning_llm.strategies.tensor import to_plain


class RunsBatches(Protocol):
    """A pipeline, as steps see it."""

    def run(
        self, inputs: Tensor, targets: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor], **keywords: Tensor
    ) -> Tensor:
        """Forward of a whole batch, and backward when gradients are enabled. Returns the loss, on every rank."""
        ...

    def forward(self, inputs: Tensor, **keywords: Tensor) -> Tensor:
        """Forward alone; returns the output, on every rank."""
        ...


class ParallelSteps(ShardedState):
    """Training, validation, test and predict steps of a model that is cut over ranks.

    Attributes:
        context: The context axis, if there is one.
        pipeline: Of stages, if there are several.
    """

    context: ContextParallel | None = None
    pipeline: RunsBatches | None = None
    _scheduled_loss: Tensor | None = None
    _denominator: Tensor | None = None
    _unfinished = False  # whether a backward came after gradients were finished last

    def _begin(self, trainer: pl.Trainer) -> None:
        """Fits the loops to this strategy."""
        self._tokens = AccumulatedTokens()
        ResumableEpochLoop.install(trainer)
        if self.pipeline is not None:
            PipelineOptimization.install(trainer)

    @staticmethod
    def _without_inference_mode(trainer: pl.Trainer) -> None:
        """Inference tensors cannot be gathered into again by an engine that shards, nor be received into."""
        for loop in (
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ):
            loop.inference_mode = False

    # -- the model --

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """`trainer.init_module(empty_init=True)` builds on the meta device: weights come after everything is cut."""
        with torch.device("meta") if empty_init else nullcontext(), self.precision_plugin.tensor_init_context():
            yield

    @property
    def _decoder(self) -> nn.Module:
        model = getattr(self.lightning_module, "model", None)
        assert isinstance(model, nn.Module)
        return model

    def _copy_from_rank_zero(self, model: nn.Module) -> None:
        if self.world_size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                sent = tensor.data.to(self.root_device)  # one at a time: NCCL takes tensors of its devices only
                dist.broadcast(sent, src=0)
                tensor.data.copy_(sent)

    def _weight_source(self, module: pl.LightningModule) -> Any:
        """Where the weights of a model come from that was built on the meta device."""
        weight_source = getattr(module, "weight_source", None)
        if weight_source is None:
            raise ConfigurationError(
                f"{type(module).__name__} built its model on the meta device but has no weight_source() to fill it "
                "from. Build it with real tensors, or add the method (see lightning_llm.LLMModule)."
            )
        return weight_source()

    def _count_tokens(self, module: pl.LightningModule) -> None:
        """Has the module's own count of valid tokens weigh the batches of one optimizer step against each other."""
        count = getattr(module, "loss_denominator", None)
        if callable(count):

            def counted(labels: Tensor) -> Tensor:
                self._denominator = count(labels)
                return self._denominator

            module.loss_denominator = counted  # type: ignore[assignment]

    def _run_in_pipeline(self, module: pl.LightningModule, pipeline: RunsBatches) -> None:
        """Puts a pipeline in the place of a module's forward: its training_step still runs on every rank, and logs."""
        self.pipeline = pipeline
        module.forward_loss = self._pipelined_loss  # type: ignore[assignment]
        module.forward = pipeline.forward  # type: ignore[method-assign]

    # -- the step --

    def _step_context(self) -> AbstractContextManager[None]:
        """In which forward and backward run."""
        return nullcontext()

    @abstractmethod
    def _accumulate(self, *, last: bool) -> None:
        """Told before each batch of several that lead to one optimizer step."""

    def _share(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """A step's arguments with the batch checked and cut to what this rank computes of it."""
        batch, *rest = arguments
        self.check_batch(batch)
        if self.context is not None:
            batch = self.context.shard_batch(batch)
        return (batch, *rest)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's training step; in a pipeline it has run the backward too when it returns."""
        assert self.lightning_module is not None
        args = self._share(args)
        self._scheduled_loss = self._denominator = None
        if self._accumulates:
            self._accumulate(last=not self.lightning_module.trainer.fit_loop.epoch_loop._should_accumulate())
        with self._step_context():
            output = tree_map(to_plain, super().training_step(*args, **kwargs))
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if self.pipeline is not None and (loss is None or loss is not self._scheduled_loss):
            raise ConfigurationError(
                f"{type(self.lightning_module).__name__}.training_step() must return the value of forward_loss(batch) "
                "as it is: a pipeline has run the backward by then, so another loss would have no effect. Put what you "
                "add to the loss into loss(), which the pipeline calls for each microbatch."
            )
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's validation step."""
        args = self._share(args)
        with self._step_context():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's test step."""
        args = self._share(args)
        with self._step_context():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's predict step; outputs that are split over ranks are put together."""
        args = self._share(args)
        output = tree_map(to_plain, super().predict_step(*args, **kwargs))
        context = self.context
        if context is None or context.positions is None:
            return output
        share = len(context.positions)

        def whole(leaf: Any) -> Any:
            along_sequence = isinstance(leaf, Tensor) and leaf.ndim > SEQUENCE_DIM and leaf.shape[SEQUENCE_DIM] == share
            return context.gather_sequence(leaf) if along_sequence else leaf

        return tree_map(whole, output)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Backward and its hooks; after a pipeline's schedule the hooks alone."""
        self._unfinished = True
        if self.pipeline is None:
            if self._denominator is not None and self._accumulates:
                closure_loss = closure_loss * self._weight(self._denominator)
            with self._step_context():
                return super().backward(closure_loss, optimizer, *args, **kwargs)
        assert self.lightning_module is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    def _pipelined_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Stands in for `LLMModule.forward_loss` when the model is cut into stages."""
        module: Any = self.lightning_module
        assert self.pipeline is not None
        denominator = module.loss_denominator(batch["labels"])
        factor: Any = 1.0
        if module.trainer.training:
            # Lightning divides the loss after the step; gradients made inside the step must be divided here.
            factor = self._pipelined_loss_scale / module.trainer.accumulate_grad_batches
            if self._accumulates:
                factor = factor * self._weight(denominator)
        loss = self.pipeline.run(
            batch["input_ids"],
            batch["labels"],
            lambda output, target: module.loss(output, target) / denominator * factor,
            **getattr(module, "model_keywords", lambda _: {})(batch),
        )
        self._scheduled_loss = loss / factor
        return self._scheduled_loss

    @property
    def _pipelined_loss_scale(self) -> float:
        """What a pipeline's losses are multiplied by before its backward, for the sake of float16."""
        return self.precision_plugin.loss_scale  # type: ignore[attr-defined]

    @property
    def _accumulates(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.trainer.accumulate_grad_batches > 1

    def _weight(self, tokens: Tensor) -> Tensor:
        """Of a batch among those of one optimizer step; its routers' losses get it too."""
        weight = self._tokens.add(self.reduce(tokens, reduce_op="mean"))
        scale = getattr(getattr(getattr(self.lightning_module, "model", None), "router_losses", None), "scale", None)
        if isinstance(scale, Tensor):
            scale.mul_(weight)
        return weight

    # -- the end --

    def model_to_device(self) -> None:
        """Done while the model is materialised."""

    def teardown(self) -> None:
        """Ends precision plugin and accelerator; parameters stay where they are, for this trainer's next run."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self._random_state = None  # not taken up where there was nothing left to train
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def check_pipelined(module: pl.LightningModule) -> None:
    """Refuses modules that a pipeline cannot run.

    Raises:
        ConfigurationError: naming what the module lacks, or overrides without effect.
    """
    if not module.automatic_optimization:
        raise ConfigurationError(
            f"{type(module).__name__} sets automatic_optimization=False. A pipeline runs the backward within its "
            "schedule, so manual_backward() would do nothing: use automatic optimization."
        )
    for name in ("loss", "loss_denominator", "forward_loss"):
        if not callable(getattr(module, name, None)):
            raise ConfigurationError(
                f"A pipeline needs {type(module).__name__}.{name}(); see lightning_llm.LLMModule for what it does."
            )
    if isinstance(module, LLMModule) and type(module).forward_loss is not LLMModule.forward_loss:
        raise ConfigurationError(
            f"{type(module).__name__} overrides forward_loss(), which a pipeline replaces by its schedule. "
            "Override loss(), which it calls for each microbatch."
        )
