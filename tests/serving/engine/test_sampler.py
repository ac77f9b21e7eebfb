"""Which token a row gets: penalties and cuts as in transformers, draws that follow their distribution, rows that are
independent of each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as reference

from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.engine.sampler import Sampled, Sampler
from lightning_llm.serving.engine.sampling_state import SamplingState

VOCAB = 300
EOS = 0


def make_state(prompt: list[int] | None = None, *, vocab: int = VOCAB, offset: int = 0, **params: Any) -> SamplingState:
    return SamplingState(
        SamplingParams(**params), prompt or [1, 2, 3], vocab_size=vocab, eos_token_ids=[EOS], seed_offset=offset
    )


def random_logits(rows: int, vocab: int = VOCAB, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draw_many(logits: Tensor, count: int, **params: Any) -> Tensor:
    """How often each token is drawn from the one row of logits, in `count` draws of one sequence."""
    # Many rows that share a state draw in turn from its one generator, as steps would.
    state = make_state(vocab=len(logits), seed=7, **params)
    answers: list[Sampled] = []
    for start in range(0, count, 500):
        rows = min(500, count - start)
        answers += Sampler().sample(logits.expand(rows, -1), [state] * rows)
    return torch.bincount(torch.tensor([answer.token_id for answer in answers]), minlength=len(logits))


def reference_probabilities(logits: Tensor, *, temperature: float, min_p: float, top_k: int, top_p: float) -> Tensor:
    """The distribution, token by token, as the definitions read."""
    scores = (logits.double() / temperature).tolist()
    top = max(scores)
    weights = {token: math.exp(score - top) for token, score in enumerate(scores)}
    weights = {token: weight for token, weight in weights.items() if weight >= min_p}
    ranked = sorted(weights, key=lambda token: -weights[token])
    if top_k > 0:
        ranked = ranked[:top_k]
    total = sum(weights[token] for token in ranked)
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= top_p * total:
            break
        kept.append(token)
        mass += weights[token]
    probabilities = torch.zeros(len(logits), dtype=torch.float64)
    for token in kept:
        probabilities[token] = weights[token] / mass
    return probabilities


def chi_square_is_plausible(counts: Tensor, probabilities: Tensor) -> bool:
    """Pearson's test at six standard deviations, tokens expected less than five times thrown together."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common].double(), counts[~common].sum()[None].double()])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return statistic <= freedom + 6 * math.sqrt(2 * freedom) + 6


