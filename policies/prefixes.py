"""Which beginnings of prompts a backend has probably in its prefix cache.

An engine keeps the blocks of what it has computed and evicts those that were used longest ago. What a router knows
of that is where it has sent what: so it keeps, for each backend, the hashes of the blocks that it sent there, in
the same order, and forgets as many as the engine's cache has no room for. What others send to the same engine, it
does not see; llm-d's and SGLang's approximate trees have the same limit.

Hashes are chained: one stands for its block and all before it. Of one prompt the later block is always noted as
used before the earlier one, as vLLM frees blocks from the tail. So whoever has a block has all blocks before it,
and the longest beginning is found by bisection.
"""

from __future__ import annotations

from typing import Final

ROOM_TOKENS: Final = 400_000
"""Room of a cache that nobody has told: a 32B model on two cards has 40 to 400 thousand (sim/profiles)."""

MOST_BLOCKS: Final = 65_536
"""Blocks kept for one backend at most: 512 tokens each, 33 million."""


class Prefixes:
    """The blocks that one backend has probably, by hash; the one used longest ago first."""

    __slots__ = ("blocks",)

    def __init__(self) -> None:
        self.blocks: dict[int, None] = {}
        """Only to look into."""

    def __len__(self) -> int:
        return len(self.blocks)

    def matching(self, hashes: tuple[int, ...]) -> int:
        """How many blocks of a prompt are there, from its beginning."""
        blocks = self.blocks
        if not hashes or hashes[0] not in blocks:
            return 0
        low, high = 1, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def note(self, hashes: tuple[int, ...], room: int) -> None:
        """The backend computes this prompt; its cache has room for so many blocks."""
        blocks = self.blocks
        for one in reversed(hashes):
            blocks.pop(one, None)
            blocks[one] = None
        excess = len(blocks) - min(max(room, 1), MOST_BLOCKS)
        if excess > 0:
            for one in list(blocks)[:excess]:
                del blocks[one]

    def clear(self) -> None:
        """Its engine has started anew."""
        self.blocks.clear()
