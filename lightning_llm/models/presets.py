"""The named models: published architectures as plain dictionaries, plus `tiny` and others that train on a laptop.

Read by `DecoderConfig.preset`. Every figure is the one in the model's public `config.json`; to add a model, add a row.
"""

from typing import Any

_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}
_LLAMA31: dict[str, Any] = {
    **_LLAMA3,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_LLAMA32: dict[str, Any] = {
    **_LLAMA31,
    "tie_word_embeddings": True,
    "rope_scaling": {**_LLAMA31["rope_scaling"], "factor": 32.0},
}
_LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
_LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}

_SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
_MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
_QWEN25: dict[str, Any] = {
    "model_type": "qwen2",
    "attention_bias": True,
    "vocab_size": 151936,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "dtype": "bfloat16",
}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "qk_norm": True,
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "dtype": "bfloat16",
}

_MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
_QWEN3_MOE: dict[str, Any] = {
    **_QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "router_aux_loss_coef": 0.001,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 4096,
        **_sizes(256, 704, 4, 8, 4),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    "small": {
        "model_type": "llama",
        "vocab_size": 4096,
        **_sizes(384, 1024, 6, 6, 2),
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    # A token meets as many parameters of experts as `tiny` has of MLPs.
    "tiny-moe": {
        "model_type": "qwen3_moe",
        "qk_norm": True,
        "vocab_size": 4096,
        **_sizes(256, 704, 4, 8, 4),
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 352,
        "router_aux_loss_coef": 0.01,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    # SmolLM2-135M is the one of the three that was initialised with 1/sqrt(hidden_size).
    "smollm2-135m": {**_SMOLLM2, **_sizes(576, 1536, 30, 9, 3), "initializer_range": 576**-0.5},
    "smollm2-360m": {**_SMOLLM2, **_sizes(960, 2560, 32, 15, 5)},
    "smollm2-1.7b": {**_SMOLLM2, **_sizes(2048, 8192, 24, 32, 32), "rope_theta": 130000.0},
    "llama3-8b": {**_LLAMA3, **_LLAMA_8B},
    "llama3-70b": {**_LLAMA3, **_LLAMA_70B},
    # 405B was published as Llama 3.1 only, hence its scaled rotary embedding.
    "llama3-405b": {**_LLAMA31, **_sizes(16384, 53248, 126, 128, 8)},
    "llama3.1-8b": {**_LLAMA31, **_LLAMA_8B},
    "llama3.1-70b": {**_LLAMA31, **_LLAMA_70B},
    "llama3.2-1b": {**_LLAMA32, **_sizes(2048, 8192, 16, 32, 8), "head_dim": 64},
    "llama3.2-3b": {**_LLAMA32, **_sizes(3072, 8192, 28, 24, 8), "head_dim": 128},
    # v0.1 has the sliding window; v0.3 dropped it for a longer rotary base.
    "mistral-7b": {**_MISTRAL, "vocab_size": 32000, "rope_theta": 10000.0, "sliding_window": 4096},
    "mistral-7b-v0.3": {**_MISTRAL, "vocab_size": 32768, "rope_theta": 1000000.0},
    "qwen2.5-0.5b": {
        **_QWEN25,
        **_sizes(896, 4864, 24, 14, 2),
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    "qwen2.5-1.5b": {**_QWEN25, **_sizes(1536, 8960, 28, 12, 2), "tie_word_embeddings": True},
    "qwen2.5-7b": {**_QWEN25, **_sizes(3584, 18944, 28, 28, 4), "vocab_size": 152064},
    "qwen3-0.6b": {**_QWEN3, **_sizes(1024, 3072, 28, 16, 8), "tie_word_embeddings": True},
    "qwen3-1.7b": {**_QWEN3, **_sizes(2048, 6144, 28, 16, 8), "tie_word_embeddings": True},
    "qwen3-4b": {**_QWEN3, **_sizes(2560, 9728, 36, 32, 8), "tie_word_embeddings": True},
    "qwen3-8b": {**_QWEN3, **_sizes(4096, 12288, 36, 32, 8)},
    "qwen3-14b": {**_QWEN3, **_sizes(5120, 17408, 40, 40, 8)},
    "qwen3-32b": {**_QWEN3, **_sizes(5120, 25600, 64, 64, 8)},
    "mixtral-8x7b": {
        **_MIXTRAL,
        **_sizes(4096, 14336, 32, 32, 8),
        "max_position_embeddings": 32768,
        "router_aux_loss_coef": 0.02,
    },
    "mixtral-8x22b": {
        **_MIXTRAL,
        **_sizes(6144, 16384, 56, 48, 8),
        "max_position_embeddings": 65536,
        "router_aux_loss_coef": 0.001,
    },
    "qwen3-30b-a3b": {**_QWEN3_MOE, **_sizes(2048, 6144, 48, 32, 4), "moe_intermediate_size": 768},
    "qwen3-235b-a22b": {**_QWEN3_MOE, **_sizes(4096, 12288, 94, 64, 4), "moe_intermediate_size": 1536},
    "olmoe-1b-7b": {
        "model_type": "olmoe",
        "qk_norm": True,
        "qk_norm_whole": True,
        "vocab_size": 50304,
        **_sizes(2048, 1024, 16, 16, 16),
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50279,
        "pad_token_id": 1,
        "dtype": "bfloat16",
    },
}
