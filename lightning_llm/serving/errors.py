"""What is wrong with a request: told to whoever sent it, and to nobody else. And what ends a server."""

from __future__ import annotations

from lightning_llm.errors import ConfigurationError


class RequestError(ConfigurationError):
    """A request that cannot be answered as it stands.

    Attributes:
        param: The field that is wrong, as the client wrote it (`messages`, `temperature`, ...); None if no single one.
        code: OpenAI's word for the kind of mistake, such as "context_length_exceeded"; None where OpenAI has none.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineDiedError(RuntimeError):
    """There is no engine any more that could answer. Nothing is wrong with the request."""


class ServerFailedError(RuntimeError):
    """A server cannot go on; the text says why, and the log what led to it."""
