"""`lightning-llm registry` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_llm.registry import open_registry
from tests.commands import call_forked
from tests.object_storage import ObjectStorage
from tests.registry.folders import content, write


@pytest.fixture(params=["folder", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "bucket":
        storage: ObjectStorage = request.getfixturevalue("object_storage")
        return f"s3://{storage.bucket()}"
    return str(tmp_path / "registry")


def test_register_list_promote_pull(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_LLM_REGISTRY", url)
    first, second = write(tmp_path / "first", 1), write(tmp_path / "second", 2)
    checkpoint = tmp_path / "step_00000040"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text('{"uuid": "u-40", "step": 40}')
    made = call_forked(
        *("registry", "register", first, "--name", "demo", "--alias", "a", "b", "--alias", "production"),
        *("--metric", "val_loss=2.5", "tokens=1e9", "--checkpoint", checkpoint, "--run", "r1"),
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(f"demo 1 (a, b, production) at {url}/demo/")
    assert call_forked("registry", "register", second, "--name", "demo").returncode == 0

    listed = call_forked("registry", "list")
    assert listed.returncode == 0, listed.stderr
    row = listed.stdout.splitlines()[1]
    assert row.startswith("demo") and "r1" in row and "40" in row
    (one, two) = json.loads(call_forked("registry", "list", "--json").stdout)
    assert one["aliases"] == ["a", "b", "production"] and one["metrics"] == {"tokens": 1e9, "val_loss": 2.5}
    assert one["lineage"] == {"checkpoint": str(checkpoint), "checkpoint_uuid": "u-40", "step": 40, "run": "r1"}
    assert (two["version"], two["aliases"], two["digest"] == one["digest"]) == (2, [], False)

    promoted = call_forked("registry", "promote", "demo", "2", "production")
    assert promoted.returncode == 0 and promoted.stdout.startswith("demo 2 (production)")
    pulled = call_forked("registry", "pull", "demo", tmp_path / "out", "--version", "production")
    assert pulled.returncode == 0 and "verified" in pulled.stdout
    assert content(tmp_path / "out") == content(second)
    assert call_forked("registry", "pull", "demo", tmp_path / "old", "--version", "a").returncode == 0
    assert content(tmp_path / "old") == content(first)


def test_a_damaged_version_ends_with_1(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    made = open_registry(root).register("demo", write(tmp_path / "source", 1))
    (Path(made.location) / "config.json").write_text("{}")
    done = call_forked("registry", "pull", "demo", tmp_path / "out", "--registry", root)
    assert done.returncode == 1
    assert "config.json is not what was registered: expected xxh3_128:" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_an_empty_registry(tmp_path: Path) -> None:
    for arguments in ([], ["--name", "demo"]):
        done = call_forked("registry", "list", "--registry", tmp_path / "registry", *arguments)
        assert done.returncode == 0 and "no versions" in done.stdout
    assert call_forked("registry", "list", "--json", "--registry", tmp_path / "registry").stdout == "[]\n"


def test_help() -> None:
    for arguments in (["registry"], ["registry", "--help"]):
        done = call_forked(*arguments)
        assert done.returncode == 0
        assert all(f"\n  {name} " in done.stdout for name in ("list", "register", "promote", "pull"))
    assert "\n  registry " in call_forked("--help").stdout
    assert call_forked("registry", "pull", "--help").stdout.startswith("usage: lightning-llm registry pull")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "no command 'lst'"),
        (["list", "--registry", "gs://bucket"], "is not a registry"),
        (["promote", "demo", "1"], "alias"),
        (["promote", "demo", "1", "production"], "has no model 'demo'"),
        (["pull", "demo", "out"], "has no model 'demo'"),
        (["register", "nowhere", "--name", "demo"], "nowhere is not a folder"),
        (["register", "nowhere"], "--name"),
        (["register", "nowhere", "--name", "demo", "--metric", "loss"], "is not NAME=NUMBER"),
        (["register", "nowhere", "--name", "demo", "--metric", "loss=low"], "is not NAME=NUMBER"),
        (["register", "nowhere", "--name", "de mo"], "cannot name a model"),
        (["register", "nowhere", "--name", "demo", "--alias", "7"], "cannot be an alias"),
    ],
)
def test_wrong_arguments_end_with_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_LLM_REGISTRY", str(tmp_path / "registry"))
    done = call_forked("registry", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "registry").exists()
