"""`HTTPSettings`: the limits of the HTTP interface, and what of its behaviour is the operator's choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_llm.errors import ConfigurationError

ToolParserName = Literal["auto", "hermes", "llama3_json", "mistral"]


@dataclass(frozen=True, kw_only=True)
class HTTPSettings:
    """Limits and choices.

    Raises:
        ConfigurationError: A limit is not above 0.
    """

    max_body_bytes: int = 4 << 20
    """Of a request; more is refused with 413."""
    max_header_bytes: int = 16 << 10
    """Of names and values of a request's headers; more is refused with 431."""
    max_json_depth: int = 64
    """Objects and arrays within each other, in a request."""
    body_timeout: float = 30.0
    """Seconds that a client may take to send its request."""
    ping_interval: float = 15.0
    """Seconds without an event after which a stream gets a comment, so that proxies leave it open."""
    max_inputs: int = 2048
    """Answers of one request: its prompts or texts, times `n`."""
    retry_after: int = 5
    """Seconds after which a client may try again when there is no engine that answers."""
    pooling: Literal["mean", "last"] = "mean"
    """How the hidden states of a text become its embedding."""
    tool_parser: ToolParserName = "auto"
    """How the model writes calls of tools; "auto": as its chat template does."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, str) and not value > 0:
                raise ConfigurationError(f"{name} must be above 0, not {value}.")
