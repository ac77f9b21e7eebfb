"""The summary of a corpus: loads what was saved, and names what is missing or damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_llm.data.corpus import TokenizedCorpus
from lightning_llm.errors import ConfigurationError


def test_loads_what_was_saved(corpus: TokenizedCorpus, tmp_path: Path) -> None:
    corpus.save(tmp_path)
    loaded = TokenizedCorpus.load(tmp_path)
    assert loaded.path == tmp_path
    assert (loaded.train, loaded.val, loaded.digest) == (corpus.train, corpus.val, corpus.digest)
    assert TokenizedCorpus.load(corpus.path) == corpus


def test_counts_sequences_of_one_token_more_than_their_length(corpus: TokenizedCorpus) -> None:
    first = corpus.train.chunks[0].tokens
    assert corpus.train.sequences_per_chunk(first - 1)[0] == 1
    assert corpus.train.sequences_per_chunk(first)[0] == 0


def test_missing_folder_says_which_command_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere does not exist .*lightning-llm tokenize --input .*nowhere"):
        TokenizedCorpus.load(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=r"is not a finished tokenised corpus"):
        TokenizedCorpus.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "train": 3, "val": 4}'])
def test_damaged_summary_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "corpus.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"corpus.json is damaged"):
        TokenizedCorpus.load(tmp_path)


def test_other_format_is_named(copied_corpus: Callable[[], TokenizedCorpus]) -> None:
    file = copied_corpus().path / "corpus.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(ConfigurationError, match=r"has format 99, this version reads 1"):
        TokenizedCorpus.load(file.parent)


def test_whole_corpus_passes(copied_corpus: Callable[[], TokenizedCorpus]) -> None:
    copied_corpus().check_files()


@pytest.mark.parametrize(
    "name", ["train/chunk-0-1.bin", "val/chunk-0-0.bin", "tokenizer.json", "train/index.json", "val/index.json"]
)
def test_deleted_file_is_named(copied_corpus: Callable[[], TokenizedCorpus], name: str) -> None:
    copy = copied_corpus()
    (copy.path / name).unlink()
    with pytest.raises(ConfigurationError, match=f"{name} is missing"):
        copy.check_files()


def test_truncated_chunk_is_named_with_its_sizes(copied_corpus: Callable[[], TokenizedCorpus]) -> None:
    copy = copied_corpus()
    file = copy.path / "train" / "chunk-0-2.bin"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigurationError, match=rf"chunk-0-2.bin has {size - 10} bytes instead of {size}"):
        copy.check_files()


@pytest.mark.parametrize("content", ["{", '{"chunks": []}', '{"chunks": [{"filename": "x"}]}'])
def test_wrong_index_is_named(copied_corpus: Callable[[], TokenizedCorpus], content: str) -> None:
    copy = copied_corpus()
    (copy.path / "train" / "index.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"train/index.json (cannot be read|does not list the chunks)"):
        copy.check_files()


def test_many_damages_are_counted(copied_corpus: Callable[[], TokenizedCorpus]) -> None:
    copy = copied_corpus()
    for chunk in copy.train.chunks:
        (copy.path / "train" / chunk.filename).unlink()
    with pytest.raises(ConfigurationError, match=rf"and {len(copy.train.chunks) - 5} more"):
        copy.check_files()


def test_summary_for_people(corpus: TokenizedCorpus) -> None:
    text = str(corpus)
    assert f"{corpus.train.tokens:,} tokens" in text and "vocabulary 300" in text and "reused" not in text
