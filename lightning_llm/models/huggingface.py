"""Between `DecoderConfig` and Hugging Face's `config.json`: which family says what, in both directions.

Called by `DecoderConfig` only. Families differ in what a flag means (Llama's `attention_bias` covers o_proj, Qwen2's
biases are implied, Qwen's sliding window needs `use_sliding_window`); those differences end here.
"""

from typing import TYPE_CHECKING, Any

from lightning_llm.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_llm.models.config import DecoderConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
}

# Fields that mean the same in every family, copied as they are.
_PLAIN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# What transformers assumes where a config.json is silent and our own default differs.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "ministral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    "qwen3": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3_moe": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    "olmoe": {
        "max_position_embeddings": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    },
    "dots1": {
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.0,
    },
}

# What a family with experts calls their number, what else its config.json says about them, and what it implies.
_NUM_EXPERTS = {
    "mixtral": "num_local_experts",
    "qwen3_moe": "num_experts",
    "olmoe": "num_experts",
    "dots1": "n_routed_experts",
}
_EXPERT_FIELDS: dict[str, tuple[str, ...]] = {
    "mixtral": (),
    "qwen3_moe": ("moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
    "olmoe": ("norm_topk_prob",),
    "dots1": (
        "moe_intermediate_size",
        "norm_topk_prob",
        "n_shared_experts",
        "first_k_dense_replace",
        "routed_scaling_factor",
    ),
}
_SOFTMAX = {"scoring_func": "softmax", "use_routing_bias": False, "routed_scaling_factor": 1.0, "n_shared_experts": 0}
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": (), "first_k_dense_replace": 0}
_ONE_WIDTH = {"moe_intermediate_size": None}  # that is, intermediate_size
_IMPLIED: dict[str, dict[str, Any]] = {
    "mixtral": {**_SOFTMAX, **_EVERY_LAYER, **_ONE_WIDTH, "norm_topk_prob": True},
    "qwen3_moe": {**_SOFTMAX, "first_k_dense_replace": 0},
    "olmoe": {**_SOFTMAX, **_EVERY_LAYER, **_ONE_WIDTH},
    "dots1": {"scoring_func": "sigmoid", "use_routing_bias": True, "decoder_sparse_step": 1, "mlp_only_layers": ()},
}

_WITH_QK_NORM = ("qwen3", "qwen3_moe", "olmoe", "dots1")
_WITH_FOUR_BIASES = ("llama", "qwen3", "qwen3_moe", "olmoe", "dots1")  # attention_bias means q, k, v and o
_WITHOUT_BIASES = ("mistral", "ministral", "mixtral")
_WITHOUT_WINDOW = ("llama", "olmoe")
_WITH_ONE_WINDOW = ("mistral", "mixtral", "qwen3_moe")
_WITH_LAYER_TYPES = ("ministral", "qwen2", "qwen3", "dots1")


def _misfit(config: "DecoderConfig", family: str) -> str | None:
    """Why the family cannot express this config, or None if it can."""
    windows = {config.layer_window(i) for i in range(config.num_hidden_layers)}
    if family == "llama" and config.hidden_size % config.num_attention_heads:
        return f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}"
    if family == "olmoe" and config.head_dim * config.num_attention_heads != config.hidden_size:
        return (
            f"head_dim {config.head_dim} * {config.num_attention_heads} heads is not hidden_size {config.hidden_size}"
        )
    if config.qk_norm != (family in _WITH_QK_NORM):
        return f"qk_norm is {config.qk_norm}"
    if config.qk_norm_whole != (family == "olmoe"):
        return f"qk_norm_whole is {config.qk_norm_whole}"
    if config.mlp_bias and family != "llama":
        return "mlp_bias is True"
    if family == "qwen2" and not (config.attention_bias and not config.attention_output_bias):
        return "it has attention_bias=True, attention_output_bias=False"
    if family in _WITH_FOUR_BIASES and config.attention_bias != config.attention_output_bias:
        return f"attention_bias {config.attention_bias} != attention_output_bias {config.attention_output_bias}"
    if family in _WITHOUT_BIASES and (config.attention_bias or config.attention_output_bias):
        return "it has no attention biases"
    if family in _WITHOUT_WINDOW and windows != {None}:
        return "it has no sliding window"
    if family in _WITH_ONE_WINDOW and len(windows) > 1:
        return "all its layers have the same window"
    return _misfit_of_experts(config, family)


