"""A model as the planner sees it: which weights each layer has, how tensor parallelism cuts them, what a token costs.

Read off `DecoderConfig.parameter_shapes()`, so that counts are exact whatever the architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.sizes import ROUTING_BIAS
from lightning_llm.planner.dividing import balanced_counts

# The dim of a weight that tensor parallelism cuts (Megatron's column and row scheme, as strategies/plan.py names it);
# what is not here is replicated over the axis: norms, routers, biases of row-parallel layers.
TENSOR_DIM = {
    "embed_tokens": 0,
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "gate_proj": 0,
    "up_proj": 0,
    "lm_head": 0,
    "o_proj": 1,
    "down_proj": 1,
}


class Weight(NamedTuple):
    """One parameter of a layer."""

    name: str
    shape: tuple[int, ...]

    @property
    def is_expert(self) -> bool:
        """Whether it is a stack `[experts, ...]`, which expert parallelism shares out and tensor does not."""
        return ".experts." in f".{self.name}"

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)

    def cut(self, tensor: int) -> tuple[int, ...]:
        """Shape on one rank of the tensor axis."""
        module, _, leaf = self.name.rpartition(".")
        dim = TENSOR_DIM.get(module.rpartition(".")[2])
        if dim is None or self.is_expert or dim >= len(self.shape) or (leaf == "bias" and dim == 1):
            return self.shape
        return tuple(size // tensor if i == dim else size for i, size in enumerate(self.shape))

    def shard(self, tensor: int, shards: int) -> int:
        """Elements on the first of `shards` ranks: `fully_shard` cuts dim 0 into chunks, the first ones are full."""
        first, *rest = self.cut(tensor)
        return -(-first // shards) * math.prod(rest)


@dataclass(frozen=True, eq=False)  # by identity: equal blocks are one object (see _unit), and hashing must be cheap
class Unit:
    """Weights that are gathered as one: a block, or what is around the blocks."""

    weights: tuple[Weight, ...]

    @cached_property
    def experts(self) -> int:
        """Elements of all its experts."""
        return sum(w.numel for w in self.weights if w.is_expert)

    def gathered(self, tensor: int, expert: int) -> int:
        """Elements on a rank while the unit is gathered."""
        return sum(math.prod(w.cut(tensor)) for w in self.weights if not w.is_expert) + self.experts // expert

    def stored(self, tensor: int, shards: int, expert: int, expert_shards: int) -> int:
        """Elements that a rank stores, the fullest one."""
        dense = sum(w.shard(tensor, shards) for w in self.weights if not w.is_expert)
        # Experts are spread evenly: over dim 0 while there are enough of them, else within each expert.
        experts = sum(-(-w.numel // (expert * expert_shards)) for w in self.weights if w.is_expert)
        return dense + experts

    def matrices(self, tensor: int, shards: int, expert: int, expert_shards: int) -> int:
        """Of `stored`, the elements of matrices."""
        only = Unit(tuple(w for w in self.weights if len(w.shape) > 1))
        return only.stored(tensor, shards, expert, expert_shards)


@dataclass(frozen=True, eq=False)
class Shape:
    """A decoder's sizes.

    Attributes:
        config: What it was read off.
        layers: The weights of each block.
        windows: Tokens that each block attends to at most; None for all.
        experts_per_token: Of a mixture-of-experts layer; 0 in a dense model.
    """

    config: DecoderConfig
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    tied: bool
    embedding: Unit
    layers: tuple[Unit, ...]
    windows: tuple[int | None, ...]
    final: Unit
    experts_per_token: int = 0

    @classmethod
    def of(cls, config: DecoderConfig) -> Shape:
        """The shape of a configuration."""
        blocks: list[list[Weight]] = [[] for _ in range(config.num_hidden_layers)]
        ends: dict[str, list[Weight]] = {"embedding": [], "final": []}
        for name, shape in config.parameter_shapes().items():
            if name.endswith(ROUTING_BIAS):  # a buffer of one number an expert
                continue
            layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
            if layer:
                blocks[int(layer[1])].append(Weight(layer[2], shape))
            else:
                ends["embedding" if "embed_tokens" in name else "final"].append(Weight(name, shape))
        layers = tuple(_unit(tuple(weights)) for weights in blocks)
        return cls(
            config=config,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qk_norm=config.qk_norm,
            tied=config.tie_word_embeddings,
            embedding=Unit(tuple(ends["embedding"])),
            layers=layers,
            windows=tuple(config.layer_window(i) for i in range(config.num_hidden_layers)),
            final=Unit(tuple(ends["final"])),
            experts_per_token=config.num_experts_per_tok or 0,
        )

    @cached_property
    def num_parameters(self) -> int:
        """Elements of the whole model; a tied head counts once."""
        return sum(w.numel for unit in (self.embedding, *self.layers, self.final) for w in unit.weights)

    @cached_property
    def num_experts(self) -> int:
        """Experts of a mixture-of-experts layer; 0 in a dense model."""
        return max(sizes_of(unit).experts for unit in self.layers)

    def head(self, stages: int) -> Unit:
        """Final norm and output layer; the last of several stages has its own copy of a tied one."""
        if not self.tied or stages == 1:
            return self.final
        return Unit((*self.final.weights, *(Weight("lm_head.weight", w.shape) for w in self.embedding.weights)))


class LayerSizes(NamedTuple):
    """Widths of a block's feed-forward part."""

    intermediate: int
    """Of a dense MLP or of the shared experts; 0 without."""
    experts: int
    expert_intermediate: int


