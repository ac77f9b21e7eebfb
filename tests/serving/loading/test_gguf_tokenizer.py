"""Vocabularies in `.gguf` files -> the tokenizers that they were taken from, for texts where splitting matters."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.loading.gguf_file import GGUFFile
from lightning_llm.serving.loading.gguf_tokenizer import end_token_ids, read_tokenizer
from lightning_llm.serving.tokenizer import ModelTokenizer
from tests.serving.loading.ggufs import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, byte_level, sentencepiece
from tests.serving.smollm2 import smollm2_folder

TEXT = (
    "In 1984, 31415 people DON'T say  'hello   world'; we'll see 12,345.67 again.\n\n\n  def camelCase(HTTPServer):\n"
    "\treturn {'a': 1}  # naïve Ünïcödé, ΑΒΓ абв 日本語 ١٢٣ ½ 🙂👍🏽  \r\n a/b//c e\u0301 \u00e9 <|end|>.</s> <tool>x\n"
)
CORPUS = [TEXT, Path(gguf.__file__).with_name("constants.py").read_text()[:20000]]
LLAMA3 = TikTokenConverter("").pattern
# The pattern in the tokenizer.json of Mistral's models since NeMo, as llama.cpp cites it.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def original(regex: str | None = None, *, digits: bool = False, nfc: bool = False) -> Tokenizer:
    """A tokenizer as the models of a family have it, small, with tokens of all kinds."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.normalizer = normalizers.NFC() if nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens([AddedToken("<s>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def parts(tokenizer: Tokenizer) -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and types, as a `.gguf` file has them."""
    content = json.loads(tokenizer.to_str())
    added = tokenizer.get_added_tokens_decoder()
    kinds = {number: CONTROL if token.special else USER_DEFINED for number, token in added.items()}
    tokens = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return tokens, merges, [kinds.get(number, NORMAL) for number in range(len(tokens))]


def vocabulary(path: Path, write: Any) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


@pytest.mark.parametrize(
    ("pre", "tokenizer"),
    [
        ("smollm", {"digits": True}),
        ("gpt-2", {}),
        ("olmo", {"nfc": True}),
        ("llama-bpe", {"regex": LLAMA3}),
        ("qwen2", {"regex": PRETOKENIZE_REGEX, "nfc": True}),
        ("tekken", {"regex": TEKKEN}),
    ],
)
def test_byte_level_vocabularies(tmp_path: Path, pre: str, tokenizer: dict[str, Any]) -> None:
    expected = original(**tokenizer)
    tokens, merges, types = parts(expected)
    write = byte_level(tokens, merges, pre, types, add_bos_token=False)
    found = read_tokenizer(vocabulary(tmp_path / "model.gguf", write))
    for text in CORPUS:
        assert found.encode(text).ids == expected.encode(text).ids
        assert found.decode(found.encode(text).ids, skip_special_tokens=True) == expected.decode(
            expected.encode(text).ids, skip_special_tokens=True
        )
    assert {str(token) for token in found.get_added_tokens_decoder().values()} == {"<s>", "<|end|>", "<tool>"}


def test_splitting_is_not_all_the_same(tmp_path: Path) -> None:
    tokens, merges, types = parts(original())
    pieces = {}
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"):
        write = byte_level(tokens, merges, pre, types)
        splitter = read_tokenizer(vocabulary(tmp_path / f"{pre}.gguf", write)).pre_tokenizer
        pieces[pre] = tuple(piece for piece, _ in splitter.pre_tokenize_str(TEXT))
    assert len(set(pieces.values())) == len(pieces)


def test_a_token_in_front(tmp_path: Path) -> None:
    tokens, merges, types = parts(original())
    bos = tokens.index("<s>")

    def first(pre: str, **values: Any) -> int:
        write = byte_level(tokens, merges, pre, types, **values)
        return read_tokenizer(vocabulary(tmp_path / "model.gguf", write)).encode("hello").ids[0]

    assert first("llama-bpe", bos_token_id=bos) == bos, "Llama 3 has one where the file does not say"
    assert first("llama-bpe", bos_token_id=bos, add_bos_token=False) != bos
    assert first("gpt-2", bos_token_id=bos) != bos
    assert first("gpt-2", bos_token_id=bos, add_bos_token=True) == bos


def test_tokens_that_end_an_answer(tmp_path: Path) -> None:
    tokens, merges, types = parts(original())
    eos, end = tokens.index("<s>"), tokens.index("<|end|>")
    write = byte_level(tokens, merges, "gpt-2", types, eos_token_id=eos)
    assert end_token_ids(vocabulary(tmp_path / "model.gguf", write)) == [eos, end]


def test_a_splitting_that_is_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, merges, types = parts(original())
    write = byte_level(tokens, merges, "brand-new", types)
    with pytest.raises(ConfigurationError, match="'brand-new' .* not known here; known are gpt-2, .*smollm"):
        read_tokenizer(vocabulary(tmp_path / "model.gguf", write))
    with caplog.at_level(logging.WARNING):
        read_tokenizer(vocabulary(tmp_path / "model.gguf", byte_level(tokens, merges, None, types)))
    assert "does not say how its texts are split" in caplog.text


def test_a_vocabulary_of_another_kind_or_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="kind 't5'"):
        read_tokenizer(
            vocabulary(
                tmp_path / "a.gguf", lambda writer: (writer.add_tokenizer_model("t5"), writer.add_token_list(["a"]))
            )
        )
    with pytest.raises(ConfigurationError, match="has no vocabulary"):
        read_tokenizer(vocabulary(tmp_path / "b.gguf", lambda writer: writer.add_uint32("x", 1)))


def test_sentencepiece_vocabularies(tmp_path: Path) -> None:
    expected = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    expected.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    expected.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # for training alone: lines are no tokens
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", *bytes_]
    expected.train_from_iterator(
        CORPUS[1:], trainers.BpeTrainer(vocab_size=900, special_tokens=special, limit_alphabet=80, show_progress=False)
    )
    content = json.loads(expected.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special[:3]]
    content["pre_tokenizer"] = None
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    expected = Tokenizer.from_str(json.dumps(content))
    tokens = [expected.id_to_token(number) for number in range(expected.get_vocab_size())]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    write = sentencepiece(
        tokens, [-float(number) for number in range(len(tokens))], types, bos_token_id=1, eos_token_id=2, unk_token_id=0
    )
    found = read_tokenizer(vocabulary(tmp_path / "model.gguf", write))
    for text in CORPUS:
        ids = found.encode(text).ids
        assert ids[0] == 1, "bos, where the file does not say"
        assert ids[1:] == expected.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) == expected.decode(ids)
    model = ModelTokenizer(found)
    assert b"".join(map(model.token_bytes, model.encode("日本 x\n", add_special_tokens=False))) == " 日本 x\n".encode()


def test_smollm2_has_the_tokenizer_of_its_makers() -> None:
    tokenizer = ModelTokenizer.load(smollm2_folder())
    assert tokenizer.encode("total:   1234") == [9712, 42, 333, 33, 34, 35, 36], "digits are split before the spaces"
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    theirs = AutoTokenizer.from_pretrained(smollm2_folder())
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT)
    assert tokenizer.eos_token_ids == {2}
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    text = tokenizer.apply_chat_template(messages)
    assert text == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
