"""What tokens cost: exact integers from the decimal text an operator wrote, never a float.

A price is money per million tokens. It is kept as a whole number of 1e-18 currency per token, so a price may
have up to 12 decimals. A request's cost is one sum of products, rounded once (half to even) to nano-units,
1e-9 currency. Sums over requests are sums of those integers; a statement rounds once per line, when it is
printed. A price that nobody configured is not zero and not a guess: the row says that it is unpriced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from proxy.records import MOST_NANO

UNITS_PER_NANO = 10**9
_UNITS_PER_MILLION_TOKENS_PRICE = 10**12
HIGHEST_PRICE = 10**6
"""Per million tokens: a currency unit per token. Above it, somebody has misplaced a decimal point."""


@dataclass(frozen=True, slots=True)
class Price:
    """Whole 1e-18 currency units per token. Made by `Price.parse`."""

    input: int
    cached_input: int
    output: int
    currency: str

    @classmethod
    def parse(
        cls,
        input: str | float | Decimal,
        output: str | float | Decimal,
        currency: str,
        cached_input: str | float | Decimal | None = None,
    ) -> Price:
        """Prices per million tokens, as written; cached input costs as much as input unless it has its own price.

        A float counts as the shortest text that reads back as it, which is what stood in the file.

        Raises ValueError naming the field: not a decimal number, negative, absurdly high, too many decimals.
        """
        if not currency:
            raise ValueError("currency: a price needs one, such as USD")
        return cls(
            _units("input", input),
            _units("cached_input", input if cached_input is None else cached_input),
            _units("output", output),
            currency,
        )

    def cost(self, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
        """Nano-units. `cached_tokens` are those of `prompt_tokens` that came from a cache; never more count."""
        cached = min(cached_tokens, prompt_tokens)
        units = (
            (prompt_tokens - cached) * self.input
            + cached * self.cached_input
            + completion_tokens * self.output
        )
        nano, rest = divmod(units, UNITS_PER_NANO)
        twice = 2 * rest
        return nano + (twice > UNITS_PER_NANO or (twice == UNITS_PER_NANO and nano & 1))


class Prices:
    """Prices by backend and, on a backend, by model. One currency for all of them: the ledger's."""

    def __init__(
        self, prices: Mapping[str, Price | Mapping[str, Price]] | None = None, currency: str = ""
    ) -> None:
        """`prices`: backend -> one price for all its models, or model -> price where `*` means any other.

        `currency` is the ledger's; empty takes the one that the prices have. Raises ValueError on a second
        currency, naming where it stands.
        """
        self._by_backend: dict[str, dict[str, Price]] = {}
        self.currency = currency
        for backend, given in (prices or {}).items():
            by_model = {"*": given} if isinstance(given, Price) else dict(given)
            for model, price in by_model.items():
                where = backend if model == "*" else f"{backend}, model {model}"
                self.currency = self.currency or price.currency
                if price.currency != self.currency:
                    raise ValueError(
                        f"price of {where}: {price.currency}, but the ledger counts in {self.currency}; "
                        "one ledger has one currency"
                    )
            self._by_backend[backend] = by_model

    def price(self, backend: str, model: str) -> Price | None:
        """The price of a model on a backend; None: unknown."""
        by_model = self._by_backend.get(backend)
        if by_model is None:
            return None
        return by_model.get(model) or by_model.get("*")

    def cost(
        self, backend: str, model: str, prompt_tokens: int, cached_tokens: int, completion_tokens: int
    ) -> tuple[int, str]:
        """(nano-units, currency) for `Row.cost_nano` and `Row.currency`; (0, "") when the price is unknown.

        At most `MOST_NANO`, which is what a row can hold: budgets and metrics count what the ledger keeps.
        """
        price = self.price(backend, model)
        if price is None:
            return 0, ""
        nano = price.cost(prompt_tokens, cached_tokens, completion_tokens)
        return max(0, min(nano, MOST_NANO)), price.currency


def amount(nano: int) -> str:
    """Nano-units for people, with 4 decimals; `<0.0001`: what these would show as nothing."""
    text = f"{Decimal(nano).scaleb(-9):,.4f}"  # half to even
    return "<0.0001" if nano > 0 and text == "0.0000" else text


def _units(name: str, text: str | float | Decimal) -> int:
    try:
        value = Decimal(repr(text) if isinstance(text, float) else text)
    except InvalidOperation:
        raise ValueError(f"{name}: {text!r} is not a decimal number") from None
    if not value.is_finite() or not 0 <= value <= HIGHEST_PRICE:
        raise ValueError(f"{name}: {text} is not a price per million tokens between 0 and {HIGHEST_PRICE}")
    numerator, denominator = value.as_integer_ratio()
    units, rest = divmod(numerator * _UNITS_PER_MILLION_TOKENS_PRICE, denominator)
    if rest:
        raise ValueError(f"{name}: {text} has more than 12 decimals")
    return units
