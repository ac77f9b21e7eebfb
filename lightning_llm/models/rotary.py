"""Rotary position embedding (RoFormer, arXiv:2104.09864) and the ways to stretch it to longer contexts.

Called by `Attention` for every q and k. There are no buffers: tables follow from the config and the positions, so that
nothing has to be rebuilt when a model is made on the meta device, split, or moved.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_llm.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_llm.models.config import DecoderConfig

# Required settings per kind. Names and meanings are Hugging Face's.
ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}
_STRETCHED = ("yarn", "longrope", "llama3")  # kinds that know the length that the model was pretrained on


class Rope(NamedTuple):
    """What the rotary embedding of a model depends on; hashable, so it keys the shared tables."""

    kind: str
    head_dim: int
    theta: float
    max_position_embeddings: int
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, config: "DecoderConfig") -> "Rope":
        """The rotary embedding of a model."""
        scaling = dict(config.rope_scaling or {"rope_type": "default"})
        kind = scaling.pop("rope_type")
        settings = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(scaling.items()))
        return cls(kind, config.head_dim, float(config.rope_theta), config.max_position_embeddings, settings)

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies change with the length of the sequence (and not only the positions)."""
        return self.kind in ("dynamic", "longrope")


def normalize_rope_scaling(
    scaling: dict[str, Any] | None, *, head_dim: int, rope_theta: float, max_position_embeddings: int
) -> dict[str, Any] | None:
    """Checks `rope_scaling`, spells `type` as `rope_type`, fills in the pretraining length; None for the plain kind.

    Raises:
        ConfigurationError: an unknown kind, a missing or unknown setting, or factors of the wrong length.
    """
    if not scaling:
        return None
    values = {k: v for k, v in scaling.items() if v is not None}
    legacy = values.pop("type", None)
    kind = values.pop("rope_type", legacy)
    if kind is None:
        raise ConfigurationError(f"rope_scaling has no rope_type: add one of {', '.join(ROPE_KINDS)}.")
    if kind not in ROPE_KINDS:
        raise ConfigurationError(f"rope_type {kind!r} is not supported: use one of {', '.join(ROPE_KINDS)}.")
    theta = values.pop("rope_theta", rope_theta)
    if theta != rope_theta:
        raise ConfigurationError(f"rope_scaling says rope_theta {theta}, the config says {rope_theta}: give one.")
    if kind == "default":
        return None
    if kind in _STRETCHED:
        values.setdefault("original_max_position_embeddings", max_position_embeddings)
    missing = [name for name in ROPE_KINDS[kind] if name not in values]
    if missing:
        raise ConfigurationError(f"rope_scaling of kind {kind!r} needs {', '.join(missing)}.")
    known = {*ROPE_KINDS[kind], *_OPTIONAL.get(kind, ()), "original_max_position_embeddings"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigurationError(
            f"rope_scaling of kind {kind!r} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}."
        )
    for name, value in values.items():
        if name in ("short_factor", "long_factor"):
            if len(value) != head_dim // 2:
                raise ConfigurationError(
                    f"rope_scaling.{name} has {len(value)} entries, not head_dim {head_dim} // 2 = {head_dim // 2}."
                )
            values[name] = list(value)
        elif name != "truncate" and (not isinstance(value, int | float) or isinstance(value, bool) or value <= 0):
            raise ConfigurationError(f"rope_scaling.{name} must be a positive number, not {value!r}.")
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ConfigurationError(
            f"rope_scaling.low_freq_factor {values['low_freq_factor']} must be below high_freq_factor "
            f"{values['high_freq_factor']}."
        )
    if kind == "dynamic" and head_dim <= 2:
        raise ConfigurationError(f"rope_scaling of kind 'dynamic' needs a head_dim above 2, not {head_dim}.")
    return {"rope_type": kind, **values}


def inverse_frequencies(
    rope: Rope, seq_len: int, *, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """The angle per position of each pair of a head, [head_dim / 2], and the factor on cos and sin.

    `seq_len` matters for the kinds that depend on length only. The order of float operations follows transformers'
    `modeling_rope_utils`, so that float32 results are equal to the last bit.

    Sources: linear: kaiokendev's "SuperHOT" note; dynamic: NTK-aware scaling (bloc97, emozilla); yarn:
    arXiv:2309.00071; longrope: arXiv:2402.13753; llama3: Llama 3.1's reference code.
    """
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.int64, device=device).to(dtype) / rope.head_dim
    settings = dict(rope.settings)
    match rope.kind:
        case "linear":
            return 1.0 / rope.theta**exponents / settings["factor"], 1.0
        case "dynamic":
            length = max(seq_len, rope.max_position_embeddings) / rope.max_position_embeddings
            stretch = settings["factor"] * length - (settings["factor"] - 1)
            theta = rope.theta * stretch ** (rope.head_dim / (rope.head_dim - 2))
            return 1.0 / theta**exponents, 1.0
        case "yarn":
            return _yarn(rope, settings, exponents)
        case "longrope":
            return _longrope(rope, settings, exponents, seq_len)
        case "llama3":
            return _llama3(settings, 1.0 / rope.theta**exponents), 1.0
        case _:
            return 1.0 / rope.theta**exponents, 1.0


def _yarn(rope: Rope, settings: dict[str, Any], exponents: Tensor) -> tuple[Tensor, float]:
    factor, original = settings["factor"], settings["original_max_position_embeddings"]

    def magnitude(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    attention_factor = settings.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = settings.get("mscale"), settings.get("mscale_all_dim")
        attention_factor = magnitude(factor, mscale) / magnitude(factor, mscale_all) if mscale and mscale_all else None
        attention_factor = attention_factor or magnitude(factor)

    def pair_that_turns(rotations: float) -> float:
        # Which pair turns `rotations` times over the pretraining length.
        return rope.head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(settings.get("beta_fast", 32)), pair_that_turns(settings.get("beta_slow", 1))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(rope.head_dim // 2, dtype=exponents.dtype, device=exponents.device)
    keep = 1 - ((pairs - low) / (high - low)).clamp(0, 1)  # 1: fast pairs, left as they are; 0: slow pairs, stretched
    frequencies = rope.theta**exponents
    return 1.0 / (factor * frequencies) * (1 - keep) + 1.0 / frequencies * keep, float(attention_factor)


def _longrope(rope: Rope, settings: dict[str, Any], exponents: Tensor, seq_len: int) -> tuple[Tensor, float]:
    original = settings["original_max_position_embeddings"]
    factor = settings.get("factor", rope.max_position_embeddings / original)
    attention_factor = settings.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    stretch = settings["long_factor"] if seq_len > original else settings["short_factor"]
    per_pair = torch.tensor(stretch, dtype=exponents.dtype, device=exponents.device)
    return 1.0 / (per_pair * rope.theta**exponents), float(attention_factor)


def _llama3(settings: dict[str, Any], frequencies: Tensor) -> Tensor:
    factor, original = settings["factor"], settings["original_max_position_embeddings"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * scaled / factor + smooth * scaled
    medium = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(medium, blended, scaled)


# (rope, device, dtype, length bucket) -> cos and sin of all positions so far. A handful of entries at most per process.
_tables: dict[tuple[Rope, torch.device, torch.dtype, int], tuple[Tensor, Tensor]] = {}
_MAX_TABLES = 16


def _compute(rope: Rope, positions: Tensor, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies, factor = inverse_frequencies(rope, seq_len, device=positions.device, dtype=dtype)
    angles = positions[..., None].to(dtype) * frequencies
    return angles.cos() * factor, angles.sin() * factor


def cos_sin(
    rope: Rope, positions: Tensor | int | None, seq_len: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine for `seq_len` tokens: [seq, head_dim / 2]; for batched positions [batch, 1, seq, ...].

    Args:
        positions: a tensor [seq] or [batch, seq]; an int, the position of the first of consecutive tokens; None is 0.
            For the kinds that depend on length, the length is the highest of these positions + 1.
        dtype: the element type of the activations; float64 gives float64 tables, everything else float32.
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(positions, Tensor):
        length = int(positions.max()) + 1 if rope.depends_on_length else seq_len
        cos, sin = _compute(rope, positions, length, dtype)
        return (cos.unsqueeze(1), sin.unsqueeze(1)) if positions.dim() == 2 else (cos, sin)

    first = positions or 0
    end = first + seq_len
    # A kind that depends on length has a table per length; growing the others by doubling keeps them few.
    capacity = end if rope.depends_on_length else 1 << max(end - 1, 127).bit_length()
    if torch.compiler.is_compiling():
        return _compute(rope, torch.arange(first, end, device=device), end, dtype)
    key = (rope, device, dtype, capacity)
    table = _tables.get(key)
    if table is None:
        # Not in inference mode: a table made during validation would otherwise be unusable in the next training step.
        with torch.inference_mode(False), torch.no_grad():
            table = _compute(rope, torch.arange(capacity, device=device), end, dtype)
        if type(table[0]) is torch.Tensor:  # tensors of a tracing mode must not outlive it
            while len(_tables) >= _MAX_TABLES:
                _tables.pop(next(iter(_tables)))
            _tables[key] = table
    return table[0][first:end], table[1][first:end]


class Rotation(NamedTuple):
    """Cosine and sine of tokens in hand, [seq, head_dim / 2]: what a decoder takes in place of positions, where one
    look-up is to serve all layers."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, rope: Rope, positions: Tensor, length: int, *, dtype: torch.dtype) -> "Rotation":
        """Of tokens at `positions`, [seq], all below `length`, for activations of `dtype`.

        The kinds that depend on length turn all of them as tokens of a sequence of `length`.
        """
        cos, sin = cos_sin(rope, 0, length, device=positions.device, dtype=dtype)
        return cls(cos[positions], sin[positions])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + head_dim / 2]) of each head by the angles of its position.

    x: [batch, heads, seq, head_dim]. Computed in the tables' float32 (or float64) and returned in x's type.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
