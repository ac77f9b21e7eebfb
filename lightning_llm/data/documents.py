"""Which text is in a corpus, and who gets it: finds files, cuts long ones into pieces, deals pieces to train and val.

`tokenize.py` calls this to plan a run and its workers to read a piece. Everything here is a pure function of the input
files, so that the same input gives the same plan on every machine and with any number of workers.
"""

from __future__ import annotations

import codecs
import fnmatch
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lightning_llm.errors import ConfigurationError

# A piece is the unit of work and of the split. Documents up to this size stay whole; a longer file is cut at line ends,
# so that one book can have a validation part and no worker holds more than a piece of text.
PIECE_BYTES = 256 * 1024
_CUT_SEARCH_BYTES = 64 * 1024  # how far to look for a line end before a text without line ends is cut anyway
_READ_BYTES = 1 << 20
ALWAYS_EXCLUDED = ("__pycache__", "site-packages", "dist-packages")
_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class SourceFile:
    """A file of the input. `name` is relative to the input, so that no decision depends on where the input lies."""

    name: str
    path: str
    size: int  # bytes
    modified: int  # nanoseconds

    @property
    def is_json_lines(self) -> bool:
        """Whether each line is a JSON object that holds one document."""
        return self.path.lower().endswith(_JSON_LINES)


class Piece(NamedTuple):
    """Bytes [start, end) of a file. `ends_document`: what follows it in its split is another document."""

    file: int
    start: int
    end: int
    ends_document: bool

    @property
    def size(self) -> int:
        """Bytes of text."""
        return self.end - self.start


def find_files(
    inputs: Sequence[str | Path], exclude: Sequence[str] = (), skip: Sequence[Path] = ()
) -> list[SourceFile]:
    """All files of the input, folders searched recursively, sorted by name within each input.

    Hidden files and folders, `__pycache__`, `site-packages` and `dist-packages` below an input folder are left out, and
    so is what matches an `exclude` pattern by its own name or by its path below the input (`tests`, `*.svg`, `a/b/*`).

    Args:
        inputs: files and folders.
        exclude: glob patterns.
        skip: folders that are never read (the output, when it lies within the input).

    Raises:
        ConfigurationError: an input does not exist.
    """
    found: dict[str, SourceFile] = {}
    skipped = {path.resolve() for path in skip}
    for given in inputs:
        root = Path(given)
        if root.is_file():
            candidates: Iterable[tuple[str, Path]] = [(root.name, root)]
        elif root.is_dir():
            candidates = _walk(root, exclude, skipped)
        else:
            raise ConfigurationError(f"Input {root} does not exist. Give a text file, a .jsonl file or a folder.")
        for name, path in candidates:
            real = str(path.resolve())
            if real not in found:  # the same file given twice is one file
                status = os.stat(real)
                found[real] = SourceFile(name, real, status.st_size, status.st_mtime_ns)
    return list(found.values())


def _walk(root: Path, exclude: Sequence[str], skipped: set[Path]) -> Iterator[tuple[str, Path]]:
    def wanted(name: str, relative: str) -> bool:
        if name.startswith(".") or name in ALWAYS_EXCLUDED:
            return False
        return not any(fnmatch.fnmatch(name, glob) or fnmatch.fnmatch(relative, glob) for glob in exclude)

    files: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        below = here.relative_to(root)
        folders[:] = [
            name
            for name in folders
            if wanted(name, (below / name).as_posix()) and (here / name).resolve() not in skipped
        ]
        for name in names:
            relative = (below / name).as_posix()
            if wanted(name, relative) and (here / name).is_file():  # not a broken link, socket or pipe
                files.append((relative, here / name))
    yield from sorted(files)


def why_not_text(file: SourceFile) -> str | None:
    """Why a file is left out ("empty", "binary", "not UTF-8", "unreadable"); None when it is text. Reads all of it."""
    if file.size == 0:
        return "empty"
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(file.path, "rb") as stream:
            while block := stream.read(_READ_BYTES):
                if b"\0" in block:
                    return "binary"
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "not UTF-8"
    except OSError:
        return "unreadable"
    return None


