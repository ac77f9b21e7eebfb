"""`DecoderConfig`: every number that decides what a decoder is, in Hugging Face's words.

Made from a preset, a Hugging Face `config.json` or by hand; read by `Decoder`, the planner, the
loader and the exporter.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_llm.errors import ConfigurationError
from lightning_llm.models import huggingface
from lightning_llm.models.presets import PRESETS
from lightning_llm.models.rotary import normalize_rope_scaling

LAYER_TYPES = ("full_attention", "sliding_attention")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The architecture of a dense decoder (Llama 2/3, Mistral, Qwen2/2.5/3, SmolLM2 and their relatives).

    Field names are those of Hugging Face's `config.json`. Values are checked on construction; what cannot work, or
    could not be exported as a Hugging Face architecture, raises `ConfigurationError` with the arithmetic.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore[assignment]
    """Key and value heads (grouped-query attention, arXiv:2305.13245). None: as many as attention heads."""
    head_dim: int = None  # type: ignore[assignment]
    """Width of one head. None: hidden_size // num_attention_heads."""
    max_position_embeddings: int = 2048
    """Longest sequence in tokens that the model is meant for."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """None, or {"rope_type": "linear" | "dynamic" | "yarn" | "longrope" | "llama3", ...} in Hugging Face's words."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on q_proj, k_proj and v_proj."""
    attention_output_bias: bool = False
    """Bias on o_proj (Llama's `attention_bias` means all four; Qwen2 has the first three only)."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k before the rotary embedding (Qwen3)."""
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` tokens before it, in the layers that `layer_types` says."""
    layer_types: tuple[str, ...] | None = None
    """"full_attention" | "sliding_attention" per layer. None: all sliding if `sliding_window` is set, else all full."""
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    model_type: str = None  # type: ignore[assignment]
    """The Hugging Face family to export as: llama, mistral, ministral, qwen2, qwen3. None: the one that fits."""
    dtype: str = "float32"
    """The element type of the weights on disk."""

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.num_key_value_heads is None:
            self._set("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigurationError(
                    f"hidden_size {self.hidden_size} % num_attention_heads {self.num_attention_heads} = "
                    f"{self.hidden_size % self.num_attention_heads}, not 0: change one of them or set head_dim."
                )
            self._set("head_dim", self.hidden_size // self.num_attention_heads)
        self._check_heads()
        if self.layer_types is not None:
            self._set("layer_types", tuple(self.layer_types))
        if isinstance(self.eos_token_id, list | tuple):
            self._set("eos_token_id", tuple(self.eos_token_id))
        self._check_layers()
        self._set(
            "rope_scaling",
            normalize_rope_scaling(
                self.rope_scaling,
                head_dim=self.head_dim,
                rope_theta=self.rope_theta,
                max_position_embeddings=self.max_position_embeddings,
            ),
        )
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"dtype {self.dtype!r} is not known: use one of {', '.join(DTYPES)}.")
        self._set("model_type", huggingface.family(self))

    def _set(self, name: str, value: Any) -> None:
        # The dataclass is frozen for its users; filling in derived values is part of building it.
        object.__setattr__(self, name, value)

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
        ):
            value = getattr(self, name)
            optional = name in ("num_key_value_heads", "head_dim", "sliding_window")
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name} must be a positive integer, not {value!r}.")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ConfigurationError(f"{name} must be a positive number, not {value!r}.")

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigurationError(
                f"num_attention_heads {self.num_attention_heads} % num_key_value_heads {self.num_key_value_heads} = "
                f"{self.num_attention_heads % self.num_key_value_heads}, not 0: every key-value head must serve "
                "equally many attention heads."
            )
        if self.head_dim % 2:
            raise ConfigurationError(
                f"head_dim {self.head_dim} is odd: the rotary embedding turns pairs, so make it even."
            )

    def _check_layers(self) -> None:
        if self.layer_types is None:
            return
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigurationError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers {self.num_hidden_layers}: "
                "give one per layer."
            )
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ConfigurationError(f"layer_types holds {', '.join(unknown)}: only {' and '.join(LAYER_TYPES)} exist.")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ConfigurationError("layer_types has sliding_attention layers but sliding_window is not set: set it.")

    # -- where it comes from and goes to

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "DecoderConfig":
        """The named architecture (see `PRESETS`), with `changes` to its fields. An unknown name lists them all."""
        if name.lower() not in PRESETS:
            raise ConfigurationError(f"There is no preset {name!r}. Presets: {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name.lower()], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DecoderConfig":
        """Reads the content of a Hugging Face `config.json`, in the old form (`rope_theta`, `rope_scaling`,
        `torch_dtype`) or that of transformers 5 (`rope_parameters`, `dtype`).

        Raises:
            ConfigurationError: an architecture, activation or quantisation that `Decoder` does not implement.
        """
        return cls(**huggingface.read(values))

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers 4 and 5 load as the same model."""
        return huggingface.write(self)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "DecoderConfig":
        """Reads `config.json` in a Hugging Face folder (or the file itself).

        Raises:
            ConfigurationError: the file is missing, is not JSON, or describes something else; it is named.
        """
        path = Path(folder)
        if path.suffix != ".json":
            path = path / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigurationError(
                f"There is no {path}: give a Hugging Face model folder (config.json and *.safetensors)."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} is not valid JSON ({error}): fetch or export it again.") from None
        try:
            return cls.from_dict(values)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from None

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `config.json` into the folder (made if need be), whole or not at all; returns its path."""
        path = Path(folder) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".config.json.{os.getpid()}")
        staged.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(staged, path)
        return path

    def replace(self, **changes: Any) -> "DecoderConfig":
        """A copy with some fields changed, checked again. `None` makes a derived field be derived anew."""
        return dataclasses.replace(self, **changes)

    # -- what follows from it

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence tokens, as a tuple however many there are."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer in tokens; None where it attends to everything before."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter, in the order of `Decoder.named_parameters()`; a tied lm_head is not one."""
        heads, kv_heads = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, intermediate = self.hidden_size, self.intermediate_size
        block: dict[str, tuple[int, ...]] = {}

        def linear(name: str, rows: int, columns: int, bias: bool) -> None:
            block[f"{name}.weight"] = (rows, columns)
            if bias:
                block[f"{name}.bias"] = (rows,)

        linear("self_attn.q_proj", heads, hidden, self.attention_bias)
        linear("self_attn.k_proj", kv_heads, hidden, self.attention_bias)
        linear("self_attn.v_proj", kv_heads, hidden, self.attention_bias)
        linear("self_attn.o_proj", hidden, heads, self.attention_output_bias)
        if self.qk_norm:
            block["self_attn.q_norm.weight"] = block["self_attn.k_norm.weight"] = (self.head_dim,)
        linear("mlp.gate_proj", intermediate, hidden, self.mlp_bias)
        linear("mlp.up_proj", intermediate, hidden, self.mlp_bias)
        linear("mlp.down_proj", hidden, intermediate, self.mlp_bias)
        block["input_layernorm.weight"] = block["post_attention_layernorm.weight"] = (hidden,)

        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_hidden_layers):
            shapes.update({f"model.layers.{layer}.{name}": shape for name, shape in block.items()})
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def num_parameters(self) -> int:
        """The exact number of parameters; a tied lm_head counts once."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of training on one token, forward and backward, at `seq_len` tokens per sequence.

        6 for every parameter that is multiplied (the embedding table is only looked up; tied, it is also the head and
        counts) plus 12 * layers * heads * head_dim * context for attention: PaLM, arXiv:2204.02311, appendix B, the
        usual convention for model FLOPs utilisation (the causal mask is not discounted). A sliding window caps the
        context.
        """
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        attended = sum(min(seq_len, self.layer_window(i) or seq_len) for i in range(self.num_hidden_layers))
        return 6 * (self.num_parameters() - embedding) + 12 * self.num_attention_heads * self.head_dim * attended
