"""DeepSpeed's engine and its ZeRO optimizers, as the strategy uses them: norms, and steps with a factor.

What is private in deepspeed 0.19 stands here and in state.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_llm.strategies.optimization import local_gradients


class Gradients:
    """The gradients of an engine, once a backward that closes a step has reduced them.

    Args:
        engine: DeepSpeed's.
        device: Where collectives run.
    """

    def __init__(self, engine: Any, device: torch.device) -> None:
        self._engine = engine
        self._device = device
        self._factor: Tensor | float = 1.0
        self._norm: Tensor | None = None
        self._discarded = False

    @property
    def partitioned(self) -> bool:
        """Whether ZeRO has them; else they are the parameters' own."""
        return bool(self._engine.zero_optimization())

    @property
    def loss_scale(self) -> float:
        """What the loss was multiplied by."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    @property
    def _buffers(self) -> list[Tensor] | None:
        """Of the optimizer that accumulates in float32 (ZeRO-1 in bfloat16 alone), which has all gradients, flat."""
        return getattr(self._engine.optimizer, "fp32_groups_gradients_flat", None)

    def norm(self) -> Tensor:
        """Euclidean norm over every axis, equal on all ranks; not scaled, not clipped. Computed once a step."""
        if self._norm is None:
            self._norm = self._scaled_norm() / self.loss_scale
        return self._norm * self._factor

    def scale(self, factor: Tensor | float) -> None:
        """Multiplies all gradients, in the step that is to come."""
        self._factor = self._factor * factor

    def discard(self) -> None:
        """Leaves out the step that is to come: weights, states and loss scale stay as they are."""
        self._discarded = True

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within it the engine steps, with gradients multiplied by what `scale` was told."""
        factor, norm, discarded = self._factor, self._norm, self._discarded
        self._factor, self._norm, self._discarded = 1.0, None, False
        if discarded:
            with _overflowing(self._engine.optimizer) if self.partitioned else nullcontext():
                if not self.partitioned:
                    for parameter in self._engine.module.parameters():
                        parameter.grad = None
                yield
            return
        if not self.partitioned or self._buffers is not None:
            if not isinstance(factor, float) or factor != 1.0:
                for gradient in self._buffers or local_gradients(self._engine.module.parameters()):
                    gradient.mul_(factor)
            yield
            return
        optimizer = self._engine.optimizer
        scale = optimizer.loss_scale
        with _remembered_norm(optimizer, norm * scale if norm is not None else None):
            # ZeRO divides gradients by the loss scale on their way into the optimizer, and by nothing else. It reads it
            # after the scale was adapted: without a fixed one, a step at which it doubles would halve the gradients.
            before = optimizer.custom_loss_scaler, optimizer.external_loss_scale
            optimizer.custom_loss_scaler, optimizer.external_loss_scale = True, scale / float(factor)
            try:
                yield
            finally:
                optimizer.custom_loss_scaler, optimizer.external_loss_scale = before

    def _scaled_norm(self) -> Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm

        optimizer = self._engine.optimizer
        if not self.partitioned:
            return self._norm_of_parameters()
        if self._buffers is not None:
            return self._norm_of_buffers()
        if hasattr(optimizer, "scaled_global_norm"):
            norm = optimizer.scaled_global_norm()
        else:
            norm = combine_grad_norm_groups(optimizer._get_norm_groups())
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self._device)
        return norm.new_full((), float("inf")) if is_invalid_grad_norm(norm) else norm

    def _norm_of_buffers(self) -> Tensor:
        from deepspeed.runtime.utils import get_global_norm_of_tensors, get_norm_with_moe_layers

        optimizer = self._engine.optimizer
        shared, experts = optimizer.get_grads_for_norm()
        norm = get_global_norm_of_tensors(input_tensors=shared, mpu=optimizer.mpu)
        if optimizer.has_moe_layers:
            norm = get_norm_with_moe_layers(norm, mpu=optimizer.mpu, expert_tensors=experts)
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self._device)
        return torch.where(norm < 0, float("inf"), norm)

    def _norm_of_parameters(self) -> Tensor:
        """Each rank adds what it has alone, and of what several have the first one's: tensor ranks, expert replicas."""
        from deepspeed.runtime.utils import is_model_parallel_parameter

        engine = self._engine
        mpu = engine.mpu
        first = mpu is None or _tensor_rank(mpu) == 0
        shared, experts = torch.zeros(2, dtype=torch.float32, device=self._device)
        replicas = 1
        for parameter in engine.module.parameters():
            if parameter.grad is None or getattr(parameter, "ds_pipe_replicated", False):
                continue
            square = torch.linalg.vector_norm(parameter.grad.float()) ** 2
            if not getattr(parameter, "allreduce", True):
                experts += square
                replicas = dist.get_world_size(engine.expert_data_parallel_group[parameter.group_name])
            elif first or is_model_parallel_parameter(parameter):
                shared += square
        if mpu is not None:
            dist.all_reduce(shared, group=mpu.get_model_parallel_group())
        dist.all_reduce(experts, group=engine.seq_data_parallel_group)
        return (shared + experts / replicas).sqrt()


