"""Is a checkpoint what it was when it was committed? Every byte of every file is read and digested to know.

Loading, `lightning-llm verify` and the read-back after a write use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lightning_llm.checkpoint.digest import Digester, FileRecord
from lightning_llm.checkpoint.manifest import MANIFEST, Manifest, ManifestError, secret
from lightning_llm.checkpoint.store import CheckpointStore

MISSING = "it is missing"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a checkpoint.

    Attributes:
        file: Path within the checkpoint.
        reason: In words.
        damaged: Whether the content is wrong; False where it could not be read now, which may pass.
        chunk: Number of the chunk that differs.
        expected: Its digest, or the size, in the manifest.
        actual: What was found instead.
    """

    file: str
    reason: str
    damaged: bool = True
    chunk: int | None = None
    expected: str | None = None
    actual: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def read_manifest(store: CheckpointStore, name: str) -> Manifest:
    """The manifest of a checkpoint; signed with the environment's key, if there is one.

    Raises:
        ManifestError: It cannot be believed.
    """
    return Manifest.from_bytes(store.manifest(name), secret())


def find_problems(
    store: CheckpointStore,
    location: str,
    manifest: Manifest,
    files: Iterable[str] | None = None,
    *,
    threads: int = 1,
    on_read: Callable[[int], None] = lambda size: None,
) -> list[Problem]:
    """Reads files at a location and compares them to a manifest.

    Args:
        store: Where they are.
        location: Of a checkpoint or a draft.
        manifest: What they must be.
        files: These alone; None is all.
        threads: Files that are read at once; digesting needs no interpreter lock.
        on_read: Called with the bytes of each part that was read, from any of the threads.
    """

    def check(file: str) -> Problem | None:
        return check_file(store, location, file, manifest.files[file], manifest.algorithm, manifest.chunk_size, on_read)

    chosen = sorted(manifest.files) if files is None else files
    if threads == 1:
        return [problem for file in chosen if (problem := check(file))]
    with ThreadPoolExecutor(threads) as pool:
        return [problem for problem in pool.map(check, chosen) if problem]


def check_file(
    store: CheckpointStore,
    location: str,
    file: str,
    expected: FileRecord,
    algorithm: str,
    chunk_size: int,
    on_read: Callable[[int], None] = lambda size: None,
) -> Problem | None:
    """Compares one file to its record; None if it is as it should be. Of several wrong chunks the first is named."""
    digester = Digester(algorithm, chunk_size)
    try:
        for part in store.read(location, file, chunk_size):
            digester.update(part)
            on_read(memoryview(part).nbytes)
    except FileNotFoundError:
        return Problem(file, MISSING)
    except OSError as error:
        return Problem(file, f"it cannot be read: {error}", damaged=False)
    return compare(file, expected, digester.record(), algorithm, chunk_size)


def compare(file: str, expected: FileRecord, actual: FileRecord, algorithm: str, chunk_size: int) -> Problem | None:
    """What differs between a file's record in the manifest and the record of what was found; None if nothing does."""
    if actual.size != expected.size:
        reason = f"it has {actual.size} bytes instead of {expected.size}"
        return Problem(file, reason, expected=str(expected.size), actual=str(actual.size))
    pairs = zip(expected.chunks, actual.chunks, strict=True)
    wrong = [(index, wanted, found) for index, (wanted, found) in enumerate(pairs) if wanted != found]
    if wrong:
        index, wanted, found = wrong[0]
        where = f"chunk {index} (bytes {index * chunk_size} to {min((index + 1) * chunk_size, expected.size)})"
        others = f"; {len(wrong) - 1} more of its {len(actual.chunks)} chunks differ" if len(wrong) > 1 else ""
        reason = f"{where} has the {algorithm} digest {found} instead of {wanted}{others}"
        return Problem(file, reason, chunk=index, expected=wanted, actual=found)
    if actual.digest != expected.digest:
        reason = f"its {algorithm} digest is {actual.digest} instead of {expected.digest}"
        return Problem(file, reason, expected=expected.digest, actual=actual.digest)
    return None


def believe(store: CheckpointStore, name: str) -> tuple[Manifest | None, list[Problem]]:
    """A checkpoint's manifest, or what is wrong with that."""
    try:
        return read_manifest(store, name), []
    except ManifestError as error:
        return None, [Problem(MANIFEST, str(error), damaged=error.damaged)]
    except OSError as error:
        return None, [Problem(MANIFEST, f"it cannot be read: {error}", damaged=False)]


def verify(store: CheckpointStore, name: str) -> list[Problem]:
    """All that is wrong with a committed checkpoint; an empty list if it can be loaded.

    For programs that have a store at hand; on the command line it is `lightning-llm verify`.
    """
    manifest, problems = believe(store, name)
    return problems if manifest is None else find_problems(store, store.location(name), manifest)


def share_of(manifest: Manifest, rank: int, world_size: int) -> list[str]:
    """The files that one of several ranks should verify, so that all have about the same number of bytes."""
    shares = [0] * world_size
    mine = []
    for file, record in sorted(manifest.files.items(), key=lambda item: -item[1].size):
        least = shares.index(min(shares))
        shares[least] += record.size
        if least == rank:
            mine.append(file)
    return mine
