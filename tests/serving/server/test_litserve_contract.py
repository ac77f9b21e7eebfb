"""What the seam relies on in LitServe, as it is in 0.2.19. When one of these fails with a newer version, the file that
its docstring names has to follow."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
from collections import deque
from importlib.metadata import version

import litserve
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from litserve.loops import LitLoop, inference_worker
from litserve.server import response_queue_to_buffer
from litserve.specs.base import LitSpec
from litserve.transport.base import MessageTransport
from litserve.utils import LitAPIStatus, LoopResponseType, ResponseBufferItem, wrap_litserve_start
from packaging.specifiers import SpecifierSet

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.server.api import LLMServeAPI
from lightning_llm.serving.server.client import EngineClient, Fanout
from lightning_llm.serving.server.loop import FANOUT
from lightning_llm.serving.server.server import EngineServer
from lightning_llm.serving.server.transport import EngineTransport
from tests.serving.server.serving import attach, save_tiny_model


def test_the_version_is_one_that_was_read() -> None:
    assert version("litserve") in SpecifierSet(">=0.2.19,<0.3")


def test_the_dispatcher_hands_on_what_comes_under_the_fanouts_name() -> None:
    """client.py, transport.py: it calls `areceive(consumer_id)`, and puts [data, status] into the buffered item."""

    class Transport(MessageTransport):
        asked: list[tuple] = []
        messages = deque(
            ("*" if known else "unknown", (["data"], LitAPIStatus.OK, LoopResponseType.STREAMING, 0))
            for known in (False, True)
        )

        def send(self, item, consumer_id): ...

        async def areceive(self, *args):
            self.asked.append(args)
            if not self.messages:
                raise asyncio.CancelledError
            return self.messages.popleft()

    class Apis(list):
        lit_apis = [None]

        def any_stream(self) -> bool:
            return True

    arrived: deque = deque()
    item = ResponseBufferItem(event=asyncio.Event(), response_queue=arrived)
    asyncio.run(response_queue_to_buffer(Transport(), {FANOUT: item}, 3, Apis()))
    assert list(arrived) == [[["data"], LitAPIStatus.OK]] and item.event.is_set()
    assert Transport.asked == [(3,)] * 3


def test_a_message_that_cannot_be_read_does_not_end_the_dispatcher() -> None:
    """client.py: whatever is raised while a message is handed on would end LitServe's task for good."""
    transport = EngineTransport(1, 1)
    try:
        fanout = Fanout(EngineClient(transport))
        for data in (None, [0, 1, [[]]], [0, 1, [["hello"]]], [9, 1, [["update"]]]):
            fanout.append([data, LitAPIStatus.OK])
    finally:
        transport.close()


def test_a_worker_knows_its_id_before_setup_and_loops_are_called_with_what_ours_takes() -> None:
    """api.py reads LITSERVE_WORKER_ID in `setup`; loop.py overrides `__call__`."""
    source = inspect.getsource(inference_worker)
    assert source.index('os.environ["LITSERVE_WORKER_ID"] = str(worker_id)') < source.index("lit_api.setup(device)")
    assert source.index("lit_api.setup(device)") < source.index("    loop(\n")
    assert list(inspect.signature(LitLoop.__call__).parameters)[1:] == [
        "lit_api",
        "device",
        "worker_id",
        "request_queue",
        "transport",
        "workers_setup_status",
        "callback_runner",
    ]


def test_the_transport_can_be_replaced_before_workers_are_started() -> None:
    """spec.py: `spec.setup` comes first, and `_transport` is read afterwards."""
    for launch in (litserve.LitServer.launch_inference_worker, litserve.LitServer.launch_single_inference_worker):
        source = inspect.getsource(launch)
        assert source.index("spec.setup(server_copy)") < source.index("self._transport,")
    manager = inspect.getsource(litserve.LitServer._init_manager)
    assert "self.transport_config.num_consumers = num_api_servers" in manager
    assert "transport = self._transport\n" in inspect.getsource(litserve.LitServer.lifespan)


