"""Text from a decoder, one token at a time: a contiguous KV cache and a sampling loop for one sequence.

Called by `lightning-llm generate` and the demo. Many requests at once are the serving engine's business.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.attention import causal_attention, visible
from lightning_llm.models.decoder import Decoder


class KVCache:
    """Keys and values of the tokens so far, for every layer, in memory set aside once; a decoder's `attention`.

        cache = KVCache(capacity=2048)
        logits = decoder(ids, positions=cache.length, attention=cache)
        cache.advance(ids.shape[1])

    Args:
        capacity: tokens that fit. Per layer it takes 2 * batch * kv_heads * capacity * head_dim elements.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ConfigurationError(f"A KV cache holds at least 1 token, not {capacity}.")
        self.capacity = capacity
        self.length = 0
        # Allocated when a layer is first seen: k tells batch, local heads, dtype and device.
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def advance(self, tokens: int) -> None:
        """Counts the tokens of a finished forward pass; the next one stands behind them."""
        self.length += tokens

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, sliding_window: int | None
    ) -> Tensor:
        """Appends k and v, and attends to everything up to them (see `AttentionFunction`)."""
        start, new = self.length, q.shape[2]
        end = start + new
        if end > self.capacity:
            raise ConfigurationError(
                f"{start} + {new} = {end} tokens do not fit a KV cache of {self.capacity}: give it a larger capacity."
            )
        if layer not in self._layers:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self._layers[layer] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self._layers[layer]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        if start == 0:
            return causal_attention(q, k, v, layer=layer, scale=scale, sliding_window=sliding_window)

        first = 0 if sliding_window is None else max(0, start + 1 - sliding_window)  # nothing older is seen by anyone
        keys, values = keys[:, :, first:end], values[:, :, first:end]
        if new == 1:
            # One query sees every key that is left, so the heads that share a key-value head can stand as its rows:
            # no mask, and no copies of k and v.
            rows = q.squeeze(2).unflatten(1, (k.shape[1], -1))
            return F.scaled_dot_product_attention(rows, keys, values, scale=scale).flatten(1, 2).unsqueeze(2)
        positions = torch.arange(first, end, device=q.device)
        mask = visible(positions[-new:], positions, sliding_window=sliding_window)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)


def sample(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """Draws a token id from logits [vocab]; temperature 0 takes the most likely one.

    `top_p` keeps the smallest set of most likely tokens whose probabilities reach it (nucleus sampling,
    arXiv:1904.09751); the most likely token is always kept.
    """
    if temperature == 0:
        return int(logits.argmax())
    # On the CPU, so that a seed means the same tokens on every device. The maximum goes first: a tiny temperature must
    # not overflow.
    logits = logits.double().cpu()
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= top_p] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.inference_mode()
def _next_logits(decoder: Decoder, ids: Sequence[int], cache: KVCache) -> Tensor:
    """Feeds token ids and returns the logits after the last, [vocab]."""
    assert decoder.lm_head is not None
    x = torch.tensor([ids], device=decoder.lm_head.weight.device)
    hidden = decoder.model(x, positions=cache.length, attention=cache)
    cache.advance(len(ids))
    # Only the last position meets the head: on a long prompt, logits of all positions would dwarf the model.
    return decoder.lm_head(hidden[0, -1])


def generate(
    decoder: Decoder,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_ids: Collection[int] = (),
) -> Iterator[int]:
    """Continues a prompt, yielding each token id as soon as it is known.

    Every token is computed once: the prompt in one pass, then one token per pass against the KV cache.

    Args:
        max_tokens: the most tokens to yield.
        temperature: 0 is greedy; higher is more varied.
        top_p: draw from the most likely tokens that make up this much probability.
        seed: makes sampling reproducible; None: a new draw every time.
        eos_token_ids: the end-of-text tokens; one of them ends the text and is yielded last.

    Raises:
        ConfigurationError: on the call, not on the first token: an empty prompt, a token that is not in the vocabulary,
            a setting out of its range, or a decoder that is only a pipeline stage.
    """
    config = decoder.config
    if not prompt_ids:
        raise ConfigurationError("The prompt has no tokens: give at least one (the beginning-of-text token will do).")
    outside = [token for token in prompt_ids if not 0 <= token < config.vocab_size]
    if outside:
        raise ConfigurationError(
            f"Token id {outside[0]} is not in the vocabulary of {config.vocab_size}: tokenizer and model do not match."
        )
    if max_tokens < 1:
        raise ConfigurationError(f"max_tokens must be at least 1, not {max_tokens}.")
    if not 0 <= temperature < float("inf"):
        raise ConfigurationError(f"temperature must be 0 (greedy) or a positive number, not {temperature}.")
    if not 0 < top_p <= 1:
        raise ConfigurationError(f"top_p is a probability above 0 and at most 1, not {top_p}.")
    if decoder.model.embed_tokens is None or decoder.model.norm is None or decoder.lm_head is None:
        raise ConfigurationError("This decoder is only a pipeline stage: generate with the whole model.")
    total = len(prompt_ids) + max_tokens
    if total > config.max_position_embeddings:
        warnings.warn(
            f"prompt {len(prompt_ids)} + max_tokens {max_tokens} = {total} tokens, more than the "
            f"{config.max_position_embeddings} that the model was made for: expect poor text beyond that.",
            stacklevel=2,
        )
    return _tokens(decoder, prompt_ids, max_tokens, temperature, top_p, seed, frozenset(eos_token_ids))


def _tokens(
    decoder: Decoder,
    prompt_ids: list[int],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    eos_token_ids: frozenset[int],
) -> Iterator[int]:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    # The last token is yielded, never fed back.
    cache = KVCache(len(prompt_ids) + max_tokens - 1)
    ids: Sequence[int] = prompt_ids
    for _ in range(max_tokens):
        logits = _next_logits(decoder, ids, cache)
        token = sample(logits, temperature=temperature, top_p=top_p, generator=generator)
        yield token
        if token in eos_token_ids:
            return
        ids = [token]
