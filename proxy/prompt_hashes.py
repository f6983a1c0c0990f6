"""Which prompts begin alike, told by hashes of their beginnings."""

from __future__ import annotations

import hashlib
from typing import Final

BLOCK_BYTES: Final = 2048
"""About 512 tokens."""
BLOCKS: Final = 512
"""Most of one prompt: a MiB."""


def prompt_hashes(raw: bytes, salt: bytes) -> tuple[int, ...]:
    """Chained salted hashes of the leading 2 KiB blocks of a body's prompt: equal beginnings share them, nothing
    else can be told from them."""
    if len(raw) < BLOCK_BYTES:
        return ()
    start = max(raw.find(b'"messages"'), 0) or max(raw.find(b'"prompt"'), raw.find(b'"input"'), 0)
    hashes = []
    digest = salt
    last = min(len(raw) - BLOCK_BYTES, start + BLOCKS * BLOCK_BYTES)
    for at in range(start, last + 1, BLOCK_BYTES):
        block = hashlib.blake2b(raw[at : at + BLOCK_BYTES], key=digest, digest_size=16).digest()
        digest = block
        hashes.append(int.from_bytes(block[:8], "big") >> 1)
    return tuple(hashes)
