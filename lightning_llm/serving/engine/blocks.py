"""`BlockPool`: who holds which block of the KV cache, and which blocks still have keys and values worth finding again.

A block that nobody holds stays findable by the hash of what it has until it is needed for something else, the one
unused for longest first (vLLM, arXiv:2309.06180; hash chain as in vLLM v1's automatic prefix caching).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from lightning_llm.serving.kernels.batch import NULL_BLOCK


def chain_root(salt: str) -> bytes:
    """Where a tenant's hash chains begin: nobody else's prompts are found."""
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def chain_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block: of its tokens, and through `before` of all tokens before them.

    A real hash (BLAKE2b, 16 bytes), since tenants who could make two prompts collide could read each other's answers.
    """
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16, key=before).digest()


class BlockPool:
    """Blocks `first` to `num_blocks - 1`, handed out, counted and found again.

    Every operation is O(1) per block.

    Args:
        num_blocks: In the cache, those below `first` included.
        first: Blocks below are never handed out.
    """

    def __init__(self, num_blocks: int, first: int = NULL_BLOCK + 1) -> None:
        self.num_blocks = num_blocks
        self.first = first
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(first, num_blocks))  # next to be reused first
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._found: dict[bytes, int] = {}

    @property
    def total(self) -> int:
        """Blocks that can be handed out."""
        return self.num_blocks - self.first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those that can still be found among them."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their hash, held or not."""
        return len(self._found)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks that nobody holds; what was to be found in them is forgotten.

        Raises:
            RuntimeError: There are not so many; look at `num_free` first.
        """
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks wanted, {len(self._free)} of {self.total} free")
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def share(self, block: int) -> None:
        """Holds a block once more, or again after nobody did."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Lets go of a sequence's blocks, given first to last; null blocks are passed over.

        Its last blocks are reused before its first, which more prompts have in common; blocks that cannot be found
        again before all others.

        Raises:
            RuntimeError: One is not held by anybody.
        """
        for block in reversed(list(blocks)):
            if block < self.first:
                continue
            if self._references[block] == 0:
                raise RuntimeError(f"block {block} was released once too often")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence holds it, so that it must be copied before it is written to."""
        return self._references[block] > 1

    def is_held(self, block: int) -> bool:
        """Whether anybody holds it."""
        return self._references[block] > 0

    def register(self, block: int, content: bytes) -> None:
        """Makes a full, computed block findable. Of two with the same content the first stays the one that is found."""
        if self._hashes[block] is None and content not in self._found:
            self._hashes[block] = content
            self._found[content] = block

    def find(self, content: bytes) -> int | None:
        """The block with this content, if there is one; `share` it to hold it."""
        return self._found.get(content)

    def _forget(self, block: int) -> None:
        content = self._hashes[block]
        if content is not None:
            del self._found[content]
            self._hashes[block] = None

    def states(self) -> bytes:
        """A byte per block that can be handed out: 0 free, 1 free and findable, 2 held, 3 held by several."""
        return bytes(
            min(self._references[block], 2) + 1 if self._references[block] else int(self._hashes[block] is not None)
            for block in range(self.first, self.num_blocks)
        )

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Says what is wrong with the books, given the block tables of all sequences.

        Raises:
            RuntimeError: A count is not the number of tables that hold the block, or a free block is held, or the hash
                map and the blocks disagree.
        """
        held = Counter(block for table in tables for block in table if block >= self.first)
        for block in range(self.first, self.num_blocks):
            if self._references[block] != held[block]:
                raise RuntimeError(f"block {block} is counted {self._references[block]} times, held {held[block]}")
            if (block in self._free) != (held[block] == 0):
                raise RuntimeError(f"block {block} is held {held[block]} times and {block in self._free=}")
        if {content: block for block, content in enumerate(self._hashes) if content is not None} != self._found:
            raise RuntimeError("the blocks' hashes and the map of hashes disagree")
