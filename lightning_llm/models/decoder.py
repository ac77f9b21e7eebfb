"""`Decoder`: the one model that is trained and served. Plain torch; parallelism is applied to it from outside.

Parameter names are Hugging Face's, so checkpoints load without renaming. Attention is handed in per call.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_llm._torch import full_shape
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.attention import AttentionFunction, causal_attention
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.expert_weights import PretrainedWeights, to_files
from lightning_llm.models.initialization import RandomInit
from lightning_llm.models.mlp import MLP
from lightning_llm.models.moe import MoE, RouterLosses
from lightning_llm.models.rotary import Rope, Rotation, cos_sin, rotate
from lightning_llm.models.weights import DEFAULT_SHARD_SIZE, load_weights, save_weights, torch_dtype


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dim (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)

    def extra_repr(self) -> str:
        """What `print(decoder)` shows of it."""
        return f"{full_shape(self.weight)[0]}, eps={self.eps}"


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions: [batch, seq, hidden] -> [batch, seq, hidden].

    The number of heads is read off the tensors, not the config: under tensor parallelism each rank has its share.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.sliding_window = config.layer_window(layer)
        self.rope = Rope.of(config)
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=config.attention_output_bias)
        self.qk_norm_whole = config.qk_norm_whole
        q_size, k_size = (heads, kv_heads) if config.qk_norm_whole else (config.head_dim, config.head_dim)
        self.q_norm = RMSNorm(q_size, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(k_size, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | int | Rotation | None = None,
        attention: AttentionFunction = causal_attention,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """See `Decoder.forward`."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.k_norm is not None and self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (projected.unflatten(-1, (-1, self.head_dim)) for projected in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None and not self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        # The length is q's: with sequence parallelism x is a slice of the sequence that the projections gather.
        if isinstance(positions, Rotation):
            cos, sin = positions
        else:
            cos, sin = cos_sin(self.rope, positions, q.shape[2], device=q.device, dtype=q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        documents: dict[str, Any] = {} if document_ids is None else {"document_ids": document_ids}
        out = attention(q, k, v, layer=self.layer, scale=self.scale, sliding_window=self.sliding_window, **documents)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """One layer: attention and MLP or experts, each behind a norm and a residual.

    Sub-modules get exactly one positional argument: torch's tensor-parallel styles hook positional inputs.
    """

    def __init__(self, config: DecoderConfig, layer: int, router_losses: RouterLosses) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp: MoE | MLP
        if config.layer_is_moe(layer):
            self.mlp = MoE(config, router_losses)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | int | Rotation | None = None,
        attention: AttentionFunction = causal_attention,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """See `Decoder.forward`; hidden states [batch, seq, hidden] in and out."""
        attended = self.self_attn(
            self.input_layernorm(x), positions=positions, attention=attention, document_ids=document_ids
        )
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything below the head. Each part may be missing (a pipeline stage); `layers` keeps global indices as keys,
    so that parameter names are the same in every layout."""

    def __init__(self, config: DecoderConfig, router_losses: RouterLosses) -> None:
        super().__init__()
        self.embed_tokens: nn.Embedding | None = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(config, i, router_losses) for i in range(config.num_hidden_layers)})
        self.norm: RMSNorm | None = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | int | Rotation | None = None,
        attention: AttentionFunction = causal_attention,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [batch, seq, hidden]; see `Decoder.forward`."""
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for block in self.layers.values():
            x = block(x, positions=positions, attention=attention, document_ids=document_ids)
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    """A decoder-only language model: `decoder(input_ids)` -> logits.

    Built in torch's default dtype and on its default device, with the weights of `reset_parameters(0)`. Under
    `torch.device("meta")` nothing is allocated; then come `to_empty`, `tie_weights`, and `reset_parameters` or
    `load_weights`.

    A pipeline stage is the same object with parts removed: `model.embed_tokens`, `model.norm` and `lm_head` set to
    None, keys deleted from `model.layers`.

    `router_losses` is what its routers share: set `router_losses.scale` to train with their auxiliary losses.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.router_losses = RouterLosses(config)
        device = torch.get_default_device()
        # Building on meta first skips the initialisation that torch's layers would do and `reset_parameters` overwrite.
        with torch.device("meta"):
            self.model = Trunk(config, self.router_losses)
            self.lm_head: nn.Linear | None = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if device.type != "meta":
            self.to_empty(device=device)
        self.tie_weights()
        if device.type != "meta":
            self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | int | Rotation | None = None,
        attention: AttentionFunction = causal_attention,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits [batch, seq, vocab] for token ids [batch, seq].

        Without `model.embed_tokens`, x is hidden states [batch, seq, hidden]; without `lm_head`, so is the answer.

        Args:
            positions: where the tokens stand: a tensor [seq] or [batch, seq], or an int for consecutive tokens from
                there on; a `Rotation`, which is looked up once instead of in every layer. None: from 0.
            attention: see `AttentionFunction`.
            document_ids: [batch, seq] ints, where several documents are packed into a sequence: tokens attend only to
                tokens of their own.
        """
        x = self.model(x, positions=positions, attention=attention, document_ids=document_ids)
        return x if self.lm_head is None else self.lm_head(x)

    def tie_weights(self) -> None:
        """Makes the head share the embedding's weight where the config says so. Needed again after `to_empty`."""
        if self.config.tie_word_embeddings and self.lm_head is not None and self.model.embed_tokens is not None:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self, seed: int = 0) -> None:
        """Draws initial weights (see `RandomInit`): the same for a seed whatever the device, dtype or layout."""
        load_weights(self, RandomInit(self.config, seed))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> "Decoder":
        """Loads a Hugging Face folder (config.json, and model.safetensors or an index with shards).

        Args:
            dtype: element type of the parameters; None: as the config says.
            device: None: torch's default device.

        Raises:
            ConfigurationError: a file is missing or damaged, or tensors are missing, extra or of another shape; all are
                named.
        """
        config = DecoderConfig.load(folder)
        with PretrainedWeights(folder, config) as source:
            with torch.device("meta"):
                decoder = cls(config)
            decoder.to(torch_dtype(dtype or config.dtype)).to_empty(device=device or torch.get_default_device())
            decoder.tie_weights()
            load_weights(decoder, source)
        return decoder

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, max_shard_size: int | str = DEFAULT_SHARD_SIZE
    ) -> Path:
        """Writes a folder that transformers and `from_pretrained` load; one file, or shards of at most `max_shard_size`
        (bytes, or "5GB") with an index.

        Raises:
            ConfigurationError: parts of the model are not here (a pipeline stage).
        """
        shapes = self.config.parameter_shapes()
        tensors = {name: tensor for name, tensor in self.state_dict().items() if name in shapes}
        missing = shapes.keys() - tensors.keys()
        if missing:
            raise ConfigurationError(
                f"This decoder holds {len(tensors)} of {len(shapes)} parameters (a pipeline stage?), "
                "so it cannot be saved as a whole: export the checkpoint instead."
            )
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        self.config.replace(dtype=dtype).save(folder)
        save_weights(to_files(tensors.items(), self.config), folder, max_shard_size=max_shard_size)
        return Path(folder)
