"""The engine against a plain forward pass, in float64: batches, chunks, caches and preemptions must not show."""

import json
import re

import pytest
import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.params import Grammar, SamplingParams
from lightning_llm.serving.errors import RequestError
from tests.serving.engine.models import (
    ARCHITECTURES,
    VOCABULARY,
    Answers,
    greedy,
    make_decoder,
    make_engine,
    plain_greedy,
    prompts,
    run,
    tokenizer,
)

SETTINGS = {
    "roomy": {},
    "chunks of 8": {"max_num_batched_tokens": 8},
    "one at a time": {"max_num_seqs": 1},
    "no prefix cache": {"enable_prefix_caching": False},
    "recompute": {"kv_cache_blocks": 16, "preemption": "recompute"},
    "swap": {"kv_cache_blocks": 16, "preemption": "swap", "swap_blocks": 64},
    "auto": {"kv_cache_blocks": 16, "swap_blocks": 10},
    "continuous": {"batching": "continuous"},
    "static": {"batching": "static", "kv": "static", "max_model_len": 64},
    "dynamic": {"batching": "dynamic", "batch_timeout": 0.01},
    "blocks of 1": {"block_size": 1, "kv_cache_blocks": 256},
    "priority": {"scheduling_policy": "priority", "kv_cache_blocks": 16},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def decoder(request):
    return make_decoder(request.param)


@pytest.fixture(scope="module")
def llama():
    return make_decoder("llama")


@pytest.fixture(scope="module")
def expected(decoder):
    asked = prompts(10)
    asked[3] = asked[2][:20] + asked[3]  # two have a beginning in common
    return [(prompt, plain_greedy(decoder, prompt, 16)) for prompt in asked]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_engines_ways_do_not_show(decoder, expected, settings):
    engine = make_engine(decoder, **settings)
    answers = Answers()
    for number, (prompt, _) in enumerate(expected):
        engine.add(str(number), prompt, greedy(16), priority=number % 3)
        if number % 3 == 0:
            answers.step(engine)
    answers.finish(engine)
    again = run(engine, {str(number): prompt for number, (prompt, _) in enumerate(expected)}, greedy(16))
    for number, (_, tokens) in enumerate(expected):
        assert answers[str(number), 0].token_ids == tokens
        assert again[str(number), 0].token_ids == tokens
    stats = engine.stats()
    assert stats.generation_tokens == 2 * 16 * len(expected)
    if decoder.config.sliding_window is None:  # else blocks come back before they get short, or can be found again
        assert settings.get("kv_cache_blocks") != 16 or stats.num_preemptions > 0
        assert (stats.prefix_cache_hits > 0) == engine.config.caches_prefixes


def test_fifty_requests_with_room_for_two(llama):
    engine = make_engine(llama, kv_cache_blocks=24, swap_blocks=8)
    asked = {str(number): prompt for number, prompt in enumerate(prompts(50))}
    answers = run(engine, asked, greedy(8))
    for name, prompt in asked.items():
        assert answers[name, 0].token_ids == plain_greedy(llama, prompt, 8)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_cache_changes_little(llama, kind):
    asked = {str(number): prompt for number, prompt in enumerate(prompts(6))}
    exact = run(make_engine(llama), asked, greedy(1, logprobs=0))
    rough = run(make_engine(llama, kv_cache_dtype=kind), asked, greedy(1, logprobs=0))
    for name in asked:
        if exact[name, 0].token_ids == rough[name, 0].token_ids:
            assert rough[name, 0].logprobs[0].logprob == pytest.approx(exact[name, 0].logprobs[0].logprob, abs=0.5)
    assert sum(exact[name, 0].token_ids == rough[name, 0].token_ids for name in asked) >= 5


def test_a_seed_means_the_same_tokens_whatever_else_runs(llama):
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=11, max_tokens=12, n=3, ignore_eos=True)
    prompt = prompts(3)[0]
    alone = run(make_engine(llama), {"a": prompt}, params)
    crowd = {str(number): other for number, other in enumerate(prompts(9))}
    engine = make_engine(llama, kv_cache_blocks=20, max_num_batched_tokens=16)
    mixed = run(engine, {**crowd, "a": prompt}, {**dict.fromkeys(crowd, greedy(12)), "a": params})
    assert engine.stats().num_preemptions > 0
    answers = [alone["a", index].token_ids for index in range(3)]
    assert answers == [mixed["a", index].token_ids for index in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3
    other = run(make_engine(llama), {"a": prompt}, SamplingParams(seed=12, max_tokens=12, n=3, ignore_eos=True))
    assert other["a", 0].token_ids != answers[0]


def test_answers_to_one_prompt_compute_it_once(llama):
    engine = make_engine(llama)
    answers = run(engine, {"a": prompts(4, 30)[0]}, greedy(5, n=4))
    assert len({tuple(answers["a", index].token_ids) for index in range(4)}) == 1
    assert engine.stats().prompt_tokens == len(prompts(4, 30)[0])


def test_an_answer_ends_where_it_should(llama):
    [prompt] = prompts(1)
    tokens = plain_greedy(llama, prompt, 12)
    text = tokenizer().decode(tokens)
    third = tokens[2]
    engine = make_engine(llama)

    def one(**fields):
        return run(engine, {"a": prompt}, SamplingParams(temperature=0, max_tokens=12, **fields))["a", 0]

    whole = one(ignore_eos=True)
    assert (whole.token_ids, whole.finish_reason, whole.text) == (tokens, "length", text)
    stopped = one(stop_token_ids=(third,), ignore_eos=True)
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
    assert stopped.token_ids == tokens[: tokens.index(third) + 1]
    assert stopped.text == tokenizer().decode(tokens[: tokens.index(third)])
    waiting = one(stop_token_ids=(third,), ignore_eos=True, min_tokens=6)
    assert len(waiting.token_ids) >= 6
    piece = text[4:7]
    cut = one(stop=piece, ignore_eos=True)
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (text[: text.index(piece)], "stop", piece)
    kept = one(stop=piece, ignore_eos=True, include_stop_str_in_output=True)
    assert kept.text == text[: text.index(piece)] + piece


def test_the_end_of_text_ends_an_answer(llama):
    [prompt] = prompts(1)
    tokens = plain_greedy(llama, prompt, 8)
    ending = make_decoder("llama", eos_token_id=tokens[3])
    answer = run(make_engine(ending), {"a": prompt}, SamplingParams(temperature=0, max_tokens=8))["a", 0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (
        tokens[: tokens.index(tokens[3]) + 1],
        "stop",
        None,
    )
    assert answer.text == tokenizer().decode(tokens[: tokens.index(tokens[3])])


def test_an_answer_without_a_limit_fills_the_context(llama):
    [prompt] = prompts(1)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    answer = run(make_engine(llama, max_model_len=48), {"a": prompt}, params)["a", 0]
    assert (len(prompt) + len(answer.token_ids), answer.finish_reason) == (48, "length")


def test_log_probabilities_are_those_of_the_model(llama):
    [prompt] = prompts(1)
    engine = make_engine(llama, max_num_batched_tokens=8)
    run(engine, {"before": prompt}, greedy(2))
    answer = run(engine, {"a": prompt}, greedy(4, logprobs=3, prompt_logprobs=2))["a", 0]
    ids = prompt + answer.token_ids
    exact = llama(torch.tensor([ids]))[0].log_softmax(-1)
    found = [*answer.prompt_logprobs[1:], *answer.logprobs]
    assert answer.prompt_logprobs[0] is None and len(found) == len(ids) - 1
    for place, one in enumerate(found):
        assert one.token_id == ids[place + 1]
        assert one.logprob == pytest.approx(exact[place, one.token_id].item(), abs=1e-5)
        values, best = exact[place].topk(len(one.top))
        assert [token for token, _ in one.top] == best.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert {len(one.top) for one in answer.logprobs} == {3}
    assert {len(one.top) for one in answer.prompt_logprobs[1:]} == {2}


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_hidden_states(llama, pooling):
    asked = {str(number): prompt for number, prompt in enumerate(prompts(4))}
    engine = make_engine(llama, max_num_batched_tokens=8)
    run(engine, asked, greedy(2))  # what is cached now must not be left out of a mean
    answers = run(engine, asked, SamplingParams(), pooling=pooling)
    for name, prompt in asked.items():
        hidden = llama.model(torch.tensor([prompt]))[0]
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        exact = torch.nn.functional.normalize(pooled, dim=0)
        assert answers[name, 0].embedding == pytest.approx(exact.tolist(), abs=1e-5)
        assert answers[name, 0].token_ids == []


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_aborting_frees_everything_and_disturbs_nobody(llama, steps):
    engine = make_engine(llama, kv_cache_blocks=20, max_num_batched_tokens=16, swap_blocks=20)
    asked = {str(number): prompt for number, prompt in enumerate(prompts(8))}
    for name, prompt in asked.items():
        engine.add(name, prompt, greedy(6, n=2))
    answers = Answers()
    for _ in range(steps):
        answers.step(engine)
    aborted = [name for name in list(asked)[::2] if (name, 0) not in answers or answers[name, 0].finish_reason is None]
    before = {name: len(answers[name, 0].token_ids) if (name, 0) in answers else 0 for name in aborted}
    for name in aborted:
        engine.abort(name)
        engine.abort(name)
        engine.scheduler.check()
    engine.abort("nobody")
    answers.finish(engine)
    for name, prompt in asked.items():
        for index in range(2):
            said = answers[name, index].token_ids if (name, index) in answers else []
            expected = plain_greedy(llama, prompt, 6)
            assert said == (expected[: before[name]] if name in aborted else expected)


def test_a_request_that_breaks_the_model_fails_alone_and_leaves_nothing_behind(llama):
    broken = make_decoder("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[5] = torch.nan
    engine = make_engine(broken, kv_cache_blocks=24, max_num_batched_tokens=16)
    good = [[token for token in prompt if token != 5] or [1] for prompt in prompts(12)]
    asked = {str(number): prompt for number, prompt in enumerate(good)}
    poison = {f"bad {number}": [9, 8, 5, 7] * 5 for number in range(4)}
    everything = {}
    for number, name in enumerate(asked):  # mixed, so that they meet in steps and follow each other in blocks
        everything[name] = asked[name]
        if number % 3 == 0:
            everything[f"bad {number // 3}"] = poison[f"bad {number // 3}"]
    answers = run(engine, everything, greedy(8))
    for name in poison:
        assert answers[name, 0].finish_reason == "error" and "not finite" in answers[name, 0].error
    for name, prompt in asked.items():
        expected = plain_greedy(llama, prompt, 8)
        if 5 not in expected:
            assert answers[name, 0].token_ids == expected


def test_an_answer_follows_its_grammar(llama):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["fox", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    params = {
        "json": SamplingParams(seed=1, max_tokens=80, grammar=Grammar("json_schema", json.dumps(schema)), n=2),
        "regex": SamplingParams(seed=1, max_tokens=40, grammar=Grammar("regex", r"[a-c]{3}-\d{2}")),
        "free": greedy(10),
    }
    [prompt] = prompts(1)
    answers = run(make_engine(llama), dict.fromkeys(params, prompt), params)
    for index in range(2):
        value = json.loads(answers["json", index].text)
        assert value["name"] in ("fox", "dog") and 0 <= value["age"] <= 99
    assert re.fullmatch(r"[a-c]{3}-\d{2}", answers["regex", 0].text)
    assert answers["regex", 0].finish_reason == "stop"
    assert answers["free", 0].token_ids == plain_greedy(llama, prompt, 10)


BAD = {
    "no tokens": ([], greedy(1), "The prompt has no tokens", "prompt"),
    "outside": ([VOCABULARY], greedy(1), "Token id 300 is not in the vocabulary of 300", "prompt"),
    "negative": ([-1], greedy(1), "Token id -1 is not in the vocabulary", "prompt"),
    "too long": (
        [1] * 100,
        greedy(40),
        "the prompt has 100, and max_tokens asks for 40, 140 together",
        "prompt",
    ),
    "no room": ([1] * 128, SamplingParams(max_tokens=None), "128 tokens: the prompt has 128", "prompt"),
    "n": ([1], greedy(1, n=9), "n is 9; at most 8 run at a time", "n"),
    "bias": ([1], greedy(1, logit_bias={300: 1.0}), "logit_bias: token id 300", "logit_bias"),
    "stop": ([1], greedy(1, stop_token_ids=(300,)), "stop_token_ids: token id 300", "stop_token_ids"),
    "grammar": ([1], greedy(1, grammar=Grammar("regex", "(")), "regex", "response_format"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_what_cannot_be_answered_is_refused(llama, case):
    prompt, params, message, param = case
    engine = make_engine(llama)
    with pytest.raises(RequestError, match=re.escape(message)) as refused:
        engine.add("a", prompt, params)
    assert refused.value.param == param
    if "the prompt has" in message:
        assert refused.value.code == "context_length_exceeded"
    assert not engine.has_work
    assert run(engine, {"a": [1, 2, 3]}, greedy(2))["a", 0].token_ids == plain_greedy(llama, [1, 2, 3], 2)


def test_a_name_is_given_once(llama):
    engine = make_engine(llama)
    engine.add("a", [1], greedy(1))
    with pytest.raises(RequestError, match="There is a request 'a' already"):
        engine.add("a", [1], greedy(1))
    Answers().finish(engine)


def test_sizes_that_do_not_fit_are_refused(llama):
    with pytest.raises(ConfigurationError, match="max_model_len 100 needs 25 blocks of 4 tokens, the KV cache has 10"):
        make_engine(llama, kv_cache_blocks=10, max_model_len=100)
    with pytest.raises(ConfigurationError, match="max_model_len 200 is more than the 128 tokens"):
        make_engine(llama, max_model_len=200)
    assert make_engine(llama, kv_cache_blocks=10).max_model_len == 40
    assert make_engine(llama, kv_cache_blocks="auto").stats().blocks_total == 8 * 32


def test_usage_tells_tokens_and_times(llama):
    [prompt] = prompts(1, 30)
    engine = make_engine(llama)
    first = run(engine, {"a": prompt}, greedy(5))["a", 0].usage
    second = run(engine, {"b": prompt}, greedy(5))["b", 0].usage
    assert (first.prompt_tokens, first.completion_tokens, first.cached_tokens) == (len(prompt), 5, 0)
    assert second.cached_tokens == (len(prompt) - 1) // 4 * 4
    assert first.queued >= 0 and first.prefill > 0 and first.decode > 0
    assert engine.stats().requests_finished == {"length": 2}


def test_answers_that_were_to_branch_off_fail_with_the_first(llama):
    """A request that cannot be computed is one that the runner refuses: a piece beyond the model's rotary length."""
    dynamic = make_decoder("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    engine = make_engine(dynamic)
    engine.max_model_len = 200  # as if it had been let in
    engine.add("long", [1] * 140, greedy(2, n=3))
    engine.add("good", [1, 2, 3], greedy(4))
    answers = Answers().finish(engine)
    assert {answers["long", index].finish_reason for index in range(3)} == {"error"}
    assert answers["good", 0].token_ids == plain_greedy(dynamic, [1, 2, 3], 4)


def test_a_prompt_that_fills_the_context_can_be_pooled(llama):
    answer = run(make_engine(llama), {"a": [1] * 128}, SamplingParams(), pooling="mean")["a", 0]
    assert (answer.finish_reason, len(answer.embedding)) == ("stop", 32)


@pytest.fixture
def poisoned():
    """A model to which token 5 is not a number, and whose head takes no such thing."""
    decoder = make_decoder("llama")
    with torch.no_grad():
        decoder.model.embed_tokens.weight[5] = torch.nan

    def refuse(module, inputs):
        if not inputs[0].isfinite().all():
            raise FloatingPointError("not a number")

    decoder.lm_head.register_forward_pre_hook(refuse)
    return decoder


@pytest.mark.parametrize("fields", [{}, {"prompt_logprobs": 2}, {"n": 3}], ids=str)
def test_who_breaks_the_head_fails_alone(llama, poisoned, fields):
    engine = make_engine(poisoned)
    good = {"a": [1, 2, 3], "b": [4, 9, 8, 7]}
    params = SamplingParams(seed=3, max_tokens=3, logit_bias={5: -100.0}, ignore_eos=True)
    bad = greedy(3, **fields)
    answers = run(engine, {"a": good["a"], "bad": [1, 5, 6], "b": good["b"]}, {"a": params, "b": params, "bad": bad})
    for index in range(bad.n):
        assert answers["bad", index].finish_reason == "error" and "could not compute" in answers["bad", index].error
    alone = run(make_engine(llama), good, params)
    for name in good:  # sampling once more did not use up any of their random numbers
        assert answers[name, 0].token_ids == alone[name, 0].token_ids
    assert engine.stats().requests_finished == {"error": bad.n, "length": 2}


def test_one_failure_after_another_is_the_engines(poisoned):
    engine = make_engine(poisoned)

    def fail():
        answer = run(engine, {"bad": [5]}, greedy(1))["bad", 0]
        assert answer.finish_reason == "error"

    fail()
    fail()
    run(engine, {"good": [1, 2, 3]}, greedy(1, logit_bias={5: -100.0}))
    with pytest.raises(RuntimeError, match="in 5 steps one after another"):
        for _ in range(5):
            fail()


def test_what_is_not_a_number_is_not_pooled(poisoned):
    answer = run(make_engine(poisoned), {"a": [1, 5]}, SamplingParams(), pooling="mean")["a", 0]
    assert (answer.finish_reason, answer.embedding) == ("error", None) and "not finite" in answer.error


def test_a_stop_token_can_be_kept(llama):
    [prompt] = prompts(1)
    tokens = plain_greedy(llama, prompt, 6)
    params = greedy(6, stop_token_ids=(tokens[3],), include_stop_str_in_output=True)
    answer = run(make_engine(llama), {"a": prompt}, params)["a", 0]
    assert answer.stop_reason == tokens[3]
    assert answer.text == tokenizer().decode(tokens[: tokens.index(tokens[3]) + 1])


def test_every_prompt_that_was_computed_counts_once(llama):
    engine = make_engine(llama, max_num_batched_tokens=8, kv_cache_blocks=16)
    run(engine, {"pooled": [1] * 20}, SamplingParams(), pooling="last")
    assert engine.stats().prompt_tokens == 20
    engine.add("aborted", [2] * 10, greedy(20, n=2))
    engine.step()
    engine.step()
    engine.abort("aborted")
    engine.add("unborn", [3] * 10, greedy(20, n=2))
    engine.abort("unborn")
    assert engine.stats().prompt_tokens == 30
    assert engine.stats().requests_finished == {"stop": 1, "abort": 4}
    run(engine, {str(number): [number + 4] * 15 for number in range(4)}, greedy(20))
    assert engine.stats().num_preemptions > 0 and engine.stats().prompt_tokens == 90


def test_answers_branch_off_without_compiling_their_grammar_again(llama):
    params = SamplingParams(seed=1, max_tokens=20, n=4, grammar=Grammar("regex", "[a-c]{3}"))
    engine = make_engine(llama)
    grammar = engine.prepare(params)
    engine.close()
    engine._grammars = None  # nothing to compile with any more
    engine.add("a", [1, 2, 3], params, grammar=grammar)
    answers = Answers().finish(engine)
    assert all(re.fullmatch("[a-c]{3}", answers["a", index].text) for index in range(4))


def test_only_steps_that_nothing_else_was_part_of_are_measured(llama):
    engine = make_engine(llama, max_num_batched_tokens=64, kv_cache_blocks=200)
    before = engine.costs.flop_rate
    run(engine, {"a": [1] * 60}, greedy(1))
    assert engine.costs.flop_rate == before  # too small
    run(engine, {"a": [1] * 127}, greedy(1))
    assert engine.costs.flop_rate != before
