"""The prefix cache of an engine: which beginnings of prompts its KV blocks still hold.

A unit is a fixed number of tokens; its hash stands for these tokens and all before them, so a prompt shares
a unit with another only if it shares everything up to its end (vLLM's automatic prefix caching). Units that
no sequence uses stay until their blocks are needed, the one first that was used least recently, and of one
sequence its last.
"""

from __future__ import annotations


class PrefixCache:
    """Counts who uses which unit. The blocks themselves are the engine's to count."""

    __slots__ = ("_unused", "_users", "hit_tokens", "queried_tokens", "unit_blocks", "unit_tokens")

    def __init__(self, unit_tokens: int, unit_blocks: int) -> None:
        self.unit_tokens = unit_tokens
        self.unit_blocks = unit_blocks
        self._users: dict[int, int] = {}
        """By hash: how many sequences use the unit."""
        self._unused: dict[int, None] = {}
        """Those that nobody uses, the least recently used one first."""
        self.queried_tokens = 0
        self.hit_tokens = 0
        """Of prompts admitted so far."""

    def __len__(self) -> int:
        return len(self._users)

    @property
    def evictable(self) -> int:
        """Units that nobody uses."""
        return len(self._unused)

    def use(self, hashes: tuple[int, ...], most: int) -> int:
        """Use the leading units that are there, `most` at most. -> how many."""
        users, unused = self._users, self._unused
        found = 0
        for value in hashes[:most]:
            count = users.get(value)
            if count is None:
                break
            if not count:
                del unused[value]
            users[value] = count + 1
            found += 1
        return found

    def add(self, value: int) -> bool:
        """Use a unit that has been computed. True: it is new, and its blocks are the cache's from now on;
        False: it was there, so the blocks it was computed into are free."""
        users = self._users
        count = users.get(value)
        if count is None:
            users[value] = 1
            return True
        if not count:
            del self._unused[value]
        users[value] = count + 1
        return False

    def leave(self, hashes: tuple[int, ...], used: int) -> None:
        """The sequence that used the first `used` units needs them no more."""
        users, unused = self._users, self._unused
        for index in range(used - 1, -1, -1):  # a beginning is worth more than what follows it
            value = hashes[index]
            count = users[value] - 1
            users[value] = count
            if not count:
                unused[value] = None

    def evict(self) -> None:
        """Drop the unit that was used least recently. Its blocks are the engine's again."""
        value = next(iter(self._unused))
        del self._unused[value]
        del self._users[value]
