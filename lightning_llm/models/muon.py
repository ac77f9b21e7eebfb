"""Muon for matrices that are sharded over ranks. optimizers.py says which matrices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard

from lightning_llm.models.adamw import CastingAdamW, compute_dtype, local_gradient, store
from lightning_llm.models.moe import local_tensor

AdjustLearningRate = Literal["match_rms_adamw", "original"]

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ_EPS = 1e-7


class Muon(CastingAdamW):
    """Muon (https://kellerjordan.github.io/posts/muon/) for groups with `use_muon`, AdamW for the others.

    Muon steps along the nearest orthogonal matrix to the averaged gradient: all its directions count alike. The matrix
    must be whole for that. `torch.optim.Muon` finds it for DTensors too, but multiplies shards, which takes 10 to 30
    collectives for each matrix (torch 2.13), and every rank does all of the work. Here matrices of one shape are taken
    as many at a time as ranks share them, one all-to-all per mesh axis gives each rank one whole matrix, and another
    one gives each its shards of the results:

        traffic       sends and receives 2 bytes per element of its shards, there and back, per mesh axis
                      (an axis that replicates sends nothing there, and gathers the results)
        computation   6 products of the matrix with its smaller side per iteration, divided by all ranks that share it
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

    Args:
        shards: This rank's, of tensors `[m, n]` or `[experts, m, n]` that are sharded like `like`.
        like: A parameter; a plain tensor is whole.
    """
    stack = torch.stack(shards)
    if not isinstance(like, DTensor):
        return list(orthogonalize(stack.flatten(0, -3)).view_as(stack).unbind())
    mesh = like.device_mesh
    sharded, whole = _stacked_placements(like)
    # Offloaded shards travel, and are multiplied, where the mesh is.
    there = _stacked(stack.to(mesh.device_type), like, sharded, len(shards)).redistribute(placements=whole)
    mine = there.to_local()
    mine = orthogonalize(mine.flatten(0, -3)).view_as(mine)
    back = _stacked(mine, like, whole, len(shards)).redistribute(placements=sharded)
    return list(back.to_local().to(stack.device).unbind())


def _stacked(local: Tensor, like: DTensor, placements: Sequence[Placement], count: int) -> DTensor:
    """A stack of `count` tensors like `like`, of which this rank has `local`."""
    shape = torch.Size([count, *like.shape])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def _stacked_placements(like: DTensor) -> tuple[Sequence[Placement], Sequence[Placement]]:
    """Of a stack of tensors that are sharded like `like`, and of the same with the matrices dealt out whole."""
    stacked = like.detach().unsqueeze(0)
    assert isinstance(stacked, DTensor)
    matrix_dims = (stacked.ndim - 2, stacked.ndim - 1)
    whole = [Shard(0) if p.is_replicate() or getattr(p, "dim", None) in matrix_dims else p for p in stacked.placements]
    return stacked.placements, whole


def _alike(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one shape, type and placement, as many at a time as ranks can work on, one each."""
    kinds: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        place = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        kinds[parameter.shape, parameter.dtype, place].append(parameter)
    for kind in kinds.values():
        ranks = _ranks_sharing(kind[0])
        for start in range(0, len(kind), ranks):
            yield kind[start : start + ranks]


def _ranks_sharing(parameter: Tensor) -> int:
    """How many ranks a stack of tensors like this one can be dealt out to."""
    if not isinstance(parameter, DTensor):
        return 1
    axes = zip(parameter.device_mesh.shape, *_stacked_placements(parameter), strict=True)
    return math.prod(size for size, sharded, whole in axes if sharded != whole)


def _rate_ratio(adjust_lr_fn: AdjustLearningRate, shape: torch.Size) -> float:
    m, n = shape[-2:]
    return 0.2 * math.sqrt(max(m, n)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, m / n))
