"""Which beginnings two requests have in common: chained hashes of their tokens, as vLLM's prefix cache has them.

A hash stands for one block of tokens and all before it, so equal hashes mean equal beginnings. They hold within
one process: Python seeds its hashes anew in each.
"""

from __future__ import annotations

from collections.abc import Sequence


def prefix_hashes(pieces: Sequence[str], unit: int, salt: str = "") -> tuple[int, ...]:
    """One hash for each full unit of `unit` tokens. Different salts share nothing (vLLM's `cache_salt`)."""
    hashes = []
    before = hash(salt)
    for at in range(0, len(pieces) - unit + 1, unit):
        before = hash((before, *pieces[at : at + unit]))
        hashes.append(before)
    return tuple(hashes)
