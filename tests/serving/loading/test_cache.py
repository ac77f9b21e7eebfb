"""Fetched and converted folders: made once by whoever is first, checked on use, gone when others need the room."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.loading.cache import DEFAULT_LIMIT, ENTRY, LIMIT_VARIABLE, ModelCache


class Maker:
    """Writes an entry, and counts how often."""

    def __init__(self, size: int = 1000) -> None:
        self.size, self.calls = size, 0

    def __call__(self, folder: Path) -> None:
        assert not list(folder.iterdir()), "it is empty"
        self.calls += 1
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"0" * self.size)


def get(cache: ModelCache, make: Any, **identity: Any) -> Path:
    with cache.entry(identity, make) as folder:
        assert (folder / "config.json").read_text() == "{}"
        return folder


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    cache, make = ModelCache(tmp_path), Maker()
    folder = get(cache, make, source="a")
    assert get(ModelCache(tmp_path), make, source="a") == folder
    assert make.calls == 1
    assert get(cache, make, source="b") != folder
    assert make.calls == 2
    assert cache.has({"source": "a"}) and not cache.has({"source": "c"})


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_LLM_CACHE", str(tmp_path / "elsewhere"))
    assert ModelCache().folder == tmp_path / "elsewhere" / "models"
    assert ModelCache(tmp_path).folder == tmp_path / "models"
    monkeypatch.delenv("LIGHTNING_LLM_CACHE")
    assert ModelCache().folder == Path.home() / ".cache" / "lightning_llm" / "models"
    monkeypatch.setenv(LIMIT_VARIABLE, "3MB")
    assert ModelCache().limit == 3_000_000
    assert ModelCache(limit="1KiB").limit == 1024
    with pytest.raises(ConfigurationError, match=f"'lots' is not a size.*{DEFAULT_LIMIT}"):
        ModelCache(limit="lots")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 999),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / ENTRY).write_text("{"),
        lambda folder: (folder / ENTRY).write_text((folder / ENTRY).read_text().replace("1000", "1001")),
        lambda folder: (folder / ENTRY).unlink(),
    ],
)
def test_a_damaged_entry_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    cache, make = ModelCache(tmp_path), Maker()
    folder = get(cache, make)
    damage(folder)
    assert get(cache, make) == folder
    assert make.calls == 2
    assert (folder / "model.safetensors").stat().st_size == 1000
    assert "is damaged and is made again" in caplog.text


def test_digests_find_what_sizes_do_not(tmp_path: Path) -> None:
    make = Maker()
    folder = get(ModelCache(tmp_path, verify=True), make)
    get(ModelCache(tmp_path, verify=True), make)
    assert make.calls == 1
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(500)
        file.write(b"1")
    get(ModelCache(tmp_path), make)
    assert make.calls == 1, "it is not noticed: sizes are as they were"
    get(ModelCache(tmp_path, verify=True), make)
    assert make.calls == 2
    assert (folder / "model.safetensors").read_bytes() == b"0" * 1000


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)

    def fail(folder: Path) -> None:
        Maker()(folder)
        raise ConfigurationError("no such model")

    for _ in range(2):
        with pytest.raises(ConfigurationError, match="no such model"):
            get(cache, fail)
    assert {path.suffix for path in cache.folder.iterdir()} == {".lock"}
    get(cache, Maker())


def _die(root: Path) -> None:
    def die(folder: Path) -> None:
        Maker()(folder)
        os._exit(9)

    get(ModelCache(root), die)


def test_a_process_that_dies_leaves_no_half_entry(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    cache, make = ModelCache(tmp_path), Maker()
    assert len([path for path in cache.folder.iterdir() if path.is_dir()]) == 1, "its draft is there"
    folder = get(cache, make)
    assert make.calls == 1
    assert [path for path in cache.folder.iterdir() if path.is_dir()] == [folder]


def _ask(root: Path, calls: Any, barrier: Any) -> None:
    def make(folder: Path) -> None:
        with calls.get_lock():
            calls.value += 1
        Maker(100_000)(folder)

    barrier.wait(60)
    for number in range(3):
        get(ModelCache(root), make, number=number)


def test_processes_that_ask_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    calls, barrier = context.Value("i", 0), context.Barrier(4)
    processes = [context.Process(target=_ask, args=(tmp_path, calls, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert calls.value == 3


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache, make = ModelCache(tmp_path, limit=3500), Maker()
    folders = [get(cache, make, number=number) for number in range(3)]
    for age, folder in enumerate(folders):
        os.utime(folder / ENTRY, (age, age))
    get(cache, make, number=0)  # now it is the one that was used last
    newest = get(cache, make, number=3)
    assert [folder.exists() for folder in folders] == [True, False, True]
    assert newest.exists()
    large = get(ModelCache(tmp_path, limit=100), Maker(5000), number=4)
    assert large.exists(), "even if it is more than the limit"
    assert not any(folder.exists() for folder in (*folders, newest))


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path, limit=1500)
    with cache.entry({"number": 0}, Maker()) as folder:
        other = get(cache, Maker(), number=1)
        assert folder.exists() and other.exists()
    assert get(cache, Maker(), number=2).exists()
    assert not folder.exists() and not other.exists()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"0")
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigurationError, match=r"disk of .* is full: .*LIGHTNING_LLM_CACHE"):
        get(ModelCache(tmp_path), make)


class User:
    """Someone who has an entry loaded."""


def test_what_is_loaded_stays_after_it_was_read(tmp_path: Path) -> None:
    cache, make, user = ModelCache(tmp_path, limit=1500), Maker(), User()
    with cache.entry({"source": "a"}, make) as folder:
        cache.hold(folder, user)
    other = get(cache, make, source="b")
    assert folder.exists() and other.exists()
    (folder / "config.json").unlink()
    assert get(cache, make, source="a") == folder, "it is made again, and waits for nobody who has it loaded"
    del user
    get(cache, make, source="c")
    assert not folder.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_cache_of_another_user() -> None:
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        folder = get(ModelCache(root), Maker(), source="a")
        pipe, end = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=as_another_user, args=(root, end))
        process.start()
        process.join()
        assert pipe.poll(), "it wrote what came of it"
        found, error = pipe.recv()
    assert found == str(folder)
    assert "another user's or read-only, and does not have this model" in error


def as_another_user(root: str, end: Any) -> None:
    os.setgid(65534)
    os.setuid(65534)
    cache, user = ModelCache(root), User()
    with cache.entry({"source": "a"}, Maker()) as folder:
        cache.hold(folder, user)
    try:
        get(cache, Maker(), source="b")
    except ConfigurationError as error:
        end.send((str(folder), str(error)))
