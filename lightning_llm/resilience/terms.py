"""What a run asks of its monitor: of one that it starts, or by a message of one that a launcher has started before."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from lightning_llm.resilience.watch import ALIVE_TIMEOUT


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How the ranks are judged, and what follows.

    Attributes:
        reports: Where verdicts and stacks are kept.
        progress_timeout: See `Limits`.
        alive_timeout: See `Watch`.
        on_hang: "report", or "kill": ends the ranks that are to blame, all of them where none is.
        port: Of `/healthz` and `/metrics`; None for none.
    """

    reports: str
    progress_timeout: float | Literal["auto"] = "auto"
    alive_timeout: float = ALIVE_TIMEOUT
    on_hang: Literal["report", "kill"] = "report"
    port: int | None = None

    def to_bytes(self) -> bytes:
        """As they are sent."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Terms | None:
        """What was sent; None for what are no terms."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None
