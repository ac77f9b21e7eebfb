"""What a model tells about itself so that it can be parallelised: a `ParallelPlan`.

Models know nothing of parallelism. A plan names their parts; tensor.py, pipeline.py and sharding.py act on the names.
`Decoder` has a plan here; a user's own model offers one as an attribute or method named `parallel_plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, Literal

from torch import nn

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.decoder import Decoder
from lightning_llm.strategies.mesh import ParallelDims, divisors

TensorStyle = Literal[
    "embedding", "norm", "head_norm", "projection_norm", "gather", "column", "row", "router", "vocabulary"
]


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Names of a model's parts, as `named_modules()` gives them; `*` stands for any characters.

    Attributes:
        tensor_parallel: Module pattern -> tensor-parallel style (see `tensor.py`): `embedding`, `norm`, `head_norm`
            (a norm over each head), `projection_norm` (over all heads), `gather` (a block that needs the whole
            sequence; its hidden states are its first argument, or the keyword `hidden_states`), `column`, `row`,
            `router` (of a mixture of experts), `vocabulary` (the output layer; its logits stay split over the
            vocabulary). Experts need no style: tensor ranks share them as data ranks do.
        tensor_divides: Label -> number that the tensor-parallel size must divide, checked before anything starts.
        pipeline_first: Modules that only the first stage has; the others have None in their place.
        pipeline_units: Name of the `nn.ModuleList` or `nn.ModuleDict` of blocks that stages share out. The blocks of a
            stage keep their numbers, so that parameter names do not depend on the layout: iterate over the container,
            do not index it.
        pipeline_last: Modules that only the last stage has.
        tied: Pairs (owner, copy) of parameter names that are one tensor.
        attention_heads: `(heads, key-value heads)` of a model whose forward, and that of each of its pipeline stages,
            takes `positions` and `attention` as `Decoder.forward` does; None where a sequence cannot be cut.
        num_experts: Experts of each mixture layer (`models.moe.Experts`); 0 for a dense model.
        forward: For a model whose own forward cannot run with parts missing or with a part of the sequence: called in
            its place once the model is cut over pipeline or tensor ranks, as `forward(stage, x, *arguments,
            sequence_ranks=n, **keywords)`. After the first stage x is hidden states, split among n ranks along the
            sequence.
    """

    tensor_parallel: Mapping[str, TensorStyle] = field(default_factory=dict)
    tensor_divides: Mapping[str, int] = field(default_factory=dict)
    pipeline_first: tuple[str, ...] = ()
    pipeline_units: str = ""
    pipeline_last: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    attention_heads: tuple[int, int] | None = None
    num_experts: int = 0
    forward: Callable[..., Any] | None = None

    def check(self, model: nn.Module, dims: ParallelDims) -> None:
        """Refuses sizes that this model cannot be cut into.

        Raises:
            ConfigurationError: with the arithmetic and what to change.
        """
        name = type(model).__name__
        tensor_parallel_size, pipeline_parallel_size = dims.tensor_parallel_size, dims.pipeline_parallel_size
        if tensor_parallel_size > 1:
            if not self.tensor_parallel:
                raise ConfigurationError(
                    f"tensor_parallel_size={tensor_parallel_size}, but the plan of {name} names no tensor-parallel "
                    "modules. Add `tensor_parallel` to its ParallelPlan."
                )
            for label, number in self.tensor_divides.items():
                if number % tensor_parallel_size:
                    valid = [size for size in range(1, number + 1) if all(n % size == 0 for n in self._divided())]
                    raise ConfigurationError(
                        f"tensor_parallel_size({tensor_parallel_size}) does not divide {label}({number}). "
                        f"Sizes that this model allows: {valid}."
                    )
        if dims.context_parallel_size > 1 and self.attention_heads is None:
            raise ConfigurationError(
                f"context_parallel_size={dims.context_parallel_size}, but the plan of {name} names no "
                "`attention_heads`: its forward must take `positions` and `attention`, as Decoder.forward does."
            )
        if dims.expert_parallel_size > 1:
            if not self.num_experts:
                raise ConfigurationError(
                    f"expert_parallel_size={dims.expert_parallel_size}, but {name} has no experts. Leave it at 1."
                )
            if self.num_experts % dims.expert_parallel_size:
                valid = [n for n in divisors(self.num_experts) if dims.foldable_size % n == 0]
                raise ConfigurationError(
                    f"expert_parallel_size({dims.expert_parallel_size}) does not divide the {self.num_experts} experts "
                    f"of each layer. Use one of {valid}."
                )
        if pipeline_parallel_size > 1:
            if not self.pipeline_units:
                raise ConfigurationError(
                    f"pipeline_parallel_size={pipeline_parallel_size}, but the plan of {name} names no pipeline "
                    "units. Add `pipeline_units` to its ParallelPlan."
                )
            modules = dict(model.named_modules())
            unknown = [n for n in (self.pipeline_units, *self.pipeline_first, *self.pipeline_last) if n not in modules]
            if unknown:
                raise ConfigurationError(
                    f"The plan of {name} names {unknown} for the pipeline, but the model has no such "
                    "modules. Names are those of named_modules()."
                )
            units = len(self.units(model))
            if pipeline_parallel_size > units:
                raise ConfigurationError(
                    f"pipeline_parallel_size({pipeline_parallel_size}) is more than the {units} layers of the model. "
                    f"Use at most {units}."
                )

    def units(self, model: nn.Module) -> list[nn.Module]:
        """The model's blocks, in order; none if the plan names no container of them."""
        return list(model.get_submodule(self.pipeline_units).children()) if self.pipeline_units else []

    def _divided(self) -> list[int]:
        return list(self.tensor_divides.values())


