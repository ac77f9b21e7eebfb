"""From a URL to a registry: what the command line and callbacks call."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lightning_llm.errors import ConfigurationError
from lightning_llm.registry.base import Lineage, ModelRegistry, ModelVersion

URL_VARIABLE = "LIGHTNING_LLM_REGISTRY"
DEFAULT_URL = "registry"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+-]+):")


def open_registry(url: str | Path | None = None) -> ModelRegistry:
    """The registry at a URL.

    Args:
        url: A folder or `file:///folder`; `s3://bucket/prefix`; `mlflow:` and an MLflow tracking URI, such as
            `mlflow:sqlite:///mlflow.db` or `mlflow:https://host`; `wandb:entity/project`. None is the environment's
            LIGHTNING_LLM_REGISTRY, or the folder `registry`.

    Raises:
        ConfigurationError: It is none of these, or a package that it needs is missing.
    """
    text = os.fspath(url or os.environ.get(URL_VARIABLE) or DEFAULT_URL)
    scheme = None if isinstance(url, Path) else _SCHEME.match(text)
    if scheme is None:
        from lightning_llm.registry.folder import FolderRegistry

        return FolderRegistry(text)
    rest = text[scheme.end() :]
    parts = urlsplit(text)
    match scheme[1].lower():
        case "file" if rest.startswith("/") and parts.netloc in ("", "localhost"):
            from lightning_llm.registry.folder import FolderRegistry

            return FolderRegistry(unquote(parts.path))
        case "s3" if rest.startswith("//") and parts.netloc:
            from lightning_llm.registry.bucket import BucketRegistry

            return BucketRegistry(parts.netloc, parts.path)
        case "mlflow" if rest:
            from lightning_llm.registry.mlflow import MLflowRegistry

            return MLflowRegistry(rest)
        case "wandb" if rest.count("/") == 1 and all(rest.split("/")):
            from lightning_llm.registry.wandb import WandbRegistry

            return WandbRegistry(*rest.split("/"))
    raise ConfigurationError(
        f"{text!r} is not a registry. It is a folder, file:///folder, s3://bucket/prefix, mlflow:TRACKING_URI "
        "(mlflow:sqlite:///mlflow.db, mlflow:https://host) or wandb:ENTITY/PROJECT."
    )


def register(
    folder: str | Path,
    name: str,
    *,
    registry: str | Path | ModelRegistry | None = None,
    metrics: Mapping[str, float] | None = None,
    checkpoint: str | Path | None = None,
    run: str | None = None,
    lineage: Lineage | None = None,
    aliases: Iterable[str] = (),
) -> ModelVersion:
    """Registers an exported folder, with its lineage read from the checkpoint that it was exported from.

    Args:
        folder: What to register.
        name: Of the model.
        registry: One, or the URL of one as of `open_registry`.
        metrics: Numbers that were measured on it.
        checkpoint: Where it comes from; uuid and step are in its manifest.
        run: Name or id of the training run.
        lineage: All of it, where that is known: of a checkpoint in a bucket no manifest is read here.
        aliases: Names to move to it.

    Returns:
        The version.
    """
    if not isinstance(registry, ModelRegistry):
        registry = open_registry(registry)
    if lineage is None:
        lineage = Lineage(run=run) if checkpoint is None else Lineage.of_checkpoint(checkpoint, run)
    elif checkpoint is not None or run is not None:
        raise ConfigurationError("Give lineage=..., or checkpoint=... and run=..., of which it is made.")
    return registry.register(name, folder, metrics=metrics, lineage=lineage, aliases=aliases)
