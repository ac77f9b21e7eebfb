"""What every registry does, whoever keeps it: a folder, a bucket of a real object store, or MLflow on SQLite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.registry import Lineage, ModelRegistry, VerificationError, open_registry, register
from lightning_llm.registry.content import describe
from tests.registry.folders import check, content, ended, fork, write

KINDS = ("folder", "bucket", "mlflow")
LINEAGE = Lineage(checkpoint="runs/a/step_00000010", checkpoint_uuid="b7e2", step=10, run="a")


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: making its tables takes seconds."""
    return f"mlflow:sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    match request.param:
        case "bucket":
            storage = request.getfixturevalue("object_storage")
            return f"s3://{storage.bucket()}/models"
        case "mlflow":
            monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
            return request.getfixturevalue("mlflow_url")
    return str(tmp_path / "registry")


@pytest.fixture
def registry(url: str) -> ModelRegistry:
    return open_registry(url)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """Of a model that no other test has."""
    return "m-" + "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:80]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", seed=0)


def test_a_version_has_all_that_was_given(registry: ModelRegistry, url: str, name: str, source: Path) -> None:
    metrics = {"val_loss": 2.5, "spread": math.inf}
    made = registry.register(name, source, metrics=metrics, lineage=LINEAGE, aliases=["candidate", "best"])
    assert (made.name, made.version, made.aliases) == (name, 1, ("best", "candidate"))
    assert (made.metrics, made.lineage) == (metrics, LINEAGE)
    assert made.digest.startswith("xxh3_128:") and made.created.tzinfo is not None
    json.dumps(made.to_json(), allow_nan=False)
    again = open_registry(url)
    assert again.versions(name) == [made]
    assert made in again.versions()
    assert again.get(name, 1) == again.get(name, "v1") == again.get(name, "best") == again.get(name) == made


def test_pull_gives_the_same_bytes(registry: ModelRegistry, name: str, source: Path, tmp_path: Path) -> None:
    (source / "link.json").symlink_to("config.json")  # as in Hugging Face's cache
    registry.register(name, source)
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "a" / "b" / "pulled", tmp_path / "empty"):
        assert registry.pull(name, "latest", target) == target
        assert content(target) == content(source)
        assert not (target / "link.json").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "empty", "source", "registry"}


def test_pull_over_what_is_there(registry: ModelRegistry, name: str, source: Path, tmp_path: Path) -> None:
    registry.register(name, source)
    target = registry.pull(name, 1, tmp_path / "pulled")
    before = (target / "config.json").stat()
    registry.pull(name, 1, target)
    assert (target / "config.json").stat().st_ino == before.st_ino, "the same content stays as it is"
    (target / "mine.txt").write_text("not to be lost")
    with pytest.raises(ConfigurationError, match="is there already"):
        registry.pull(name, 1, target)
    assert (target / "mine.txt").read_text() == "not to be lost"


def test_the_same_again_is_the_same_version(registry: ModelRegistry, name: str, source: Path) -> None:
    first = registry.register(name, source, metrics={"loss": math.nan}, lineage=LINEAGE, aliases=["a"])
    again = registry.register(name, source, metrics={"loss": math.nan}, lineage=LINEAGE, aliases=["b"])
    assert (again.version, again.created, again.aliases) == (1, first.created, ("a", "b"))
    assert registry.register(name, source, metrics={"loss": 2.0}, lineage=LINEAGE).version == 2
    assert registry.register(name, source, metrics={"loss": 2.0}).version == 3
    (source / "config.json").write_text("{}")
    assert registry.register(name, source, metrics={"loss": 2.0}).version == 4
    assert [version.version for version in registry.versions(name)] == [1, 2, 3, 4]
    assert len({version.digest for version in registry.versions(name)}) == 2


def test_promote_moves_an_alias(registry: ModelRegistry, name: str, source: Path) -> None:
    registry.register(name, source, metrics={"loss": 3.0}, aliases=["production"])
    registry.register(name, source, metrics={"loss": 2.0}, aliases=["staging"])
    assert registry.promote(name, "staging", "production").aliases == ("production", "staging")
    assert registry.get(name, "production").version == 2
    assert [version.aliases for version in registry.versions(name)] == [(), ("production", "staging")]
    assert registry.promote(name, 1, "production").aliases == ("production",)
    assert registry.get(name, "latest").version == 2


def stored_file(location: str, path: str) -> Path:
    return Path(urlsplit(location).path) / path


