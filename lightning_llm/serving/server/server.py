"""`EngineServer`: LitServe's server, whose processes begin, are replaced and end in order."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn

from litserve import LitServer
from litserve.utils import WorkerSetupStatus

from lightning_llm.errors import ConfigurationError, NoGoodCheckpointError
from lightning_llm.serving.errors import ServerFailedError
from lightning_llm.serving.loading import check_source
from lightning_llm.serving.server.api import LLMServeAPI
from lightning_llm.serving.server.board import Phase
from lightning_llm.serving.server.http.bounded import BoundedHTTP
from lightning_llm.serving.server.processes import check_main_module, guard_forks, unguard_forks
from lightning_llm.serving.server.supervisor import Supervisor
from lightning_llm.serving.server.transport import EngineTransport

log = logging.getLogger(__name__)

_HOSTS = ("0.0.0.0", "127.0.0.1", "::")
_FAREWELL = 5  # seconds that connections get to send what is left, after the requests have ended


class EngineServer(LitServer):
    """A `LitServer` for an `LLMServeAPI`.

    SIGTERM and Ctrl-C drain it: it is not ready any more and refuses new requests (503), what runs is finished within
    `drain_timeout`, the rest gets an error, and the exit code is 0. A second one, or one while it starts, ends it at
    once. A worker that dies or hangs is replaced; its requests fail. Whatever ends the main process ends all others.

    Args:
        lit_api: The model.
        drain_timeout: Seconds.
        hang_timeout: Seconds without a sign of life after which a worker is replaced. More than its longest step:
            `max_num_batched_tokens` tokens can take a slow CPU a minute.
        max_failures: Workers in the same place that end before they are ready, after which the server gives up.
        **settings: Of `LitServer`, such as `accelerator`, `devices` and `workers_per_device`.
    """

    def __init__(
        self,
        lit_api: LLMServeAPI,
        *,
        drain_timeout: float = 30.0,
        hang_timeout: float = 120.0,
        max_failures: int = 5,
        **settings: Any,
    ) -> None:
        if not isinstance(lit_api, LLMServeAPI):
            raise ConfigurationError(f"EngineServer serves one LLMServeAPI, not {type(lit_api).__name__}.")
        # Its timeout is about LitServe's request queue, which nothing goes through here.
        super().__init__(lit_api, **{"timeout": False, **settings})
        self.uvicorn_graceful_timeout = _FAREWELL
        self.drain_timeout = drain_timeout
        self.hang_timeout = hang_timeout
        self.max_failures = max_failures
        self._main_pid = 0
        self._supervising = False

    @property
    def transport(self) -> EngineTransport | None:
        """None until workers are launched."""
        return self._model_api.spec.transport

    @property
    def _model_api(self) -> LLMServeAPI:
        return self.litapi_connector.lit_apis[0]

    def run(  # type: ignore[override]
        self, host: str = "0.0.0.0", port: int = 8000, *, num_api_servers: int = 1, **settings: Any
    ) -> None:
        """Serves until a signal ends it.

        Args:
            host: "0.0.0.0", "127.0.0.1" or "::".
            port: 1024 to 65535.
            num_api_servers: Processes that speak HTTP. Limits are kept per process, so that one is the default.
            **settings: Of `LitServer.run` and of uvicorn, such as `log_level`.

        Raises:
            ConfigurationError: The model is not there, or cannot be served, as a worker said; or the address cannot be
                listened at.
            NoGoodCheckpointError: None of the checkpoints can be believed.
            ServerFailedError: Workers end before they are ready, or a process that speaks HTTP has died.
        """
        check_main_module()
        check_address(host, port)
        check_source(self._model_api.model)
        settings = {"generate_client_file": False, "http": BoundedHTTP, **settings, "api_server_worker_type": "process"}
        self._main_pid = os.getpid()
        scheme = "https" if settings.get("ssl_certfile") else "http"
        shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)
        self._model_api.spec.url = f"{scheme}://{shown}:{port}"
        guard_forks()
        try:
            with self._signals():
                super().run(host, port, num_api_servers, **settings)
        except ServerFailedError:
            self._raise_complaint()
            raise
        finally:
            unguard_forks()
            self._kill_all()

    # -- LitServe calls these --

    def verify_worker_status(self) -> None:
        """Returns when a worker is ready. LitServe's would wait for ever for one that was killed while it loaded."""
        while WorkerSetupStatus.READY not in (statuses := self.workers_setup_status.values()):
            if WorkerSetupStatus.ERROR in statuses:
                raise ServerFailedError("A worker could not load the model: it says above why.")
            if not any(worker.is_alive() for worker in self.inference_workers):
                raise ServerFailedError(_why_ended([worker.exitcode for worker in self.inference_workers]))
            wait([worker.sentinel for worker in self.inference_workers], timeout=0.05)

    def launch_inference_worker(self, lit_api: LLMServeAPI) -> list[BaseProcess]:
        """Tells the processes that follow who looks after them, unless it is a test that starts them without `run`."""
        log.info("Loading %s ...", lit_api.model)
        processes = super().launch_inference_worker(lit_api)
        assert self.transport is not None
        self.transport.board.supervised = self._main_pid == os.getpid()
        return processes

    def _start_worker_monitoring(self, manager: Any, uvicorn_workers: Mapping[Any, Any]) -> None:
        """LitServe 0.2.19 calls this in the main thread when everything runs, and then waits for `_shutdown_event`; the
        thread that it would start here ends the server when a worker dies. Ours does its work before it returns, in the
        main thread: it is the parent of the workers, who end with it, and it is the one that signals interrupt."""
        assert self.transport is not None
        board = self.transport.board
        lit_api = self._model_api
        supervisor = Supervisor(
            board,
            self.inference_workers,
            list(uvicorn_workers.values()),
            launch=lambda worker: self.launch_single_inference_worker(lit_api, worker),
            is_shut_down=self._shutdown_event.is_set,
            drain_timeout=self.drain_timeout,
            hang_timeout=self.hang_timeout,
            max_failures=self.max_failures,
        )
        self._supervising = True
        try:
            supervisor.run()
        finally:
            board.phase = Phase.CLOSING
        self._shutdown_event.set()

    # -- signals --

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # whoever runs it in another thread has the signals
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._main_pid:
            return  # a forked process that has not set its own handlers yet
        if self._supervising and self.transport is not None and self.transport.board.phase == Phase.SERVING:
            self.transport.board.phase = Phase.DRAINING
        else:
            # While it starts nothing is in flight, and an exception from here may get lost in somebody's __del__.
            self._end_now(number)

    def _end_now(self, number: int) -> NoReturn:
        self._kill_all()
        os._exit(128 + number)

    def _kill_all(self) -> None:
        """Ends what is left of the processes; after an orderly end there is nothing."""
        for child in multiprocessing.active_children():
            child.kill()
        if self.transport is not None:
            self.transport.remove()

    def _raise_complaint(self) -> None:
        if self.transport is None:
            return
        for worker in range(len(self.transport.board.workers)):
            complaint = self.transport.complaint(worker)
            if complaint.is_file():
                text = complaint.read_text(encoding="utf-8")
                if self.inference_workers[worker].exitcode == NoGoodCheckpointError.EXIT_CODE:
                    raise NoGoodCheckpointError(text) from None
                raise ConfigurationError(text) from None


def _why_ended(codes: list[int | None]) -> str:
    """Of workers that have not got ready."""
    if -signal.SIGKILL in codes:
        return (
            "A worker was killed (signal 9) before it was ready, as the kernel does when memory runs out: take fewer "
            "workers, a smaller dtype or model, or fewer kv_cache_blocks."
        )
    return f"Workers ended with {', '.join(map(str, codes))} before they were ready: they say above why."


def check_address(host: str, port: int) -> None:
    """Says at once what uvicorn would say when the model is loaded.

    Raises:
        ConfigurationError: LitServe does not listen there, or somebody else does.
    """
    if host not in _HOSTS:
        raise ConfigurationError(f"host is {host}: LitServe listens at {', '.join(_HOSTS)}.")
    if not 1024 <= port <= 65535:
        raise ConfigurationError(f"port is {port}: it must be from 1024 to 65535.")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that has just ended
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"{host}:{port} cannot be listened at ({error.strerror}): take another port."
            ) from None
