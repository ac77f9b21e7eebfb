"""Where checkpoints are kept: a folder of a file system, or a prefix of a bucket.

Both keep the same promise. What is written goes to a draft, which nobody loads; `commit` makes it a checkpoint in one
step that either happens or does not; and a name that is in `names()` was committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import Buffer

from lightning_llm.checkpoint.digest import FileRecord
from lightning_llm.checkpoint.manifest import Manifest


class CheckpointStore(Protocol):
    """A place for checkpoints, each known by a name. No method but `create` and `commit` needs to be called in order.

    Attributes:
        url: From which `open_store` makes an equal store, in another process too.
    """

    url: str

    def create(self, name: str, attempt: str) -> str:
        """Begins a draft of the checkpoint `name`; `attempt` is unique. Returns the draft's location.

        Raises:
            ConfigurationError: `name` is taken by something that is no checkpoint.
        """
        ...

    def write(self, location: str, file: str, buffers: Iterable[Buffer], algorithm: str) -> FileRecord:
        """Writes one file of a draft, from any process; returns when it is stored for good."""
        ...

    def commit(self, location: str, name: str, manifest: bytes) -> None:
        """Makes a draft the checkpoint `name`, in place of the one that may have this name."""
        ...

    def discard(self, location: str) -> None:
        """Removes a draft."""
        ...

    def sweep(self) -> None:
        """Removes what runs have left behind that ended in the middle of a save or a removal."""
        ...

    def names(self) -> list[str]:
        """Of all committed checkpoints, damaged ones too, in no particular order."""
        ...

    def aliases(self) -> dict[str, str]:
        """Other names of checkpoints, each with the name that it stands for."""
        ...

    def drafts(self) -> dict[str, int]:
        """What is there of saves that are under way, or ended in the middle: name -> bytes."""
        ...

    def manifest(self, name: str) -> bytes:
        """The manifest of a committed checkpoint, as it was given to `commit`; empty if there is none."""
        ...

    def location(self, name: str) -> str:
        """Where the files of a committed checkpoint are."""
        ...

    def files(self, location: str) -> list[str]:
        """All files of a checkpoint but its manifest, also such as no manifest lists."""
        ...

    def read(self, location: str, file: str, chunk_size: int) -> Iterator[Buffer]:
        """A file's content, from the store itself and not from what was kept of writing it, in parts of `chunk_size`.

        Raises:
            FileNotFoundError: It is not there.
            OSError: It cannot be read now.
        """
        ...

    def read_back(self, location: str, file: str, ranges: Sequence[tuple[int, int]]) -> Iterator[Buffer]:
        """Parts of a file that was just written, from the medium itself where that can be had.

        Args:
            location: Of the draft.
            file: Path within it.
            ranges: First byte and number of bytes of each part.
        """
        ...

    def fetch(self, name: str, manifest: Manifest, files: Iterable[str]) -> Path:
        """A local folder that has these files of a verified checkpoint."""
        ...

    def remove(self, name: str) -> None:
        """Removes a checkpoint; half of one is never seen.

        Raises:
            ConfigurationError: It is not a checkpoint.
        """
        ...

    def alias(self, name: str, target: str) -> None:
        """Makes `name` another name of the checkpoint `target`, in one step; where it was an alias, it moves."""
        ...

    def mark(self, name: str, report: dict[str, Any] | None) -> None:
        """Notes beside a checkpoint that it is damaged, or takes the note away."""
        ...

    def marked(self, name: str) -> dict[str, Any] | None:
        """The note on a damaged checkpoint."""
        ...


def open_store(url: str | Path) -> CheckpointStore:
    """The store at a folder or an `s3://bucket/prefix`."""
    if str(url).startswith("s3://"):
        from lightning_llm.checkpoint.bucket import BucketStore

        return BucketStore(str(url))
    from lightning_llm.checkpoint.folder import FolderStore

    return FolderStore(url)


def split_url(url: str | Path) -> tuple[str, str]:
    """`s3://bucket/run/last.ckpt` -> (`s3://bucket/run`, `last.ckpt`); folders likewise."""
    if str(url).startswith("s3://"):
        parent, _, name = str(url).rstrip("/").rpartition("/")
        return parent, name
    path = Path(url).expanduser().absolute()
    return str(path.parent), path.name
