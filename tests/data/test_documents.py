"""Finding, cutting and dealing text: nothing is lost, nothing depends on place or chance."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.data.documents import (
    Piece,
    SourceFile,
    cut,
    deal,
    find_files,
    read_texts,
    shards,
    why_not_text,
)
from lightning_llm.errors import ConfigurationError


def source(path: Path, content: bytes | None = None) -> SourceFile:
    if content is not None:
        path.write_bytes(content)
    return SourceFile(path.name, str(path), path.stat().st_size, 0)


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_folders_are_searched_in_the_order_of_names_without_caches_and_hidden_files(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        "b.py",
        "a/z.md",
        "a/b/c.txt",
        ".git/config",
        "a/.hidden",
        "a/__pycache__/z.pyc",
        "lib/site-packages/x.py",
        "lib/dist-packages/x.py",
    )
    (root / "broken").symlink_to(root / "nowhere")
    assert [file.name for file in find_files([root])] == ["a/b/c.txt", "a/z.md", "b.py"]


def test_a_given_root_is_searched_even_if_its_own_name_is_hidden(tmp_path: Path) -> None:
    assert [file.name for file in find_files([tree(tmp_path / ".cache" / "site-packages", "a.txt")])] == ["a.txt"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["tests"], ["a.py", "a/b.py", "a/c.svg"]),
        (["*.svg"], ["a.py", "a/b.py", "a/tests/t.py", "tests/t.py"]),
        (["a/*"], ["a.py", "tests/t.py"]),
        (["a"], ["a.py", "tests/t.py"]),
        (["a/tests"], ["a.py", "a/b.py", "a/c.svg", "tests/t.py"]),
    ],
)
def test_exclude_matches_names_and_paths(tmp_path: Path, exclude: list[str], left: list[str]) -> None:
    root = tree(tmp_path, "a.py", "a/b.py", "a/c.svg", "a/tests/t.py", "tests/t.py")
    assert [file.name for file in find_files([root], exclude)] == left


def test_a_file_given_twice_is_one_file_and_the_output_is_not_input(tmp_path: Path) -> None:
    root = tree(tmp_path, "a.txt", "out/b.txt")
    assert [file.name for file in find_files([root / "a.txt", root], skip=[root / "out"])] == ["a.txt"]


def test_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere does not exist"):
        find_files([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"a\0b", "binary"),
        (b"caf\xe9 au lait", "not UTF-8"),
        ("naïve".encode()[:3], "not UTF-8"),  # ends within a character
        ("ï".encode() * (1 << 19) + b"x" + "ï".encode(), None),  # characters across the blocks that are read
        (b"plain", None),
    ],
)
def test_what_is_text(tmp_path: Path, content: bytes, reason: str | None) -> None:
    assert why_not_text(source(tmp_path / "f", content)) == reason


def test_unreadable_file_is_left_out(tmp_path: Path) -> None:
    file = source(tmp_path / "f", b"x")
    os.remove(tmp_path / "f")
    assert why_not_text(file) == "unreadable"


@settings(deadline=None)
@given(text=st.text(alphabet="ab\n\u00e9\u4e2d\U0001f600", min_size=1, max_size=400), piece_bytes=st.integers(4, 100))
def test_cut_text_covers_the_file_in_whole_characters(
    tmp_path_factory: pytest.TempPathFactory, text: str, piece_bytes: int
) -> None:
    file = source(tmp_path_factory.mktemp("cut") / "f.txt", text.encode())
    ranges = cut(file, piece_bytes)
    assert [start for start, _ in ranges] == [0] + [end for _, end in ranges[:-1]]
    assert ranges[-1][1] == file.size
    assert all(end > start for start, end in ranges)
    texts = [read_texts(file, Piece(0, start, end, False), "text")[0] for start, end in ranges]
    assert "".join(texts) == text


def test_cut_prefers_line_ends_and_gives_up_on_endless_lines(tmp_path: Path) -> None:
    lines = source(tmp_path / "lines.txt", b"0123456789abcde\n" * 1000)
    assert all(end % 16 == 0 for _, end in cut(lines, 100))
    endless = source(tmp_path / "endless.txt", b"x" * 1_000_000)
    assert max(end - start for start, end in cut(endless, 100_000)) == 100_000


@settings(deadline=None)
@given(texts=st.lists(st.text(max_size=50), min_size=1, max_size=30), piece_bytes=st.integers(1, 200))
def test_json_lines_are_never_cut_within_a_line(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], piece_bytes: int
) -> None:
    content = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    file = source(tmp_path_factory.mktemp("cut") / "f.jsonl", content)
    pieces = [Piece(0, start, end, True) for start, end in cut(file, piece_bytes)]
    read = [text for piece in pieces for text in read_texts(file, piece, "text")]
    wanted = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts if text]
    assert read == wanted


def test_half_a_character_in_json_becomes_a_replacement_character(tmp_path: Path) -> None:
    file = source(tmp_path / "f.jsonl", b'{"text": "a\\ud83db"}\n')
    assert read_texts(file, Piece(0, 0, file.size, True), "text") == ["a\ufffdb"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"f.jsonl, line 5, is not JSON"),
        ('{"body": "x"}', r"f.jsonl, line 5, has no string under 'text', but body\..*text_key="),
        ('{"text": 3}', r"f.jsonl, line 5, has no string under 'text'"),
        ("[1]", r"f.jsonl, line 5, has no string under 'text', but list"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    good = '{"text": "good"}\n'
    file = source(tmp_path / "f.jsonl", (good * 3 + "\n" + line + "\n" + good).encode())
    pieces = [Piece(0, start, end, True) for start, end in cut(file, len(good) * 2)]
    with pytest.raises(ConfigurationError, match=message):
        for piece in pieces:
            read_texts(file, piece, "text")


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    file = source(tmp_path / "f.txt", b"0123456789")
    (tmp_path / "f.txt").write_bytes(b"01234")
    with pytest.raises(ConfigurationError, match=r"f.txt became shorter"):
        read_texts(file, Piece(0, 0, 10, True), "text")


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=60), fraction=st.floats(0, 0.9))
def test_deal_is_a_partition_near_the_fraction_asked_for(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], fraction: float
) -> None:
    files = [SourceFile(f"{number}.txt", "", size, 0) for number, size in enumerate(sizes)]
    train, val = deal(files, fraction)
    assert sorted(train + val) == [Piece(number, 0, size, True) for number, size in enumerate(sizes)]
    assert train
    if fraction == 0 or len(sizes) == 1:
        assert not val
    else:
        assert val
        assert sum(piece.size for piece in val) <= max(fraction * sum(sizes), min(sizes))


def test_deal_is_a_matter_of_names_and_not_of_places() -> None:
    def val_names(folder: str, count: int) -> set[str]:
        files = [SourceFile(f"{number}.txt", f"{folder}/{number}.txt", 100, 0) for number in range(count)]
        return {files[piece.file].name for piece in deal(files, 0.1)[1]}

    assert val_names("/here", 200) == val_names("/there", 200)
    assert 18 <= len(val_names("/here", 200)) <= 20
    assert len(val_names("/here", 200) & val_names("/here", 210)) > 15  # a few more files move few others


def test_a_long_text_is_shared_and_has_an_end_of_text_only_where_it_is_broken_off(tmp_path: Path) -> None:
    file = source(tmp_path / "book.txt", b"0123456789abcde\n" * 100_000)  # 1.6 MB: 7 pieces
    train, val = deal([file], 0.2)
    assert len(train) + len(val) == 7 and 1 <= len(val) <= 2
    in_order = sorted(train + val)
    for piece, following in zip(in_order, in_order[1:], strict=False):
        assert piece.ends_document == ((piece in val) != (following in val))
    assert in_order[-1].ends_document


def test_shards_hold_all_pieces_in_order() -> None:
    pieces = [Piece(number, 0, 10, True) for number in range(25)]
    grouped = shards(pieces, 100)
    assert [piece for shard in grouped for piece in shard] == pieces
    assert [len(shard) for shard in grouped] == [10, 10, 5]
    assert shards([], 100) == []
