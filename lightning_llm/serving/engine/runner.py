"""`Runner`: one flat pass of the decoder over the pieces of a step, prompts and single tokens alike.

Called by the engine. It keeps no state of its own: what a pass leaves behind is in the KV cache, at positions that the
engine counts as computed only after the pass has come back; one that fails can simply be made again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.rotary import Rope, Rotation
from lightning_llm.serving.engine.kv_cache import KVCache
from lightning_llm.serving.kernels.batch import PagedBatch, Piece
from lightning_llm.serving.kernels.paged import PagedAttention
from lightning_llm.serving.kernels.select import select_kernel


class Runner:
    """A decoder over a paged KV cache.

    Args:
        decoder: The whole model, dense or with experts, on the cache's device and of its type.
        cache: Where keys and values are kept.
        kernel: The attention kernel by name (see `select_kernel`).

    Raises:
        ConfigurationError: The decoder is only a pipeline stage, decoder and cache do not match, or the kernel cannot
            do this.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, *, kernel: str = "auto") -> None:
        embedding, norm, head = decoder.model.embed_tokens, decoder.model.norm, decoder.lm_head
        if embedding is None or norm is None or head is None:
            raise ConfigurationError("This decoder is only a pipeline stage: serve the whole model.")
        weight = embedding.weight
        if (weight.device.type, weight.dtype) != (cache.device.type, cache.dtype):
            raise ConfigurationError(
                f"The decoder is {weight.dtype} on {weight.device}, but the KV cache is made for {cache.dtype} on "
                f"{cache.device}: make both alike."
            )
        self.decoder = decoder
        self.cache = cache
        self.device = weight.device
        self.kernel, self._kernel = select_kernel(cache.device, cache.dtype, cache.kv_dtype, kernel=kernel)
        self._head = head
        self._rope = Rope.of(decoder.config)
        self._max_length = self.max_length(decoder.config)

    @staticmethod
    def max_length(config: DecoderConfig) -> int:
        """The longest sequence in tokens that can be served.

        Usually what the model was made for. "yarn" and "linear" stretch that by their factor, which a config may leave
        to whoever serves the model to add (as Qwen2.5's do; vLLM reads them so, too).

        The rotary embeddings "dynamic" and "longrope" turn all tokens of a sequence differently once it passes its
        original length; keys that are in the cache would be turned the old way, and those that are not the new one.
        They are served up to that length.
        """
        rope = Rope.of(config)
        settings = dict(rope.settings)
        if rope.kind == "longrope":
            return min(config.max_position_embeddings, settings["original_max_position_embeddings"])
        if rope.kind in ("yarn", "linear"):
            original = settings.get("original_max_position_embeddings", config.max_position_embeddings)
            return max(config.max_position_embeddings, int(original * settings["factor"]))
        return config.max_position_embeddings

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Computes the tokens of all pieces: hidden states behind the final norm, [tokens, hidden], in their order.

        Raises:
            ValueError: A piece that cannot be (see `PagedBatch.of`), or one that is longer than `max_length` where the
                rotary embedding allows no more.
        """
        batch = PagedBatch.of(pieces, block_size=self.cache.block_size, device=self.device)
        length = batch.max_context_len
        if self._rope.depends_on_length:
            if length > self._max_length:
                raise ValueError(
                    f"A sequence has {length} tokens; with this rotary embedding {self._max_length} at most."
                )
            length = self._max_length
        rotation = Rotation.of(self._rope, batch.positions, length, dtype=self.cache.dtype)
        attention = PagedAttention(self.cache, batch, self._kernel)
        return self.decoder.model(batch.token_ids.unsqueeze(0), positions=rotation, attention=attention).squeeze(0)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab] float32. Give it only the rows that a token is drawn from."""
        return self._head(hidden).float()
