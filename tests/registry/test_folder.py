"""The folder under crashes: processes end at every write, or are killed at random; no half version is ever listed."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from lightning_llm.errors import ConfigurationError
from lightning_llm.registry import FileRecord, VerificationError, open_registry
from lightning_llm.registry.content import digest_of, staging
from lightning_llm.registry.folder import FolderRegistry
from tests.registry.folders import check, content, ended, fork, kill_while_registering, write

CRASHED = 77


def crash_at(count: int, work: Callable[[], Any]) -> bool:
    """Whether a process that ends without warning at its `count`-th fsync, rename or delete got so far."""
    calls = itertools.count()

    def armed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == count:
                os._exit(CRASHED)
            return function(*args, **kwargs)

        return call

    def doomed() -> None:
        for name in ("fsync", "rename", "unlink", "rmdir"):
            setattr(os, name, armed(getattr(os, name)))
        work()

    code = ended(fork(doomed))
    assert code in (0, CRASHED)
    return code == CRASHED


def strangers(root: Path) -> set[str]:
    """What lies in the registry's folder and belongs to no version."""
    registry = FolderRegistry(root)
    known = {"index.sqlite"}
    for version in registry.versions():
        known |= {f"{version.name}/{version.version}/{file.path}" for file in registry.files(version)}
    return set(content(root)) - known


def test_a_crash_at_every_write_leaves_what_was_there(tmp_path: Path) -> None:
    root, first, second = tmp_path / "registry", write(tmp_path / "first", 1), write(tmp_path / "second", 2)
    FolderRegistry(root).register("demo", first, aliases=["production"])
    points = 0
    while crash_at(points, lambda: FolderRegistry(root).register("demo", second, aliases=["production"])):
        registry = FolderRegistry(root)
        committed = len(registry.versions("demo")) == 2  # the last crashes come while the staging folder goes
        assert registry.get("demo", "production").version == (2 if committed else 1)
        check(registry, tmp_path / "scratch")
        points += 1
        if committed:
            shutil.rmtree(root)
            FolderRegistry(root).register("demo", first, aliases=["production"])
            continue
        registry.register("other", first)  # what the crash left is no hindrance, and is cleaned up
        assert {path.split("/")[0] for path in strangers(root)} <= {"demo"}
    assert points > 12, "each file, each folder, the rename and the end have their own point"
    assert FolderRegistry(root).get("demo", "production").version == 2
    assert strangers(root) == set()


def test_a_pull_that_crashes_leaves_no_target(tmp_path: Path) -> None:
    registry = FolderRegistry(tmp_path / "registry")
    source = write(tmp_path / "source", 1)
    registry.register("demo", source)
    target = tmp_path / "out" / "pulled"
    points = 0
    while crash_at(points, lambda: registry.pull("demo", 1, target)):
        points += 1
        if target.exists():
            assert content(target) == content(source)
            shutil.rmtree(target)
    assert points > 8
    assert content(target) == content(source)
    assert list((tmp_path / "out").iterdir()) == [target], "the last pull removed what the others left"


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """kill -9 while a process registers one version after the other."""
    root, bits = tmp_path / "registry", random.Random(5)
    sources = [write(tmp_path / f"source-{number}", number, size=200_000) for number in range(3)]

    seen = 0
    for _ in range(20):
        kill_while_registering(str(root), sources, bits)
        registry = FolderRegistry(root)
        versions = registry.versions()
        assert len(versions) > seen, "a version that was there is lost"
        for version in versions[seen:]:
            pulled = registry.pull("demo", str(version.version), tmp_path / "pulled")
            assert content(pulled) == content(sources[int(version.metrics["number"]) % 3])
            shutil.rmtree(pulled)
        seen = len(versions)
    check(registry, tmp_path / "scratch")
    FolderRegistry(root).register("demo", sources[0])
    assert strangers(root) == set()


