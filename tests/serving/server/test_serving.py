"""A server with two workers, in real processes: answers, cancellation, failures and replacements."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lightning_llm.serving.llm import LLM
from tests.serving.engine.models import greedy
from tests.serving.server.serving import CONTEXT, POISON, VOCABULARY, Server, eventually, save_tiny_model, serving

pytestmark = pytest.mark.alone

GREEDY = {"temperature": 0.0, "ignore_eos": True}
LONG = {"max_tokens": 3900, **GREEDY}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, tmp_path_factory.mktemp("server") / "log", workers=2, hang_timeout=3.0) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Server:
    """With both workers ready, and nothing to do."""
    eventually(lambda: all(worker["ready"] and not worker["busy"] for worker in shared.ask()["workers"]), 60)
    return shared


def blocks_in_use(server: Server) -> int:
    return sum(one["blocks_total"] - one["blocks_free"] for one in server.ask()["stats"])


def token_ids(updates: list[dict]) -> list[int]:
    assert updates[-1].get("finish_reason") == "length", updates[-1]
    return [token for update in updates for token in update["token_ids"]]


def worker_with_requests(server: Server) -> dict:
    (worker,) = [one for one in server.ask()["workers"] if one["in_flight"]]
    return worker


def test_answers_are_those_of_the_engine_in_this_process(server: Server, model: Path) -> None:
    prompts = [[first, *range(10, 20 + first)] for first in range(1, 9)]
    expected = [output.token_ids for output in LLM(model, kv_cache_blocks=64).generate(prompts, greedy(12))]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda ids: server.generate(ids, params={"max_tokens": 12, **GREEDY}), prompts))
    assert [token_ids(updates) for updates in answers] == expected
    assert answers[0][-1]["usage"]["completion_tokens"] == 12 and answers[0][-1]["request_id"] == "mine"


def test_several_answers_logprobs_and_embeddings_come_over_the_wire(server: Server) -> None:
    updates = server.generate([3, 4, 5], params={"n": 2, "max_tokens": 4, "logprobs": 2, "prompt_logprobs": 1})
    assert sorted(update["index"] for update in updates if update["finish_reason"]) == [0, 1]
    assert all(len(update["logprobs"][0]["top"]) == 2 for update in updates if update["token_ids"])
    (told,) = [update["prompt_logprobs"] for update in updates if update["prompt_logprobs"]]
    assert told[0] is None and [one["token_id"] for one in told[1:]] == [4, 5]
    (update,) = server.generate([3, 4, 5], pooling="mean")
    assert len(update["embedding"]) == 32


def test_routes_know_the_model_without_its_weights_and_ours_take_the_place_of_litserves(server: Server) -> None:
    state = server.ask()
    assert state["model"][:3] == ["tiny", CONTEXT, VOCABULARY] and state["model"][3]
    assert state["defaults"] == {}
    assert server.ask("/health") == {"ours": True}
    assert server.status("/") == server.status("/info") == 404  # LitServe has them


def test_what_the_engine_refuses_comes_back_as_the_request_error_that_it_was(server: Server) -> None:
    (answer,) = server.generate([1, 2], params={"max_tokens": CONTEXT})
    assert answer["param"] == "prompt" and answer["code"] == "context_length_exceeded"
    (answer,) = server.generate([1, 2], params={"stop_token_ids": [VOCABULARY]})
    assert answer["param"] == "stop_token_ids"
    (answer,) = server.generate([1, 2], params={"min_tokens": 2**70, "max_tokens": None})
    assert "64 bits" in answer["refused"]
    assert server.ask()["in_flight"] == 0


def test_grammars_are_compiled_beside_the_steps_and_bad_ones_are_refused(server: Server) -> None:
    updates = server.generate([5, 6], params={"max_tokens": 40, "grammar": ["regex", "[0-9]{3}"]})
    assert "".join(update["text"] for update in updates).isdigit()
    (answer,) = server.generate([5, 6], params={"grammar": ["regex", "("]})
    assert answer["param"] == "response_format"


def test_a_client_that_leaves_frees_its_blocks_at_once_and_nobody_elses(server: Server) -> None:
    stays = server.start([7] * 40, params={"max_tokens": 400, **GREEDY}).wait_for_first()
    with server.stream([8] * 40, params=LONG) as updates:
        next(updates)
    assert eventually(lambda: server.ask()["in_flight"] <= 1, 5) < 2
    assert len(token_ids(stays.result())) == 400
    eventually(lambda: blocks_in_use(server) == 0, 5)
    assert sum(one["requests_finished"].get("abort", 0) for one in server.ask()["stats"]) >= 1


def test_requests_that_wait_are_cancelled_too(server: Server) -> None:
    """More than both engines take at a time."""
    streams = [server.stream([9, number], params=LONG) for number in range(40)]
    for stream in streams:
        stream.__enter__()
    eventually(lambda: server.ask()["in_flight"] == 40)
    assert any(one["num_requests_waiting"] for one in server.ask()["stats"])
    for stream in streams:
        stream.__exit__(None, None, None)
    eventually(lambda: server.ask()["in_flight"] == 0 and blocks_in_use(server) == 0, 10)
    assert all(one["num_requests_waiting"] == one["num_requests_running"] == 0 for one in server.ask()["stats"])


def test_equal_beginnings_go_to_the_same_worker_and_others_to_the_less_busy(server: Server) -> None:
    before = [one["prefix_cache_hits"] for one in server.ask()["stats"]]
    for last in range(4):
        server.generate([*range(50, 114), last], params={"max_tokens": 1})
    hits = [one["prefix_cache_hits"] - old for one, old in zip(server.ask()["stats"], before, strict=True)]
    assert sorted(hits) == [0, 3 * 64]
    with server.stream([20] * 4, params=LONG) as one, server.stream([21] * 4, params=LONG) as other:
        next(one), next(other)
        assert [worker["in_flight"] for worker in server.ask()["workers"]] == [1, 1]


def test_the_event_loop_is_not_held_up_while_engines_work(server: Server) -> None:
    busy = [server.start([first] * 4, params={"max_tokens": 300, **GREEDY}).wait_for_first() for first in range(8)]
    assert server.ask("/lag")["longest"] < 1
    for one in busy:
        one.result()


def test_idle_workers_use_no_processor(server: Server) -> None:
    pids = [worker["pid"] for worker in server.ask()["workers"]]
    workers = [one for one in server.family() if one.pid in pids]
    before = sum(sum(one.cpu_times()[:2]) for one in workers)
    time.sleep(2)
    assert sum(sum(one.cpu_times()[:2]) for one in workers) - before < 0.1


def test_a_request_that_cannot_be_computed_fails_alone(server: Server) -> None:
    others = [server.start([first] * 4, params={"max_tokens": 300, **GREEDY}).wait_for_first() for first in (30, 31)]
    pids = [worker["pid"] for worker in server.ask()["workers"]]
    (failed,) = server.generate([1, POISON], params={"max_tokens": 5})
    assert failed["finish_reason"] == "error" and failed["error"]
    assert all(len(token_ids(one.result())) == 300 for one in others)
    assert [worker["pid"] for worker in server.ask()["workers"]] == pids


def test_no_other_user_can_reach_the_sockets(server: Server) -> None:
    (folder,) = server.sockets.glob("lightning-llm-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [connection for one in server.family() for connection in one.net_connections("inet")] != []
    listening = {
        connection.laddr.port
        for one in server.family()
        for connection in one.net_connections("inet")
        if connection.status == "LISTEN"
    }
    assert listening == {int(server.url.rpartition(":")[2])}


def test_workers_that_are_killed_or_hang_fail_their_own_requests_and_are_replaced(
    server: Server,
) -> None:
    kept = server.start([41] * 40, params={"max_tokens": 1500, **GREEDY}).wait_for_first()
    survivor = worker_with_requests(server)
    lost = server.start([40] * 40, params=LONG).wait_for_first()
    (victim,) = [one for one in server.ask()["workers"] if one["id"] != survivor["id"]]
    killed_at = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    assert "died" in lost.result()[-1]
    assert lost.ended_at - killed_at < 2
    assert server.status() == 200  # there is another
    assert len(token_ids(server.generate([40] * 40, params={"max_tokens": 3, **GREEDY}))) == 3
    assert len(token_ids(kept.result())) == 1500

    lost = server.start([42] * 40, params=LONG).wait_for_first()
    stopped = worker_with_requests(server)
    os.kill(stopped["pid"], signal.SIGSTOP)
    assert "died" in lost.result()[-1]

    eventually(lambda: all(worker["ready"] for worker in server.ask()["workers"]), 90)
    assert not {victim["pid"], stopped["pid"]} & {worker["pid"] for worker in server.ask()["workers"]}
    assert len(token_ids(server.generate([1], params={"max_tokens": 3, **GREEDY}))) == 3


def test_an_engine_that_fails_altogether_ends_its_worker(server: Server) -> None:
    """Several requests in one step, and none can be computed: it is not the requests' fault any more."""

    def died() -> bool:
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: server.generate([POISON] * 40, params={"max_tokens": 5}), range(8)))
        return any("died" in one[-1] for one in answers)

    eventually(died)
    eventually(lambda: "ended with 1; another is started" in server.log.read_text())


def test_sigterm_lets_what_runs_finish_and_refuses_what_comes(shared: Server) -> None:
    """The last of this module."""
    eventually(lambda: any(worker["ready"] for worker in shared.ask()["workers"]), 60)
    family = shared.family()
    running = shared.start([43] * 40, params={"max_tokens": 1500, **GREEDY}).wait_for_first()
    os.kill(shared.process.pid, signal.SIGTERM)
    eventually(lambda: shared.status() == 503, 5)
    assert "about to end" in shared.generate([1])[-1]["died"]
    assert len(token_ids(running.result())) == 1500
    shared.process.join(30)
    assert shared.process.exitcode == 0
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not list(shared.sockets.glob("lightning-llm-*"))
