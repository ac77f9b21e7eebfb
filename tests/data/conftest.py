"""A small corpus that the tests of this room read, tokenised once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_llm.data import tokenize as tokenize_module
from lightning_llm.data.corpus import TokenizedCorpus
from tests.data.corpora import write_documents


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of about 4 kB of text, so that a small corpus has several."""
    monkeypatch.setattr(tokenize_module, "_SMALLEST_SHARD", 4_000)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenizedCorpus:
    """30 documents in about 8 chunks. Only read it: all tests share it."""
    folder = tmp_path_factory.mktemp("corpus")
    write_documents(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_module, "_SMALLEST_SHARD", 4_000)
        return tokenize_module.tokenize(
            folder / "text", folder / "tokens", vocab_size=300, val_fraction=0.1, num_workers=1, progress=False
        )


@pytest.fixture
def copied_corpus(corpus: TokenizedCorpus, tmp_path: Path) -> Callable[[], TokenizedCorpus]:
    """Makes a copy of the corpus that a test may damage."""

    def copy() -> TokenizedCorpus:
        shutil.copytree(corpus.path, tmp_path / "copy")
        return TokenizedCorpus.load(tmp_path / "copy")

    return copy
