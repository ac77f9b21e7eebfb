"""Files of text -> a tokenised corpus on disk. The command line calls `tokenize`; `corpus.py` says what it leaves.

One run: find files -> leave out what is not text -> deal pieces to train and val -> train the tokenizer -> pack ->
publish by one rename. All but the packing (`packing.py`) happens here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from lightning_llm.data._litdata import import_litdata
from lightning_llm.data.corpus import CORPUS_FILE, FORMAT, SPLITS, Split, TokenizedCorpus
from lightning_llm.data.documents import Piece, SourceFile, deal, draw, find_files, read_texts, shards, why_not_text
from lightning_llm.data.packing import Job, pack
from lightning_llm.data.progress import Progress, human
from lightning_llm.data.tokenizer import (
    TOKENIZER_FILE,
    end_of_text_id,
    load_tokenizer,
    tokenizer_file,
    train_tokenizer,
    vocabulary_size,
)
from lightning_llm.errors import ConfigurationError

# Text that the tokenizer is trained on. More changes a vocabulary of some thousand little and costs memory.
TOKENIZER_SAMPLE_BYTES = 16 << 20
# Text per chunk: small corpora still give several chunks to shuffle and to share among workers, large ones few files.
_SMALLEST_SHARD, _LARGEST_SHARD, _SHARDS_WANTED = 1 << 20, 64 << 20, 256
_EXAMPLES = 3


def tokenize(
    input: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    val_fraction: float = 0.05,
    num_workers: int | None = None,
    text_key: str = "text",
    exclude: Sequence[str] = (),
    end_of_text: str | None = None,
    progress: bool = True,
) -> TokenizedCorpus:
    """Tokenise text into a folder that `TokenDataModule` reads.

    Every UTF-8 text file is a document, every line of a .jsonl (.ndjson) file is one. Each ends with the end-of-text
    token. The same input and options give the same files, byte for byte, whatever `num_workers` is; a second call finds
    them and does nothing (`reused` is True). The output appears at once when all is done: an interrupted run leaves the
    output as it was. Needs no `if __name__ == "__main__"` guard.

    Args:
        input: files and folders (searched recursively). Hidden files, `__pycache__`, `site-packages`, and files
            that are not UTF-8 text are left out and counted.
        output: the folder to make. A corpus that is there with another input or other options is replaced.
        tokenizer: a tokenizer.json, or a folder with one; None trains a byte-level BPE on the train part.
        vocab_size: ids of the trained tokenizer; not used when `tokenizer` is given.
        val_fraction: share of the text to hold out for validation, 0 for none.
        num_workers: processes; None takes one for each CPU core that this process may use.
        text_key: the key that holds the text in JSON lines.
        exclude: glob patterns of files and folders to leave out, such as `tests` or `*.svg`.
        end_of_text: the token that ends a document; None finds the tokenizer's own.
        progress: show progress on stderr: a bar on a terminal, else a line now and then.

    Raises:
        ConfigurationError: the input, the output, the tokenizer or an option cannot be used; says which and why.
    """
    progress_bar = Progress(progress)
    workers = _check_options(vocab_size, val_fraction, num_workers)
    import_litdata()
    if "://" in str(output):
        raise ConfigurationError(f"Output {output} is a URL; tokenise into a local folder.")
    output = Path(output)
    target, staging = _places(output)
    inputs = [input] if isinstance(input, (str, Path)) else list(input)
    files = find_files(inputs, exclude, skip=(target, staging))
    given = None if tokenizer is None else tokenizer_file(tokenizer)
    digest = _digest(files, given, vocab_size, val_fraction, text_key, end_of_text)

    if corpus := _finished(output, digest):
        progress_bar.note(f"{output} holds this corpus already: nothing to do")
        return corpus
    with _claimed(staging, progress_bar) as lock:
        if corpus := _finished(output, digest):  # by the run that we waited for
            return corpus
        texts, left_out = _texts_only(files, progress_bar)
        if not texts:
            raise ConfigurationError(
                f"No text to tokenise in {', '.join(map(str, inputs))}: {len(files)} files found"
                f"{_reasons(left_out)}. Give UTF-8 text files."
            )
        train, val = deal(texts, val_fraction)
        trained = _tokenizer(staging, given, texts, train, vocab_size, text_key, progress_bar)
        size = vocabulary_size(trained)
        end_id = end_of_text_id(trained, tokenizer, end_of_text)

        scratch = staging / "scratch"
        scratch.mkdir()
        job = Job(
            output=str(staging),
            tokenizer=str(staging / TOKENIZER_FILE),
            vocab_size=size,
            end_of_text_id=end_id,
            text_key=text_key,
            files=texts,
            shards=_shards({"train": train, "val": val}),
            num_workers=workers,
        )
        with progress_bar.bar("tokenizing", sum(file.size for file in texts)) as advance:
            done = pack(job, scratch, advance, keep_open=lock)
        shutil.rmtree(scratch)
        corpus = TokenizedCorpus(
            path=output,
            vocab_size=size,
            end_of_text_id=end_id,
            files=len(texts),
            left_out=dict(Counter(reason for _, reason in left_out)),
            left_out_examples=tuple(name for name, _ in left_out[:_EXAMPLES]),
            train=done.get("train", Split()),
            val=done.get("val", Split()),
            digest=digest,
        )
        if corpus.train.documents == 0:
            raise ConfigurationError(f"No text to tokenise in {', '.join(map(str, inputs))}: all documents are empty.")
        corpus.save(staging)
        _publish(staging, target)
    return corpus


def _check_options(vocab_size: int, val_fraction: float, num_workers: int | None) -> int:
    """The number of workers, once all options are seen to be possible (vocab_size: train_tokenizer says)."""
    if not 0 <= val_fraction < 1:
        raise ConfigurationError(f"val_fraction={val_fraction} is not a share: set it to 0 (none) or more, below 1.")
    if num_workers is not None and num_workers < 1:
        raise ConfigurationError(f"num_workers={num_workers}: tokenising takes at least 1 process.")
    return num_workers or _usable_cores()


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _places(output: Path) -> tuple[Path, Path]:
    """The real folder to make, and the folder beside it to work in (one file system, so that a rename is atomic)."""
    target = output.resolve()
    if target.exists() and not target.is_dir():
        raise ConfigurationError(f"Output {output} is a file. Give a folder.")
    if target.is_dir() and os.path.ismount(target):
        raise ConfigurationError(
            f"Output {output} is a mount point, which cannot be replaced. Give a folder within it."
        )
    if target.is_dir() and any(target.iterdir()) and not (target / CORPUS_FILE).is_file():
        raise ConfigurationError(f"Output {output} has files in it and is not a tokenised corpus. Give another folder.")
    return target, target.with_name(f".{target.name}.incomplete")


def _digest(
    files: Sequence[SourceFile],
    tokenizer: Path | None,
    vocab_size: int,
    val_fraction: float,
    text_key: str,
    end_of_text: str | None,
) -> str:
    """What the output depends on. Like `make`, it takes a file of the same size and time for the same file."""
    known_by = hashlib.blake2b(tokenizer.read_bytes()).hexdigest() if tokenizer else vocab_size
    parts = [FORMAT, known_by, val_fraction, text_key, end_of_text, [(f.name, f.size, f.modified) for f in files]]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _finished(output: Path, digest: str) -> TokenizedCorpus | None:
    try:
        corpus = TokenizedCorpus.load(output)
    except ConfigurationError:  # there is none, or one that cannot be read: make it
        return None
    if corpus.digest != digest or corpus.damage():
        return None
    return dataclasses.replace(corpus, reused=True)


@contextmanager
def _claimed(staging: Path, progress: Progress) -> Iterator[int]:
    """Have the staging folder, empty, to ourselves; removed at the end unless it was published.

    The lock is on the folder itself: it leaves no file behind, ends with the last process that holds it, and goes with
    the folder when that is renamed. Gives the file descriptor.
    """
    import fcntl  # POSIX only, as the project is

    while True:
        try:
            staging.mkdir(parents=True, exist_ok=True)
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigurationError(f"Cannot write beside the output: {error}. Give another output folder.") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.note(f"waiting for another run that works in {staging}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _same_folder(lock, staging):  # else it was published or removed while we waited
                break
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    try:
        _clear(staging)  # what an interrupted run left
        yield lock
    finally:
        if _same_folder(lock, staging):
            shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _same_folder(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _texts_only(files: Sequence[SourceFile], progress: Progress) -> tuple[list[SourceFile], list[tuple[str, str]]]:
    texts, left_out = [], []
    with progress.bar("reading", sum(file.size for file in files)) as advance:
        for file in files:
            reason = why_not_text(file)
            if reason is None:
                texts.append(file)
            else:
                left_out.append((file.name, reason))
            advance(file.size)
    return texts, left_out


def _reasons(left_out: Sequence[tuple[str, str]]) -> str:
    counts = Counter(reason for _, reason in left_out)
    listed = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return f", left out: {listed} (such as {left_out[0][0]})" if left_out else ""


def _tokenizer(
    staging: Path,
    given: Path | None,
    files: Sequence[SourceFile],
    train: Sequence[Piece],
    vocab_size: int,
    text_key: str,
    progress: Progress,
) -> Tokenizer:
    """The tokenizer to use, also written into the staging folder: a copy of the given one, or a new one."""
    if given is not None:
        tokenizer = load_tokenizer(given)
        shutil.copyfile(given, staging / TOKENIZER_FILE)
        return tokenizer
    sample = _sample(files, train)
    progress.note(f"training a vocabulary of {vocab_size} on {human(sum(piece.size for piece in sample))} of text")
    tokenizer = train_tokenizer(
        (text for piece in sample for text in read_texts(files[piece.file], piece, text_key)), vocab_size
    )
    tokenizer.save(str(staging / TOKENIZER_FILE))
    return tokenizer


def _sample(files: Sequence[SourceFile], pieces: Sequence[Piece]) -> list[Piece]:
    """At most TOKENIZER_SAMPLE_BYTES of the pieces (but one at least), drawn by hash, in their own order."""
    drawn: set[Piece] = set()
    size = 0
    for piece in sorted(pieces, key=lambda piece: draw(files[piece.file].name, piece.start)):
        if drawn and size + piece.size > TOKENIZER_SAMPLE_BYTES:
            break
        drawn.add(piece)
        size += piece.size
    return [piece for piece in pieces if piece in drawn]


def _shards(splits: dict[str, list[Piece]]) -> dict[str, list[list[Piece]]]:
    total = sum(piece.size for pieces in splits.values() for piece in pieces)
    size = min(max(total // _SHARDS_WANTED, _SMALLEST_SHARD), _LARGEST_SHARD)
    return {name: shards(splits[name], size) for name in SPLITS if splits[name]}


def _publish(staging: Path, target: Path) -> None:
    """Make the staging folder the output. At every instant the output is the old corpus, nothing, or the new one."""
    for folder, _, names in os.walk(staging):
        for place in [os.path.join(folder, name) for name in names] + [folder]:
            _sync(place)
    replaced = staging.with_suffix(".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(staging, target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
