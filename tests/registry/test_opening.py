"""From a URL to a registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.registry import open_registry
from lightning_llm.registry.bucket import BucketRegistry
from lightning_llm.registry.folder import FolderRegistry


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_LLM_REGISTRY", raising=False)
    for url, root in {
        "models": "models",
        "./a:b": "a:b",
        Path("s3:") / "x": "s3:/x",
        "file:///srv/my%20models": "/srv/my models",
        None: "registry",
    }.items():
        registry = open_registry(url)
        assert isinstance(registry, FolderRegistry) and registry.root == Path(root)
    monkeypatch.setenv("LIGHTNING_LLM_REGISTRY", str(tmp_path))
    assert open_registry().url == str(tmp_path)
    assert open_registry("models").url == "models"


def test_buckets() -> None:
    pytest.importorskip("boto3")
    registry = open_registry("s3://bucket/a/b/")
    assert isinstance(registry, BucketRegistry)
    assert (registry.bucket, registry.prefix) == ("bucket", "a/b")


@pytest.mark.parametrize(
    "url",
    ["gs://bucket/x", "s3:bucket", "s3://", "file:models", "file://host/x", "mlflow:", "wandb:project", "wandb:a/b/c"],
)
def test_what_is_no_registry(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a registry. It is a folder, .*s3://.*mlflow:.*wandb:"):
        open_registry(url)


def test_what_mlflow_refuses() -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(ConfigurationError, match="mlflow:nonsense://host: .*unsupported URI"):
        open_registry("mlflow:nonsense://host")


@pytest.mark.parametrize(
    ("package", "url", "extra"),
    [
        ("boto3", "s3://bucket", "s3"),
        ("mlflow", "mlflow:sqlite:///x.db", "mlflow"),
        ("sqlalchemy", "mlflow:sqlite:///x.db", "mlflow"),
        ("wandb", "wandb:me/models", "tracking"),
    ],
)
def test_a_missing_package_names_its_extra(package: str, url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=rf"{package}.*pip install \"lightning-llm\[{extra}\]\""):
        open_registry(url)


def test_optional_packages_are_imported_when_they_are_needed() -> None:
    program = "import sys, lightning_llm.registry.commands; print(*{'mlflow', 'boto3', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
