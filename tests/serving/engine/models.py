"""Small random models of every kind that is served, and the plain forward pass that an engine must agree with."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer

from lightning_llm.data.tokenizer import train_tokenizer
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.engine.engine import Engine
from lightning_llm.serving.engine.outputs import Completion
from lightning_llm.serving.engine.params import SamplingParams

VOCABULARY = 300
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 0,
    "initializer_range": 0.4,  # far enough from uniform that answers differ
}
ARCHITECTURES = {
    "llama": {},
    "qwen3": {"qk_norm": True, "head_dim": 16, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 9},
    "mixtral": {"num_experts": 4, "num_experts_per_tok": 2},
}


@cache
def tokenizer() -> Tokenizer:
    """Every byte, and some pairs."""
    return train_tokenizer(["the quick brown fox jumps over the lazy dog", "def main(): return 0"], VOCABULARY)


def make_decoder(architecture: str = "llama", dtype: torch.dtype = torch.float64, **changes) -> Decoder:
    config = DecoderConfig(**{**_SIZES, **ARCHITECTURES[architecture], **changes})
    decoder = Decoder(config).to(dtype).eval().requires_grad_(False)
    decoder.reset_parameters(7)
    return decoder


def make_engine(decoder: Decoder, **settings) -> Engine:
    sizes = {"kv_cache_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32} | settings
    return Engine(decoder, tokenizer(), EngineConfig(**sizes))


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def plain_greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens one after another, everything computed anew each time."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


class Answers(dict[tuple[str, int], Completion]):
    """What an engine has said so far, by (name, index)."""

    def step(self, engine: Engine) -> None:
        for update in engine.step():
            key = update.request_id, update.index
            assert key not in self or self[key].finish_reason is None, "something was said after the end"
            answer = self.setdefault(key, Completion(update.index))
            answer.add(update)
            answer.usage, answer.error, answer.embedding = update.usage, update.error, update.embedding
            if update.prompt_logprobs is not None:
                answer.prompt_logprobs = update.prompt_logprobs
        engine.scheduler.check()

    def finish(self, engine: Engine) -> Answers:
        while engine.has_work:
            self.step(engine)
        stats = engine.stats()
        assert stats.blocks_free == stats.blocks_total and stats.swap_blocks_used == 0
        return self


def run(engine: Engine, asked: dict[str, list[int]], params, **fields) -> Answers:
    for name, ids in asked.items():
        engine.add(name, ids, params[name] if isinstance(params, dict) else params, **fields)
    return Answers().finish(engine)


def greedy(count: int, **changes) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **changes)
