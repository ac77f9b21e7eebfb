"""A manifest is read as it was written, or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.checkpoint.digest import FileRecord
from lightning_llm.checkpoint.manifest import KEY_VARIABLE, Manifest, ManifestError, secret
from tests.checkpoint.digests import digest_of
from tests.checkpoint.stores import manifest_of

HEX = st.text("0123456789abcdef", min_size=32, max_size=32)
RECORDS = st.builds(FileRecord, st.integers(0, 2**60), HEX, st.lists(HEX, min_size=1, max_size=3).map(tuple))
NAMES = st.text(min_size=1).filter(lambda name: "\\" not in name and {"", ".", ".."}.isdisjoint(name.split("/")))
SIZES = st.dictionaries(st.text(), st.integers(1, 9))
MANIFESTS = st.builds(
    Manifest,
    uuid=HEX,
    step=st.integers(0),
    created=st.text(),
    world_size=st.integers(1),
    files=st.dictionaries(NAMES, RECORDS, max_size=4),
    mesh=SIZES,
    versions=st.dictionaries(st.text(), st.text()),
    weights_only=st.booleans(),
    source=st.none() | st.text(),
    algorithm=st.sampled_from(["xxh3_128", "sha256"]),
    chunk_size=st.integers(1),
)
KEY = b"a secret"
MANIFEST = manifest_of({"rank_00000.safetensors": b"1" * 3000, "index.json": b"{}"})


def redigested(change: Callable[[dict[str, object]], object], raw: bytes = MANIFEST.to_bytes()) -> bytes:
    """A manifest that somebody edited who knows the format, but no key."""
    content = json.loads(raw)
    for name in ("digest", "hmac"):
        content.pop(name, None)
    change(content)
    body = json.dumps(content, indent=1)[:-2].encode()
    return body + b',\n "digest": "xxh3_128:%s"\n}\n' % xxhash.xxh3_128_hexdigest(body).encode()


@given(MANIFESTS, st.sampled_from([None, KEY]))
def test_it_is_read_as_it_was_written(manifest: Manifest, key: bytes | None) -> None:
    raw = manifest.to_bytes(key)
    assert Manifest.from_bytes(raw, key) == manifest
    assert Manifest.from_bytes(raw) == manifest
    assert json.loads(raw)["step"] == manifest.step, "it is JSON"
    assert manifest.size == sum(record.size for record in manifest.files.values())


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "signed"])
def test_any_bit(key: bytes | None) -> None:
    raw = MANIFEST.to_bytes(key)
    for position in range(len(raw)):
        for bit in range(8):
            flipped = bytearray(raw)
            flipped[position] ^= 1 << bit
            with pytest.raises(ManifestError):
                Manifest.from_bytes(bytes(flipped), key)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "signed"])
def test_cut_off_anywhere_or_continued(key: bytes | None) -> None:
    raw = MANIFEST.to_bytes(key)
    for size in range(len(raw)):
        with pytest.raises(ManifestError):
            Manifest.from_bytes(raw[:size], key)
    for more in (b"\n", b" ", raw):
        with pytest.raises(ManifestError):
            Manifest.from_bytes(raw + more, key)
    with pytest.raises(ManifestError, match="empty"):
        Manifest.from_bytes(b"", key)


@given(st.binary(max_size=400))
def test_anything_else_is_no_manifest(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_bytes(raw)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda content: content.update(version=2), "version 2.*reads version 1"),
        (lambda content: content.update(format="another"), "not the manifest of a checkpoint"),
        (lambda content: content.update(algorithm="crc32"), "'crc32', which this lightning_llm does not know"),
        (lambda content: content.pop("algorithm"), "not have the form.*algorithm"),
        (lambda content: content.pop("step"), "not have the form of a manifest.*step"),
        (lambda content: content.update(more=1), "not have the form of a manifest.*more"),
        (lambda content: content.update(files=[]), "not have the form"),
        (lambda content: content.update(files={"a": {"size": 1}}), "not have the form of a manifest.*digest"),
        (lambda content: content["files"].update({"../a": content["files"]["index.json"]}), "no file of a checkpoint"),
        (
            lambda content: content["files"].update({"/etc/a": content["files"]["index.json"]}),
            "no file of a checkpoint",
        ),
        (lambda content: content.update(uuid="../.."), "no file of a checkpoint"),
    ],
)
def test_what_is_whole_but_not_ours(change: Callable[[dict[str, object]], object], reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        Manifest.from_bytes(redigested(change))


def test_not_json() -> None:
    for body in (b"no", b"[" * 100_000, b"[1"):
        raw = body + b',\n "digest": "xxh3_128:%s"\n}\n' % xxhash.xxh3_128_hexdigest(body).encode()
        with pytest.raises(ManifestError, match="not have the form of a manifest"):
            Manifest.from_bytes(raw)


def test_without_the_key_nobody_makes_one_that_is_read() -> None:
    raw = MANIFEST.to_bytes(KEY)
    edited = redigested(lambda content: content.update(step=7), raw)
    assert Manifest.from_bytes(edited).step == 7, "whoever has no key cannot tell"
    with pytest.raises(ManifestError, match=f"not signed, and {KEY_VARIABLE} is set"):
        Manifest.from_bytes(edited, KEY)
    with pytest.raises(ManifestError, match="not made with the key"):
        Manifest.from_bytes(dataclasses.replace(MANIFEST, step=7).to_bytes(b"another key"), KEY)
    signature = raw[raw.index(b',\n "hmac"') : -len(b"\n}\n")]
    with pytest.raises(ManifestError, match="not made with the key"):
        Manifest.from_bytes(edited[: -len(b"\n}\n")] + signature + b"\n}\n", KEY)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert secret() is None
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert secret() is None
    monkeypatch.setenv(KEY_VARIABLE, "ä secret")
    assert secret() == "ä secret".encode()


def test_size_of_a_large_one() -> None:
    """70B parameters of 16 bytes in 512 files: the manifest stays small enough to be read by every rank."""
    record = digest_of([b"1"], "xxh3_128")
    files = {
        f"rank_{rank:05}.safetensors": dataclasses.replace(record, chunks=record.chunks * 33) for rank in range(512)
    }
    raw = dataclasses.replace(MANIFEST, files=files).to_bytes()
    assert len(raw) < 1 << 20
    assert Manifest.from_bytes(raw).files == files
