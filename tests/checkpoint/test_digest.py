"""Checksums do not depend on how a file comes in, and name the chunk that differs."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.checkpoint.digest import ALGORITHMS, CHUNK_SIZE, Digester, FileRecord
from tests.checkpoint.digests import digest_of

CONTENT = st.binary(max_size=300)
CHUNK = st.integers(1, 64)


@given(CONTENT, st.lists(st.integers(0, 300)), CHUNK, st.sampled_from(sorted(ALGORITHMS)))
def test_any_cut_of_the_stream_gives_the_same_record(
    content: bytes, cuts: list[int], chunk_size: int, algorithm: str
) -> None:
    places = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    parts = [content[start:end] for start, end in zip(places, places[1:], strict=False)]
    assert digest_of(parts, algorithm, chunk_size) == digest_of([content], algorithm, chunk_size)


@given(CONTENT, CHUNK)
def test_digests_are_those_of_the_chunks_and_of_all_of_them(content: bytes, chunk_size: int) -> None:
    chunks = [content[start : start + chunk_size] for start in range(0, len(content), chunk_size)] or [b""]
    digests = [hashlib.sha256(chunk).digest() for chunk in chunks]
    expected = FileRecord(
        len(content), hashlib.sha256(b"".join(digests)).hexdigest(), tuple(digest.hex() for digest in digests)
    )
    assert digest_of([content], "sha256", chunk_size) == expected


@given(st.binary(min_size=1, max_size=300), CHUNK, st.data())
def test_one_bit_changes_the_digest_of_its_chunk_alone(content: bytes, chunk_size: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    before, after = (digest_of([each], "xxh3_128", chunk_size) for each in (content, flipped))
    assert before.digest != after.digest
    differ = [index for index, pair in enumerate(zip(before.chunks, after.chunks, strict=True)) if pair[0] != pair[1]]
    assert differ == [position // chunk_size]


def test_buffers_of_any_kind() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    raw = array.tobytes()
    for buffer in (array, memoryview(array), bytearray(raw), memoryview(raw)[:0]):
        assert digest_of([buffer], "xxh3_128").size == memoryview(buffer).nbytes
    assert digest_of([array], "xxh3_128") == digest_of([raw], "xxh3_128")


def test_default_chunks_are_of_64_mib() -> None:
    digester = Digester("xxh3_128")
    content = bytes(CHUNK_SIZE)
    digester.update(content)
    digester.update(b"1")
    record = digester.record()
    assert record.chunks == (xxhash.xxh3_128_hexdigest(content), xxhash.xxh3_128_hexdigest(b"1"))
    assert record.size == (64 << 20) + 1


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(KeyError):
        Digester("md5")
