"""Muon for matrices that are sharded over ranks. optimizers.py says which matrices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_llm._torch import all_gather_single
from lightning_llm.models.adamw import CastingAdamW, compute_dtype, local_gradient, store
from lightning_llm.models.moe import local_tensor

AdjustLearningRate = Literal["match_rms_adamw", "original"]

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ_EPS = 1e-7


class Muon(CastingAdamW):
    """Muon (https://kellerjordan.github.io/posts/muon/) for groups with `use_muon`, AdamW for the others.

    Muon steps along the nearest orthogonal matrix to the averaged gradient: all its directions count alike. The matrix
    must be whole for that. `torch.optim.Muon` is right for DTensors too, but multiplies their shards, which takes 10 to
    27 collectives per matrix (torch 2.13). Here matrices of one shape are taken as many at a time as ranks share them;
    an all-to-all per mesh axis gives each rank a whole one, and another gives each its shards of the results. A step
    costs, per rank:

        traffic       2 bytes per element of its shards there and 2 back, for each axis that shards; an axis that
                      replicates gathers the results
        computation   5 iterations of 4 m^2 n + 2 m^3 operations per matrix (m the smaller side), divided by the ranks
                      that share it
        memory        one whole matrix and its products, in bfloat16

    Stacked matrices `[experts, m, n]` are orthogonalised each by itself, by the ranks that hold the experts.

    All ranks that share a parameter must step together, and have a gradient for it or have none.

    Args:
        params: Groups, with `use_muon` for those of matrices `[..., m, n]`.
        lr: Learning rate.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: Decoupled, times the learning rate.
        state_dtype: As of `CastingAdamW`; the momentum too.
        momentum: Muon's moving-average factor.
        nesterov: Look one step ahead.
        adjust_lr_fn: "match_rms_adamw" makes updates as large as AdamW's usually are, so that one learning rate and
            weight decay serve both (Moonlight, https://arxiv.org/abs/2502.16982); "original" multiplies the rate by
            sqrt(max(1, m / n)).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        state_dtype: torch.dtype = torch.float32,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: AdjustLearningRate = "match_rms_adamw",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            state_dtype=state_dtype,
            use_muon=False,
            momentum=momentum,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr_fn,
        )

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        if not group["use_muon"]:
            return super()._update(parameters, group)
        for alike in _alike(parameters):
            directions = orthogonalize_shards([self._average(p, group) for p in alike], alike[0])
            for parameter, direction in zip(alike, directions, strict=True):
                rate = group["lr"] * _rate_ratio(group["adjust_lr_fn"], parameter.shape)
                stored = local_tensor(parameter)
                weight = stored.to(compute_dtype(parameter)).mul_(1 - group["lr"] * group["weight_decay"])
                store(stored, weight.add_(direction.to(weight.dtype), alpha=-rate))

    def _average(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """The rank's shard of the averaged gradient, in the type in which it is orthogonalised."""
        (buffer,) = (local_tensor(moment) for moment in self._moments(parameter, "momentum_buffer"))
        gradient = local_gradient(parameter)
        average = buffer.to(gradient.dtype).lerp_(gradient, 1 - group["momentum"])
        store(buffer, average)
        ahead = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        # bfloat16 as in torch's; runs in float64 are there to compare layouts.
        return ahead.to(torch.float64 if ahead.dtype == torch.float64 else torch.bfloat16)


def orthogonalize(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrix to each of `[count, m, n]`: singular values between 0.7 and 1.2 or so.

    Newton-Schulz iteration of fifth order, as in `torch.optim.Muon`.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=NEWTON_SCHULZ_EPS)  # the largest singular value is at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalize_shards(shards: list[Tensor], like: Tensor) -> list[Tensor]:
    """The ranks' shards of the orthogonalised matrices. Collective over the mesh of `like`.

    Matrices are put together from shards in the order of ranks, which need not be that of their rows, and with zeros
    where a shard is smaller than others. Neither matters: rows and columns of the result are permuted as the matrix's
    are, and zero where it is.

    Args:
        shards: This rank's, of tensors `[m, n]` or `[experts, m, n]` that are sharded like `like`.
        like: A parameter; a plain tensor is whole.
    """
    stack = torch.stack(shards)
    axes = _axes(like)
    m, n = (math.ceil(like.shape[dim] / math.prod(axis.size for axis in axes if axis.dim == dim)) for dim in (-2, -1))
    count = _round_up(len(shards), math.prod(axis.size for axis in axes))
    padded = stack.new_zeros(count, *stack.shape[1:-2], m, n)
    padded[_corner(stack)] = stack
    if isinstance(like, DTensor):
        padded = padded.to(like.device_mesh.device_type)  # offloaded shards travel, and are multiplied, on the device
    for axis in axes:
        padded = axis.deal(padded)
    padded = orthogonalize(padded.flatten(0, -3)).view_as(padded)
    for axis in reversed(axes):
        padded = axis.give_back(padded)
    return list(padded[_corner(stack)].to(stack.device).unbind())


class _Axis(NamedTuple):
    """A mesh axis whose ranks share matrices."""

    group: dist.ProcessGroup
    size: int
    rank: int
    dim: int | None
    """Which dim of the matrices they hold shards of, -2 or -1; None: they all hold the same."""

    def deal(self, stack: Tensor) -> Tensor:
        """Shards of `[count, ...]` -> `count / size` matrices that are whole along the axis."""
        if self.dim is None:
            return stack.chunk(self.size)[self.rank]
        received = torch.empty_like(stack)
        dist.all_to_all_single(received, stack.contiguous(), group=self.group)
        return torch.cat(received.chunk(self.size), self.dim)

    def give_back(self, stack: Tensor) -> Tensor:
        """Undoes `deal`."""
        if self.dim is None:
            gathered = stack.new_empty(self.size * stack.shape[0], *stack.shape[1:])
            all_gather_single(gathered, stack.contiguous(), group=self.group)
            return gathered
        shards = torch.cat(stack.chunk(self.size, self.dim))
        received = torch.empty_like(shards)
        dist.all_to_all_single(received, shards, group=self.group)
        return received


def _axes(parameter: Tensor) -> list[_Axis]:
    """The axes that matrices are dealt out over: all but those that experts are spread over."""
    if not isinstance(parameter, DTensor):
        return []
    mesh, axes = parameter.device_mesh, []
    for index, placement in enumerate(parameter.placements):
        dim = None if placement.is_replicate() else getattr(placement, "dim") - parameter.ndim  # noqa: B009
        if dim in (None, -2, -1) and mesh.size(index) > 1:
            axes.append(_Axis(mesh.get_group(index), mesh.size(index), mesh.get_local_rank(index), dim))
    return axes


def _alike(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one shape, type and placement, as many at a time as ranks can work on, one each."""
    kinds: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        place = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        kinds[parameter.shape, parameter.dtype, place].append(parameter)
    for kind in kinds.values():
        ranks = math.prod(axis.size for axis in _axes(kind[0]))
        for start in range(0, len(kind), ranks):
            yield kind[start : start + ranks]


def _corner(stack: Tensor) -> tuple[slice, ...]:
    """Where a stack is in its padded copy."""
    return tuple(slice(size) for size in stack.shape)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _rate_ratio(adjust_lr_fn: AdjustLearningRate, shape: torch.Size) -> float:
    m, n = shape[-2:]
    return 0.2 * math.sqrt(max(m, n)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, m / n))
