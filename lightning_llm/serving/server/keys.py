"""`ApiKey`: the key that clients need: `Authorization: Bearer KEY`, as OpenAI's send it, or LitServe's `X-API-Key`."""

from __future__ import annotations

import hashlib
import hmac
import os

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lightning_llm.serving.server.http.errors import APIError

VARIABLE = "LIT_SERVER_API_KEY"  # LitServe's

# Kubernetes' probes have no key, and the page asks for one.
OPEN_PATHS = frozenset({"/", "/health", "/livez", "/readyz"})


def key_from_environment() -> str | None:
    """The key in `LIT_SERVER_API_KEY`; None: everybody may ask."""
    return os.environ.get(VARIABLE) or None


class ApiKey:
    """Middleware that answers 401 to requests without the key, before it reads their bodies.

    Args:
        app: What it is around.
        key: Any text.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._digest = _digest(os.fsencode(key))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Goes on if the request may."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._knows(Headers(scope=scope)):
            return await self.app(scope, receive, send)
        error = APIError(
            401,
            "The API key is missing or wrong: send it as `Authorization: Bearer KEY` or as `X-API-Key`.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        # Digests have one length, so that the time of a comparison tells nothing of the key. Starlette reads headers
        # as latin-1, in which every byte is a character: this gives the bytes back.
        matches = [hmac.compare_digest(_digest(one.encode("latin-1")), self._digest) for one in given]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
