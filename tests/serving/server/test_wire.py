"""What goes over the wire comes out as it went in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightning_llm.serving
from lightning_llm.serving.engine.outputs import TokenLogprob, Update, Usage
from lightning_llm.serving.engine.params import Grammar, SamplingParams
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.server.wire import (
    pack,
    params_from_wire,
    params_to_wire,
    unpack,
    update_from_wire,
    update_to_wire,
)

texts = st.text(st.characters(exclude_categories=()), max_size=20)  # halves of surrogate pairs, too
tokens = st.integers(0, 2**31)
logprobs = st.builds(
    TokenLogprob, tokens, st.floats(-100, 0), st.lists(st.tuples(tokens, st.floats(-100, 0)), max_size=3)
)
updates = st.builds(
    Update,
    request_id=texts,
    index=st.integers(0, 63),
    token_ids=st.lists(tokens, max_size=4),
    text=texts,
    logprobs=st.none() | st.lists(logprobs, max_size=3),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_reason=st.none() | texts | tokens,
    error=st.none() | texts,
    usage=st.none() | st.builds(Usage, tokens, tokens, tokens, tokens, *[st.floats(0, 1e6)] * 3),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=3),
    embedding=st.none() | st.lists(st.floats(-1, 1), max_size=3),
)
params = st.builds(
    SamplingParams,
    n=st.integers(1, 64),
    temperature=st.floats(0, 2),
    top_k=st.integers(-1, 100),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100), max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.none() | st.integers(1, 2**31),
    stop=st.lists(st.text(st.characters(exclude_categories=()), min_size=1, max_size=9), max_size=3).map(tuple),
    stop_token_ids=st.lists(tokens, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    grammar=st.none() | st.builds(Grammar, st.sampled_from(["json_schema", "regex", "json_object", "lark"]), texts),
)


@given(updates)
def test_updates(update: Update) -> None:
    assert update_from_wire(unpack(pack(update_to_wire(update)))) == update


@given(params)
def test_params(one: SamplingParams) -> None:
    assert params_from_wire(unpack(pack(params_to_wire(one)))) == one


def test_most_updates_are_small() -> None:
    assert len(pack(update_to_wire(Update("0.12345", 0, [1234], " word")))) < 24


def test_params_are_checked_again_where_they_arrive() -> None:
    with pytest.raises(RequestError, match="temperature"):
        params_from_wire(unpack(pack({"temperature": float("nan")})))


@pytest.mark.parametrize("value", [object(), {1, 2}, ValueError("no")])
def test_nothing_but_plain_types_is_sent(value: object) -> None:
    with pytest.raises(TypeError):
        pack(value)


def test_nothing_in_serving_unpickles() -> None:
    folder = Path(lightning_llm.serving.__file__).parent
    found = re.compile(r"import pickle|pickle\.loads?\(|recv_pyobj|send_pyobj|torch\.load\(")
    assert [str(file) for file in folder.rglob("*.py") if found.search(file.read_text())] == []
