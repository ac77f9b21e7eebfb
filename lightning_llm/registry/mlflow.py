"""A registry kept by MLflow: a database of its own (`mlflow:sqlite:///mlflow.db`) or a tracking server.

A version is an MLflow model version. Its files are artifacts of a run in the experiment "lightning-llm-registry", which
also has the metrics, so that MLflow's pages show them. Digest, metrics and lineage are the version's tags, the digests
of the files an artifact beside them. Model versions that others made have no such tags, and are not ours to show.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_llm._disk import sync
from lightning_llm.errors import ConfigurationError
from lightning_llm.registry.base import (
    Lineage,
    ModelRegistry,
    ModelVersion,
    decode_metrics,
    encode_metrics,
    find_same,
)
from lightning_llm.registry.content import FileRecord, describe, list_files

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "lightning-llm-registry"

_MODEL, _FILES = "model", "files.json"  # artifacts of a run
_DIGEST, _METRICS, _LINEAGE = (f"lightning_llm.{tag}" for tag in ("digest", "metrics", "lineage"))
_SQLITE = "sqlite:///"


class MLflowRegistry(ModelRegistry):
    """A registry in MLflow.

    A registration that is interrupted leaves a run without a model version. Two processes that register the same at the
    same moment may make two versions of it: MLflow has no transaction over both.

    Args:
        tracking_uri: As MLflow takes it. With `sqlite:///NAME.db` the files go into `NAME-artifacts` beside it.
    """

    def __init__(self, tracking_uri: str) -> None:
        self.url = f"mlflow:{tracking_uri}"
        self._uri = tracking_uri
        self._client = _client(self.url, tracking_uri)

    def versions(self, name: str | None = None) -> list[ModelVersion]:
        """As of `ModelRegistry`."""
        condition = f"name = '{name}'" if name else None
        models, token = [], None
        while page := self._client.search_registered_models(condition, page_token=token):
            models += page
            token = page.token
            if not token:
                break
        return [version for model in sorted(models, key=lambda each: each.name) for version in self._versions(model)]

    def files(self, version: ModelVersion) -> tuple[FileRecord, ...]:
        """As of `ModelRegistry`.

        Raises:
            VerificationError: The list is not what was registered.
        """
        with tempfile.TemporaryDirectory() as folder:
            text = self._download(self._run_of(version), _FILES, Path(folder)).read_text(encoding="utf-8")
        return self._check_list(version, (FileRecord(*file) for file in json.loads(text)["files"]))

    def _register(
        self, name: str, source: Path, metrics: dict[str, float], lineage: Lineage, aliases: tuple[str, ...]
    ) -> ModelVersion:
        files = [describe(source, path) for path in list_files(source)]
        wanted = ModelVersion.before_commit(name, files, metrics, lineage)
        known = find_same(self.versions(name), wanted)
        number = known.version if known else self._add(wanted, source, files)
        for alias in aliases:
            self._client.set_registered_model_alias(name, alias, str(number))
        return self.get(name, str(number))

    def _add(self, wanted: ModelVersion, source: Path, files: list[FileRecord]) -> int:
        """Files, then metrics, then the model version, which is the commit; returns its number."""
        run = self._client.create_run(self._experiment(), run_name=f"register {wanted.name}")
        run_id = run.info.run_id
        try:
            self._client.log_artifacts(run_id, str(source), _MODEL)
            listing = {"files": [[file.path, file.size, file.digest] for file in files]}
            self._client.log_dict(run_id, listing, _FILES)
            for key, value in wanted.metrics.items():
                self._client.log_metric(run_id, key, value, step=wanted.lineage.step)
            self._create_model(wanted.name)
            version = self._client.create_model_version(
                wanted.name,
                source=f"{run.info.artifact_uri}/{_MODEL}",
                run_id=run_id,
                tags={
                    _DIGEST: wanted.digest,
                    _METRICS: json.dumps(encode_metrics(wanted.metrics)),
                    _LINEAGE: json.dumps(asdict(wanted.lineage)),
                },
            )
        except BaseException:
            self._client.set_terminated(run_id, "FAILED")
            raise
        self._client.set_terminated(run_id)
        return int(version.version)

    def _point(self, version: ModelVersion, alias: str) -> None:
        self._client.set_registered_model_alias(version.name, alias, str(version.version))

    def _fetch(self, version: ModelVersion, file: FileRecord, folder: Path) -> FileRecord:
        place = folder / file.path
        self._download(self._run_of(version), f"{_MODEL}/{file.path}", place.parent)
        sync(place)
        return describe(folder, file.path)

    def _versions(self, model: Any) -> list[ModelVersion]:
        aliases: dict[int, list[str]] = {}
        for alias, number in model.aliases.items():
            aliases.setdefault(int(number), []).append(alias)
        return sorted(
            (
                ModelVersion(
                    name=model.name,
                    version=int(stored.version),
                    aliases=tuple(sorted(aliases.get(int(stored.version), ()))),
                    digest=stored.tags[_DIGEST],
                    metrics=decode_metrics(json.loads(stored.tags[_METRICS])),
                    lineage=Lineage(**json.loads(stored.tags[_LINEAGE])),
                    created=datetime.fromtimestamp(stored.creation_timestamp / 1000, UTC),
                    location=stored.source,
                )
                for stored in self._client.search_model_versions(f"name = '{model.name}'")
                if _DIGEST in stored.tags
            ),
            key=lambda version: version.version or 0,
        )

    def _run_of(self, version: ModelVersion) -> str:
        return self._client.get_model_version(version.name, str(version.version)).run_id

    def _download(self, run_id: str, path: str, folder: Path) -> Path:
        from mlflow.exceptions import MlflowException

        try:
            return Path(self._client.download_artifacts(run_id, path, str(folder)))
        except MlflowException as error:
            beside = self._client.list_artifacts(run_id, path.rpartition("/")[0] or None)
            if path in {item.path for item in beside}:
                raise
            raise FileNotFoundError(path) from error

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            location = None  # a server knows where its artifacts go
            if self._uri.startswith(_SQLITE):  # MLflow alone would put them where this process happens to run
                database = Path(self._uri.removeprefix(_SQLITE)).absolute()
                location = database.with_name(f"{database.stem}-artifacts").as_uri()
            try:
                return self._client.create_experiment(EXPERIMENT, location)
            except MlflowException as error:
                found = self._client.get_experiment_by_name(EXPERIMENT)  # another process was faster
                if found is None:
                    raise error
        return found.experiment_id

    def _create_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _client(url: str, tracking_uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # it would draw one for each file
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        if tracking_uri.startswith(_SQLITE):
            import alembic  # noqa: F401  mlflow-skinny leaves these out
            import sqlalchemy  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f'A registry in MLflow needs the package {error.name}: pip install "lightning-llm[mlflow]"'
        ) from error
    try:
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        client.search_registered_models(max_results=1)
    except MlflowException as error:
        raise ConfigurationError(f"{url}: {error}") from error
    return client
