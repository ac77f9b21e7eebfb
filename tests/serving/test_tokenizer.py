"""A model folder's tokenizer: the ids of transformers, bytes of tokens, and what is said where something is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer

from lightning_llm.data.tokenizer import train_tokenizer
from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.tokenizer import ModelTokenizer

TEXT = "Ünïcödé, 日本語 🙂 and\n\n plain  text 1234.\r\n"
CHATML = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer([TEXT * 3], 280)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path,
        eos_token={"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        bos_token="<|endoftext|>",
    )
    return tmp_path


def write(folder: Path, **settings: Any) -> None:
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added(280, "<|im_end|>")}
    (folder / "tokenizer_config.json").write_text(json.dumps(known | settings))


def added(number: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {str(number): {"content": content, "special": True, **flags}}


def test_ids_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = ModelTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, "", "a<|im_end|>b"):
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ids[0] == ours.bos_token_id == 0
        assert ours.encode(text, add_special_tokens=False) == ids[1:]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == 281 == len(theirs)


def test_tokens_that_end_an_answer(folder: Path) -> None:
    assert ModelTokenizer.load(folder, eos_token_ids=[0, 7]).eos_token_ids == {0, 7, 280}


def test_bytes_of_tokens_make_up_the_text(folder: Path) -> None:
    tokenizer = ModelTokenizer.load(folder)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(TEXT, add_special_tokens=False))) == TEXT.encode()
    assert tokenizer.token_bytes(280) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""
    every = {tokenizer.token_bytes(number) for number in range(tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= every


def test_what_only_looks_like_a_byte_is_text() -> None:
    words = ["<unk>", "<0xZZ>", "<0x0A>", "▁the"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = ModelTokenizer(backend)
    assert [tokenizer.token_bytes(number) for number in (1, 2, 3)] == [b"<0xZZ>", b"\n", b" the"]


def test_limits_of_training_do_not_cut_a_prompt(folder: Path) -> None:
    tokenizer = ModelTokenizer.load(folder).backend
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(ModelTokenizer.load(folder).encode(TEXT)) > 8


def test_where_templates_are_looked_for(folder: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]

    def text(**arguments: Any) -> str:
        return ModelTokenizer.load(folder, **arguments).apply_chat_template(messages, tools=arguments.get("tools"))

    write(folder, chat_template=CHATML)
    assert text() == "user: Hi\n"
    write(folder, chat_template=[{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "tools"}])
    assert text() == "listed"
    (folder / "chat_template.jinja").write_text("of a file")
    assert text() == "of a file"
    (folder / "mine.jinja").write_text("mine")
    assert text(chat_template=folder / "mine.jinja") == "mine"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].name }}")
    tokenizer = ModelTokenizer.load(folder)
    assert tokenizer.apply_chat_template(messages, [{"name": "f"}]) == "f"
    with pytest.raises(ConfigurationError, match=r"chat template .*none.jinja cannot be read"):
        text(chat_template=folder / "none.jinja")


def test_a_model_without_a_template(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"no chat template.* /v1/completions.* --chat-template FILE") as caught:
        ModelTokenizer.load(folder).apply_chat_template([{"role": "user", "content": "Hi"}])
    assert caught.value.param == "messages"


def test_files_that_are_missing_or_damaged(folder: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ConfigurationError, match=match):
            ModelTokenizer.load(folder)

    write(folder, added_tokens_decoder=added(444, "<|im_end|>"))
    refused("token 444 is '<|im_end|>', but .* not of the same model")
    (folder / "tokenizer_config.json").write_text("[1]")
    refused("tokenizer_config.json holds a list")
    (folder / "tokenizer_config.json").write_text("{")
    refused("tokenizer_config.json is not valid JSON")
    (folder / "tokenizer_config.json").unlink()
    ModelTokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    refused("tokenizer.json is not a tokenizer")
    (folder / "tokenizer.json").unlink()
    refused("has no tokenizer.json, without which there is no text. Copy it there")
    (folder / "tokenizer.model").write_bytes(b"")
    refused("has tokenizer.model, of which .* makes a tokenizer.json")
