"""What it costs to let a sequence make room: moving its blocks to the host and back, or computing its tokens again."""

from __future__ import annotations

_LEARNING_RATE = 0.1


class PreemptionCosts:
    """Seconds of either way, by sizes and by rates that are measured while the engine runs.

    Args:
        bytes_per_block: Of the KV cache, over all layers.
        flops_per_token: Of a forward pass; twice the parameters that a token meets.
    """

    # Until something was measured: orders of magnitude of a small machine.
    copy_rate = 5e9
    """Bytes per second between cache and host."""
    flop_rate = 1e11
    """Floating-point operations per second."""

    def __init__(self, bytes_per_block: int, flops_per_token: int) -> None:
        self._bytes_per_block = bytes_per_block
        self._flops_per_token = max(flops_per_token, 1)

    def saw_copy(self, blocks: int, seconds: float) -> None:
        """Learns from a swap."""
        if seconds > 0:
            self.copy_rate += _LEARNING_RATE * (blocks * self._bytes_per_block / seconds - self.copy_rate)

    def saw_forward(self, tokens: int, seconds: float) -> None:
        """Learns from a step that was large enough to be bound by computing."""
        if seconds > 0:
            self.flop_rate += _LEARNING_RATE * (tokens * self._flops_per_token / seconds - self.flop_rate)

    def swap_is_cheaper(self, blocks: int, tokens: int) -> bool:
        """Whether to move `blocks` out and in again rather than to compute `tokens` anew."""
        return 2 * blocks * self._bytes_per_block / self.copy_rate < tokens * self._flops_per_token / self.flop_rate
