"""Mixture of experts: a router sends each token to a few of many MLPs. The `mlp` of a block that has experts.

Knows nothing of parallelism, but is made for it: experts are stacked tensors that can be sharded over dim 0 with a
dispatch hooked in front of `Experts` and a combine behind it, and the router's losses need no loss function to reach
them, so that they train through a pipeline whose stages never see one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_llm._torch import full_shape, untraced
from lightning_llm.models.mlp import MLP
from lightning_llm.models.sizes import ROUTING_BIAS

if TYPE_CHECKING:
    from lightning_llm.models.config import DecoderConfig


class RouterLosses:
    """How much the auxiliary losses of all routers of one decoder weigh. One object per decoder, shared by its routers.

    With it set, the gradients are those of `loss + scale * sum over sequences of (aux_loss_coef * aux + z_loss_coef *
    z)`, with `aux` and `z` averaged over the layers that have experts (see `Router.losses_of`).

    Attributes:
        aux_loss_coef: Of the load-balancing loss.
        z_loss_coef: Of the z-loss (ST-MoE, arXiv:2202.08906, section 2.2).
        scale: Weight of one sequence in the backward, a float or a 0-dim tensor; the training step sets it before each
            forward, to 1 / sequences in the batch where the loss is a mean. 0: no auxiliary losses.
        num_layers: Layers with experts in the whole model, over which the losses are averaged.
    """

    def __init__(self, config: "DecoderConfig") -> None:
        self.aux_loss_coef = config.router_aux_loss_coef
        self.z_loss_coef = 0.0
        self.scale: float | Tensor = 0.0
        self.num_layers = config.num_moe_layers


class RouterStatistics(NamedTuple):
    """Sums over everything that went backward through a router since they were last reset."""

    tokens_per_expert: Tensor
    """[experts] int64."""
    aux_loss: Tensor
    """Sum over sequences, unweighted; likewise `z_loss`."""
    z_loss: Tensor
    sequences: Tensor
    """How many sequences; a slice of one counts as its share."""


class Routing(NamedTuple):
    """What `Router` decides."""

    experts: Tensor
    """[batch, seq, top_k] int64: where each token goes."""
    weights: Tensor
    """[batch, seq, top_k]: of each of its experts in its sum."""
    counts: Tensor
    """[batch, experts] int64: how many tokens of each sequence an expert gets."""
    logits: Tensor
    """[batch, seq, experts]."""
    scores: Tensor
    """[batch, seq, experts]: softmax or sigmoid of the logits."""


def identity(x: Tensor) -> Tensor:
    """The sum over ranks where there is one rank."""
    return x


class Router(nn.Module):
    """Chooses the experts of each token, in float32 (or float64) whatever the model's type.

    Attributes:
        e_score_correction_bias: [experts] float32, added to the scores for the choice, not for the weights; None if the
            config has no `use_routing_bias`. Stays float32 when the model is cast: its steps are small.
        force_balance: Sends tokens to experts in turn, whatever their scores: for benchmarks.
        statistics: What was routed, recorded in the backward, so that recomputed activations count once and evaluation
            not at all. Reset by `update_bias`, or by setting it to None.
        sequence_sum: Sums a tensor over the ranks that hold parts of the same sequences.
        data_sum: Sums a tensor over all ranks that hold different tokens.
        local: The weight that this rank computes with, of a weight that may be a DTensor.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: "DecoderConfig", losses: RouterLosses) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.scoring_func = config.scoring_func
        self.routed_scaling_factor = config.routed_scaling_factor
        self.losses = losses
        self.force_balance = False
        self.statistics: RouterStatistics | None = None
        self.sequence_sum: Callable[[Tensor], Tensor] = identity
        self.data_sum: Callable[[Tensor], Tensor] = identity
        self.local: Callable[[Tensor], Tensor] = local_tensor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.use_routing_bias else None
        self.register_buffer(ROUTING_BIAS, bias)

    def forward(self, x: Tensor) -> Routing:
        """[batch, seq, hidden] -> where each token goes."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with _without_autocast(x):
            logits = F.linear(x.to(dtype), self.local(self.weight).to(dtype))
        scores = logits.softmax(-1) if self.scoring_func == "softmax" else logits.sigmoid()
        experts = self._choose(scores.detach())
        weights = scores.gather(-1, experts)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        chosen = experts.flatten(1)
        counts = chosen.new_zeros(x.shape[0], scores.shape[-1]).scatter_add_(1, chosen, torch.ones_like(chosen))
        return Routing(experts, weights * self.routed_scaling_factor, counts, logits, scores)

    def _choose(self, scores: Tensor) -> Tensor:
        if self.force_balance:
            seq, experts = scores.shape[-2:]
            turns = torch.arange(seq * self.top_k, device=scores.device).view(seq, self.top_k) % experts
            return turns.expand(scores.shape[0], -1, -1)
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias
        return scores.topk(self.top_k, dim=-1).indices

    def losses_of(self, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's share of each sequence's losses: `(aux, z, share)`, each [batch].

        aux: experts * sum over experts of f * P, with f the fraction of the sequence's tokens that an expert gets (they
        sum to top_k) and P its mean probability: Switch Transformer's loss (arXiv:2101.03961) in Hugging Face's scale,
        per sequence as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2), so that it does not depend on how a batch is
        cut. z: mean over tokens of logsumexp(logits) ** 2. share: the part of the sequence's tokens that are here.
        """
        probabilities = routing.scores
        if self.scoring_func == "sigmoid":
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        counts = self.sequence_sum(routing.counts).to(probabilities.dtype)
        tokens = (counts.sum(-1) / self.top_k).clamp(min=1)  # of the whole sequence; a rank may hold none of a slice
        aux = counts.shape[-1] * (counts * probabilities.sum(1)).sum(-1) / tokens.square()
        z = routing.logits.logsumexp(-1).square().sum(1) / tokens
        return aux, z, routing.counts.sum(-1) / self.top_k / tokens

    @untraced  # what a backward does beside gradients must not be traced away
    def with_losses(self, output: Tensor, routing: Routing) -> Tensor:
        """The output of the block, unchanged; its backward adds the gradient of this layer's losses and counts."""
        losses = self.losses
        with torch.set_grad_enabled(bool(losses.aux_loss_coef or losses.z_loss_coef)):
            aux, z, share = (sequences.sum() for sequences in self.losses_of(routing))
            loss = (losses.aux_loss_coef * aux + losses.z_loss_coef * z) / max(1, losses.num_layers)
        statistics = (routing.counts.sum(0), aux.detach(), z.detach(), share.detach())
        return _WithLosses.apply(output, loss, self, *statistics)

    def record(self, statistics: RouterStatistics) -> None:
        """Adds to `statistics`."""
        before = self.statistics
        self.statistics = statistics if before is None else RouterStatistics(*map(torch.add, before, statistics))

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """Makes overloaded experts less and underloaded ones more likely, by `rate`, and resets the statistics.

        To be called once per optimizer step, on all ranks (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
        """
        assert self.e_score_correction_bias is not None, "the config has no use_routing_bias"
        bias = self.e_score_correction_bias
        counts = bias.new_zeros(bias.shape, dtype=torch.int64)
        counts = self.data_sum(counts if self.statistics is None else self.statistics.tokens_per_expert)
        bias += rate * torch.sign(counts.sum() - counts * counts.numel())  # mean - counts, in whole numbers
        self.statistics = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # torch.nn.Module.to, .bfloat16() and the like end here (torch 2.13). They must move the bias, but not round it.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias is not None:
            cast = self.e_score_correction_bias
            self.e_score_correction_bias = cast if cast.dtype == bias.dtype else bias.to(cast.device)
        return self

    def extra_repr(self) -> str:
        """What `print(decoder)` shows of it."""
        return f"top {self.top_k} of {full_shape(self.weight)[0]}, {self.scoring_func}"


