"""What is asked, and when."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.bench.datasets import (
    SHAREGPT_INPUT,
    SHAREGPT_LONGEST,
    SHAREGPT_OUTPUT,
    SHAREGPT_SHORTEST,
    Prompt,
    as_texts,
    prompts_of_file,
    random_prompts,
    sharegpt_lengths,
)
from lightning_llm.serving.bench.load import arrival_times


def made(seed: int, **changes: int) -> list[Prompt]:
    sizes = {"input_len": 20, "output_len": 7, "prefix_len": 5, "vocab_size": 50} | changes
    return random_prompts(8, seed=seed, **sizes)


def test_the_seed_decides() -> None:
    assert made(3) == made(3)
    assert made(3) != made(4)
    assert sharegpt_lengths(50, seed=3) == sharegpt_lengths(50, seed=3) != sharegpt_lengths(50, seed=4)
    assert arrival_times(50, 2.0, 3) == arrival_times(50, 2.0, 3) != arrival_times(50, 2.0, 4)


def test_random_prompts_share_their_beginning_and_nothing_else() -> None:
    prompts = made(0)
    assert [prompt.num_tokens for prompt in prompts] == [25] * 8
    assert {prompt.max_tokens for prompt in prompts} == {7}
    assert len({tuple(prompt.content[:5]) for prompt in prompts}) == 1
    assert len({tuple(prompt.content[5:]) for prompt in prompts}) == 8
    tokens = [token for prompt in made(0, input_len=500) for token in prompt.content]
    assert min(tokens) == 0 and max(tokens) == 49


def test_lengths_may_be_given_for_each() -> None:
    prompts = random_prompts(2, input_len=[3, 4], output_len=[5, 6], vocab_size=9, seed=0)
    assert [(prompt.num_tokens, prompt.max_tokens) for prompt in prompts] == [(3, 5), (4, 6)]


def test_sharegpt_lengths_are_many_short_ones_and_a_few_long_ones() -> None:
    for lengths, mean in zip(sharegpt_lengths(20_000, seed=0), (SHAREGPT_INPUT, SHAREGPT_OUTPUT), strict=True):
        assert statistics.mean(lengths) == pytest.approx(mean, rel=0.1)  # the longest are cut
        assert statistics.median(lengths) < 0.7 * mean
        assert min(lengths) >= SHAREGPT_SHORTEST and max(lengths) == SHAREGPT_LONGEST


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = arrival_times(20_000, 4.0, seed=1)
    gaps = [after - before for before, after in zip(arrivals, arrivals[1:], strict=False)]
    assert arrivals[0] == 0 and min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(1 / 4, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 4, rel=0.05)  # of exponential gaps: the mean
    within_a_second = [0] * int(arrivals[-1])
    for arrival in arrivals:
        if arrival < len(within_a_second):
            within_a_second[int(arrival)] += 1
    assert statistics.variance(within_a_second) == pytest.approx(statistics.mean(within_a_second), rel=0.1)


def test_an_endless_rate_is_all_at_once() -> None:
    assert arrival_times(3, float("inf"), 0) == [0.0, 0.0, 0.0]
    assert arrival_times(1, 0.1, 0) == [0.0]


def test_a_file_is_read_from_its_beginning_and_again(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "max_tokens": 3}\n\n{"prompt": [1, 2]}\n')
    assert prompts_of_file(file, 3, output_len=9) == [Prompt("one", 3), Prompt([1, 2], 9), Prompt("one", 3)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "is empty"),
        ('{"prompt": "fine"}\nno', "line 2 is not JSON"),
        ("[1]", "line 1 has no prompt"),
        ('{"text": "a"}', "line 1 has no prompt"),
        ('{"prompt": []}', "line 1 has no prompt"),
        ('{"prompt": ["a"]}', "line 1 has no prompt"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens must be a positive integer, not 0"),
    ],
)
def test_a_file_that_cannot_be_used_says_where(tmp_path: Path, line: str, complaint: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    with pytest.raises(ConfigurationError, match=complaint):
        prompts_of_file(file, 1, output_len=1)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        prompts_of_file(tmp_path / "none.jsonl", 1, output_len=1)


def test_token_ids_become_texts() -> None:
    texts = as_texts([Prompt([1, 2], 3), Prompt("as it is", 4)], lambda ids: "+".join(map(str, ids)))
    assert texts == [Prompt("1+2", 3), Prompt("as it is", 4)]
