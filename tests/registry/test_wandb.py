"""W&B without its server: what is logged for `wandb sync`, and what is said where the server is needed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.registry import Lineage, open_registry
from tests.registry.folders import write

wandb = pytest.importorskip("wandb")

BLOCK = 32768  # bytes; the run's file has LevelDB's log format


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("DIR", "DATA_DIR", "CACHE_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / name))
    yield
    if wandb.run is not None:
        wandb.finish()


def artifacts(folder: Path) -> list[Any]:
    """The artifacts in an offline run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # W&B's own process writes the file, after `finish` too
    (file,) = folder.glob("run-*.wandb")
    data, position, begun, found = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        begun += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(begun)
            begun = b""
            if record.HasField("artifact"):
                found.append(record.artifact)
    return found


def test_offline_a_version_is_logged_for_sync(tmp_path: Path) -> None:
    registry, source = open_registry("wandb:me/models"), write(tmp_path / "source", 1)
    lineage = Lineage(checkpoint="step_10", step=10, run="r")
    made = registry.register("demo", source, metrics={"val_loss": 2.5}, lineage=lineage, aliases=["production"])
    assert made.version is None and made.aliases == (), "numbers and aliases are the server's to give"
    assert (made.metrics, made.lineage) == ({"val_loss": 2.5}, lineage)
    (artifact,) = artifacts(Path(made.location))
    assert (artifact.entity, artifact.project, artifact.type, artifact.name) == ("me", "models", "model", "demo")
    assert sorted(artifact.aliases) == ["latest", "production"]
    facts = json.loads(artifact.metadata)
    assert facts["digest"] == made.digest and facts["metrics"] == {"val_loss": 2.5} and facts["lineage"]["step"] == 10
    logged = {entry.path: entry.size for entry in artifact.manifest.contents}
    assert logged.pop("lightning-llm.json") > 0
    assert logged == {path: size for path, size, _ in facts["files"]}
    assert logged == {
        path.relative_to(source).as_posix(): path.stat().st_size for path in source.rglob("*") if path.is_file()
    }


def test_within_a_run_of_the_project_the_artifact_is_that_runs(tmp_path: Path) -> None:
    source = write(tmp_path / "source", 1)
    run = wandb.init(entity="me", project="models")
    inside = open_registry("wandb:me/models").register("demo", source)
    outside = open_registry("wandb:me/other").register("demo", source)
    assert wandb.run is run, "the run goes on"
    assert inside.location == run.settings.sync_dir != outside.location
    folder = Path(run.settings.sync_dir)
    wandb.finish()
    assert [artifact.name for artifact in artifacts(folder)] == ["demo"]
    assert [artifact.project for artifact in artifacts(Path(outside.location))] == ["other"]


def test_what_needs_the_server_says_so(tmp_path: Path) -> None:
    registry = open_registry("wandb:me/models")
    for use in (
        registry.versions,
        lambda: registry.get("demo"),
        lambda: registry.promote("demo", 1, "production"),
        lambda: registry.pull("demo", 1, tmp_path / "out"),
    ):
        with pytest.raises(ConfigurationError, match=r"needs W&B's server: .*wandb login"):
            use()