class Life(RuleBasedStateMachine):
    """Any order of registering, crashing, promoting and pulling, beside what a list and a dict make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(prefix="registry-"))
        self.sources = [write(self.scratch / f"source-{number}", number) for number in range(3)]
        self.versions: dict[str, list[tuple[int, float]]] = {"a": [], "b": []}
        self.aliases: dict[tuple[str, str], int] = {}
        self.pulls = 0

    @property
    def registry(self) -> FolderRegistry:
        return FolderRegistry(self.scratch / "registry")

    def expect(self, name: str, source: int, loss: float, alias: str | None) -> int:
        known = self.versions[name]
        if (source, loss) not in known:
            known.append((source, loss))
        number = known.index((source, loss)) + 1
        if alias:
            self.aliases[name, alias] = number
        return number

    names, sources_, losses = st.sampled_from("ab"), st.integers(0, 2), st.sampled_from([1.0, 2.0])
    alias_names = st.sampled_from(["production", "staging"])

    @rule(name=names, source=sources_, loss=losses, alias=st.none() | alias_names)
    def register(self, name: str, source: int, loss: float, alias: str | None) -> None:
        made = self.registry.register(
            name, self.sources[source], metrics={"loss": loss}, aliases=[alias] if alias else []
        )
        assert made.version == self.expect(name, source, loss, alias)

    @rule(name=names, source=sources_, loss=losses, alias=alias_names, point=st.integers(0, 20))
    def crash(self, name: str, source: int, loss: float, alias: str, point: int) -> None:
        before = self.registry.versions()
        crash_at(
            point,
            lambda: self.registry.register(name, self.sources[source], metrics={"loss": loss}, aliases=[alias]),
        )
        if self.registry.versions() != before:  # then it did everything that was asked for
            self.expect(name, source, loss, alias)

    @precondition(lambda self: any(self.versions.values()))
    @rule(data=st.data(), alias=alias_names)
    def promote(self, data: st.DataObject, alias: str) -> None:
        name = data.draw(st.sampled_from([name for name, known in self.versions.items() if known]))
        number = data.draw(st.integers(1, len(self.versions[name])))
        self.registry.promote(name, number, alias)
        self.aliases[name, alias] = number

    @precondition(lambda self: self.aliases)
    @rule(data=st.data())
    def pull(self, data: st.DataObject) -> None:
        name, alias = data.draw(st.sampled_from(sorted(self.aliases)))
        self.pulls += 1
        pulled = self.registry.pull(name, alias, self.scratch / f"pulled-{self.pulls}")
        source, _ = self.versions[name][self.aliases[name, alias] - 1]
        assert content(pulled) == content(self.sources[source])

    @invariant()
    def lists_what_was_registered(self) -> None:
        listed = self.registry.versions()
        assert [(version.name, version.version, version.metrics["loss"]) for version in listed] == [
            (name, number, loss) for name in "ab" for number, (_, loss) in enumerate(self.versions[name], 1)
        ]
        pointing = {(version.name, alias): version.version for version in listed for alias in version.aliases}
        assert pointing == self.aliases

    def teardown(self) -> None:
        for version in self.registry.versions():
            source, _ = self.versions[version.name][version.version - 1]
            assert content(Path(version.location)) == content(self.sources[source])
        shutil.rmtree(self.scratch)


def test_life() -> None:
    run_state_machine_as_test(Life, settings=settings(max_examples=6, stateful_step_count=12, deadline=None))


@pytest.mark.slow
def test_a_long_life() -> None:
    run_state_machine_as_test(Life, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))


def test_a_folder_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", 1)
    monkeypatch.chdir(tmp_path)
    made = open_registry("registry").register("demo", source)
    assert made.location == "registry/demo/1"
    (tmp_path / "registry").rename(tmp_path / "moved")
    assert content(open_registry("moved").pull("demo", 1, tmp_path / "out")) == content(source)


def test_looking_makes_nothing(tmp_path: Path) -> None:
    registry = FolderRegistry(tmp_path / "registry")
    assert registry.versions() == []
    with pytest.raises(ConfigurationError, match="has no model 'demo'. It has none"):
        registry.promote("demo", 1, "production")
    assert not registry.root.exists()


def test_names_that_a_file_system_may_confuse(tmp_path: Path) -> None:
    registry, source = FolderRegistry(tmp_path / "registry"), write(tmp_path / "source", 1)
    registry.register("Demo", source)
    with pytest.raises(ConfigurationError, match="differs by case alone"):
        registry.register("demo", source)
    with pytest.raises(ConfigurationError, match="index has that name"):
        registry.register("index.sqlite", source)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    root, source = tmp_path / "registry", write(tmp_path / "source", 1)
    FolderRegistry(root).register("demo", source)
    (root / "index.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigurationError, match="is not a registry's index"):
        FolderRegistry(root).versions()
    with pytest.raises(ConfigurationError, match="is not a registry's index"):
        FolderRegistry(root).register("demo", source)
    with pytest.raises(ConfigurationError, match="is a file"):
        FolderRegistry(source / "config.json")


def test_staging_of_the_living_stays(tmp_path: Path) -> None:
    """Another process' clean-up takes what the dead left, not what somebody is writing."""
    with staging(tmp_path) as mine:
        (mine / "file").write_text("x")

        def die() -> None:
            with staging(tmp_path):
                os._exit(CRASHED)

        dead = fork(die)
        assert ended(dead) == CRASHED
        assert len(list(mine.parent.parent.iterdir())) == 2
        with staging(tmp_path) as other:
            assert len(list(mine.parent.parent.iterdir())) == 2
            assert other.is_dir()
        assert (mine / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == []


def test_the_digest_of_all_sees_every_change() -> None:
    files = [FileRecord("a", 1, "xxh3_128:0"), FileRecord("b", 2, "xxh3_128:1")]
    changed = [
        [FileRecord("a", 1, "xxh3_128:0")],
        [FileRecord("c", 1, "xxh3_128:0"), files[1]],
        [FileRecord("a", 3, "xxh3_128:0"), files[1]],
        [FileRecord("a", 1, "xxh3_128:2"), files[1]],
        [FileRecord("a", 1, "xxh3_128:1"), FileRecord("b", 2, "xxh3_128:0")],
    ]
    assert digest_of(files) == digest_of(files[::-1])
    assert len({digest_of(each) for each in (files, *changed)}) == 6


def test_a_file_added_to_a_version_is_not_pulled(tmp_path: Path) -> None:
    registry, source = FolderRegistry(tmp_path / "registry"), write(tmp_path / "source", 1)
    made = registry.register("demo", source)
    (Path(made.location) / "malice.py").write_text("import os")
    assert content(registry.pull("demo", 1, tmp_path / "out")) == content(source)
    shutil.rmtree(made.location)
    with pytest.raises(VerificationError, match=r"config\.json is missing"):
        registry.pull("demo", 1, tmp_path / "again")
