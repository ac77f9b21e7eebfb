"""What a `DecoderConfig` amounts to: the shape of every tensor, how many numbers that is, and the work per token.

Called through the methods of `DecoderConfig` of the same names.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_llm.models.config import DecoderConfig

Shapes = dict[str, tuple[int, ...]]

ROUTING_BIAS = "e_score_correction_bias"
"""The one tensor of a decoder that is no parameter (`Router`); Hugging Face's name."""
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def parameter_shapes(config: "DecoderConfig") -> Shapes:
    """See `DecoderConfig.parameter_shapes`."""
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        block = {
            **_prefixed("self_attn", _attention(config)),
            **_prefixed("mlp", _moe(config) if config.layer_is_moe(layer) else _mlp(config, config.intermediate_size)),
            "input_layernorm.weight": (config.hidden_size,),
            "post_attention_layernorm.weight": (config.hidden_size,),
        }
        shapes.update(_prefixed(f"model.layers.{layer}", block))
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def _attention(config: "DecoderConfig") -> Shapes:
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden = config.hidden_size
    shapes = {
        **_linear("q_proj", heads, hidden, config.attention_bias),
        **_linear("k_proj", kv_heads, hidden, config.attention_bias),
        **_linear("v_proj", kv_heads, hidden, config.attention_bias),
        **_linear("o_proj", hidden, heads, config.attention_output_bias),
    }
    if config.qk_norm:
        shapes["q_norm.weight"] = (heads if config.qk_norm_whole else config.head_dim,)
        shapes["k_norm.weight"] = (kv_heads if config.qk_norm_whole else config.head_dim,)
    return shapes


def _mlp(config: "DecoderConfig", intermediate: int) -> Shapes:
    return {
        **_linear("gate_proj", intermediate, config.hidden_size, config.mlp_bias),
        **_linear("up_proj", intermediate, config.hidden_size, config.mlp_bias),
        **_linear("down_proj", config.hidden_size, intermediate, config.mlp_bias),
    }


def _moe(config: "DecoderConfig") -> Shapes:
    assert config.num_experts is not None
    experts, hidden, intermediate = config.num_experts, config.hidden_size, config.moe_intermediate_size
    shapes: Shapes = {"gate.weight": (experts, hidden)}
    if config.use_routing_bias:
        shapes[f"gate.{ROUTING_BIAS}"] = (experts,)
    for name in EXPERT_PROJECTIONS:
        rows, columns = (hidden, intermediate) if name == "down_proj" else (intermediate, hidden)
        shapes[f"experts.{name}"] = (experts, rows, columns)
    if config.n_shared_experts:
        shapes.update(_prefixed("shared_experts", _mlp(config, config.n_shared_experts * intermediate)))
    return shapes


def num_parameters(config: "DecoderConfig") -> int:
    """See `DecoderConfig.num_parameters`."""
    shapes = parameter_shapes(config)
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(ROUTING_BIAS))


def num_active_parameters(config: "DecoderConfig") -> int:
    """See `DecoderConfig.num_active_parameters`."""
    if config.num_experts is None:
        return num_parameters(config)
    idle = config.num_experts - config.num_experts_per_tok
    per_expert = len(EXPERT_PROJECTIONS) * config.hidden_size * config.moe_intermediate_size
    return num_parameters(config) - config.num_moe_layers * idle * per_expert


def flops_per_token(config: "DecoderConfig", seq_len: int) -> float:
    """See `DecoderConfig.flops_per_token`."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attended = sum(min(seq_len, config.layer_window(i) or seq_len) for i in range(config.num_hidden_layers))
    attention = 12 * config.num_attention_heads * config.head_dim * attended
    return 6 * (num_active_parameters(config) - embedding) + attention
