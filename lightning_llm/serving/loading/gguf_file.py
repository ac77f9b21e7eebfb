"""A `.gguf` file (llama.cpp's format): its metadata as a `DecoderConfig`, its tensors as those of a `Decoder`.

Called by `gguf_conversion.py`. The file is mapped; a tensor's blocks are dequantised when it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

# What a family says by its name alone. The first is also Mistral, SmolLM2 and, with experts, Mixtral.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"qk_norm": True},
    "qwen3moe": {"qk_norm": True, "norm_topk_prob": True},
    "olmoe": {"qk_norm": True, "qk_norm_whole": True, "norm_topk_prob": False},
}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_EXPERTS = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
_ROPE_FREQUENCIES = "rope_freqs.weight"  # Llama 3's scaling of the rotary frequencies, as numbers
_IGNORED = (_ROPE_FREQUENCIES, ".attn_rot_embd", ".attn_rot_embd.weight")
_CHUNK = 1 << 24  # elements that are dequantised at a time: 64 MiB as float32


class GGUFFile:
    """An open `.gguf` file.

    Attributes:
        path: Of it.
        architecture: llama.cpp's name of the family.
        tensors: By their names in the file.

    Raises:
        ConfigurationError: It is missing, damaged or no GGUF file, one part of several, or of a family that `Decoder`
            does not implement.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._reader = _open(self.path)
        self._values: dict[str, Any] = {}
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.value("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ConfigurationError(
                f"{self.path} is a {self.architecture!r} model, which is not supported: Decoder implements GGUF's "
                f"{', '.join(ARCHITECTURES)}."
            )
        if int(self.value("split.count", 1)) > 1:
            raise ConfigurationError(
                f"{self.path} is one of {self.value('split.count')} parts: merge them with llama.cpp's "
                "`gguf-split --merge`."
            )

    def value(self, key: str, default: Any = None) -> Any:
        """A value of the metadata; `{arch}.` at the front of a key stands for the family."""
        key = key.replace("{arch}", getattr(self, "architecture", ""))
        if key not in self._values:  # a vocabulary takes a while to put together
            field = self._reader.get_field(key)
            self._values[key] = None if field is None else field.contents()
        value = self._values[key]
        return default if value is None else value

    def _number(self, key: str) -> Any:
        """A number that has to be there, the same for all layers."""
        value = self.value(f"{{arch}}.{key}")
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int | float):
            raise ConfigurationError(
                f"{self.path}: {self.architecture}.{key} is {value!r}, where one number is needed: "
                "Decoder's layers are all alike."
            )
        return value

    def config(self, dtype: str = "float32") -> DecoderConfig:
        """The architecture; `dtype` is what the weights are to be converted to.

        Raises:
            ConfigurationError: The metadata describe something that `Decoder` does not implement.
        """
        hidden, heads = self._number("embedding_length"), self._number("attention.head_count")
        head_dim = self.value("{arch}.attention.key_length", hidden // heads)
        for key in ("rope.dimension_count", "attention.value_length"):
            if self.value(f"{{arch}}.{key}", head_dim) != head_dim:
                raise ConfigurationError(
                    f"{self.path}: {self.architecture}.{key} is {self.value(f'{{arch}}.{key}')}, but heads are "
                    f"{head_dim} wide: Decoder has values as wide as keys, and rotates whole heads."
                )
        try:
            return DecoderConfig(
                vocab_size=int(self.tensor("token_embd.weight").shape[-1]),
                hidden_size=hidden,
                intermediate_size=self._number("feed_forward_length"),
                num_hidden_layers=self._number("block_count"),
                num_attention_heads=heads,
                num_key_value_heads=self._number("attention.head_count_kv"),
                head_dim=head_dim,
                max_position_embeddings=self._number("context_length"),
                rms_norm_eps=_rounded(self._number("attention.layer_norm_rms_epsilon")),
                rope_theta=_rounded(self.value("{arch}.rope.freq_base", 10000.0)),
                rope_scaling=self._rope_scaling(head_dim),
                tie_word_embeddings="output.weight" not in self.tensors,
                attention_bias="blk.0.attn_q.bias" in self.tensors,
                attention_output_bias="blk.0.attn_output.bias" in self.tensors,
                mlp_bias="blk.0.ffn_gate.bias" in self.tensors,
                sliding_window=self.value("{arch}.attention.sliding_window"),
                bos_token_id=self.value("tokenizer.ggml.bos_token_id"),
                eos_token_id=self.value("tokenizer.ggml.eos_token_id"),
                pad_token_id=self.value("tokenizer.ggml.padding_token_id"),
                dtype=dtype,
                **(ARCHITECTURES[self.architecture] | self._experts()),
            )
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.path}: {error}") from None

    def _experts(self) -> dict[str, Any]:
        if not self.value("{arch}.expert_count", 0):
            return {}
        experts = {
            "num_experts": self._number("expert_count"),
            "num_experts_per_tok": self._number("expert_used_count"),
            "moe_intermediate_size": self.value("{arch}.expert_feed_forward_length"),
        }
        norm = self.value("{arch}.expert_weights_norm")
        return experts if norm is None else {**experts, "norm_topk_prob": norm}

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        if _ROPE_FREQUENCIES in self.tensors:
            return self._llama3_scaling(head_dim)
        kind = self.value("{arch}.rope.scaling.type", "none")
        factor = self.value("{arch}.rope.scaling.factor", 1.0)
        if kind == "none" or factor in (0.0, 1.0):
            return None
        scaling = {"rope_type": kind, "factor": _rounded(factor)}
        original = self.value("{arch}.rope.scaling.original_context_length")
        if original and kind == "yarn":
            scaling["original_max_position_embeddings"] = original
        return scaling

    def _llama3_scaling(self, head_dim: int) -> dict[str, Any]:
        """The four numbers of Llama 3's scaling, of which the file has only what they do to each frequency."""
        found = self.read(_ROPE_FREQUENCIES, torch.float64)
        factor, low, high, original = round(float(found.max()), 4), 1.0, 4.0, 8192
        theta = _rounded(self.value("{arch}.rope.freq_base", 10000.0))
        wavelengths = 2 * torch.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3):
            raise ConfigurationError(
                f"{self.path}: {_ROPE_FREQUENCIES} is not Llama 3's scaling of rotary frequencies (factor {factor}, "
                f"{low:g} to {high:g}, of {original} positions), and no other is implemented as numbers."
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    @property
    def dtype(self) -> str:
        """The element type that loses nothing worth keeping: float32 of a file that is all float32, float16 of one
        that is all float16 (but for its norms), else bfloat16."""
        kinds = {tensor.tensor_type.name for tensor in self.tensors.values() if len(tensor.shape) > 1}
        return {frozenset({"F32"}): "float32", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "bfloat16")

    def tensor(self, name: str) -> ReaderTensor:
        """One tensor, as it is in the file.

        Raises:
            ConfigurationError: It is missing.
        """
        if name not in self.tensors:
            raise ConfigurationError(f"{self.path} has no tensor {name}: it is incomplete, fetch or convert it again.")
        return self.tensors[name]

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor, dequantised a part at a time."""
        from gguf import quants

        stored = self.tensor(name)
        shape = tuple(int(size) for size in reversed(stored.shape))
        out = torch.empty(shape, dtype=dtype)
        rows, flat = stored.data.reshape(-1, stored.data.shape[-1]), out.view(-1, shape[-1])
        step = max(1, _CHUNK // shape[-1])
        for start in range(0, len(rows), step):
            try:
                part = quants.dequantize(rows[start : start + step], stored.tensor_type)
            except NotImplementedError:
                raise ConfigurationError(
                    f"{self.path}: {name} is quantised as {stored.tensor_type.name}, which cannot be read here: "
                    "convert the file to another type with llama.cpp's `llama-quantize`."
                ) from None
            flat[start : start + step] = torch.from_numpy(np.array(part, copy=True))
        return out

    def weights(self, config: DecoderConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a `Decoder` by its names, one at a time, in the order of `config.parameter_shapes()`.

        Raises:
            ConfigurationError: One is missing, of another shape or of an unknown type, or the file has more than those.
        """
        shapes = config.parameter_shapes()
        names = {name: self._stored_names(name, config) for name in shapes}
        used = {stored for several in names.values() for stored in several}
        extra = sorted(name for name in self.tensors.keys() - used if not name.endswith(_IGNORED))
        if extra:
            raise ConfigurationError(
                f"{self.path} has {len(extra)} tensors that Decoder has no use for ({', '.join(extra[:4])}): the model "
                "is not quite of the architecture that the file names."
            )
        for name, shape in shapes.items():
            parts = [self.read(stored, dtype) for stored in names[name]]
            tensor = self._reordered(name, parts[0] if len(parts) == 1 else torch.stack(parts), config)
            if tuple(tensor.shape) != tuple(shape):
                raise ConfigurationError(
                    f"{self.path}: {name} has shape {list(tensor.shape)}, not {list(shape)} as its metadata say."
                )
            yield name, tensor

    def _stored_names(self, name: str, config: DecoderConfig) -> list[str]:
        """What a tensor of the decoder is called in the file; several where it has one for each expert."""
        if name in _OUTER:
            return [_OUTER[name]]
        layer, _, inner = name.removeprefix("model.layers.").partition(".")
        if inner.startswith("mlp.experts."):
            kind = _EXPERTS[inner.removeprefix("mlp.experts.")]
            stacked = f"blk.{layer}.{kind}_exps.weight"
            if stacked in self.tensors:
                return [stacked]
            assert config.num_experts is not None  # files before 2024-04
            return [f"blk.{layer}.{kind}.{expert}.weight" for expert in range(config.num_experts)]
        part, _, kind = inner.rpartition(".")
        return [f"blk.{layer}.{_INNER[part]}.{kind}"]

    def _reordered(self, name: str, tensor: Tensor, config: DecoderConfig) -> Tensor:
        """Rows of a llama's q and k in Hugging Face's order: llama.cpp rotates neighbours, Hugging Face two halves."""
        kind = name.rpartition(".")[0].rpartition(".")[2]
        if self.architecture != "llama" or kind not in ("q_proj", "k_proj"):
            return tensor
        heads = config.num_attention_heads if kind == "q_proj" else config.num_key_value_heads
        return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigurationError(f"{path} needs the package gguf ({error}): pip install lightning-llm[serve]") from None
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path}: give a .gguf file.")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, MemoryError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as GGUF ({error}; {path.stat().st_size} bytes): it is truncated or damaged, fetch "
            "it again."
        ) from None


def _rounded(number: float) -> float:
    """1e-5, of which a float32 keeps 9.999999747378752e-06."""
    return float(str(np.float32(number)))
