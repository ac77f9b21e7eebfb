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
from lightning_llm.models import huggingface, sizes
from lightning_llm.models.presets import PRESETS
from lightning_llm.models.rotary import normalize_rope_scaling

LAYER_TYPES = ("full_attention", "sliding_attention")
DTYPES = ("float32", "bfloat16", "float16", "float64")
SCORING_FUNCTIONS = ("softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The architecture of a decoder (Llama 2/3, Mistral, Qwen2/2.5/3, SmolLM2, Mixtral, OLMoE and their relatives).

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
    qk_norm_whole: bool = False
    """With `qk_norm`: one RMSNorm over all heads of q together, and one over those of k (OLMoE)."""
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` tokens before it, in the layers that `layer_types` says."""
    layer_types: tuple[str, ...] | None = None
    """"full_attention" | "sliding_attention" per layer. None: all sliding if `sliding_window` is set, else all full."""
    num_experts: int | None = None
    """Experts of each mixture-of-experts layer. None or 0: every layer is dense."""
    num_experts_per_tok: int = None  # type: ignore[assignment]
    """How many of them each token is sent to."""
    moe_intermediate_size: int = None  # type: ignore[assignment]
    """Width of one expert. None: `intermediate_size`, which otherwise is that of the dense layers."""
    norm_topk_prob: bool = True
    """The weights of a token's experts are divided by their sum."""
    scoring_func: str = "softmax"
    """"softmax" over the experts, or "sigmoid" of each (DeepSeek-V3, arXiv:2412.19437)."""
    routed_scaling_factor: float = 1.0
    """What the weights of the experts are multiplied by in the end."""
    use_routing_bias: bool = False
    """A bias per expert, `e_score_correction_bias`, decides with the scores which experts are chosen, but not their
    weights: balance without an auxiliary loss (DeepSeek-V3). No gradient reaches it; see `Router.update_bias`."""
    n_shared_experts: int = 0
    """Experts that every token meets, as one MLP of `n_shared_experts * moe_intermediate_size`."""
    decoder_sparse_step: int = 1
    """Every n-th layer has experts (layers n - 1, 2n - 1, ...), ..."""
    mlp_only_layers: tuple[int, ...] = ()
    """... but not these ..."""
    first_k_dense_replace: int = 0
    """... and not the first k."""
    router_aux_loss_coef: float = 0.001
    """Weight of the load-balancing loss in training (see `RouterLosses`)."""
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    model_type: str = None  # type: ignore[assignment]
    """The Hugging Face family to export as: llama, mistral, ministral, qwen2, qwen3, mixtral, qwen3_moe, olmoe, dots1.
    None: the one that fits."""
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
        self._check_experts()
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
        for name in ("rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor"):
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
        if self.qk_norm_whole and not self.qk_norm:
            raise ConfigurationError("qk_norm_whole is True, but qk_norm is not: set both, or neither.")
        if self.head_dim % 2:
            raise ConfigurationError(
                f"head_dim {self.head_dim} is odd: the rotary embedding turns pairs, so make it even."
            )

    def _check_experts(self) -> None:
        self._set("num_experts", self.num_experts or None)
        self._set("mlp_only_layers", tuple(self.mlp_only_layers))
        if self.num_experts is None:
            for name in ("num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "use_routing_bias"):
                if getattr(self, name):
                    raise ConfigurationError(
                        f"{name} is {getattr(self, name)}, but num_experts is not set: set it, or leave {name} out."
                    )
            return
        if self.moe_intermediate_size is None:
            self._set("moe_intermediate_size", self.intermediate_size)
        minima = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 1, "decoder_sparse_step": 1}
        minima |= {"n_shared_experts": 0, "first_k_dense_replace": 0}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ConfigurationError(f"{name} must be an integer of at least {minimum}, not {value!r}.")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigurationError(
                f"num_experts_per_tok {self.num_experts_per_tok} > num_experts {self.num_experts}: a token cannot be "
                "sent to more experts than there are."
            )
        if self.scoring_func not in SCORING_FUNCTIONS:
            raise ConfigurationError(
                f"scoring_func {self.scoring_func!r} is not known: use {' or '.join(SCORING_FUNCTIONS)}."
            )
        coefficient = self.router_aux_loss_coef
        if not isinstance(coefficient, int | float) or not 0 <= coefficient < math.inf:
            raise ConfigurationError(f"router_aux_loss_coef must be a number of at least 0, not {coefficient!r}.")
        outside = [layer for layer in self.mlp_only_layers if layer not in range(self.num_hidden_layers)]
        if outside:
            raise ConfigurationError(
                f"mlp_only_layers names layer {outside[0]}, but the last of {self.num_hidden_layers} layers is "
                f"{self.num_hidden_layers - 1}."
            )
        if not self.num_moe_layers:
            raise ConfigurationError(
                f"num_experts is {self.num_experts}, but none of the {self.num_hidden_layers} layers has experts: "
                f"decoder_sparse_step {self.decoder_sparse_step}, mlp_only_layers {list(self.mlp_only_layers)} and "
                f"first_k_dense_replace {self.first_k_dense_replace} leave none. Change one of them."
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

    def layer_is_moe(self, layer: int) -> bool:
        """Whether a layer has experts in place of the dense MLP."""
        return (
            self.num_experts is not None
            and layer >= self.first_k_dense_replace
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def num_moe_layers(self) -> int:
        """How many layers have experts."""
        return sum(self.layer_is_moe(layer) for layer in range(self.num_hidden_layers))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that makes up the weights, in the order of `Decoder.state_dict()`.

        That is every parameter and the routing biases. A tied lm_head is not one. Experts are stacked; for their names
        in a Hugging Face folder see `expert_weights.py`.
        """
        return sizes.parameter_shapes(self)

    def num_parameters(self) -> int:
        """The exact number of parameters; a tied lm_head counts once."""
        return sizes.num_parameters(self)

    def num_active_parameters(self) -> int:
        """The parameters that one token meets: of the experts of each layer `num_experts_per_tok`, and all others."""
        return sizes.num_active_parameters(self)

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of training on one token, forward and backward, at `seq_len` tokens per sequence.

        6 for every active parameter that is multiplied (the embedding table is only looked up; tied, it is also the
        head and counts) plus 12 * layers * heads * head_dim * context for attention: PaLM, arXiv:2204.02311, appendix
        B, the usual convention for model FLOPs utilisation (the causal mask is not discounted). A sliding window caps
        the context.
        """
        return sizes.flops_per_token(self, seq_len)
