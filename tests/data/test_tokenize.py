"""Text to corpus, end to end: complete, repeatable, atomic, and clear about what it cannot use."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lightning_llm.data import packing
from lightning_llm.data.corpus import TokenizedCorpus
from lightning_llm.data.documents import Piece, SourceFile
from lightning_llm.data.tokenize import tokenize
from lightning_llm.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from lightning_llm.errors import ConfigurationError
from tests.data.corpora import prose, tokens_of, write_documents


def documents_of(corpus: TokenizedCorpus, split: str) -> list[str]:
    """The texts of a split, decoded from its tokens."""
    tokens = tokens_of(corpus, split)
    ends = np.flatnonzero(tokens == corpus.end_of_text_id)
    assert ends[-1] == len(tokens) - 1
    tokenizer = load_tokenizer(corpus.tokenizer_file)
    parts = np.split(tokens, ends + 1)[:-1]
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.usefixtures("small_shards")
def test_tokens_decode_to_the_documents_and_the_second_call_reuses_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = write_documents(tmp_path / "in", count=20)
    texts |= {
        "odd.md": "naïve 中文 😀\r\n\ttabs  and   spaces\n\n\n" + "é" * 100,
        "spells.py": f"print('{END_OF_TEXT}')  # not the end {END_OF_TEXT}",
        "sub/deep.txt": "deep",
    }
    lines = [f"line {number}: {prose(number + 100, 30)}" for number in range(10)] + [END_OF_TEXT]
    for name in ("odd.md", "spells.py", "sub/deep.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(texts[name].encode())
    (tmp_path / "in" / "many.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in [*lines, ""]) + "\n\n")
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "in" / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in" / "empty.txt").touch()

    corpus = tokenize(tmp_path / "in", tmp_path / "out", vocab_size=300, val_fraction=0.2, text_key="body")
    told = capfd.readouterr()
    assert told.out == "" and "training a vocabulary of 300" in told.err
    assert "lightning.ai" not in told.err and "Rank" not in told.err  # litdata's chatter

    train, val = documents_of(corpus, "train"), documents_of(corpus, "val")
    assert sorted(train + val) == sorted([*texts.values(), *lines])
    assert (corpus.train.documents, corpus.val.documents) == (len(train), len(val))
    assert len(corpus.train.chunks) > 2 and len(corpus.val.chunks) >= 1
    held_out = sum(len(text.encode()) for text in val)
    assert 0.1 < held_out / (held_out + sum(len(text.encode()) for text in train)) <= 0.2
    assert corpus.left_out == {"binary": 1, "not UTF-8": 1, "empty": 1}
    assert corpus.files == 24 and corpus.vocab_size == 300 and not corpus.reused
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["corpus.json", "tokenizer.json", "train", "val"]

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    again = tokenize(
        tmp_path / "in", tmp_path / "out", vocab_size=300, val_fraction=0.2, text_key="body", num_workers=7
    )
    assert again.reused and again == corpus and "reused" in str(again)
    assert "nothing to do" in capfd.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


@pytest.mark.usefixtures("small_shards")
def test_output_is_the_same_whatever_the_number_of_workers_and_the_place(tmp_path: Path) -> None:
    write_documents(tmp_path / "in")
    for number, workers in enumerate((1, 2, 3)):
        os.makedirs(tmp_path / str(number))
        shutil.copytree(tmp_path / "in", tmp_path / str(number) / "in", copy_function=shutil.copy2)
        tokenize(
            tmp_path / str(number) / "in",
            tmp_path / str(number) / "out",
            num_workers=workers,
            vocab_size=300,
            progress=False,
        )
    first = contents(tmp_path / "0" / "out")
    assert len(first) > 8
    assert first == contents(tmp_path / "1" / "out") == contents(tmp_path / "2" / "out")


def job(folder: Path, tokenizer_file: Path, texts: dict[str, str], **changes: object) -> packing.Job:
    files = [SourceFile(n, str(folder / "in" / n), (folder / "in" / n).stat().st_size, 0) for n in texts]
    pieces = [Piece(number, 0, file.size, True) for number, file in enumerate(files)]
    shards = {"train": [pieces[:3], pieces[3:4], pieces[4:]]}
    values = packing.Job(str(folder / "out"), str(tokenizer_file), 300, 0, "text", files, shards, num_workers=2)
    return dataclasses.replace(values, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_packing_with_a_large_vocabulary_and_either_start_method(tmp_path: Path, start_method: str) -> None:
    texts = write_documents(tmp_path / "in", count=6)
    tokenizer = train_tokenizer(texts.values(), 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    seen: list[int] = []
    (tmp_path / "scratch").mkdir()
    work = job(tmp_path, tmp_path / "tokenizer.json", texts, start_method=start_method, vocab_size=100_000)
    done = packing.pack(work, tmp_path / "scratch", seen.append)
    assert sum(seen) == done["train"].text_bytes == sum(len(text) for text in texts.values())
    expected = [[*tokenizer.encode(text).ids, 0] for text in texts.values()]
    assert [chunk.tokens for chunk in done["train"].chunks] == [
        sum(map(len, part)) for part in (expected[:3], expected[3:4], expected[4:])
    ]
    assert done["train"].chunks[1].bytes == 12 + 4 * len(expected[3])  # 4 bytes an id
    index = json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    assert index["config"]["data_format"] == ["no_header_numpy:6"]  # uint32


def test_a_failure_of_the_packing_process_is_told_with_its_last_words(tmp_path: Path) -> None:
    texts = write_documents(tmp_path / "in", count=6)
    train_tokenizer(texts.values(), 300).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "scratch").mkdir()
    (tmp_path / "file").write_text("in the way")
    wrong = job(tmp_path, tmp_path / "tokenizer.json", texts, output=str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"exit code(.|\n)*file"):
        packing.pack(wrong, tmp_path / "scratch", lambda count: None)


def test_given_tokenizer_is_used_and_copied_and_other_options_make_it_anew(tmp_path: Path) -> None:
    texts = write_documents(tmp_path / "in", count=5)
    given = train_tokenizer(["something else entirely 42"] * 3, 270)
    (tmp_path / "given").mkdir()
    given.save(str(tmp_path / "given" / "tokenizer.json"))
    options = {"val_fraction": 0.0, "num_workers": 1, "progress": False}
    corpus = tokenize(tmp_path / "in", tmp_path / "out", tokenizer=tmp_path / "given", **options)
    assert corpus.tokenizer_file.read_bytes() == (tmp_path / "given" / "tokenizer.json").read_bytes()
    assert documents_of(corpus, "train") == list(texts.values())
    assert corpus.val.chunks == () and not (tmp_path / "out" / "val").exists()

    same = tokenize(tmp_path / "in", tmp_path / "out", tokenizer=tmp_path / "given" / "tokenizer.json", **options)
    assert same.reused  # the same tokenizer, named in another way
    (tmp_path / "out" / "train" / "chunk-0-0.bin").unlink()
    repaired = tokenize(tmp_path / "in", tmp_path / "out", tokenizer=tmp_path / "given", **options)
    assert not repaired.reused and repaired == corpus

    (tmp_path / "in" / "new.txt").write_text("one more")
    changed = tokenize(tmp_path / "in", tmp_path / "out", tokenizer=tmp_path / "given", **options)
    assert not changed.reused and changed.train.documents == 6
    assert TokenizedCorpus.load(tmp_path / "out") == changed
    assert sorted(os.listdir(tmp_path)) == ["given", "in", "out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, r"vocab_size=100 is too small"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0 is not a share"),
        ({"val_fraction": -0.1}, r"val_fraction=-0.1 is not a share"),
        ({"num_workers": 0}, r"num_workers=0"),
        ({"tokenizer": "nowhere.json"}, r"No tokenizer at nowhere.json"),
        ({"input": "nowhere"}, r"Input nowhere does not exist"),
        ({"output": "s3://bucket/tokens"}, r"is a URL"),
        ({"output": "file"}, r"Output .*file is a file"),
        ({"output": "full"}, r"Output .*full has files in it and is not a tokenised corpus"),
        ({"exclude": ["*.txt"]}, r"No text to tokenise in .*: 0 files found"),
        ({"end_of_text": "<stop>"}, r"no end-of-text token named <stop>"),
    ],
)
def test_bad_options_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "in", count=3)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigurationError, match=message):
        tokenize(**({"input": "in", "output": "out", "progress": False} | options))  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"\x89PNG\0", r"No text to tokenise in .*: 1 files found, left out: 1 binary \(such as a.png\)"),
        ("a.txt", b"", r"left out: 1 empty"),
        ("a.jsonl", b'\n\n{"text": ""}\n', r"all documents are empty"),
        ("a.jsonl", b'{"text": "fine"}\n{"txet": "typo"}\n', r"a.jsonl, line 2, has no string under 'text', but txet"),
    ],
)
def test_unusable_input_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        tokenize(tmp_path / "in", tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["in"]


def test_bad_json_found_by_a_worker_is_named(tmp_path: Path) -> None:
    """With a given tokenizer nobody reads the text before the workers do."""
    train_tokenizer(["x"], 257).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' * 5000 + "{broken\n")
    with pytest.raises(ConfigurationError, match=r"in.jsonl, line 5001, is not JSON"):
        tokenize(tmp_path / "in.jsonl", tmp_path / "out", tokenizer=tmp_path, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "tokenizer.json"]


def test_corrupt_tokenizer_is_named(tmp_path: Path) -> None:
    write_documents(tmp_path / "in", count=2)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"tokenizer.json is not a tokenizer"):
        tokenize(tmp_path / "in", tmp_path / "out", tokenizer=tmp_path, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["in", "tokenizer.json"]
