"""Text to tokenise, and a corpus read back, for the tests of this room."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from lightning_llm.data._litdata import TokenBlocks
from lightning_llm.data.corpus import TokenizedCorpus

WORDS = (
    "the of and to in is you that it he was for on are as with his they I at be this have from or one had by".split()
)


def prose(seed: int, words: int) -> str:
    """Deterministic text, different for each seed."""
    draw = random.Random(seed)
    return " ".join(
        draw.choice(WORDS) + (f" {draw.randrange(1000)}" if draw.random() < 0.1 else "") for _ in range(words)
    )


def write_documents(folder: Path, count: int = 30, words: int = 200) -> dict[str, str]:
    """Files of prose in a folder; gives {name: text}."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"{number:02}.txt": f"Document {number}. {prose(number, words)}\n" for number in range(count)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return texts


def tokens_of(corpus: TokenizedCorpus, split: str) -> np.ndarray:
    """All token ids of a split, read back through litdata: int64 [tokens]."""
    blocks = TokenBlocks(corpus.path / split, 1)
    return np.array([blocks[place][0] for place in range(corpus.split(split).tokens)], dtype=np.int64)
