"""Where checkpoints are kept: a folder of a file system, or a prefix of a bucket.

Both keep the same promise. What is written goes to a draft, which nobody loads; `commit` makes it a checkpoint in one
step that either happens or does not; and a name that is in `names()` was committed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from typing_extensions import Buffer

from lightning_llm.checkpoint.digest import FileRecord
from lightning_llm.checkpoint.manifest import Manifest
from lightning_llm.errors import ConfigurationError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)")


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

    def recover(self) -> None:
        """Takes back what a commit that ended in the middle has left out of sight; `sweep` does it too."""
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

    def remove(self, name: str, uuid: str | None = None) -> None:
        """Removes a checkpoint or an alias; half of one is never seen.

        Args:
            name: Of it.
            uuid: Of the manifest that is meant: with another one there, or none, nothing is removed.

        Raises:
            ConfigurationError: It is not a checkpoint.
        """
        ...

    def alias(self, name: str, target: str) -> None:
        """Makes `name` another name of the checkpoint `target`, in one step; where it was an alias, it moves."""
        ...

    def claim(self, owner: str) -> None:
        """Notes which process saves here from now on."""
        ...

    def claimant(self) -> str:
        """The process that was noted last; empty if none was."""
        ...

    def mark(self, name: str, report: dict[str, Any] | None) -> None:
        """Notes beside a checkpoint that it is damaged, or takes the note away."""
        ...

    def marked(self, name: str) -> dict[str, Any] | None:
        """The note on a damaged checkpoint."""
        ...


def open_store(url: str | Path) -> CheckpointStore:
    """The store at a folder, a `file:///folder` or an `s3://bucket/prefix`.

    Raises:
        ConfigurationError: It is none of these.
    """
    address = _address(url)
    if isinstance(address, str):
        from lightning_llm.checkpoint.bucket import BucketStore

        return BucketStore(address)
    from lightning_llm.checkpoint.folder import FolderStore

    return FolderStore(address)


def split_url(url: str | Path) -> tuple[str, str]:
    """`s3://bucket/run/last.ckpt` -> (`s3://bucket/run`, `last.ckpt`); folders likewise.

    Raises:
        ConfigurationError: It is neither, or a bucket without a name in it.
    """
    address = _address(url)
    if isinstance(address, str):
        if is_whole_bucket(address):
            raise ConfigurationError(f"{url} is a whole bucket and names nothing in it. Write s3://bucket/prefix/name.")
        parent, _, name = address.rstrip("/").rpartition("/")
        return parent, name
    return str(address.parent), address.name


def is_whole_bucket(url: str | Path) -> bool:
    """Whether it is `s3://bucket`, which can have checkpoints in it and cannot be one."""
    return str(url).startswith("s3://") and "/" not in str(url).removeprefix("s3://").rstrip("/")


def _address(url: str | Path) -> str | Path:
    """The text of an S3 address, or a folder."""
    scheme = _SCHEME.match(str(url))
    if scheme is None:
        return Path(url).expanduser().absolute()
    rest = str(url)[scheme.end() :]
    if scheme.groups() == ("s3", "//"):
        return str(url)
    if scheme[1] == "file" and len(scheme[2]) != 2:
        return Path("/", unquote(rest))
    raise ConfigurationError(
        f"{url} is no place for checkpoints. It is a folder, file:///folder or s3://bucket/prefix (as text: a Path "
        "makes one slash of two)."
    )
