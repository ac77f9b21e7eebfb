"""What a registry of models is: versions with digests, aliases that move, and where each version came from.

folder.py, bucket.py, mlflow.py and wandb.py keep one each; opening.py chooses among them by a URL. Nothing in this room
imports torch or Lightning: the commands and a machine that only serves need neither.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from lightning_llm.errors import ConfigurationError
from lightning_llm.registry.content import FileRecord, VerificationError, digest_of, matches, publish, staging

LATEST = "latest"
CHECKPOINT_MANIFEST = "manifest.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"v?\d+")


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a version's weights come from. What is not known is None.

    Attributes:
        checkpoint: Path or URL of the checkpoint.
        checkpoint_uuid: Its identity, which stays when the folder is moved.
        step: Optimizer step at which it was saved.
        run: Name or id of the training run.
    """

    checkpoint: str | None = None
    checkpoint_uuid: str | None = None
    step: int | None = None
    run: str | None = None

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path, run: str | None = None) -> Lineage:
        """Reads uuid and step from a committed checkpoint's manifest, if `checkpoint` is a folder that has one."""
        manifest = Path(checkpoint) / CHECKPOINT_MANIFEST
        if not manifest.is_file():
            return cls(checkpoint=str(checkpoint), run=run)
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        folder = str(Path(checkpoint).absolute())
        return cls(checkpoint=folder, checkpoint_uuid=facts.get("uuid"), step=facts.get("step"), run=run)


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One registered version. It never changes; only aliases are moved to and from it.

    Attributes:
        name: Of the model.
        version: 1, 2, 3, ... per model; None only where the registry gives numbers later (W&B offline).
        aliases: The names that point here now, sorted.
        digest: xxh3_128 over paths, sizes and digests of all files.
        metrics: What was measured, by name.
        lineage: Where it comes from.
        created: When it was registered, UTC.
        location: Where its files are: a folder, or a URL.
    """

    name: str
    version: int | None
    digest: str
    location: str
    aliases: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    lineage: Lineage = field(default_factory=Lineage)
    created: datetime = field(default_factory=lambda: datetime.now(UTC))

    @classmethod
    def before_commit(
        cls, name: str, files: Iterable[FileRecord], metrics: dict[str, float], lineage: Lineage, location: str = ""
    ) -> ModelVersion:
        """What is to be registered, without a number yet."""
        return cls(
            name=name, version=None, digest=digest_of(files), location=location, metrics=metrics, lineage=lineage
        )

    def to_json(self) -> dict[str, object]:
        """As plain data, for `json.dumps`."""
        plain = {**asdict(self), "aliases": list(self.aliases), "created": self.created.isoformat()}
        return {**plain, "metrics": encode_metrics(self.metrics)}


class ModelRegistry(ABC):
    """Keeps versions of models: folders of files with digests, metrics and lineage.

    A version is its content together with its metrics and lineage, and does not change. Registering the same three
    again under the same name gives the version that is there (a retry after a crash makes no second one); anything else
    makes a new version, so no record is ever rewritten. Aliases ("production") point to one version each and move.

    Attributes:
        url: What `open_registry` takes to find it again.
    """

    url: str

    def register(
        self,
        name: str,
        source_folder: str | Path,
        *,
        metrics: Mapping[str, float] | None = None,
        lineage: Lineage | None = None,
        aliases: Iterable[str] = (),
    ) -> ModelVersion:
        """Stores a folder as a version of the model `name`.

        Args:
            name: Letters, digits, ".", "_", "-".
            source_folder: For example an exported Hugging Face folder. Its files are copied, links to files as files.
            metrics: Numbers that were measured on it.
            lineage: Where it comes from.
            aliases: Names to move to it.

        Returns:
            The new version, or the one that is the same in content, metrics and lineage.

        Raises:
            ConfigurationError: A name or the folder cannot be registered.
        """
        check_name(name)
        aliases = tuple(aliases)
        for alias in aliases:
            check_alias(alias)
        source = Path(source_folder)
        if not source.is_dir():
            raise ConfigurationError(f"{source} is not a folder. Register a folder, such as `export` writes.")
        numbers = {key: float(value) for key, value in (metrics or {}).items()}
        return self._register(name, source, numbers, lineage or Lineage(), aliases)

    def get(self, name: str, version_or_alias: int | str = LATEST) -> ModelVersion:
        """One version: by number, by alias, or the newest.

        Raises:
            ConfigurationError: There is none; what there is is named.
        """
        check_name(name)
        versions = self.versions(name)
        if not versions:
            there = sorted({version.name for version in self.versions()})
            raise ConfigurationError(f"{self.url} has no model {name!r}. It has {', '.join(there) or 'none'}.")
        wanted = str(version_or_alias)
        for version in versions:
            if wanted in version.aliases or str(version.version) == wanted.removeprefix("v"):
                return version
        if wanted == LATEST:
            return versions[-1]
        aliases = sorted(alias for version in versions for alias in version.aliases)
        raise ConfigurationError(
            f"{name} has no version or alias {wanted!r} in {self.url}. Its versions are {_numbers(versions)}, "
            f"its aliases {', '.join(aliases) or 'none'}."
        )

    def promote(self, name: str, version: int | str, alias: str) -> ModelVersion:
        """Moves an alias to a version; whoever pulls by the alias gets this version from now on.

        Args:
            name: Of the model.
            version: A number, or an alias that points to it.
            alias: Letters, digits, ".", "_", "-"; not a number and not "latest".

        Returns:
            The version, with the alias.
        """
        check_alias(alias)
        chosen = self.get(name, version)
        self._point(chosen, alias)
        return self.get(name, str(chosen.version))

    def pull(self, name: str, version_or_alias: int | str, target: str | Path) -> Path:
        """Copies a version's files into the folder `target`, which is there completely or not at all.

        Every file is held against its digest. A target that has exactly this content already is left as it is.

        Returns:
            `target`.

        Raises:
            ConfigurationError: There is no such version, or `target` holds something else.
            VerificationError: A stored file is not what was registered; file, expected and actual digest are named.
        """
        version, target = self.get(name, version_or_alias), Path(target)
        files = self.files(version)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            if target.is_dir() and matches(target, files):
                return target
            raise ConfigurationError(
                f"{target} is there already and is not {name} {version.version}. Remove it or name another folder."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging(target.parent) as folder:
            for expected in files:
                (folder / expected.path).parent.mkdir(parents=True, exist_ok=True)
                try:
                    found = self._fetch(version, expected, folder)
                except FileNotFoundError as error:
                    raise VerificationError(
                        f"{name} {version.version} at {version.location}: {expected.path} is missing "
                        f"(expected {expected.digest}, {expected.size} bytes)."
                    ) from error
                if found != expected:
                    raise VerificationError(
                        f"{name} {version.version} at {version.location}: {expected.path} is not what was registered: "
                        f"expected {expected.digest} ({expected.size} bytes), "
                        f"found {found.digest} ({found.size} bytes)."
                    )
            publish(folder, target)
        return target

    @abstractmethod
    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """All versions, of one model or of all, sorted by name and number; empty if there are none."""

    @abstractmethod
    def files(self, version: ModelVersion) -> tuple[FileRecord, ...]:
        """What the version consists of, sorted by path."""

    @staticmethod
    def _check_list(version: ModelVersion, files: Iterable[FileRecord]) -> tuple[FileRecord, ...]:
        """A stored list of files, if it is the one that was registered.

        Raises:
            VerificationError: It is not.
        """
        files = tuple(files)
        if digest_of(files) != version.digest:
            raise VerificationError(
                f"{version.name} {version.version} at {version.location}: the list of its files is not what was "
                f"registered: expected {version.digest}, found {digest_of(files)}."
            )
        return files

    @abstractmethod
    def _register(
        self, name: str, source: Path, metrics: dict[str, float], lineage: Lineage, aliases: tuple[str, ...]
    ) -> ModelVersion:
        """`register`, with arguments that were checked."""

    @abstractmethod
    def _point(self, version: ModelVersion, alias: str) -> None:
        """Moves an alias to a version that exists."""

    @abstractmethod
    def _fetch(self, version: ModelVersion, file: FileRecord, folder: Path) -> FileRecord:
        """Writes one file into `folder`, durably; returns what was written. FileNotFoundError if it is not stored."""


def find_same(versions: Iterable[ModelVersion], wanted: ModelVersion) -> ModelVersion | None:
    """The first version that is the same in content, metrics and lineage."""

    def facts(version: ModelVersion) -> tuple[object, ...]:
        return version.digest, encode_metrics(version.metrics), version.lineage

    return next((version for version in versions if facts(version) == facts(wanted)), None)


def with_aliases(version: ModelVersion, aliases: Iterable[str]) -> ModelVersion:
    """The version with other aliases."""
    return replace(version, aliases=tuple(sorted(aliases)))


def encode_metrics(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """For JSON, which has no nan and no infinity: those become text, which `decode_metrics` reads."""
    return {key: metrics[key] if math.isfinite(metrics[key]) else str(metrics[key]) for key in sorted(metrics)}


def decode_metrics(stored: Mapping[str, float | str]) -> dict[str, float]:
    """What `encode_metrics` made."""
    return {key: float(value) for key, value in stored.items()}


def check_name(name: str) -> None:
    """Refuses a model name that is no safe folder name, object key and URL part."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot name a model: up to 100 letters, digits, '.', '_' and '-', the first a letter or digit."
        )


def check_alias(alias: str) -> None:
    """Refuses an alias that could be taken for a version."""
    if not _NAME.fullmatch(alias) or _VERSION.fullmatch(alias) or alias == LATEST:
        raise ConfigurationError(
            f"{alias!r} cannot be an alias: up to 100 letters, digits, '.', '_' and '-', the first a letter or digit; "
            f"numbers mean versions, and {LATEST!r} always is the newest."
        )


def _numbers(versions: list[ModelVersion]) -> str:
    return f"{versions[0].version} to {versions[-1].version}" if len(versions) > 1 else str(versions[0].version)
