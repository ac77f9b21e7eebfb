"""`PrefixRouter`: which worker gets a request: the one that has its beginning in the cache, unless that is too busy.

A guess, since workers do not tell what they still have: whoever served a prefix lately is taken to have it (dynamo's
approximate indexer, with its 120 s; SGLang's router balances in the same manner).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from lightning_llm.serving.engine.blocks import chain_hash, chain_root


class PrefixRouter:
    """Remembers which worker served which prefix.

    Args:
        block_size: Tokens by which prefixes are told apart.
        longest: Blocks of a prompt that are looked at; the hash of one takes about 2 us.
        capacity: Blocks that are remembered.
        time_to_live: Seconds after which a worker is taken to have forgotten a prefix.
        margin: Requests that the worker with the prefix may have more than the least busy one.
    """

    def __init__(
        self,
        block_size: int = 16,
        *,
        longest: int = 128,
        capacity: int = 65536,
        time_to_live: float = 120.0,
        margin: int = 4,
    ) -> None:
        self.block_size = block_size
        self.longest = longest
        self.capacity = capacity
        self.time_to_live = time_to_live
        self.margin = margin
        self._served: OrderedDict[bytes, dict[int, float]] = OrderedDict()  # block -> worker -> when

    def choose(self, prompt_ids: Sequence[int], salt: str, loads: Mapping[int, int], now: float | None = None) -> int:
        """The worker for a prompt, which is remembered.

        Args:
            prompt_ids: The prompt.
            salt: Of its tenant: prefixes are found within one only, as in the workers' caches.
            loads: Requests of each worker that can take one.
            now: Seconds of the monotonic clock.
        """
        now = time.monotonic() if now is None else now
        chain = self._chain(prompt_ids, salt)
        least = min(loads, key=lambda worker: (loads[worker], worker))
        holders = self._longest_match(chain, loads, now)
        chosen = min(holders, key=lambda worker: (loads[worker], worker), default=least)
        if loads[chosen] - loads[least] > max(self.margin, loads[least] // 2):
            chosen = least
        self._remember(chain, chosen, now)
        return chosen

    def forget(self, worker: int) -> None:
        """A worker's cache is gone."""
        for served in self._served.values():
            served.pop(worker, None)

    def _chain(self, prompt_ids: Sequence[int], salt: str) -> list[bytes]:
        # Escaped, since a salt may hold what is no text.
        chain = [chain_root(salt)]
        size = self.block_size
        for start in range(0, min(len(prompt_ids) // size, self.longest) * size, size):
            chain.append(chain_hash(chain[-1], prompt_ids[start : start + size]))
        return chain[1:]

    def _longest_match(self, chain: Sequence[bytes], loads: Mapping[int, int], now: float) -> list[int]:
        for block in reversed(chain):
            served = self._served.get(block, {})
            holders = [worker for worker, at in served.items() if worker in loads and now - at <= self.time_to_live]
            if holders:
                return holders
        return []

    def _remember(self, chain: Sequence[bytes], worker: int, now: float) -> None:
        for block in reversed(chain):  # so that the ends of prompts are forgotten before their beginnings
            self._served.setdefault(block, {})[worker] = now
            self._served.move_to_end(block)
        while len(self._served) > self.capacity:
            self._served.popitem(last=False)
