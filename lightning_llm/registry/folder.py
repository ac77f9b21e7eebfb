"""The default registry: a folder with an index in SQLite. It needs nothing but a file system.

    registry/index.sqlite       what is registered; a version exists when its row does
    registry/NAME/VERSION/...   the files of a version, as they were given

A crash at any moment leaves at most files without a row, which are no version and which the next registration replaces.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lightning_llm._disk import sync
from lightning_llm.errors import ConfigurationError
from lightning_llm.registry.base import Lineage, ModelRegistry, ModelVersion
from lightning_llm.registry.content import FileRecord, copy, list_files, publish, staging
from lightning_llm.registry.index import INDEX, Index

BUSY_TIMEOUT = 60.0  # seconds that a writer waits for others


class FolderRegistry(ModelRegistry):
    """A registry in a folder.

    Any number of processes may use it at once: who registers copies first and holds the index only for the last rename.
    The folder can be moved: the index holds no absolute paths.

    Args:
        root: The folder; it is made at the first registration.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.url = str(root)
        if self.root.exists() and not self.root.is_dir():
            raise ConfigurationError(f"{root} is a file: a registry is a folder.")

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """As of `ModelRegistry`."""
        if not (self.root / INDEX).is_file():
            return []
        with self._index(write=False) as index:
            return [self._located(version) for version in index.versions(name)]

    def files(self, version: ModelVersion) -> tuple[FileRecord, ...]:
        """As of `ModelRegistry`."""
        with self._index(write=False) as index:
            return index.files(version.name, version.version)

    def _register(
        self, name: str, source: Path, metrics: dict[str, float], lineage: Lineage, aliases: tuple[str, ...]
    ) -> ModelVersion:
        if name.startswith(INDEX):
            raise ConfigurationError(f"{name!r} cannot name a model here: the registry's index has that name.")
        paths = list_files(source)
        self.root.mkdir(parents=True, exist_ok=True)
        with staging(self.root) as folder:
            files = [copy(source, folder, path) for path in paths]
            wanted = ModelVersion.before_commit(name, files, metrics, lineage)
            with self._index(write=True) as index:
                version = index.find(wanted)
                if version is None:
                    self._refuse_other_case(index, name)
                    number = index.next_version(name)
                    version = replace(wanted, version=number, location=f"{name}/{number}")
                    self._place(folder, self.root / version.location)
                    index.add(version, files)
                return self._located(index.point(version, aliases))

    def _point(self, version: ModelVersion, alias: str) -> None:
        with self._index(write=True) as index:
            index.point(version, [alias])

    def _fetch(self, version: ModelVersion, file: FileRecord, folder: Path) -> FileRecord:
        return copy(Path(version.location), folder, file.path)

    def _place(self, folder: Path, place: Path) -> None:
        if place.exists():  # left by a crash between rename and commit
            shutil.rmtree(place)
        place.parent.mkdir(exist_ok=True)
        publish(folder, place)
        sync(self.root)

    def _refuse_other_case(self, index: Index, name: str) -> None:
        """Some file systems take Demo/1 and demo/1 for the same folder."""
        for other in {version.name for version in index.versions()} - {name}:
            if other.lower() == name.lower():
                raise ConfigurationError(
                    f"{self.url} has a model {other!r}: {name!r} differs by case alone. Take another."
                )

    def _located(self, version: ModelVersion) -> ModelVersion:
        return replace(version, location=str(self.root / version.location))

    @contextlib.contextmanager
    def _index(self, *, write: bool) -> Iterator[Index]:
        """The index within one transaction; an exception rolls it back."""
        connection = sqlite3.connect(self.root / INDEX, timeout=BUSY_TIMEOUT, isolation_level=None)
        with contextlib.closing(connection):
            index = Index(connection, self.url, write=write)
            yield index
            index.commit()
