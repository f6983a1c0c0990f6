"""What is wrong with the parameters of a policy: all of it at once, each mistake at its place.

    with Mistakes() as wrong:
        if not 0.0 <= share <= 1.0:
            wrong(f"share must be 0 to 1, not {share:g}", "share")

A constructor that raises a ValueError of its own is understood as well; then the whole `pick` is the place.
"""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple


class Mistake(NamedTuple):
    """One of them."""

    message: str
    at: tuple[str | int, ...]
    """The parameter, and what is inside of it: `("scorers", "queue")`."""
    at_key: bool = False
    """The key is wrong and not its value."""


class WrongParametersError(ValueError):
    """Everything that is wrong with a policy's parameters."""

    def __init__(self, mistakes: tuple[Mistake, ...]) -> None:
        super().__init__("; ".join(mistake.message for mistake in mistakes))
        self.mistakes = mistakes


class Mistakes:
    """Collects them. Leaving it raises WrongParametersError if there are any."""

    def __init__(self) -> None:
        self.found: list[Mistake] = []

    def __call__(self, message: str, *at: str | int, at_key: bool = False) -> None:
        self.found.append(Mistake(message, at, at_key))

    def __enter__(self) -> Mistakes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.found:
            raise WrongParametersError(tuple(self.found))
