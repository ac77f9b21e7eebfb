"""Byte-level BPE: train one, load one, and find the token that ends a document.

`tokenize.py` calls this to turn text into ids; generation and export load the same `tokenizer.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_llm.errors import ConfigurationError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"

# What the common tokenizers call the token between two documents. Chat models name another token as their
# `eos_token` (it ends a turn, not a document), so these come before what tokenizer_config.json says.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_SMALLEST_VOCABULARY = 256 + 1  # every byte, and the end of text


def train_tokenizer(texts: Iterable[str | Path], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer, digits split one by one (as Llama and SmolLM do), with `<|endoftext|>` as id 0.

    All 256 bytes are in the vocabulary, so every text encodes and decodes to itself, whatever was seen in training.
    The same texts in the same order give the same tokenizer.

    Args:
        texts: what to learn from: each item is a text, or the `Path` of a UTF-8 text file.
        vocab_size: ids wanted, the 256 bytes and the end of text included. A small text may give fewer:
            read `tokenizer.get_vocab_size()`.

    Raises:
        ConfigurationError: `vocab_size` is too small to hold the bytes, or a file is not UTF-8 text.

    Source: Sennrich et al. 2016 (BPE); Radford et al. 2019 (on bytes).
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ConfigurationError(
            f"vocab_size={vocab_size} is too small: 256 bytes + 1 end-of-text token = {_SMALLEST_VOCABULARY} ids are "
            f"always there. Set vocab_size to {_SMALLEST_VOCABULARY} or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_read_paths(texts), trainer)
    return tokenizer


def _read_paths(texts: Iterable[str | Path]) -> Iterator[str]:
    for item in texts:
        if isinstance(item, Path):
            try:
                yield item.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"Cannot train a tokenizer on {item}: {error}") from error
        else:
            yield item


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a `tokenizer.json`, given as the file or as the folder that holds it.

    Raises:
        ConfigurationError: the file is not there, or is not a tokenizer; the message names it.
    """
    file = tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises a plain Exception whatever is wrong with the file
        raise ConfigurationError(
            f"{file} is not a tokenizer that the `tokenizers` library can read: {error}. "
            "Copy it again, or make one with `lightning-llm tokenize`."
        ) from error
    if tokenizer.get_vocab_size() == 0:
        raise ConfigurationError(f"{file} is a tokenizer without any tokens. Copy it again.")
    return tokenizer


def tokenizer_file(path: str | Path) -> Path:
    """The `tokenizer.json` that `path` means: itself, or the one in that folder.

    Raises:
        ConfigurationError: there is none.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigurationError(f"No tokenizer at {file}. Give a tokenizer.json file, or a folder that has one.")
    return file


def end_of_text_id(tokenizer: Tokenizer, path: str | Path | None = None, token: str | None = None) -> int:
    """The id of the token that stands between two documents.

    Args:
        tokenizer: the tokenizer.
        path: where it was loaded from; a `tokenizer_config.json` beside it is asked when no usual name is known.
        token: the token to take, where the user names one.

    Raises:
        ConfigurationError: the tokenizer has no such token; the message lists its special tokens.
    """
    names: tuple[str, ...] = (token,) if token is not None else _END_OF_TEXT_NAMES
    if token is None and path is not None:
        names += _configured_eos(tokenizer_file(path).with_name("tokenizer_config.json"))
    for name in names:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found
    special = sorted(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special)
    raise ConfigurationError(
        f"The tokenizer has no end-of-text token named {' or '.join(names)}. Its special tokens are: "
        f"{', '.join(special) or 'none'}. Name the one that ends a document with end_of_text=..."
    )


def _configured_eos(config_file: Path) -> tuple[str, ...]:
    """The `eos_token` of a Hugging Face `tokenizer_config.json` (a string, or an object with `content`)."""
    if not config_file.is_file():
        return ()
    try:
        eos = json.loads(config_file.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"{config_file} is not a JSON object: {error}. Copy it again.") from error
    name = eos.get("content") if isinstance(eos, dict) else eos
    return (name,) if isinstance(name, str) else ()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs for every id of this tokenizer: the largest id + 1 (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
