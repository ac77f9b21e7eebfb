"""The SQLite index of a registry that we keep ourselves: versions, aliases and the files of each version.

folder.py has it as a file; bucket.py as an object, which it reads into memory and writes back whole.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime

from lightning_llm.errors import ConfigurationError
from lightning_llm.registry.base import Lineage, ModelVersion, decode_metrics, encode_metrics, find_same, with_aliases
from lightning_llm.registry.content import FileRecord

INDEX = "index.sqlite"

_SCHEMA_VERSION = 1
_SCHEMA = (
    """CREATE TABLE versions (
        name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, metrics TEXT NOT NULL,
        lineage TEXT NOT NULL, created TEXT NOT NULL, location TEXT NOT NULL, files TEXT NOT NULL,
        PRIMARY KEY (name, version))""",
    """CREATE TABLE aliases (
        name TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL,
        PRIMARY KEY (name, alias), FOREIGN KEY (name, version) REFERENCES versions (name, version))""",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)


class Index:
    """Versions and aliases behind a connection, within one transaction, which `commit` or closing ends.

    Args:
        connection: In autocommit mode (`isolation_level=None`).
        url: Of the registry, for messages. The locations that the index holds are relative to it.
        write: Take the lock of the only writer now, and make the tables if they are missing.

    Raises:
        ConfigurationError: It is no index, or one of a newer lightning-llm.
    """

    def __init__(self, connection: sqlite3.Connection, url: str, *, write: bool) -> None:
        self._db = connection
        try:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = EXTRA")  # files are durable before their row, and then the row
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            (schema,) = connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.OperationalError:  # busy, disk full, no permission: nothing is wrong with the file
            raise
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(f"{url}/{INDEX} is not a registry's index: {error}.") from error
        if schema not in (0, _SCHEMA_VERSION):
            raise ConfigurationError(
                f"{url}/{INDEX} has schema {schema}, this lightning-llm knows {_SCHEMA_VERSION}. Update lightning-llm."
            )
        self._empty = schema == 0
        if self._empty and write:
            for statement in _SCHEMA:
                connection.execute(statement)
            self._empty = False

    def commit(self) -> None:
        """Makes the changes durable."""
        self._db.execute("COMMIT")

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """Sorted by name and number."""
        if self._empty:
            return []
        aliases: dict[tuple[str, int], list[str]] = {}
        for model, alias, version in self._db.execute("SELECT name, alias, version FROM aliases"):
            aliases.setdefault((model, version), []).append(alias)
        rows = self._db.execute(
            "SELECT name, version, digest, metrics, lineage, created, location FROM versions "
            "WHERE name = ?1 OR ?1 IS NULL ORDER BY name, version",
            (name,),
        )
        return [
            ModelVersion(
                name=model,
                version=version,
                aliases=tuple(sorted(aliases.get((model, version), ()))),
                digest=digest,
                metrics=decode_metrics(json.loads(metrics)),
                lineage=Lineage(**json.loads(lineage)),
                created=datetime.fromisoformat(created),
                location=location,
            )
            for model, version, digest, metrics, lineage, created, location in rows
        ]

    def files(self, name: str, version: int | None) -> tuple[FileRecord, ...]:
        """Of one version that exists."""
        query = "SELECT files FROM versions WHERE name = ? AND version = ?"
        (files,) = self._db.execute(query, (name, version)).fetchone()
        return tuple(FileRecord(*file) for file in json.loads(files))

    def find(self, wanted: ModelVersion) -> ModelVersion | None:
        """The version that is the same in name, content, metrics and lineage."""
        return find_same(self.versions(wanted.name), wanted)

    def next_version(self, name: str) -> int:
        """The number after the newest: versions are never removed, so numbers have no gaps."""
        (newest,) = self._db.execute("SELECT MAX(version) FROM versions WHERE name = ?", (name,)).fetchone()
        return (newest or 0) + 1

    def add(self, version: ModelVersion, files: Iterable[FileRecord]) -> None:
        """Adds a version, without its aliases."""
        self._db.execute(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                version.name,
                version.version,
                version.digest,
                json.dumps(encode_metrics(version.metrics)),
                json.dumps(asdict(version.lineage)),
                version.created.isoformat(),
                version.location,
                json.dumps([[file.path, file.size, file.digest] for file in files]),
            ),
        )

    def point(self, version: ModelVersion, aliases: Iterable[str]) -> ModelVersion:
        """Moves aliases to a version; returns it with all that it has then."""
        for alias in aliases:
            self._db.execute("REPLACE INTO aliases VALUES (?, ?, ?)", (version.name, alias, version.version))
        query = "SELECT alias FROM aliases WHERE name = ? AND version = ?"
        return with_aliases(version, (alias for (alias,) in self._db.execute(query, (version.name, version.version))))