def follow_whole_calls(engine: Any) -> list[RemovableHandle]:
    """Has the engine take its own call for one pass over the module, and not the call that a step makes within it.

    Lightning runs `training_step` in the place of the module's forward, and the step calls that forward in turn. At the
    second call DeepSpeed would start its timers again, which it refuses, and ZeRO-3 would begin another pass: it never
    saw a whole one, and so gathered each parameter alone when it was needed, not several together and ahead.

    Returns:
        What takes these hooks off, since `engine.destroy` does not.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    coordinator = offload.get_param_coordinator() if hasattr(offload, "get_param_coordinator") else None
    depth = 0

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        nonlocal depth
        depth += 1
        if depth > 1:
            return None
        if coordinator is not None:
            coordinator.reset_step()
        return engine._forward_prologue(args, kwargs)

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            engine._forward_epilogue()

    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    if coordinator is not None:
        offload.fwd_pre_hook.remove()
    return [
        engine.module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
        engine.module.register_forward_hook(leave, always_call=True),
    ]


@contextmanager
def _overflowing(optimizer: Any) -> Iterator[None]:
    """Has a ZeRO optimizer treat its gradients as it does such as overflow, but for its loss scale."""
    told: dict[str, Any] = {"has_overflow": lambda *_, **__: True, "_update_scale": lambda *_: None}
    if hasattr(optimizer, "clear_hp_grads"):  # the one with buffers of its own, which looks for no overflow
        told = {"step": lambda *_: optimizer.clear_hp_grads()}
    elif hasattr(optimizer, "check_grad_overflow"):  # stages 1 and 2, which may be told not to look
        told["check_grad_overflow"] = True
    else:  # stage 3, which looks at the norm
        told["_get_norm_groups"] = lambda: [torch.tensor(float("inf"))]
    before = {name: value for name, value in vars(optimizer).items() if name in told}
    vars(optimizer).update(told)
    try:
        yield
    finally:
        for name in told:
            del vars(optimizer)[name]
        vars(optimizer).update(before)


@contextmanager
def _remembered_norm(optimizer: Any, norm: Tensor | None) -> Iterator[None]:
    """Has a ZeRO optimizer take a norm that was just computed, instead of computing it again."""
    name = "scaled_global_norm" if hasattr(optimizer, "scaled_global_norm") else "_get_norm_groups"
    if norm is None or not bool(norm.isfinite()):  # an overflow is the optimizer's own to find
        yield
        return
    setattr(optimizer, name, (lambda: norm) if name == "scaled_global_norm" else lambda: [norm])
    try:
        yield
    finally:
        delattr(optimizer, name)


def _tensor_rank(mpu: Any) -> int:
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank

    return bwc_tensor_model_parallel_rank(mpu)