def _misfit_of_experts(config: "DecoderConfig", family: str) -> str | None:
    if (config.num_experts is not None) != (family in _NUM_EXPERTS):
        return f"num_experts is {config.num_experts}"
    for name, implied in _IMPLIED.get(family, {}).items():
        value, implied = getattr(config, name), config.intermediate_size if implied is None else implied
        if value != implied:
            return f"{name} is {value}, not {implied}"
    if family == "dots1" and not config.n_shared_experts:
        return "n_shared_experts is 0"
    return None


def family(config: "DecoderConfig") -> str:
    """The Hugging Face family of this config: the one asked for, or the first one that can express it.

    Raises:
        ConfigurationError: none can, or the one asked for cannot; a model that could never be exported is refused
            before it is trained.
    """
    if config.model_type is not None:
        if config.model_type not in ARCHITECTURES:
            raise ConfigurationError(
                f"model_type {config.model_type!r} is not supported: use one of {', '.join(ARCHITECTURES)}."
            )
        misfit = _misfit(config, config.model_type)
        if misfit is not None:
            raise ConfigurationError(
                f"model_type {config.model_type!r} cannot express this model: {misfit}. Leave model_type out to have "
                "the fitting one chosen."
            )
        return config.model_type
    misfits = {name: _misfit(config, name) for name in ARCHITECTURES}
    for name, misfit in misfits.items():
        if misfit is None:
            return name
    reasons = "; ".join(f"{name}: {misfit}" for name, misfit in misfits.items())
    raise ConfigurationError(f"No Hugging Face architecture has this combination of settings ({reasons}).")


