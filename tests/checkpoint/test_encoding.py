"""decode(encode(tree)) is the tree, with its types; what is no plain value is refused with its path; nothing is run."""

from __future__ import annotations

import collections
import json
import pickle
import string
from datetime import UTC, date, timedelta, timezone
from enum import Enum, IntEnum
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from lightning_llm.checkpoint.encoding import decode, encode
from lightning_llm.checkpoint.staging import stream
from lightning_llm.errors import ConfigurationError

ARRAY_DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32"]
ARRAY_DTYPES += ["float64", "complex64"]
TENSOR_DTYPES = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.float64]
TENSOR_DTYPES += [torch.float8_e4m3fn, torch.complex64]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(TENSOR_DTYPES))
    tensor = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = tensor.view(dtype).squeeze(-1) if dtype.itemsize > 1 else tensor.view(dtype)[..., 0]
    return tensor.mT if tensor.ndim > 1 and draw(st.booleans()) else tensor


names = st.text(string.printable + "$äß😀", max_size=5)
zones = st.sampled_from([None, UTC, timezone(timedelta(hours=5, minutes=30))])
hashable = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    names,
    st.binary(max_size=5),
    st.sampled_from([Path("a/b"), PurePath("c"), torch.bfloat16, torch.device("cuda", 1), torch.Size([2, 3])]),
    st.datetimes(timezones=zones),
    st.timedeltas(),
)
leaves = st.one_of(
    hashable,
    st.complex_numbers(allow_nan=False),
    st.binary(max_size=5).map(bytearray),
    tensors(),
    npst.arrays(st.sampled_from(ARRAY_DTYPES), npst.array_shapes(min_dims=0, min_side=0, max_side=3)),
    st.sampled_from([np.float32(0.1), np.int64(-3), np.bool_(True), np.uint16(7), np.complex64(1j)]),
    st.frozensets(hashable, max_size=3),
    st.sets(hashable, max_size=3),
)
keys = st.one_of(names, st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), names), st.just("$"))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(names, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=12,
)


def there_and_back(tree: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(tree, tensors, "state"), allow_nan=False)
    b"".join(stream(tensors, {}))  # a file can hold them
    return decode(json.loads(text), tensors)


def same(left: Any, right: Any) -> bool:
    """Equal in value and in type, all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        here, there = left.contiguous().view(-1), right.contiguous().view(-1)
        return left.shape == right.shape and left.dtype == right.dtype and bits(here) == bits(there)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        pairs = zip(left.items(), right.items(), strict=True)
        return len(left) == len(right) and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right and repr(left) == repr(right) if isinstance(left, float) else left == right


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@settings(max_examples=300, deadline=None)
@given(trees)
def test_a_tree_comes_back_as_it_was(tree: Any) -> None:
    assert same(there_and_back(tree), tree)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), complex("nan+infj"), -0.0], ids=str)
def test_numbers_that_json_has_not(value: complex) -> None:
    back = there_and_back(value)
    assert type(back) is type(value) and repr(back) == repr(value)


class Colour(str, Enum):  # noqa: UP042  older code has such ones
    RED = "red"


class Level(IntEnum):
    HIGH = 3


def test_what_becomes_simpler() -> None:
    tree = collections.OrderedDict(a=Colour.RED, b=Level.HIGH, c=np.str_("name"), d=torch.nn.Parameter(torch.ones(2)))
    back = there_and_back(tree)
    assert type(back) is dict and [type(value) for value in back.values()] == [str, int, str, torch.Tensor]
    assert back["a"] == "red" and back["b"] == 3 and back["c"] == "name" and not back["d"].requires_grad
    assert there_and_back({Colour.RED: 1}) == {"red": 1}


def test_paths_that_read_alike_stay_apart() -> None:
    tree = {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1), 1: torch.ones(2), "1": torch.zeros(2)}
    assert same(there_and_back(tree), tree)


class Armed:
    """Unpickling it would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize(
    "value",
    [
        object(),
        len,
        lambda: 0,
        Armed,
        range(3),
        collections.deque([1]),
        collections.namedtuple("Pair", "a b")(1, 2),
        date(2024, 1, 1),
        PureWindowsPath("a"),
        torch.Generator(),
        np.random.default_rng(),
        np.array([object()]),
        np.array(["text"]),
        np.datetime64("2024-01-01"),
        np.ma.array([1, 2], mask=[0, 1]),
        np.array([1.0], dtype=">f4"),
        torch.zeros(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.zeros(2, dtype=torch.complex128),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_with_its_path(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"at callbacks\.Mine\.(list\.1|\(key\))"):
        encode({"Mine": {"list": [0, value]}}, {}, "callbacks")


def test_a_key_that_is_no_plain_value_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"at callbacks\.Mine\.\(key\)"):
        encode({"Mine": {object(): 0}}, {}, "callbacks")


def test_nothing_that_is_read_is_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    armed = pickle.dumps(Armed(trace))
    assert there_and_back({"bytes": armed, "array": np.frombuffer(armed, dtype=np.uint8)})["bytes"] == armed
    for planted in (
        {"$": "pickle", "value": armed.decode("latin1")},
        {"$": "dtype", "value": "load"},
        {"$": "dtype", "value": "os"},
        {"$": "__import__", "value": "os"},
    ):
        with pytest.raises(ConfigurationError):
            decode(planted, {})
    assert not trace.exists()
