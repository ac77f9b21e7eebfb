"""Files of tensors are safetensors to everybody else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.checkpoint.files import (
    ALIGNMENT,
    WRITE_SIZE,
    TensorEntry,
    make_header,
    map_file,
    read_header,
    write_file,
)
from tests.checkpoint.digests import digest_of


def entries_of(tensors: dict[str, np.ndarray]) -> list[TensorEntry]:
    names = {np.dtype("float32"): "F32", np.dtype("int64"): "I64", np.dtype("uint8"): "U8"}
    entries, start = [], 0
    for name, array in tensors.items():
        entries.append(TensorEntry(name, names[array.dtype], array.shape, start, array.nbytes))
        start += array.nbytes
    return entries


def test_the_package_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": generator.standard_normal((7, 3), dtype=np.float32),
        "step": np.array(5),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "bytes/é": np.arange(9, dtype=np.uint8),
    }
    header = make_header(entries_of(tensors), {"rank": "0", "note": "ü"})
    path = tmp_path / "file.safetensors"
    record = write_file(path, [header, *tensors.values()], "xxh3_128")
    assert record == digest_of([path.read_bytes()], "xxh3_128")
    assert record.size == path.stat().st_size
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"rank": "0", "note": "ü"}
        assert set(file.keys()) == set(tensors)
        for name, array in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found, array)


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5, dtype=torch.bfloat16), "b": torch.arange(4)}
    safetensors.torch.save_file(tensors, tmp_path / "file", {"format": "pt"})
    content = map_file(tmp_path / "file")
    entries, metadata, begin = read_header(content)
    assert metadata == {"format": "pt"}
    assert {name: (entry.dtype, entry.shape) for name, entry in entries.items()} == {
        "a": ("BF16", (3, 5)),
        "b": ("I64", (4,)),
    }
    for name, entry in entries.items():
        found = torch.frombuffer(
            content, dtype=tensors[name].dtype, count=entry.size // tensors[name].itemsize, offset=begin + entry.start
        )
        assert torch.equal(found.reshape(entry.shape), tensors[name])


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 9), max_size=3)
    ),
    st.dictionaries(st.text(), st.text()),
)
def test_a_header_is_read_as_it_was_made(shapes: dict[str, list[int]], metadata: dict[str, str]) -> None:
    tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
    entries = entries_of(tensors)
    header = make_header(entries, metadata)
    found, found_metadata, begin = read_header(header + b"tensors")
    assert list(found.values()) == entries
    assert found_metadata == metadata
    assert begin == len(header)
    assert begin % ALIGNMENT == 0
    raw = header + b"".join(array.tobytes() for array in tensors.values())
    assert {name: list(array.shape) for name, array in safetensors.numpy.load(raw).items()} == shapes


def test_buffers_larger_than_a_write(tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * ((2 * WRITE_SIZE >> 20) + 1)
    record = write_file(tmp_path / "file", [content[:3], content[3:]], "sha256")
    assert (tmp_path / "file").read_bytes() == content
    assert record == digest_of([content], "sha256")


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    write_file(tmp_path / "file", [b"first"], "xxh3_128")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", [b"second"], "xxh3_128")
    assert (tmp_path / "file").read_bytes() == b"first"


def test_a_mapped_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "empty").write_bytes(b"")
    content = map_file(tmp_path / "file")
    assert bytes(content) == b"content"
    content[0] = ord("C")
    assert (tmp_path / "file").read_bytes() == b"content", "changes stay in memory"
    assert map_file(tmp_path / "empty") == b""


def test_descriptors_are_closed_on_failure(tmp_path: Path) -> None:
    def broken():  # noqa: ANN202
        yield b"some"
        raise OSError("the source fails")

    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(OSError, match="the source fails"):
        write_file(tmp_path / "file", broken(), "xxh3_128")
    assert (len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0) == before