def cut(file: SourceFile, piece_bytes: int = PIECE_BYTES) -> list[tuple[int, int]]:
    """Cut a file into ranges [start, end) of about `piece_bytes`, at line ends.

    JSON lines are never cut within a line. Text without line ends is cut between two characters.
    """
    if file.size <= piece_bytes:
        return [(0, file.size)]
    ranges, start = [], 0
    with open(file.path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        size = len(data)
        while start < size:
            target = start + piece_bytes
            if target >= size:
                end = size
            elif file.is_json_lines:
                end = data.find(b"\n", target - 1) + 1 or size
            else:
                end = data.find(b"\n", target - 1, target + _CUT_SEARCH_BYTES) + 1
                if end == 0:
                    end = target
                    while data[end] & 0xC0 == 0x80:  # a continuation byte: step back to where the character begins
                        end -= 1
            ranges.append((start, end))
            start = end
    return ranges


def deal(files: Sequence[SourceFile], val_fraction: float) -> tuple[list[Piece], list[Piece]]:
    """Cut files into pieces and deal them into (train, val), both in the order of the files.

    A piece goes to val by the hash of its name and place, so that adding a file moves few others. Val takes about
    `val_fraction` of the bytes, at least one piece (when there are two), and never all.
    """
    ranges = [(index, start, end) for index, file in enumerate(files) for start, end in cut(file)]
    chosen = _choose(ranges, [draw(files[index].name, start) for index, start, _ in ranges], val_fraction)
    train: list[Piece] = []
    val: list[Piece] = []
    for place, (index, start, end) in enumerate(ranges):
        # A text that goes on in the next piece of the same split has no end-of-text in between.
        goes_on = (
            place + 1 < len(ranges)
            and ranges[place + 1][0] == index
            and (place in chosen) == (place + 1 in chosen)
            and not files[index].is_json_lines
        )
        (val if place in chosen else train).append(Piece(index, start, end, not goes_on))
    return train, val


def draw(name: str, start: int) -> bytes:
    """A hash that puts pieces in an order that has nothing to do with their names; the same everywhere."""
    return hashlib.blake2b(f"{name}\0{start}".encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _choose(ranges: Sequence[tuple[int, int, int]], draws: Sequence[bytes], fraction: float) -> set[int]:
    if fraction <= 0 or len(ranges) < 2:
        return set()
    sizes = [end - start for _, start, end in ranges]
    wanted = fraction * sum(sizes)
    chosen: set[int] = set()
    taken = 0
    for place in sorted(range(len(ranges)), key=lambda place: draws[place]):
        if taken + sizes[place] <= wanted:
            chosen.add(place)
            taken += sizes[place]
        elif taken >= wanted / 2:
            break  # close enough; going on would fill the rest with small files only
    if not chosen:
        chosen.add(min(range(len(ranges)), key=lambda place: (sizes[place], draws[place])))
    return chosen


def shards(pieces: Sequence[Piece], shard_bytes: int) -> list[list[Piece]]:
    """Group neighbouring pieces into shards of at least `shard_bytes` of text (the last may be smaller)."""
    groups: list[list[Piece]] = []
    size = shard_bytes
    for piece in pieces:
        if size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    return groups


def read_texts(file: SourceFile, piece: Piece, text_key: str) -> list[str]:
    """The texts of a piece: one for plain text, one per non-empty line for JSON lines.

    Raises:
        ConfigurationError: a JSON line cannot be used, or the file changed since it was planned; names file and line.
    """
    with open(file.path, "rb") as stream:
        stream.seek(piece.start)
        data = stream.read(piece.size)
    if len(data) != piece.size:
        raise ConfigurationError(f"{file.path} became shorter while it was read. Let it be written fully, then rerun.")
    if file.is_json_lines:
        return list(_json_texts(file, piece, data, text_key))
    try:
        return [data.decode("utf-8")]
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file.path} changed while it was read ({error}). Rerun.") from error


def _json_texts(file: SourceFile, piece: Piece, data: bytes, text_key: str) -> Iterator[str]:
    for number, line in enumerate(data.split(b"\n")):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigurationError(
                f"{_line(file, piece, number)} is not JSON: {error}. Correct that line."
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
            keys = ", ".join(sorted(map(str, record))) if isinstance(record, dict) else type(record).__name__
            raise ConfigurationError(
                f"{_line(file, piece, number)} has no string under {text_key!r}, but {keys or 'no keys'}. "
                "Name the key that holds the text with text_key=..."
            )
        text = record[text_key]
        if text:
            yield _without_lone_surrogates(text)


def _line(file: SourceFile, piece: Piece, number: int) -> str:
    """`file, line n`, counted from the start of the file; only an error pays for the counting."""
    with open(file.path, "rb") as stream:
        before = stream.read(piece.start).count(b"\n")
    return f"{file.path}, line {before + number + 1},"


def _without_lone_surrogates(text: str) -> str:
    # JSON can spell half a character ("\ud83d"), which is no text: no tokenizer takes it. It becomes U+FFFD.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
