"""A tiny model folder with a tokenizer, as the tests of this folder need it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_llm.data.tokenizer import train_tokenizer
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder

CONFIG = DecoderConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    eos_token_id=0,
)
TEXT = "The quick brown fox jumps over the lazy dog, 1234567890 times. " * 4


def write_model(folder: Path, *, dtype: str = "bfloat16", shards: str = "5GB", **changes: Any) -> Decoder:
    """Writes the folder, and returns its decoder."""
    import torch

    decoder = Decoder(CONFIG.replace(**changes)).to(getattr(torch, dtype))
    decoder.save_pretrained(folder, max_shard_size=shards)
    train_tokenizer([TEXT], 280).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": "x"}))
    return decoder