def read(values: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `DecoderConfig` for the content of a `config.json`.

    Raises:
        ConfigurationError: it names an architecture, activation, quantisation or rotary layout that is not implemented,
            or lacks a size.
    """
    if not isinstance(values, dict):
        raise ConfigurationError(f"A model config is a JSON object, not a {type(values).__name__}.")
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigurationError(
            f"model_type {model_type!r} is not supported: Decoder implements {', '.join(ARCHITECTURES)}."
        )
    # transformers' AutoConfig reads a Mistral with layer_types as a Ministral, too.
    if model_type == "mistral" and values.get("layer_types") is not None:
        model_type = "ministral"
    if values.get("hidden_act", "silu") != "silu":
        raise ConfigurationError(f"hidden_act {values['hidden_act']!r} is not supported: Decoder's MLP is silu-gated.")
    if values.get("quantization_config") is not None:
        raise ConfigurationError(
            "quantization_config is set: these weights are quantised, and Decoder loads float weights only. Use the "
            "unquantised model."
        )
    missing = [name for name in _REQUIRED if values.get(name) is None]
    if missing:
        raise ConfigurationError(f"{', '.join(missing)} missing from the model config.")

    fields: dict[str, Any] = {"model_type": model_type, **_DEFAULTS[model_type]}
    fields.update({name: values[name] for name in _PLAIN if values.get(name) is not None})
    # transformers writes `num_key_value_heads: null` for "as many as heads"; absent means the family's default.
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = None
    if "head_dim" in values and values["head_dim"] is None:
        fields["head_dim"] = None
    fields["dtype"] = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    fields["qk_norm"] = model_type in _WITH_QK_NORM
    fields["qk_norm_whole"] = model_type == "olmoe"
    bias = model_type == "qwen2" or bool(values.get("attention_bias") and model_type in _WITH_FOUR_BIASES)
    fields["attention_bias"] = bias
    fields["attention_output_bias"] = bias and model_type != "qwen2"
    fields["mlp_bias"] = bool(values.get("mlp_bias")) and model_type == "llama"
    fields.update(_read_windows(model_type, values))
    fields.update(_read_rope(values, fields.get("rope_theta", 10000.0)))
    if model_type in _NUM_EXPERTS:
        fields.update(_read_experts(model_type, values))
    return fields


def _read_experts(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    if values.get("clip_qkv") is not None:
        raise ConfigurationError(f"clip_qkv {values['clip_qkv']} is not supported: Decoder does not clip q, k and v.")
    for name in ("n_group", "topk_group"):
        if values.get(name, 1) not in (1, None):
            raise ConfigurationError(
                f"{name} {values[name]} is not supported: Decoder chooses experts from one group, that is {name} 1."
            )
    fields = {name: value for name, value in _IMPLIED[model_type].items() if value is not None}
    # transformers writes some families' number of experts under its own common name.
    numbers = [values[name] for name in (_NUM_EXPERTS[model_type], "num_local_experts") if values.get(name)]
    if numbers:
        fields["num_experts"] = numbers[0]
    elif "num_experts" not in _DEFAULTS[model_type]:
        raise ConfigurationError(f"{_NUM_EXPERTS[model_type]} missing from the model config.")
    written = ("num_experts_per_tok", "router_aux_loss_coef", *_EXPERT_FIELDS[model_type])
    fields.update({name: values[name] for name in written if values.get(name) is not None})
    return fields


def _read_windows(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    if model_type in _WITHOUT_WINDOW:
        return {}
    if model_type == "mixtral":
        return {"sliding_window": values.get("sliding_window")}
    window = values.get("sliding_window", 4096)
    if model_type in ("mistral", "ministral"):
        layer_types = values.get("layer_types")
        return {"sliding_window": window, "layer_types": tuple(layer_types) if layer_types else None}
    if not values.get("use_sliding_window", model_type == "dots1"):
        # Qwen writes a window even where it is switched off.
        return {"sliding_window": None, "layer_types": None}
    if model_type == "qwen3_moe":
        return {"sliding_window": window}
    layers = range(values["num_hidden_layers"])
    first = values.get("max_window_layers", 62 if model_type == "dots1" else 28)
    layer_types = values.get("layer_types") or [
        "sliding_attention" if window is not None and layer >= first else "full_attention" for layer in layers
    ]
    if model_type == "dots1" and "sliding_attention" not in layer_types:
        return {"sliding_window": None, "layer_types": None}
    return {"sliding_window": window, "layer_types": tuple(layer_types)}


def _read_rope(values: dict[str, Any], default_theta: float) -> dict[str, Any]:
    # transformers gives `rope_scaling` precedence over `rope_parameters` where a file has both.
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigurationError("rope_parameters differ per layer type, which Decoder does not implement.")
    theta = rope.pop("rope_theta", None) or values.get("rope_theta") or default_theta
    partial = rope.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ConfigurationError(f"partial_rotary_factor {partial} is not supported: Decoder rotates whole heads.")
    # Phi-3 style files keep the pretraining length outside; transformers lets that one win.
    outside = values.get("original_max_position_embeddings")
    if outside is not None and (rope.get("rope_type") or rope.get("type")) in ("yarn", "longrope", "llama3"):
        rope["original_max_position_embeddings"] = outside
    return {"rope_theta": theta, "rope_scaling": rope or None}


def write(config: "DecoderConfig") -> dict[str, Any]:
    """The content of `config.json` for this config, in the old and the new form at once: transformers 4 reads
    `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5 `rope_parameters` and `dtype`."""
    values: dict[str, Any] = {"architectures": [ARCHITECTURES[config.model_type]], "model_type": config.model_type}
    values.update({name: getattr(config, name) for name in _PLAIN})
    if isinstance(config.eos_token_id, tuple):
        values["eos_token_id"] = list(config.eos_token_id)
    values["hidden_act"] = "silu"
    values["use_cache"] = True
    values["attention_dropout"] = 0.0
    values["rope_theta"] = config.rope_theta
    values["rope_scaling"] = dict(config.rope_scaling) if config.rope_scaling else None
    values["rope_parameters"] = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    values["dtype"] = values["torch_dtype"] = config.dtype
    if config.model_type in _WITH_FOUR_BIASES:
        values["attention_bias"] = config.attention_bias
    if config.model_type == "llama":
        values["mlp_bias"] = config.mlp_bias
    if config.model_type not in _WITHOUT_WINDOW:
        values["sliding_window"] = config.sliding_window
    layer_types = [
        "full_attention" if config.layer_window(i) is None else "sliding_attention"
        for i in range(config.num_hidden_layers)
    ]
    if config.model_type in ("qwen2", "qwen3", "qwen3_moe"):
        values["use_sliding_window"] = config.sliding_window is not None
    if config.model_type in ("qwen2", "qwen3", "dots1"):
        # Older readers know only "sliding from layer n on"; layer_types is exact.
        full = [i for i, kind in enumerate(layer_types) if kind == "full_attention"]
        values["max_window_layers"] = full[-1] + 1 if full else 0
    if config.model_type in _WITH_LAYER_TYPES:
        values["layer_types"] = layer_types
    if config.model_type in _NUM_EXPERTS:
        values.update(_write_experts(config))
    return values


def _write_experts(config: "DecoderConfig") -> dict[str, Any]:
    values: dict[str, Any] = {_NUM_EXPERTS[config.model_type]: config.num_experts, "output_router_logits": False}
    for name in ("num_experts_per_tok", "router_aux_loss_coef", *_EXPERT_FIELDS[config.model_type]):
        values[name] = getattr(config, name)
    if "mlp_only_layers" in values:
        values["mlp_only_layers"] = list(config.mlp_only_layers)
    if config.model_type == "dots1":
        values["n_group"] = values["topk_group"] = 1
    return values
