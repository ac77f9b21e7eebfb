"""Writes `.gguf` files as llama.cpp's `convert_hf_to_gguf.py` does: its names, its order of rows, its keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_EXPERTS = {
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "w1": "ffn_gate",
    "w3": "ffn_up",
    "w2": "ffn_down",
}


def permute(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape_as(weights)
    )


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    *,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    stacked: bool = True,
    values: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Writes a model of transformers as a `.gguf` file.

    Args:
        path: To write; a folder of this name with `.hf` is left beside it.
        model: Of transformers.
        architecture: llama.cpp's name.
        tokenizer: Writes the vocabulary; None: one of numbers.
        quantization: Of the matrices.
        stacked: Experts in one tensor, as since 2024-04.
        values: Further metadata: key without the architecture -> number or text.
        extra: Further tensors.
    """
    config = model.config
    folder = path.with_suffix(".hf")
    model.save_pretrained(folder)
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if getattr(config, "moe_intermediate_size", None):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in (values or {}).items():
        write = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        write[type(value)](f"{architecture}.{key}", value)
    (tokenizer or numbers(config.vocab_size))(writer)
    for name, tensor in _renamed(load_file(folder / "model.safetensors"), architecture, heads, kv_heads, stacked):
        data = tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.F32 if data.ndim == 1 else quantization
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _renamed(
    tensors: dict[str, torch.Tensor], architecture: str, heads: int, kv_heads: int, stacked: bool
) -> list[tuple[str, torch.Tensor]]:
    renamed: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            tensor = permute(tensor, heads if module.endswith("q_proj") else kv_heads)
        if module in _NAMES:
            renamed[f"{_NAMES[module]}.{kind}"] = tensor
            continue
        layer, _, inner = module.removeprefix("model.layers.").partition(".")
        if ".experts." in inner:
            _, _, rest = inner.partition(".experts.")
            expert, _, projection = rest.partition(".")
            experts.setdefault(f"blk.{layer}.{_EXPERTS[projection]}", {})[int(expert)] = tensor
        else:
            renamed[f"blk.{layer}.{_NAMES[inner]}.{kind}"] = tensor
    for name, several in experts.items():
        if stacked:
            renamed[f"{name}_exps.weight"] = torch.stack([several[expert] for expert in sorted(several)])
        else:
            renamed |= {f"{name}.{expert}.weight": tensor for expert, tensor in several.items()}
    return sorted(renamed.items())


def numbers(size: int) -> Callable[[gguf.GGUFWriter], None]:
    """A vocabulary for models that only see ids: the bytes, and then names."""
    alphabet = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = [*alphabet, *(f"<{number}>" for number in range(len(alphabet), size))][:size]
    return byte_level(tokens, [], "gpt-2", [NORMAL] * min(size, 256) + [CONTROL] * max(0, size - 256))


def byte_level(
    tokens: Sequence[str], merges: Sequence[str], pre: str | None, types: Sequence[int], **values: Any
) -> Callable[[gguf.GGUFWriter], None]:
    """A byte-level BPE vocabulary; `values` by the names of GGUFWriter's methods, such as `bos_token_id`."""

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(list(tokens))
        writer.add_token_types(list(types))
        if merges:
            writer.add_token_merges(list(merges))
        for name, value in values.items():
            getattr(writer, f"add_{name}")(value)

    return write


def sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], **values: Any
) -> Callable[[gguf.GGUFWriter], None]:
    """A SentencePiece vocabulary; `values` as above."""

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(list(tokens))
        writer.add_token_scores(list(scores))
        writer.add_token_types(list(types))
        for name, value in values.items():
            getattr(writer, f"add_{name}")(value)

    return write