class _WithLosses(torch.autograd.Function):
    """The identity on a block's output, whose backward also starts that of the layer's auxiliary loss.

    Megatron-LM's MoEAuxLossAutoScaler, with the scale in an object instead of a global.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, router: Router, *statistics: Tensor) -> Tensor:
        ctx.router = router
        ctx.scale = router.losses.scale
        ctx.save_for_backward(loss, *statistics)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        loss, *statistics = ctx.saved_tensors
        ctx.router.record(RouterStatistics(*statistics))
        off = isinstance(ctx.scale, float | int) and ctx.scale == 0
        scale = None if off else torch.as_tensor(ctx.scale, dtype=loss.dtype, device=loss.device)
        return (gradients[0], scale, None, *(None for _ in statistics))


class Experts(nn.Module):
    """SwiGLU MLPs, their weights stacked: gate_proj and up_proj [experts, intermediate, hidden], down_proj [experts,
    hidden, intermediate].

    The number of experts is read off the tensors: under expert parallelism each rank has its share, as DTensors.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """[n, hidden] -> [n, hidden], each token through its expert.

        Args:
            tokens: [n, hidden], those of the first expert first.
            counts: [experts] int64, how many are for each; they sum to n.
        """
        dtype = _autocast_dtype(tokens)
        gate, up, down = (local_tensor(weight).to(dtype) for weight in (self.gate_proj, self.up_proj, self.down_proj))
        tokens = tokens.to(dtype)
        inner = F.silu(grouped_linear(tokens, gate, counts)) * grouped_linear(tokens, up, counts)
        return grouped_linear(inner, down, counts)

    def extra_repr(self) -> str:
        """What `print(decoder)` shows of it."""
        experts, intermediate, hidden = full_shape(self.gate_proj)
        return f"{experts} of {hidden} -> {intermediate} -> {hidden}"