@lru_cache(maxsize=1024)
def sizes_of(unit: Unit) -> LayerSizes:
    """The widths of a block, read off its weights."""
    dense, experts, width = 0, 0, 0
    for weight in unit.weights:
        if weight.is_expert and weight.name.endswith("gate_proj"):
            experts, width = weight.shape[0], weight.shape[1]
        elif weight.name.endswith("gate_proj.weight") and not weight.is_expert:
            dense = weight.shape[0]
    return LayerSizes(dense, experts, width)


@lru_cache(maxsize=1024)
def _unit(weights: tuple[Weight, ...]) -> Unit:
    """One object per kind of block, so that what is computed from it is computed once."""
    return Unit(weights)


@lru_cache(maxsize=1024)
def balanced_layers(shape: Shape, num_stages: int) -> tuple[int, ...]:
    """Blocks per stage as strategies cut them: the largest stage, embedding and output layer included, is the smallest
    that it can be.

    Raises:
        ConfigurationError: There are more stages than blocks.
    """
    num_layers = len(shape.layers)
    if num_stages > num_layers:
        raise ConfigurationError(
            f"{num_stages} pipeline stages are more than the model's {num_layers} layers. Use at most {num_layers}."
        )
    costs = [unit.gathered(1, 1) for unit in shape.layers]
    costs[0] += shape.embedding.gathered(1, 1)
    costs[-1] += shape.head(num_stages).gathered(1, 1)
    return tuple(balanced_counts(costs, num_stages))


@dataclass(frozen=True, eq=False)
class Stage:
    """What one pipeline stage holds."""

    index: int
    layers: tuple[Unit, ...]
    windows: tuple[int | None, ...]
    root: Unit
    """Embedding, final norm and output layer, as far as they are here."""
    is_first: bool
    is_last: bool


@lru_cache(maxsize=256)
def cut_stages(shape: Shape, layers_per_stage: tuple[int, ...]) -> tuple[Stage, ...]:
    """The model in stages.

    Raises:
        ConfigurationError: The blocks do not add up.
    """
    _check_sum(layers_per_stage, len(shape.layers))
    stages, start = [], 0
    for index, count in enumerate(layers_per_stage):
        first, last = index == 0, index == len(layers_per_stage) - 1
        head = shape.head(len(layers_per_stage)).weights if last else ()
        stages.append(
            Stage(
                index,
                shape.layers[start : start + count],
                shape.windows[start : start + count],
                Unit((*(shape.embedding.weights if first else ()), *head)),
                first,
                last,
            )
        )
        start += count
    return tuple(stages)


def _check_sum(layers_per_stage: Sequence[int], num_layers: int) -> None:
    if sum(layers_per_stage) != num_layers:
        raise ConfigurationError(
            f"layers_per_stage {tuple(layers_per_stage)} adds up to {sum(layers_per_stage)}, but the model has "
            f"{num_layers} layers."
        )
