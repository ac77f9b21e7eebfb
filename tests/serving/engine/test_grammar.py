"""Answers that follow a grammar: whatever is drawn from what is allowed is valid, and no grammar harms the machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import jsonschema_rs
import pytest
import torch
from tokenizers import Tokenizer

from lightning_llm.data.tokenizer import train_tokenizer
from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.grammar import MAX_REGEX_BYTES, GrammarCompiler, GrammarMatcher
from lightning_llm.serving.engine.params import Grammar, SamplingParams
from lightning_llm.serving.engine.sampler import Sampler
from lightning_llm.serving.engine.sampling_state import SamplingState
from lightning_llm.serving.engine.text import TextStream
from lightning_llm.serving.errors import RequestError

EOS = 0
VOCAB = 420  # more than the tokenizer has, as models often do
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["first", "second"]},
        "scores": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 99}, "maxItems": 3},
        "nested": {
            "anyOf": [
                {"type": "null"},
                {"type": "object", "properties": {"ok": {"type": "boolean"}}, "additionalProperties": False},
            ]
        },
    },
    "required": ["name", "kind", "scores"],
    "additionalProperties": False,
}


@lru_cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(['{"name": "a", "kind": "second", "scores": [1, 22], "nested": null} true false'] * 3, 400)


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer(), VOCAB, [EOS])
    yield compiler
    compiler.close()


def generate(matcher: GrammarMatcher, seed: int, most: int = 400) -> str:
    """What a model that knows nothing says within the grammar."""
    params = SamplingParams(seed=seed, max_tokens=most)
    state = SamplingState(params, [], vocab_size=VOCAB, eos_token_ids=[EOS], grammar=matcher)
    stream, text = TextStream(tokenizer(), params, []), ""
    logits = torch.randn(most, VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[:, EOS] += 4.0  # and would rather be done
    for row in logits:
        answer = Sampler().sample(row[None], [state])[0]
        assert answer.error is None
        state.append(answer.token_id)
        text += stream.push([answer.token_id])
        if answer.token_id == EOS or matcher.is_finished:
            return text + stream.finish()
    raise AssertionError(f"no end within {most} tokens: {text!r}")


def test_answers_validate_against_their_schema(compiler: GrammarCompiler) -> None:
    validator = jsonschema_rs.validator_for(SCHEMA)
    matcher = compiler.compile(Grammar("json_schema", json.dumps(SCHEMA)))
    answers = {generate(matcher.copy(), seed) for seed in range(20)}
    assert len(answers) > 10
    for answer in answers:
        validator.validate(json.loads(answer))


@pytest.mark.parametrize("expression", ["[a-f]{2,5}-[0-9]{3}", "(yes|no|maybe)( indeed){0,2}", "[äöü]{3}🎉?"])
def test_answers_match_their_expression(compiler: GrammarCompiler, expression: str) -> None:
    matcher = compiler.compile(Grammar("regex", expression))
    for seed in range(10):
        assert re.fullmatch(expression, generate(matcher.copy(), seed))


def test_json_objects_and_lark(compiler: GrammarCompiler) -> None:
    assert isinstance(json.loads(generate(compiler.compile(Grammar("json_object")), 3, most=3000)), dict)
    lark = 'start: pair ("," pair)*\npair: "(" NUMBER ")"\nNUMBER: /[0-9]{1,3}/\n'
    assert re.fullmatch(r"\(\d{1,3}\)(,\(\d{1,3}\))*", generate(compiler.compile(Grammar("lark", lark)), 1, most=3000))


def test_what_is_forbidden_where(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar("regex", "ab?"))
    a, b = (tokenizer().token_to_id(letter) for letter in "ab")
    assert matcher.forbidden() is not None
    assert [token for token, no in enumerate(matcher.forbidden().tolist()) if not no] == [a]  # type: ignore[union-attr]
    twin = matcher.copy()
    assert matcher.accept(a)
    assert not matcher.is_finished  # the end is allowed, but so is more
    assert {token for token, no in enumerate(matcher.forbidden().tolist()) if not no} == {EOS, b}  # type: ignore[union-attr]
    assert matcher.accept(b)
    assert matcher.is_finished
    assert twin.forbidden().tolist().index(False) == a  # type: ignore[union-attr]
    assert not twin.accept(b)
    assert twin.error
    assert twin.forbidden() is None


def test_the_end_of_a_grammar_is_allowed_before_min_tokens(compiler: GrammarCompiler) -> None:
    params = SamplingParams(temperature=0, min_tokens=5)
    matcher = compiler.compile(Grammar("regex", "a"))
    state = SamplingState(params, [], vocab_size=VOCAB, eos_token_ids=[EOS], grammar=matcher)
    for expected in (tokenizer().token_to_id("a"), EOS):
        answer = Sampler().sample(torch.zeros(1, VOCAB), [state])[0]
        assert (answer.token_id, answer.error) == (expected, None)
        state.append(answer.token_id)


def test_a_grammar_that_fails_fails_its_row_alone(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar("regex", "a"))
    matcher.accept(tokenizer().token_to_id("b"))
    states = [
        SamplingState(SamplingParams(temperature=0), [], vocab_size=VOCAB, eos_token_ids=[EOS], grammar=grammar)
        for grammar in (matcher, None)
    ]
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 1.0
    broken, whole = Sampler().sample(logits, states)
    assert broken.error is not None
    assert "grammar" in broken.error
    assert whole.token_id == 7


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", '{"type": '),
        Grammar("json_schema", '{"type": "foo"}'),
        Grammar("json_schema", '{"type": "string", "pattern": "("}'),
        Grammar("json_schema", '{"type":"array","items":' * 3000 + "{}" + "}" * 3000),
        Grammar("regex", "(?=a)b"),
        Grammar("regex", "a" * (MAX_REGEX_BYTES + 1)),
        Grammar("lark", 'start: ("a"'),
        # Rules so deep that they overflow the stack of the process that compiles them, which then is not ours.
        Grammar("lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(3500)) + 'r3500: "a"\n'),
        # Time cubic in the length.
        pytest.param(Grammar("regex", "a?" * 2000 + "a" * 2000), marks=pytest.mark.slow),
    ],
    ids=lambda grammar: f"{grammar.kind}-{grammar.text[:12]}",
)
def test_bad_grammars_are_refused(compiler: GrammarCompiler, grammar: Grammar) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.compile(grammar)
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 700
    assert compiler.compile(Grammar("regex", "a")).forbidden() is not None


def test_the_cache_holds_no_more_than_it_may() -> None:
    grammars = [Grammar("lark", f'start: "{number}"\n// ' + "x" * 15_000) for number in range(4)]
    compiler = GrammarCompiler(tokenizer(), VOCAB, [EOS])
    compiler.compile(grammars[0])
    one = compiler.cached_bytes
    compiler.close()
    assert one > 15_000  # however large the process is that starts the trial
    compiler = GrammarCompiler(tokenizer(), VOCAB, [EOS], cache_bytes=int(2.5 * one))
    for grammar in grammars:
        compiler.compile(grammar)
        assert 0 < compiler.cached_bytes <= 2.5 * one
    compiler.close()


def test_a_trial_that_the_machine_killed_is_made_again() -> None:
    compiler = GrammarCompiler(tokenizer(), VOCAB, [EOS])
    compiler.compile(Grammar("regex", "a"))
    ready = compiler._ready
    assert ready is not None
    ready.kill()  # it may be noticed before the next grammar comes, or while that is being sent
    assert compiler.compile(Grammar("regex", "b")).forbidden() is not None
    compiler.close()


def test_a_missing_package_is_no_fault_of_the_grammar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "llguidance.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # before what is installed
    compiler = GrammarCompiler(tokenizer(), VOCAB, [EOS])
    with pytest.raises(ConfigurationError, match="llguidance"):
        compiler.compile(Grammar("regex", "a"))
    compiler.close()


def test_a_smaller_model_and_one_without_an_end() -> None:
    compiler = GrammarCompiler(tokenizer(), 300, [])
    matcher = compiler.compile(Grammar("regex", "ab?"))
    assert matcher.forbidden() is not None
    assert len(matcher.forbidden()) == 300  # type: ignore[arg-type]
    compiler.close()
