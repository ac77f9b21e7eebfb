"""A registry kept by Weights & Biases: versions are artifacts of type "model".

Without a server (WANDB_MODE=offline) versions can be registered; they get their numbers and aliases when `wandb sync`
sends them. Everything else asks the server.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_llm._disk import sync
from lightning_llm.errors import ConfigurationError
from lightning_llm.registry.base import (
    LATEST,
    Lineage,
    ModelRegistry,
    ModelVersion,
    decode_metrics,
    encode_metrics,
    find_same,
    with_aliases,
)
from lightning_llm.registry.content import FileRecord, describe, list_files

TYPE = "model"
RECORD = "lightning-llm.json"


class WandbRegistry(ModelRegistry):
    """A registry in a project of W&B. Versions have W&B's numbers, which begin with 0.

    Within a run of the same project (`WandbLogger`) the artifact belongs to that run; else a run is made for it.

    Args:
        entity: User or team.
        project: The project.
    """

    def __init__(self, entity: str, project: str) -> None:
        self.url = f"wandb:{entity}/{project}"
        self.entity, self.project = entity, project
        try:
            import wandb
        except ImportError as error:
            raise ConfigurationError('A registry in W&B needs wandb: pip install "lightning-llm[tracking]"') from error
        self._wandb = wandb

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """As of `ModelRegistry`."""
        found = []
        with self._server() as api:
            for collection in api.artifact_collections(f"{self.entity}/{self.project}", TYPE):
                if name in (None, collection.name):
                    found += [
                        _version(artifact) for artifact in collection.artifacts() if "digest" in artifact.metadata
                    ]
        return sorted(found, key=lambda version: (version.name, version.version or 0))

    def files(self, version: ModelVersion) -> tuple[FileRecord, ...]:
        """As of `ModelRegistry`.

        Raises:
            VerificationError: The list is not what was registered.
        """
        return self._check_list(version, (FileRecord(*file) for file in self._artifact(version).metadata["files"]))

    def _register(
        self, name: str, source: Path, metrics: dict[str, float], lineage: Lineage, aliases: tuple[str, ...]
    ) -> ModelVersion:
        files = [describe(source, path) for path in list_files(source)]
        wanted = ModelVersion.before_commit(name, files, metrics, lineage)
        with self._run() as run:
            if not run.offline and (known := find_same(self.versions(name), wanted)):
                for alias in aliases:
                    self._point(known, alias)
                return self.get(name, str(known.version))
            artifact = run.log_artifact(self._artifact_of(wanted, source, files), aliases=[LATEST, *aliases])
            if run.offline:
                return replace(wanted, location=run.settings.sync_dir)
            with self._explained():
                return _version(artifact.wait())

    def _point(self, version: ModelVersion, alias: str) -> None:
        with self._explained():
            artifact = self._artifact(version)
            artifact.aliases = [*artifact.aliases, alias]
            artifact.save()

    def _fetch(self, version: ModelVersion, file: FileRecord, folder: Path) -> FileRecord:
        artifact = self._artifact(version)
        if file.path not in artifact.manifest.entries:
            raise FileNotFoundError(file.path)
        with self._explained():
            artifact.get_entry(file.path).download(root=str(folder))
        sync(folder / file.path)
        return describe(folder, file.path)

    def _artifact_of(self, version: ModelVersion, source: Path, files: list[FileRecord]) -> Any:
        facts = {
            "digest": version.digest,
            "metrics": encode_metrics(version.metrics),
            "lineage": asdict(version.lineage),
            "files": [[file.path, file.size, file.digest] for file in files],
        }
        artifact = self._wandb.Artifact(version.name, type=TYPE, metadata=facts)
        for file in files:
            artifact.add_file(str(source / file.path), name=file.path)
        # W&B takes equal files for the same version, whatever their metadata; with this file among them it does not.
        with artifact.new_file(RECORD) as record:
            json.dump(facts, record)
        return artifact

    def _artifact(self, version: ModelVersion) -> Any:
        with self._server() as api:
            return api.artifact(f"{self.entity}/{self.project}/{version.name}:v{version.version}", type=TYPE)

    @contextlib.contextmanager
    def _run(self) -> Iterator[Any]:
        """The run that is going on, if it is of this project; else one for this registration alone."""
        active = self._wandb.run
        if active is not None and (active.entity, active.project) == (self.entity, self.project):
            yield active
            return
        with self._explained():
            run = self._wandb.init(
                entity=self.entity,
                project=self.project,
                job_type="register",
                reinit="create_new",  # leaves a run of another project alone
                settings=self._wandb.Settings(silent=True),
            )
        with run:
            yield run

    @contextlib.contextmanager
    def _server(self) -> Iterator[Any]:
        with self._explained():
            yield self._wandb.Api()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._wandb.errors.Error as error:
            raise ConfigurationError(
                f"{self.url} needs W&B's server: {error} Without one versions can only be registered, with "
                "WANDB_MODE=offline, and sent later by `wandb sync`; listing, aliases and pull ask the server."
            ) from error


def _version(artifact: Any) -> ModelVersion:
    facts = artifact.metadata
    version = ModelVersion(
        name=artifact.name.partition(":")[0],
        version=int(artifact.version.removeprefix("v")),
        digest=facts["digest"],
        metrics=decode_metrics(facts["metrics"]),
        lineage=Lineage(**facts["lineage"]),
        created=datetime.fromisoformat(artifact.created_at).replace(tzinfo=UTC),
        location=f"wandb-artifact://{artifact.qualified_name}",
    )
    return with_aliases(version, set(artifact.aliases) - {LATEST, artifact.version})