CUTS = [
    {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.6, "min_p": 0.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.5, "min_p": 0.0, "top_k": 12, "top_p": 1.0},
    {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.0, "top_k": 0, "top_p": 0.1},
    {"temperature": 1.0, "min_p": 0.05, "top_k": 0, "top_p": 1.0},
    {"temperature": 2.0, "min_p": 0.02, "top_k": 25, "top_p": 0.7},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_draws_follow_the_distribution(cut: dict[str, Any]) -> None:
    logits = random_logits(1, 90, scale=2.0)[0]
    counts = draw_many(logits, 6000, **cut)
    probabilities = reference_probabilities(logits, **cut)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square_is_plausible(counts, probabilities)


def test_a_wrong_distribution_would_be_noticed() -> None:
    logits = random_logits(1, 90, scale=2.0)[0]
    counts = draw_many(logits, 6000, temperature=1.0)
    assert not chi_square_is_plausible(counts, reference_probabilities(logits, **{**CUTS[0], "temperature": 1.2}))


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"top_k": 7}, reference.TopKLogitsWarper(7)),
        ({"top_k": 1}, reference.TopKLogitsWarper(1)),
        ({"top_p": 0.6}, reference.TopPLogitsWarper(0.6)),
        ({"top_p": 0.05}, reference.TopPLogitsWarper(0.05)),
        ({"min_p": 0.1}, reference.MinPLogitsWarper(0.1)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_the_tokens_that_can_be_drawn_are_transformers(params: dict[str, Any], warper: Any) -> None:
    # Nearly flat, so that every token that may be drawn is, sooner or later.
    logits = random_logits(1, 40, scale=0.8)[0]
    kept = torch.isfinite(warper(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0])
    assert torch.equal(draw_many(logits, 3000, **params) > 0, kept)


def test_penalties_are_transformers_and_openais() -> None:
    logits = random_logits(4)
    prompt, answer = [5, 6, 7, 7], [7, 8, 8, 9]
    penalties = [(1.7, 0.0, 0.0), (1.0, 0.4, 0.9), (0.6, -0.5, 0.3), (1.3, 2.0, -2.0)]
    states = []
    for repetition, frequency, presence in penalties:
        states.append(
            make_state(
                prompt,
                temperature=0,
                repetition_penalty=repetition,
                frequency_penalty=frequency,
                presence_penalty=presence,
            )
        )
        for token in answer:
            states[-1].append(token)
    for row, (repetition, frequency, presence) in enumerate(penalties):
        ids = torch.tensor([prompt + answer])
        expected = reference.RepetitionPenaltyLogitsProcessor(repetition)(ids, logits[row : row + 1].clone())[0]
        for token in set(answer):
            expected[token] -= frequency * answer.count(token) + presence
        # The penalised tokens one after the other, and all others but one out of the way: the sampler's choice between
        # the two changes exactly where the penalised logit passes the other's.
        for token in {*prompt, *answer}:
            for gap, winner in ((-1e-3, token), (1e-3, 100)):
                row_logits = torch.full((1, VOCAB), -1e4)
                row_logits[0, token] = logits[row, token]
                row_logits[0, 100] = expected[token] + gap
                assert Sampler().sample(row_logits, [states[row]])[0].token_id == winner


def test_penalties_of_a_long_answer_count_every_token() -> None:
    state = make_state([1], temperature=0, frequency_penalty=0.01)
    for step in range(1000):
        state.append(step % 250)
    assert state.counts is not None
    assert state.counts.ids.tolist() == list(range(250))
    assert state.counts.counts.tolist() == [4.0] * 250


def test_bias_and_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 9] = 5.0, 4.0
    state = make_state(temperature=0, min_tokens=2, stop_token_ids=(9,), logit_bias={20: 1.0, 21: -100.0})
    assert Sampler().sample(logits, [state])[0].token_id == 20
    state.append(20)
    state.append(20)
    assert Sampler().sample(logits, [state])[0].token_id == EOS


def test_greedy_is_argmax_and_leaves_logits_alone() -> None:
    logits = random_logits(5)
    before = logits.clone()
    answers = Sampler().sample(logits, [make_state(temperature=0) for _ in range(5)])
    assert [answer.token_id for answer in answers] == logits.argmax(-1).tolist()
    Sampler().sample(logits, [make_state(top_p=0.5, repetition_penalty=2.0, logit_bias={4: 1.0}) for _ in range(5)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 0.01])
def test_almost_no_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(1)
    state = make_state(temperature=temperature, seed=1, top_p=0.9)
    assert Sampler().sample(logits, [state])[0].token_id == logits.argmax().item()