def test_the_monitor_is_started_in_the_main_thread_when_everything_runs() -> None:
    """server.py supervises where LitServe would start its monitor; what it raises ends the server in order."""
    run = inspect.getsource(litserve.LitServer.run)
    order = ["self._init_manager(", "launch_inference_worker(", "verify_worker_status()", "try:", "self._start_server("]
    order += ["self._start_worker_monitoring(", "self._shutdown_event.wait()", "except KeyboardInterrupt:", "finally:"]
    places = [run.rindex(step) for step in [*order, "self._perform_graceful_shutdown("]]
    assert places == sorted(places)
    assert list(inspect.signature(litserve.LitServer._start_worker_monitoring).parameters)[1:] == [
        "manager",
        "uvicorn_workers",
    ]


def test_a_server_has_what_the_spec_takes_of_it(tmp_path) -> None:
    """spec.py, server.py."""
    api = LLMServeAPI(tmp_path, attach=attach)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=3)
    assert api.spec._server is server and api.spec.response_queue_id is None
    assert server.litapi_connector.lit_apis == [api] and api.api_path == "/v1/completions"
    assert server._inference_workers_config_for_api(api.api_path) == ["cpu"] * 3
    assert {server.healthcheck_path, server.info_path} == {"/health", "/info"}
    assert server.uvicorn_graceful_timeout == 30 and server.response_buffer == {}
    assert {"/", "/health", "/info"} <= {route.path for route in server.app.router.routes}
    assert LitSpec().__getstate__().keys() >= {"_server", "_endpoints", "response_buffer"}


def test_workers_know_how_many_share_their_device(tmp_path) -> None:
    api = LLMServeAPI(tmp_path, attach=attach)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=3)
    server.devices = [["cuda:0"], ["cuda:1"]]
    server.transport_config.num_consumers, server.litapi_request_queues = 1, {api.api_path: None}
    api.spec.setup(server)
    api.spec.transport.remove()
    assert len(api.spec.transport.board.workers) == 6
    assert api.spec.__getstate__()["workers_per_device"] == 3, "a worker gets it"


def test_uvicorn_sets_its_signal_handlers_before_the_app_starts() -> None:
    """processes.py takes SIGTERM from uvicorn when the app starts, and gives it back when the server ends."""
    found = []

    async def app(scope, receive, send) -> None:
        found.append(signal.getsignal(signal.SIGTERM))
        await send({"type": "lifespan.startup.failed"})

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(SystemExit):  # since it did not start
        server.run()
    assert found == [server.handle_exit]


def test_an_app_enters_the_lifespan_that_was_put_in_the_place_of_its_own() -> None:
    """spec.py: FastAPI and Starlette."""
    app, entered = FastAPI(), []
    inner = app.router.lifespan_context

    def lifespan(app: FastAPI):
        entered.append(app)
        return inner(app)

    app.router.lifespan_context = lifespan
    with TestClient(app):
        assert entered == [app]


def test_it_is_alone_in_its_server(tmp_path) -> None:
    class Other(litserve.LitAPI):
        def setup(self, device): ...

    api = LLMServeAPI(tmp_path, attach=attach)
    server = litserve.LitServer([api, Other(api_path="/other")], accelerator="cpu")
    with pytest.raises(ConfigurationError, match="its own"), wrap_litserve_start(server):
        pass
    with pytest.raises(ConfigurationError, match="EngineServer serves one LLMServeAPI"):
        EngineServer(Other())
    with pytest.raises(ConfigurationError, match="no setting block_sise"):
        LLMServeAPI(tmp_path, block_sise=3)


@pytest.mark.slow
def test_litserves_helper_for_tests_starts_it(tmp_path) -> None:
    api = LLMServeAPI(save_tiny_model(tmp_path / "model"), attach=attach, kv_cache_blocks=64)
    with (
        wrap_litserve_start(EngineServer(api, accelerator="cpu")) as server,
        TestClient(server.app) as client,
    ):
        lines = client.post("/generate", json={"prompt_ids": [1], "params": {"max_tokens": 3}}).text.splitlines()
        assert '"finish_reason": "length"' in lines[-1]


def test_workers_do_without_the_routes() -> None:
    """LitServe sends the API to a worker, which imports its module."""
    code = """
import sys
import lightning_llm.serving.server.api
print(*sorted(name for name in sys.modules if name.startswith("lightning_llm.serving.server.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    known = {name.removeprefix("lightning_llm.serving.server.").partition(".")[0] for name in done.stdout.split()}
    assert {"api", "loop", "spec"} <= known
    assert not known & {"app", "http", "observability", "playground", "server"}
