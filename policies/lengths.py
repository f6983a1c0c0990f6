"""How long an answer will be: the mean of what this tenant got from this model, lately.

An exponentially weighted mean over answers, not over time: a tenant that was away for a night asks for the same
reports in the morning. A tenant's first answers are drawn towards the model's mean, and a model's towards what
public chat traces have: a mean of n answers counts n, the wider one `SHRINK` (empirical Bayes in its plainest
form).
"""

from __future__ import annotations

from typing import Final

EXPECTED_TOKENS: Final = 256
"""Of an answer that nothing is known about (public chat traces have means of 200 to 350)."""
MEMORY: Final = 200
"""Answers that a mean is made of."""
SHRINK: Final = 8.0
"""Answers that the wider mean counts for."""
REMEMBERED: Final = 4096
"""Pairs of tenant and model; of more, those that had an answer lately."""


class Mean:
    """A running mean that forgets."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0

    def note(self, sample: float) -> None:
        self.count = min(self.count + 1, MEMORY)
        self.value += (sample - self.value) / self.count

    def towards(self, wider: float) -> float:
        """The mean, drawn towards a wider one as far as it is made of few."""
        return (self.count * self.value + SHRINK * wider) / (self.count + SHRINK)


class Lengths:
    """Lengths of answers by tenant and model, tokens."""

    def __init__(self) -> None:
        self._models: dict[str, Mean] = {}
        self._pairs: dict[tuple[str, str], Mean] = {}
        """The one that had an answer longest ago first."""

    def __len__(self) -> int:
        return len(self._models) + len(self._pairs)

    def expected(self, tenant: str, model: str, limit: int = 0) -> int:
        """Tokens of the next answer; `limit`: the client's, 0: none."""
        found = self._models.get(model)
        mean = float(EXPECTED_TOKENS) if found is None else found.towards(EXPECTED_TOKENS)
        found = self._pairs.get((tenant, model))
        if found is not None:
            mean = found.towards(mean)
        tokens = max(round(mean), 1)
        return min(tokens, limit) if limit else tokens

    def note(self, tenant: str, model: str, tokens: int) -> None:
        """An answer had so many tokens."""
        found = self._models.pop(model, Mean())
        found.note(tokens)
        self._models[model] = found
        key = (tenant, model)
        found = self._pairs.pop(key, Mean())
        found.note(tokens)
        self._pairs[key] = found
        while len(self._models) > REMEMBERED:
            del self._models[next(iter(self._models))]
        while len(self._pairs) > REMEMBERED:
            del self._pairs[next(iter(self._pairs))]
