"""Small random transformers models, the reference that `lightning_llm.models` is measured against."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # larger than usual: attention is far from uniform, greedy choices are no ties
    "bos_token_id": 0,
    "eos_token_id": None,
}
HALF_HEAD = 8  # head_dim / 2 of SIZES
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(HALF_HEAD)],
    "long_factor": [1.0 + 0.7 * i for i in range(HALF_HEAD)],
    "original_max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 3}
DOTS1: dict[str, Any] = {
    "n_routed_experts": 6,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}

# name -> (transformers config class, changes to SIZES)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama-wide-heads": ("Llama", {"head_dim": 24}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "llama-yarn-mscale": (
        "Llama",
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 0.3}},
    ),
    "llama-yarn-untruncated": (
        "Llama",
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 600, "truncate": False}},
    ),
    "llama-yarn-betas": (
        "Llama",
        {"rope_parameters": {**YARN, "rope_theta": 1e4, "beta_fast": 8, "beta_slow": 2, "attention_factor": 1.3}},
    ),
    "llama-longrope": ("Llama", {"rope_parameters": {**LONGROPE, "rope_theta": 1e4}}),
    "llama-longrope-factor": (
        "Llama",
        {"rope_parameters": {**LONGROPE, "rope_theta": 1e4, "factor": 6.0, "original_max_position_embeddings": 64}},
    ),
    "llama-llama3": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "ministral": (
        "Ministral",
        {
            "head_dim": 16,  # this family of transformers does not derive it
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-bias-window": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "mixtral": ("Mixtral", {**EXPERTS, "num_local_experts": 6}),
    "mixtral-window": (
        "Mixtral",
        {"sliding_window": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "num_experts": 6, "moe_intermediate_size": 40, "head_dim": 24}),
    "qwen3-moe-some-layers": (
        "Qwen3Moe",
        {
            **EXPERTS,
            "num_experts": 6,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
        },
    ),
    "olmoe": ("Olmoe", {**EXPERTS, "num_experts": 6, "eos_token_id": 3}),
    "olmoe-normalised": ("Olmoe", {**EXPERTS, "num_experts": 6, "norm_topk_prob": True, "num_key_value_heads": 4}),
    "dots1": ("Dots1", {**EXPERTS, **DOTS1, "sliding_window": None}),
    "dots1-window": (
        "Dots1",
        {
            **EXPERTS,
            **DOTS1,
            "norm_topk_prob": True,
            "n_shared_experts": 2,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
}
WITH_EXPERTS = [name for name, (family, _) in VARIANTS.items() if family in ("Mixtral", "Qwen3Moe", "Olmoe", "Dots1")]


def make_reference(variant: str, **changes: Any) -> Any:
    """A transformers model of the variant: random weights with nothing left at 0 or 1, float32, eval mode."""
    import transformers

    family, own = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **own, **changes})
    config._attn_implementation = "eager"  # written with plain matmuls: independent of the kernels that we use
    torch.manual_seed(len(variant))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def reference(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """variant -> (transformers model, the folder it was saved to)."""

    def make(variant: str, **changes: Any) -> tuple[Any, Path]:
        model = make_reference(variant, **changes)
        folder = tmp_path / "reference"
        model.save_pretrained(folder)
        return model, folder

    return make
