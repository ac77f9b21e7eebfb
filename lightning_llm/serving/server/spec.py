"""`EngineSpec`: where LitServe lets the engine's transport, its client and the routes in.

LitServe registers `/`, `/health` and `/info` before a spec can register anything, and the first route of a path is the
one that answers. They tell nothing of the engine and want LitServe's kind of key (`LitAPI.health` is asked in a process
that never ran `setup`; K8s' probes have no key), so they are taken off the app when ours are put on it. `/docs` and
`/openapi.json` are FastAPI's and describe whatever routes there are.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from litserve import LitAPI, LitServer
from litserve.specs.base import LitSpec
from litserve.utils import ResponseBufferItem
from starlette.routing import Route

from lightning_llm._processes import die_with
from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.server.client import EngineClient, Fanout
from lightning_llm.serving.server.loop import FANOUT
from lightning_llm.serving.server.processes import check_main_module, leave_signals_to_main
from lightning_llm.serving.server.transport import EngineTransport

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lightning_llm.serving.server.api import LLMServeAPI

Attach = Callable[[FastAPI, EngineClient], object]
"""Puts routes, middleware and exception handlers onto an app that has not started, in front of a client."""


class EngineSpec(LitSpec):
    """Connects an `LLMServeAPI` to the `LitServer` that it was given to.

    Args:
        attach: Puts the routes on.
    """

    def __init__(self, attach: Attach) -> None:
        super().__init__()
        self.api_path = "/v1/completions"  # LitServe's name for it; `attach` puts the route there
        self.attach: Attach | None = attach
        self.transport: EngineTransport | None = None
        self.workers_per_device = 1
        self.client: EngineClient | None = None
        self.url = ""  # where an `EngineServer` listens
        self._api: LLMServeAPI | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a worker gets."""
        return {**super().__getstate__(), "attach": None, "client": None, "response_buffer": None, "_endpoints": []}

    @property
    def stream(self) -> bool:
        """LitServe hands messages on one by one."""
        return True

    def pre_setup(self, lit_api: LitAPI) -> None:
        """LitServe's constructor calls this."""
        self._api = lit_api  # type: ignore[assignment]

    def setup(self, server: LitServer) -> None:
        """LitServe calls this in its main process, before it starts workers and forks what speaks HTTP, and again when
        it starts a worker anew. `server` is a copy without app and APIs; `_server` is the one itself."""
        super().setup(server)
        if self.client is not None:
            return
        check_main_module()
        real, api = self._server, self._api
        assert real is not None and api is not None
        if len(real.litapi_connector.lit_apis) > 1:
            raise ConfigurationError(
                "LLMServeAPI is in one LitServer with another LitAPI: their messages take different ways. Give each "
                "its own."
            )
        devices = server._inference_workers_config_for_api(self.api_path)
        self.workers_per_device = max(Counter(map(str, devices)).values())
        self.transport = EngineTransport(len(devices), consumers=real.transport_config.num_consumers)
        real._transport = self.transport
        self.client = EngineClient(self.transport, chat_template=api.chat_template)
        fanout = Fanout(self.client)
        self.response_buffer[FANOUT] = ResponseBufferItem(event=fanout, response_queue=fanout)
        self._put_on(real)

    def _put_on(self, server: LitServer) -> None:
        app, client, transport = server.app, self.client, self.transport
        assert client is not None and transport is not None and self.attach is not None
        ours = {"/", server.healthcheck_path, server.info_path}
        app.router.routes[:] = [
            route for route in app.router.routes if not (isinstance(route, Route) and route.path in ours)
        ]
        self.attach(app, client)
        has_page = any(isinstance(route, Route) and route.path == "/" for route in app.router.routes)
        lifespan = app.router.lifespan_context

        @asynccontextmanager
        async def with_client(app: FastAPI) -> AsyncIterator[Any]:
            if transport.main_pid != os.getpid():
                die_with(transport.main_pid)
            leave_signals_to_main(transport.board)
            async with lifespan(app) as state, client.running(self.response_queue_id):
                if self.response_queue_id == 0 and self.url:
                    page = f"{self.url}/ (page), " if has_page else ""
                    log.info("%s is ready: %s%s/v1 (API)", client.model_name, page, self.url)
                yield state

        app.router.lifespan_context = with_client  # type: ignore[assignment]
