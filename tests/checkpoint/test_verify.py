"""Damage of any kind is found in both stores, and the place is named."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_llm.checkpoint.digest import ALGORITHMS
from lightning_llm.checkpoint.manifest import KEY_VARIABLE, MANIFEST, Manifest
from lightning_llm.checkpoint.verify import Problem, find_problems, read_manifest, share_of, verify
from tests.checkpoint.stores import CHUNK_SIZE, Store, damage, manifest_of, save, stored
from tests.checkpoint.test_manifest import redigested

NAME = "step=1.ckpt"
FILES = {
    "rank_00000.safetensors": bytes(range(256)) * 13,
    "assets/tokenizer.json": b"{}" * 700,
    "one": b"1",
    "empty": b"",
}
SIGNED = b"a secret"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_whole_has_no_problems(store: Store, algorithm: str) -> None:
    save(store, NAME, FILES, manifest_of(FILES, algorithm=algorithm).to_bytes())
    assert read_manifest(store, NAME).algorithm == algorithm
    assert verify(store, NAME) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bit_of_any_file(store: Store, data: st.DataObject) -> None:
    if not store.names():
        save(store, NAME, FILES)
    file = data.draw(st.sampled_from([*(file for file, content in FILES.items() if content), MANIFEST]))
    before = stored(store, NAME, file)
    position = data.draw(st.integers(0, len(before) - 1))
    flipped = bytearray(before)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    location = store.location(NAME)
    damage(store, NAME, file, bytes(flipped))
    problems = verify(store, NAME)
    if file == MANIFEST:
        # In a bucket the manifest lies beside the name of the draft that is meant: with another one all is missing.
        missing = [Problem(file, "it is missing") for file in sorted(FILES)]
        assert [problem.file for problem in problems] == [MANIFEST] or problems == missing
        assert problems[0].file == MANIFEST or store.location(NAME) != location
    else:
        (problem,) = problems
        assert (problem.file, problem.chunk, problem.damaged) == (file, position // CHUNK_SIZE, True)
        assert f"chunk {position // CHUNK_SIZE} (bytes {position // CHUNK_SIZE * CHUNK_SIZE} to" in str(problem)
        expected = Manifest.from_bytes(store.manifest(NAME)).files[file]
        assert problem.expected == expected.chunks[position // CHUNK_SIZE] != problem.actual
    damage(store, NAME, file, before)
    assert verify(store, NAME) == []


@pytest.mark.parametrize(
    "file, change, problem",
    [
        ("rank_00000.safetensors", lambda content: b"", "rank_00000.safetensors: it has 0 bytes instead of 3328"),
        ("rank_00000.safetensors", lambda content: content[:-1], "it has 3327 bytes instead of 3328"),
        ("rank_00000.safetensors", lambda content: content + b"1", "it has 3329 bytes instead of 3328"),
        ("empty", lambda content: b"1", "empty: it has 1 bytes instead of 0"),
        ("rank_00000.safetensors", lambda content: None, "rank_00000.safetensors: it is missing"),
        ("assets/tokenizer.json", lambda content: None, "assets/tokenizer.json: it is missing"),
        ("one", lambda content: b"2", "one: chunk 0 .bytes 0 to 1. has the xxh3_128 digest"),
        (MANIFEST, lambda content: b"", "manifest.json: it is missing or empty"),
        (MANIFEST, lambda content: None, "manifest.json: it is missing or empty"),
        (MANIFEST, lambda content: content[:-1], "manifest.json: it does not end with its digest"),
        (MANIFEST, lambda content: content[: len(content) // 2], "manifest.json: it does not end with its digest"),
        (MANIFEST, lambda content: b"{}", "manifest.json: it does not end with its digest"),
    ],
)
def test_damage(store: Store, file: str, change: Callable[[bytes], bytes | None], problem: str) -> None:
    save(store, NAME, FILES)
    damage(store, NAME, file, change(stored(store, NAME, file)))
    (found,) = verify(store, NAME)
    assert found.damaged
    assert re.search(problem, str(found)), found


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda content: content.update(version=2), "its format is version 2"),
        (lambda content: content.update(algorithm="crc32"), "its digests are 'crc32'"),
    ],
)
def test_manifests_of_the_future(store: Store, change: Callable[[dict[str, object]], object], reason: str) -> None:
    save(store, NAME, FILES, redigested(change, manifest_of(FILES).to_bytes()))
    (problem,) = verify(store, NAME)
    assert problem.file == MANIFEST
    assert reason in problem.reason


def test_with_a_key_only_what_was_signed_with_it_is_good(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SIGNED.decode())
    manifest = manifest_of(FILES, algorithm="sha256")
    save(store, NAME, FILES, manifest.to_bytes(SIGNED))
    assert verify(store, NAME) == []
    forged = {**FILES, "one": b"2"}
    signature = manifest.to_bytes(SIGNED)[-90:]
    unsigned = manifest_of(forged, algorithm="sha256").to_bytes()
    for raw, reason in (
        (unsigned, "it is not signed"),
        (unsigned[: -len(b"\n}\n")] + signature[signature.index(b",") :], "not made with the key"),
        (manifest_of(forged, algorithm="sha256").to_bytes(b"another"), "not made with the key"),
    ):
        save(store, NAME, forged, raw)
        (problem,) = verify(store, NAME)
        assert problem.file == MANIFEST
        assert reason in problem.reason
        monkeypatch.delenv(KEY_VARIABLE)
        assert verify(store, NAME) == [], "without the key nobody can tell"
        monkeypatch.setenv(KEY_VARIABLE, SIGNED.decode())


def test_several_problems_are_all_told(store: Store) -> None:
    save(store, NAME, FILES)
    damage(store, NAME, "one", None)
    damage(store, NAME, "rank_00000.safetensors", b"1")
    assert [problem.file for problem in verify(store, NAME)] == ["one", "rank_00000.safetensors"]
    manifest = read_manifest(store, NAME)
    assert [problem.file for problem in find_problems(store, store.location(NAME), manifest, ["one", "empty"])] == [
        "one"
    ]


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 10**12), max_size=20), st.integers(1, 8))
def test_every_file_is_verified_by_one_rank(sizes: dict[str, int], world_size: int) -> None:
    record = manifest_of({"a": b""}).files["a"]
    manifest = dataclasses.replace(
        manifest_of({}), files={name: dataclasses.replace(record, size=size) for name, size in sizes.items()}
    )
    shares = [share_of(manifest, rank, world_size) for rank in range(world_size)]
    assert sorted(file for share in shares for file in share) == sorted(sizes)
    loads = [sum(sizes[file] for file in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
