"""Metrics, spans and logs of a server in processes of its own, one of whose workers dies. Run as a module it is it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from fastapi import FastAPI

from lightning_llm.serving.server.api import LLMServeAPI
from lightning_llm.serving.server.client import EngineClient
from lightning_llm.serving.server.http import attach
from lightning_llm.serving.server.observability.logs import log_config
from lightning_llm.serving.server.observability.middleware import Observability
from lightning_llm.serving.server.observability.tracing import make_tracer
from lightning_llm.serving.server.playground import attach_playground
from lightning_llm.serving.server.server import EngineServer
from tests.serving.server.observability.test_tracing import Collector, attributes, collector  # noqa: F401
from tests.serving.server.serving import save_tiny_model

ROOT = Path(__file__).parents[4]


def put_on(app: FastAPI, client: EngineClient) -> None:
    observability = Observability(client, tracer=make_tracer())
    attach(app, client, observer=observability)
    attach_playground(app, client)
    observability.attach(app)


def main(folder: str, port: str) -> None:
    api = LLMServeAPI(folder, name="tiny", attach=put_on, kv_cache_blocks=64)
    server = EngineServer(api, accelerator="cpu", workers_per_device=2)
    server.run(host="127.0.0.1", port=int(port), log_config=log_config("json"))


def until(condition: Callable[[], object]) -> None:
    """Looks again and again, up to two minutes."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError("it has not come about in two minutes")


@pytest.mark.slow
def test_counters_outlive_workers_and_spans_are_sent_to_the_last(tmp_path, collector: Collector) -> None:  # noqa: F811
    model = save_tiny_model(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(model), str(port)], cwd=ROOT, env=environment, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def workers() -> list[dict]:
                return client.get("/playground/state").json()["workers"]

            def complete() -> None:
                body = {"model": "tiny", "prompt": "quick fox", "max_tokens": 5, "ignore_eos": True}
                assert client.post("/v1/completions", json=body).status_code == 200

            def generated() -> float:
                lines = client.get("/metrics").text.splitlines()
                return sum(float(line.split()[-1]) for line in lines if "generation_tokens_total{" in line)

            until(lambda: len(workers()) == 2)
            for _ in range(3):
                complete()
            assert generated() == 15
            children = psutil.Process(server.pid).children()
            spawned = [one for one in children if "--multiprocessing-fork" in one.cmdline()]
            for one in spawned:
                one.kill()
            until(lambda: not workers())
            assert generated() == 15
            until(lambda: len(workers()) == 2)
            assert sum(one["generation_tokens"] for one in workers()) == 0
            complete()
            assert generated() == 20
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    spans = collector.spans()
    assert [attributes(span)["gen_ai.usage.output_tokens"] for span in spans] == [5, 5, 5, 5]
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    requests = [line for line in lines if line.get("route") == "/v1/completions"]
    assert [line["completion_tokens"] for line in requests] == [5, 5, 5, 5]
    assert "quick fox" not in (tmp_path / "log").read_text()


if __name__ == "__main__":
    main(*sys.argv[1:])
