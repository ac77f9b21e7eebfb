"""What a tokenised corpus is on disk: `TokenizedCorpus`, written by `tokenize.py`, read and checked by `module.py`.

OUTPUT/corpus.json        this summary; written last, so a folder without it is not a corpus
OUTPUT/tokenizer.json
OUTPUT/train, OUTPUT/val  litdata's index.json and chunk-*.bin (packed token ids)
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_llm.data.tokenizer import TOKENIZER_FILE
from lightning_llm.errors import ConfigurationError

CORPUS_FILE = "corpus.json"
INDEX_FILE = "index.json"
SPLITS = ("train", "val")
FORMAT = 1  # raised when older corpora can no longer be read


@dataclass(frozen=True)
class Chunk:
    """One file of packed tokens. `bytes` is the size of the file, its header included."""

    filename: str
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Split:
    """The train or the val part: what went in and the chunks that came out, in order."""

    documents: int = 0
    text_bytes: int = 0
    chunks: tuple[Chunk, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all chunks, the end-of-text tokens included."""
        return sum(chunk.tokens for chunk in self.chunks)

    def sequences_per_chunk(self, seq_len: int) -> tuple[int, ...]:
        """Training sequences in each chunk. One takes seq_len + 1 tokens: the inputs, and the labels one further."""
        return tuple(chunk.tokens // (seq_len + 1) for chunk in self.chunks)


@dataclass(frozen=True)
class TokenizedCorpus:
    """A tokenised corpus: where it lies and what is in it.

    Attributes:
        path: the folder.
        vocab_size: rows that an embedding needs (largest id + 1).
        end_of_text_id: the id that ends each document.
        files: files that were read.
        left_out: how many files were not text, by reason ("binary", "not UTF-8", "empty", "unreadable").
        left_out_examples: names of a few of them.
        train: the part to train on.
        val: the part held out; has no chunks when none was asked for.
        digest: of the input's names, sizes and times and of the options; the same digest is the same corpus.
        reused: the last `tokenize` found this corpus finished and did nothing. Not on disk.
    """

    path: Path
    vocab_size: int
    end_of_text_id: int
    files: int
    left_out: dict[str, int]
    left_out_examples: tuple[str, ...]
    train: Split
    val: Split
    digest: str
    reused: bool = dataclasses.field(default=False, compare=False)

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the ids."""
        return self.path / TOKENIZER_FILE

    def split(self, name: str) -> Split:
        """The split "train" or "val"."""
        return {"train": self.train, "val": self.val}[name]

    @classmethod
    def load(cls, path: str | Path) -> TokenizedCorpus:
        """Read the summary of the corpus in a folder. Cheap; `check_files` looks at the chunks.

        Raises:
            ConfigurationError: the folder is missing, not a (finished) corpus, or its summary is damaged.
        """
        folder = Path(path)
        file = folder / CORPUS_FILE
        if not file.is_file():
            what = "is not a finished tokenised corpus" if folder.exists() else "does not exist"
            raise ConfigurationError(
                f"The data folder {folder} {what} (no {file}). "
                f"Make it with: lightning-llm tokenize --input PATH --output {folder}"
            )
        try:
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            found = values.pop("format")
            if found != FORMAT:
                raise ConfigurationError(
                    f"{file} has format {found}, this version reads {FORMAT}. Tokenise again into another folder."
                )
            for name in SPLITS:
                split = values[name]
                values[name] = Split(**{**split, "chunks": tuple(Chunk(**chunk) for chunk in split["chunks"])})
            values["left_out_examples"] = tuple(values["left_out_examples"])
            return cls(path=folder, **values)
        except ConfigurationError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{file} is damaged ({type(error).__name__}: {error}). Remove {folder} and tokenise again."
            ) from error

    def save(self, folder: Path) -> None:
        """Write the summary into a folder."""
        values = dataclasses.asdict(self)
        del values["path"], values["reused"]
        text = json.dumps({"format": FORMAT, **values}, indent=2, ensure_ascii=False) + "\n"
        (folder / CORPUS_FILE).write_text(text, encoding="utf-8")

    def damage(self) -> list[str]:
        """What is wrong with the files of this corpus, one sentence for each; empty when all is well.

        Looks at names and sizes, not at contents.
        """
        found = [] if self.tokenizer_file.is_file() else [f"{self.tokenizer_file} is missing"]
        for name in SPLITS:
            folder, split = self.path / name, self.split(name)
            if not split.chunks:
                continue
            found += _index_damage(folder / INDEX_FILE, split)
            for chunk in split.chunks:
                file = folder / chunk.filename
                if not file.is_file():
                    found.append(f"{file} is missing")
                elif file.stat().st_size != chunk.bytes:
                    found.append(f"{file} has {file.stat().st_size} bytes instead of {chunk.bytes}")
        return found

    def check_files(self) -> None:
        """Make sure that all files are there in full.

        Raises:
            ConfigurationError: some are missing or have another size; names them.
        """
        found = self.damage()
        if found:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise ConfigurationError(
                f"The corpus {self.path} is damaged: {'; '.join(found[:5])}{more}. "
                "Copy it again, or run the same `lightning-llm tokenize` again: it rebuilds what is damaged."
            )

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {'reused, nothing to do' if self.reused else 'tokenised'}; "
            f"{self.files:,} files, vocabulary {self.vocab_size:,}"
        ]
        for name in SPLITS:
            split = self.split(name)
            ratio = f", {split.text_bytes / split.tokens:.2f} bytes per token" if split.tokens else ""
            lines.append(
                f"  {name:<5} {split.tokens:>13,} tokens in {split.documents:,} documents, "
                f"{len(split.chunks)} chunks{ratio}"
            )
        if self.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.left_out.items()))
            lines.append(f"  left out: {reasons} (such as {', '.join(self.left_out_examples)})")
        return "\n".join(lines)


def _index_damage(file: Path, split: Split) -> list[str]:
    try:
        chunks = json.loads(file.read_text(encoding="utf-8"))["chunks"]
        same = [(chunk["filename"], chunk["dim"]) for chunk in chunks] == [(c.filename, c.tokens) for c in split.chunks]
    except FileNotFoundError:
        return [f"{file} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{file} cannot be read ({error})"]
    return [] if same else [f"{file} does not list the chunks of {CORPUS_FILE}"]
