"""The tokenizer: what is trained decodes to what went in; what is loaded is checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from lightning_llm.data.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    load_tokenizer,
    tokenizer_file,
    train_tokenizer,
    vocabulary_size,
)
from lightning_llm.errors import ConfigurationError

TEXTS = ["the cat sat on the mat", "the dog sat on the log 1234", "def main():\n    return 0\n"] * 5
TRAINED = train_tokenizer(TEXTS, 280)


@given(st.text())
def test_every_text_decodes_to_itself(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_vocabulary_has_all_bytes_the_end_of_text_first_and_the_size_asked_for() -> None:
    assert TRAINED.get_vocab_size() == vocabulary_size(TRAINED) == 280
    assert TRAINED.token_to_id(END_OF_TEXT) == end_of_text_id(TRAINED) == 0
    assert len(TRAINED.encode("sat on the").ids) < len("sat on the")  # it learned something


def test_digits_stand_alone() -> None:
    assert [TRAINED.decode([i]) for i in TRAINED.encode("1234").ids] == list("1234")


def test_same_texts_give_the_same_tokenizer_and_files_count_as_their_text(tmp_path: Path) -> None:
    files = []
    for number, text in enumerate(TEXTS):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(text, encoding="utf-8")
    assert train_tokenizer(iter(TEXTS), 280).to_str() == TRAINED.to_str() == train_tokenizer(files, 280).to_str()


def test_too_small_vocabulary_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigurationError, match=r"vocab_size=256 .* 256 bytes \+ 1 end-of-text token = 257"):
        train_tokenizer(TEXTS, 256)
    assert train_tokenizer(TEXTS, 257).get_vocab_size() == 257


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigurationError, match="latin.txt"):
        train_tokenizer([tmp_path / "latin.txt"], 300)


def test_load_takes_the_file_or_its_folder(tmp_path: Path) -> None:
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        assert load_tokenizer(path).to_str() == TRAINED.to_str()
        assert tokenizer_file(path) == tmp_path / "tokenizer.json"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', '{"model": {"type": "nothing"}}'])
def test_corrupt_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_truncated_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(TRAINED.to_str()[:-100])
    with pytest.raises(ConfigurationError, match=r"tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"No tokenizer at .*tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigurationError, match=r"No tokenizer at .*missing.json"):
        load_tokenizer(tmp_path / "missing.json")


def test_empty_tokenizer_is_refused(tmp_path: Path) -> None:
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigurationError, match="without any tokens"):
        load_tokenizer(tmp_path)


def with_tokens(*tokens: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def test_end_of_text_of_known_families() -> None:
    assert end_of_text_id(with_tokens("<|im_end|>", "<|endoftext|>")) == 1  # Qwen
    assert end_of_text_id(with_tokens("<s>", "<|eot_id|>", "<|end_of_text|>")) == 2  # Llama 3
    assert end_of_text_id(with_tokens("<s>", "</s>")) == 1  # Mistral
    assert end_of_text_id(with_tokens("<a>", "<b>"), token="<b>") == 1  # named by the user


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_end_of_text_from_tokenizer_config(tmp_path: Path, eos: object) -> None:
    tokenizer = with_tokens("<go>", "<stop>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert end_of_text_id(tokenizer, tmp_path) == 1


def test_no_end_of_text_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"special tokens are: <a>, <b>\. .*end_of_text="):
        end_of_text_id(with_tokens("<b>", "<a>"))
    with pytest.raises(ConfigurationError, match="named <c>"):
        end_of_text_id(with_tokens("<b>", "</s>"), token="<c>")


def test_vocabulary_size_counts_gaps() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 9}, []))
    assert vocabulary_size(tokenizer) == 10