@singledispatch
def plan_of(model: nn.Module) -> ParallelPlan | None:
    """The plan of a model, or None: such a model trains under data parallelism alone.

    A model's own `parallel_plan` comes first; models of transformers have one derived from what they bring along.
    """
    from lightning_llm.strategies.transformers_plan import known_plan  # it builds a ParallelPlan

    plan = getattr(model, "parallel_plan", None)
    if plan is None:
        return known_plan(model)
    return plan() if callable(plan) else plan


@plan_of.register
def _(model: Decoder) -> ParallelPlan:
    config = model.config
    layer = "model.layers.*"
    styles: dict[str, TensorStyle] = {
        "model.embed_tokens": "embedding",
        f"{layer}.input_layernorm": "norm",
        f"{layer}.self_attn": "gather",
        f"{layer}.self_attn.q_proj": "column",
        f"{layer}.self_attn.k_proj": "column",
        f"{layer}.self_attn.v_proj": "column",
        f"{layer}.self_attn.q_norm": "projection_norm" if config.qk_norm_whole else "head_norm",
        f"{layer}.self_attn.k_norm": "projection_norm" if config.qk_norm_whole else "head_norm",
        f"{layer}.self_attn.o_proj": "row",
        f"{layer}.post_attention_layernorm": "norm",
        "model.norm": "norm",
        "lm_head": "vocabulary",
    }
    divided = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    for index in range(config.num_hidden_layers):
        mlp = f"model.layers.{index}.mlp"
        if config.layer_is_moe(index):
            styles[f"{mlp}.gate"] = "router"
            if config.n_shared_experts:
                styles |= _mlp_styles(f"{mlp}.shared_experts")
                divided["n_shared_experts * moe_intermediate_size"] = (
                    config.n_shared_experts * config.moe_intermediate_size
                )
        else:
            styles |= _mlp_styles(mlp)
            divided["intermediate_size"] = config.intermediate_size
    return ParallelPlan(
        tensor_parallel=styles,
        tensor_divides=divided,
        pipeline_first=("model.embed_tokens",),
        pipeline_units="model.layers",
        pipeline_last=("model.norm", "lm_head"),
        tied=(("model.embed_tokens.weight", "lm_head.weight"),) if config.tie_word_embeddings else (),
        attention_heads=(config.num_attention_heads, config.num_key_value_heads),
        num_experts=config.num_experts or 0,
    )


def _mlp_styles(name: str) -> dict[str, TensorStyle]:
    return {name: "gather", f"{name}.gate_proj": "column", f"{name}.up_proj": "column", f"{name}.down_proj": "row"}