def test_a_sequence_draws_the_same_whatever_shares_its_batch() -> None:
    """Also whatever the global generator did, and with rows that are broken, greedy or cut beside it."""
    steps = 12
    logits = random_logits(steps, 5000, seed=3)
    kinds: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_k": 40},
        {"top_p": 0.3, "top_k": 900, "min_p": 0.001},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "temperature": 0.7},
    ]

    def run(companions: int) -> list[list[int]]:
        states = [make_state(vocab=5000, seed=11, **kind) for kind in kinds]
        others = [make_state(vocab=5000, **kind) for kind in [*kinds, {"temperature": 0}] * 3][:companions]
        taken = []
        for step in range(steps):
            torch.manual_seed(companions * 100 + step)
            noise = random_logits(len(others), 5000, seed=companions + step)
            if companions:
                noise[0] = math.nan
            batch = torch.cat([noise[: companions // 2], logits[step].expand(len(kinds), -1), noise[companions // 2 :]])
            mixed = others[: companions // 2] + states + others[companions // 2 :]
            answers = Sampler().sample(batch, mixed)[companions // 2 :][: len(kinds)]
            for state, answer in zip(states, answers, strict=True):
                state.append(answer.token_id)
            taken.append([answer.token_id for answer in answers])
        return taken

    alone = run(0)
    assert run(3) == alone
    assert run(17) == alone


def test_seeds_repeat_and_answers_of_one_request_differ() -> None:
    logits = random_logits(1, scale=0.5)

    def tokens(state: SamplingState) -> list[int]:
        return [Sampler().sample(logits, [state])[0].token_id for _ in range(8)]

    assert tokens(make_state(seed=5)) == tokens(make_state(seed=5))
    assert tokens(make_state(seed=5)) != tokens(make_state(seed=5, offset=1))
    assert tokens(make_state(seed=5, offset=1)) == tokens(make_state(seed=5, offset=1))
    assert tokens(make_state()) != tokens(make_state())
    states = [
        make_state(seed=seed, offset=offset) for seed in (1, 1 + 2**32, 1 - 2**32, -(2**63)) for offset in range(3)
    ]
    assert len({state.uniform() for state in states}) == len(states)  # all 64 bits count, and none the other's index


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_row_fails_alone(broken: float) -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"seed": 1},
        {"seed": 1, "top_p": 0.5},
        {"logit_bias": {3: 1.0}, "seed": 1},
    ]
    for kind in kinds:
        logits = random_logits(3)
        whole = Sampler().sample(logits, [make_state(**kind, logprobs=1) for _ in range(3)])
        if broken == -math.inf:
            logits[1] = broken
        else:
            logits[1, 50] = broken
        answers = Sampler().sample(logits, [make_state(**kind, logprobs=1) for _ in range(3)])
        assert answers[1].token_id == -1
        assert answers[1].error is not None
        assert answers[1].logprob is None
        assert [answers[0], answers[2]] == [whole[0], whole[2]]


def test_a_row_without_a_possible_token_fails_alone() -> None:
    logits = torch.full((2, VOCAB), -math.inf)
    logits[:, EOS] = 1.0
    answers = Sampler().sample(logits, [make_state(min_tokens=1), make_state()])
    assert answers[0].error is not None
    assert "min_tokens" in answers[0].error
    assert answers[1] == Sampled(EOS)


def test_logprobs_are_of_the_models_own_logits() -> None:
    logits = random_logits(3)
    expected = logits.log_softmax(-1)
    states = [
        make_state(seed=1, logprobs=4, temperature=0.3, logit_bias={17: 100.0}),
        make_state(temperature=0, logprobs=0),
        make_state(temperature=0),
    ]
    first, second, third = Sampler().sample(logits, states)
    assert first.token_id == 17
    assert first.logprob == pytest.approx(expected[0, 17].item(), abs=1e-5)
    values, ids = expected[0].topk(4)
    assert [token for token, _ in first.top] == ids.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert (second.top, second.logprob) == ([], pytest.approx(expected[1].max().item(), abs=1e-5))
    assert (third.logprob, third.top) == (None, [])

    found = Sampler().logprobs_of(logits, [4, 5, 6], 2)
    assert [value for value, _ in found] == pytest.approx([expected[row, 4 + row].item() for row in range(3)], abs=1e-5)
    assert [[token for token, _ in top] for _, top in found] == expected.topk(2).indices.tolist()


def test_equally_likely_tokens_are_all_kept_or_all_cut() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    assert (draw_many(logits, 800, top_k=2) > 0).tolist() == [True, True, True, True, False]
    assert (draw_many(logits, 800, top_p=0.6) > 0).tolist() == [True, True, True, True, False]


def test_a_draw_can_be_made_again_until_its_token_is_taken() -> None:
    state = make_state(seed=5)
    first = [state.uniform(), state.uniform()]
    state.rewind()
    assert [state.uniform(), state.uniform()] == first
    third = state.uniform()
    state.rewind()
    state.append(3)
    assert state.uniform() not in (*first, third)
