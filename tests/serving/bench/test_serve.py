"""`lightning-llm bench serve` against a real server of a tiny random model."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.bench.client import BenchClient
from lightning_llm.serving.bench.commands import main
from lightning_llm.serving.bench.datasets import Prompt, random_prompts
from lightning_llm.serving.bench.load import Load, arrival_times, closed_loop, open_loop
from lightning_llm.serving.bench.metrics import LATENCIES, PERCENTILES
from tests.serving.engine.models import tokenizer
from tests.serving.server.http.served import MODEL, Server, make_client, serve


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve(make_client()) as running:
        yield running


def prompts(count: int, output_len: int = 6) -> list[Prompt]:
    return random_prompts(count, input_len=10, output_len=output_len, vocab_size=tokenizer().get_vocab_size(), seed=0)


def load(
    server: Server, asked: list[Prompt], concurrency: int | None = None, rate: float = float("inf"), **settings
) -> Load:
    async def run() -> Load:
        async with BenchClient(server.url, ignore_eos=True, **settings) as client:
            if concurrency is not None:
                return await closed_loop(client, asked, concurrency)
            return await open_loop(client, asked, arrival_times(len(asked), rate, 0))

    return asyncio.run(run())


def test_every_token_has_its_time(server: Server) -> None:
    found = load(server, prompts(5))
    assert [one.error for one in found.results] == [None] * 5
    for one in found.results:
        assert (one.prompt_tokens, one.output_tokens, len(one.times)) == (10, 6, 6)
        assert one.start < one.times[0] and one.times == sorted(one.times)
        assert one.e2el <= found.duration
    assert found.client_cpu > 0


def test_a_user_waits_for_the_answer_before_the_next_question(server: Server) -> None:
    alone = load(server, prompts(3), concurrency=1).results
    assert all(before.times[-1] <= after.start for before, after in zip(alone, alone[1:], strict=False))
    spans = [(one.start, one.times[-1]) for one in load(server, prompts(6, 12), concurrency=3).results]
    running = [sum(start <= when < end for start, end in spans) for when, _ in spans]
    assert max(running) == 3


def test_an_open_loop_waits_for_nobody(server: Server) -> None:
    arrivals = arrival_times(4, 50.0, 0)
    starts = [one.start for one in load(server, prompts(4), rate=50.0).results]
    assert [start - starts[0] for start in starts] == pytest.approx(arrivals)


def test_chat_counts_tokens_not_the_piece_that_says_who_speaks(server: Server) -> None:
    asked = [Prompt("the fox", 5)]
    [found] = load(server, asked, endpoint="/v1/chat/completions").results
    assert found.error is None and found.prompt_tokens > 0
    assert 1 <= len(found.times) <= found.output_tokens == 5


def test_a_request_that_is_refused_is_an_error_of_its_own(server: Server) -> None:
    refused, answered = load(server, [Prompt([10**6], 3), *prompts(1)]).results
    assert refused.error is not None and refused.error.startswith("HTTP 400: ") and "1000000" in refused.error
    assert answered.error is None


def test_a_server_that_dies_midway_is_an_error(tmp_path: Path) -> None:
    local = make_client()
    with serve(local) as running:

        async def run() -> Load:
            async with BenchClient(running.url, ignore_eos=True) as client:
                asking = asyncio.ensure_future(closed_loop(client, prompts(1, 800), 1))
                while not local.engine.has_work:
                    await asyncio.sleep(0.001)
                running.call(local.die)
                return await asking

        [found] = asyncio.run(run()).results
    assert found.error is not None


def test_the_command_writes_what_it_measured(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    arguments = (
        f"serve --url {server.url}/v1 --num-prompts 6 --concurrency 2 --input-len 12 --prefix-len 4 --output-len 5"
    )
    vocabulary = tokenizer().get_vocab_size()
    limits = ["--goodput", "ttft:60000", "tpot:60000", "--ignore-eos", "--vocab-size", str(vocabulary)]
    assert main([*arguments.split(), *limits, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert (found["model_id"], found["completed"], found["failed"]) == (MODEL, 6, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (6 * 16, 6 * 5)
    assert found["request_goodput"] == found["request_throughput"]
    for name in (*LATENCIES, "itl"):
        rising = [found[f"p{percent}_{name}_ms"] for percent in PERCENTILES]
        assert 0 <= rising[0] <= rising[1] <= rising[2]
    assert 0 < found["p50_ttft_ms"] <= found["p50_e2el_ms"]
    shown = capsys.readouterr().out
    assert "time to first token (TTFT)" in shown and "2 at a time" in shown and "good requests/s" in shown


def test_the_command_fails_where_requests_failed(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    # the prompt and its answer are more than the model's 1024 tokens
    assert main(f"serve --url {server.url} --num-prompts 2 --input-len 2000 --vocab-size 50".split()) == 1
    assert "2 times: HTTP 400: " in capsys.readouterr().out


def test_chat_with_a_tokenizer(server: Server, tmp_path: Path) -> None:
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    arguments = f"serve --url {server.url} --endpoint /v1/chat/completions --num-prompts 2 --output-len 4 --input-len 8"
    with pytest.raises(ConfigurationError, match="takes texts, not token ids: give --tokenizer"):
        main(arguments.split())
    assert main([*arguments.split(), "--tokenizer", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--model other", "has no model 'other'; it has tiny"),
        ("--request-rate 3 --concurrency 2", "give one"),
        ("--num-prompts 0", "--num-prompts must be above 0, not 0"),
        ("--request-rate -1", "--request-rate must be above 0"),
        ("--prefix-len -2", "--prefix-len must be above -1"),
        ("--dataset sharegpt", "neither random, nor sharegpt-lengths"),
        ("--goodput speed:3", "is not NAME:MILLISECONDS"),
    ],
)
def test_mistakes_are_named(server: Server, arguments: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        main(["serve", "--url", server.url, "--num-prompts", "1", *arguments.split()])


def test_no_server_is_named_before_anything_is_measured() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(
        ConfigurationError, match=f"no server that answers at http://127.0.0.1:{port}.*lightning-llm serve"
    ):
        main(["serve", "--url", f"http://127.0.0.1:{port}"])