@pytest.mark.parametrize("damage", ["flipped", "longer", "missing"])
def test_damaged_files_are_refused(
    registry: ModelRegistry,
    url: str,
    name: str,
    source: Path,
    tmp_path: Path,
    damage: str,
    request: pytest.FixtureRequest,
) -> None:
    path = "model-00002-of-00002.safetensors"
    made = registry.register(name, source)
    (expected,) = (file for file in registry.files(made) if file.path == path)
    bits = bytearray((source / path).read_bytes())
    bits[137] ^= 1
    bad = {"flipped": bytes(bits), "longer": (source / path).read_bytes() + b"\0", "missing": None}[damage]
    if url.startswith("s3://"):
        client = request.getfixturevalue("object_storage").client()
        place = urlsplit(made.location)
        where = {"Bucket": place.netloc, "Key": f"{place.path.lstrip('/')}/{path}"}
        client.delete_object(**where) if bad is None else client.put_object(**where, Body=bad)
    else:
        file = stored_file(made.location, path)
        file.unlink() if bad is None else file.write_bytes(bad)
    with pytest.raises(VerificationError) as refused:
        registry.pull(name, 1, tmp_path / "out" / "pulled")
    assert path in str(refused.value) and expected.digest in str(refused.value)
    if bad is not None:
        (tmp_path / "bad").write_bytes(bad)
        assert describe(tmp_path, "bad").digest in str(refused.value)
    assert list((tmp_path / "out").iterdir()) == [], "nothing half-written may stay"


@pytest.mark.parametrize(
    "wrong", ["", "a/b", "..", ".hidden", "a b", "a'b", "x" * 101, "-rf"], ids=lambda wrong: wrong[:6] or "nothing"
)
def test_names_that_are_no_names(registry: ModelRegistry, source: Path, wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a model"):
        registry.register(wrong, source)


@pytest.mark.parametrize("wrong", ["latest", "3", "v3", "", "a/b"])
def test_aliases_that_are_no_aliases(registry: ModelRegistry, name: str, source: Path, wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be an alias"):
        registry.register(name, source, aliases=["fine", wrong])
    assert registry.versions(name) == []


def test_what_is_not_there(registry: ModelRegistry, name: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"has no model '{name}'"):
        registry.get(name)
    registry.register(name, source, aliases=["production"])
    for wrong in ("2", "0", "prod"):
        with pytest.raises(ConfigurationError, match=r"Its versions are 1, its aliases production"):
            registry.pull(name, wrong, tmp_path / "out")
        with pytest.raises(ConfigurationError, match=r"no version or alias"):
            registry.promote(name, wrong, "x")
    assert not (tmp_path / "out").exists()
    for nothing in (tmp_path / "nowhere", source / "config.json"):
        with pytest.raises(ConfigurationError, match="is not a folder"):
            registry.register(name, nothing)
    (tmp_path / "hollow" / "inner").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="has no files"):
        registry.register(name, tmp_path / "hollow")
    (source / "broken").symlink_to("nowhere")
    with pytest.raises(ConfigurationError, match="broken is neither a file nor a folder"):
        registry.register(name, source)


def test_register_reads_the_lineage_from_the_checkpoint(url: str, name: str, source: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_00000120"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text(json.dumps({"uuid": "4f1c", "step": 120, "files": []}))
    made = register(source, name, registry=url, checkpoint=checkpoint, run="r", metrics={"val_loss": 2})
    assert made.lineage == Lineage(checkpoint=str(checkpoint), checkpoint_uuid="4f1c", step=120, run="r")
    assert made.metrics == {"val_loss": 2.0}
    elsewhere = register(source, name, registry=open_registry(url), checkpoint="s3://b/step_1")
    assert elsewhere.lineage == Lineage(checkpoint="s3://b/step_1")


@pytest.mark.parametrize("url", ["folder", "bucket"], indirect=True)
def test_many_processes_register_at_once(registry: ModelRegistry, url: str, tmp_path: Path) -> None:
    """Different content gets consecutive numbers; the same content, registered by all, gets one."""
    everyone = write(tmp_path / "everyone", seed=99)

    def work(worker: int) -> None:
        mine = open_registry(url)
        mine.register("shared", everyone, aliases=[f"worker-{worker}"])
        for turn in range(4):
            folder = write(tmp_path / f"source-{worker}-{turn}", seed=10 * worker + turn)
            mine.register("own", folder, metrics={"worker": worker, "turn": turn}, aliases=["newest"])

    assert [ended(pid) for pid in [fork(lambda worker=worker: work(worker)) for worker in range(4)]] == [0] * 4
    assert check(registry, tmp_path / "scratch") == 17
    assert len(registry.versions("own")) == 16
    (shared,) = registry.versions("shared")
    assert shared.aliases == tuple(f"worker-{worker}" for worker in range(4))
    for version in registry.versions("own"):
        pulled = registry.pull("own", str(version.version), tmp_path / f"own-{version.version}")
        registered = tmp_path / f"source-{version.metrics['worker']:.0f}-{version.metrics['turn']:.0f}"
        assert content(pulled) == content(registered)