class MoE(nn.Module):
    """Router, experts and, where the config says so, experts that every token meets.

    [batch, seq, hidden] -> [batch, seq, hidden]; the sequence may be a slice of a longer one.
    """

    def __init__(self, config: "DecoderConfig", losses: RouterLosses) -> None:
        super().__init__()
        assert config.num_experts is not None
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.gate = Router(config, losses)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_experts = MLP(config.hidden_size, shared, bias=config.mlp_bias) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """The weighted sum of what the experts of each token make of it."""
        routing = self.gate(x)
        tokens, order = permute(x.flatten(0, 1), routing.experts.flatten(0, 1))
        tokens = self.experts(tokens, routing.counts.sum(0))
        out = unpermute(tokens, order, routing.weights.flatten(0, 1)).view(x.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return self.gate.with_losses(out, routing) if torch.is_grad_enabled() else out


def permute(x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Copies each token once per expert that it goes to, and sorts the copies by expert.

    Args:
        x: [n, hidden].
        experts: [n, top_k] int64.

    Returns:
        [n * top_k, hidden], and the order: [n * top_k] int64, which element of `experts` each row is for.
    """
    order = experts.flatten().argsort(stable=True)
    return x[order // experts.shape[1]], order


def unpermute(tokens: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's copies: undoes `permute`.

    Args:
        tokens: [n * top_k, hidden], sorted by expert.
        order: as `permute` gave it.
        weights: [n, top_k].

    Returns:
        [n, hidden], in the type of `tokens`.
    """
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    copies = tokens[place].view(*weights.shape, tokens.shape[-1])
    return torch.bmm(weights.to(tokens.dtype).unsqueeze(1), copies).squeeze(1)


def grouped_linear(tokens: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiplies consecutive groups of rows by matrices of their own: [n, in] x [groups, out, in] -> [n, out].

    In one kernel where torch has one for the type and the widths, else group by group. A group without rows gets a zero
    gradient.
    """
    if _grouped_mm_takes(tokens, weight):
        ends = counts.cumsum(0, dtype=torch.int32)
        out = F.grouped_mm(tokens.contiguous(), weight.contiguous().transpose(-2, -1), offs=ends)
        if out.requires_grad:
            out.register_hook(_dense)
        return out
    if tokens.is_meta:  # there are no counts to split by, and only the shape matters
        return F.linear(tokens, weight[0])
    groups = tokens.split(counts.tolist())
    return torch.cat([F.linear(group, matrix) for group, matrix in zip(groups, weight.unbind(0), strict=True)])


def _grouped_mm_takes(tokens: Tensor, weight: Tensor) -> bool:
    # As found in torch 2.13: rows are multiples of 16 bytes, and torch.compile is told shapes for bfloat16 only.
    compiled = torch.compiler.is_compiling()
    types = (torch.bfloat16,) if compiled else (torch.float32, torch.bfloat16, torch.float16)
    known = tokens.device.type in ("cpu", "cuda") and tokens.dtype in types
    return known and all(size * tokens.element_size() % 16 == 0 for size in weight.shape[1:])


def _dense(gradient: Tensor) -> Tensor:
    # The backward of grouped_mm refuses expanded gradients (torch 2.13), even empty ones, which count as contiguous.
    dense = gradient.stride() == (gradient.shape[1], 1)
    return gradient if dense else gradient.clone(memory_format=torch.contiguous_format)


def local_tensor(parameter: Tensor) -> Tensor:
    """What this rank holds of a DTensor; another tensor as it is."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The type that a matrix product would have here; torch's grouped one does not follow autocast by itself."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
