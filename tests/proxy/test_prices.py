from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.prices import Price, Prices, amount
from proxy.records import MOST_NANO, from_values, to_values
from tests.proxy.rows import a_row

amounts = st.decimals(min_value=0, max_value=10**6, places=9, allow_nan=False, allow_infinity=False)
tokens = st.integers(min_value=0, max_value=2**31 - 1)


def exact(amount: Decimal, count: int) -> Fraction:
    """Nano-units of `count` tokens at `amount` per million."""
    return Fraction(amount) * count * 1000


@given(amounts, amounts, amounts, tokens, tokens, tokens)
def test_cost_is_the_exact_sum_rounded_once(
    input: Decimal, cached_input: Decimal, output: Decimal, prompt: int, cached: int, completion: int
) -> None:
    price = Price.parse(str(input), str(output), "EUR", cached_input=str(cached_input))
    cached = min(cached, prompt)
    expected = exact(input, prompt - cached) + exact(cached_input, cached) + exact(output, completion)
    assert price.cost(prompt, cached, completion) == round(expected)  # Fractions round half to even


def test_halves_go_to_the_even_nano() -> None:
    price = Price.parse("0.0005", "0", "EUR")  # half a nano-unit per token
    assert [price.cost(count, 0, 0) for count in range(6)] == [0, 0, 1, 2, 2, 2]


def test_what_an_operator_writes() -> None:
    price = Price.parse(input="0.27", output="1.10", currency="CNY")
    assert price.cost(1_000_000, 0, 0) == 270_000_000
    assert price.cost(0, 0, 1_000_000) == 1_100_000_000
    assert price.cost(1_000_000, 1_000_000, 0) == 270_000_000, "cached input without its own price"
    assert Price.parse(0.27, 1.1, "CNY") == price, "a float, as YAML makes of 0.27, is its shortest text"
    assert Price.parse(Decimal("0.27"), Decimal("1.1"), "CNY") == price


def test_no_request_costs_more_than_the_ledger_can_keep() -> None:
    """Budgets and metrics count what the row will say."""
    prices = Prices({"a": Price.parse("1000000", "1000000", "CNY")})
    for tokens in (0, 2**20, 2**60, -5):
        row = a_row(cost_nano=prices.cost("a", "m", tokens, 0, 0)[0])
        assert from_values(to_values(row)).cost_nano == row.cost_nano <= MOST_NANO


def test_more_cached_tokens_than_prompt_tokens_never_cost_less_than_nothing() -> None:
    price = Price.parse("1", "0", "EUR", cached_input="0")
    assert price.cost(10, 50, 0) == 0


@pytest.mark.parametrize("text", ["-1", "abc", "", "nan", "inf", "1e7", "0.0000000000001"])
def test_a_bad_price_names_its_field(text: str) -> None:
    with pytest.raises(ValueError, match=r"^output: "):
        Price.parse("1", text, "EUR")


def test_a_price_needs_a_currency() -> None:
    with pytest.raises(ValueError, match=r"^currency: "):
        Price.parse("1", "1", "")


def test_prices_by_backend_and_model() -> None:
    cheap, dear = Price.parse("1", "1", "EUR"), Price.parse("2", "2", "EUR")
    prices = Prices({"a": cheap, "b": {"big": dear}, "c": {"big": dear, "*": cheap}})
    assert prices.currency == "EUR"
    assert prices.price("a", "anything") is cheap
    assert prices.price("b", "big") is dear
    assert prices.price("b", "small") is None
    assert prices.price("c", "big") is dear
    assert prices.price("c", "small") is cheap
    assert prices.price("d", "big") is None


def test_an_unknown_price_is_not_zero_but_unknown() -> None:
    prices = Prices({"free": Price.parse("0", "0", "EUR")}, currency="EUR")
    assert prices.cost("unknown", "m", 10, 0, 10) == (0, "")
    assert prices.cost("free", "m", 10, 0, 10) == (0, "EUR")


def test_a_second_currency_is_an_error_that_says_where() -> None:
    euro, yuan = Price.parse("1", "1", "EUR"), Price.parse("1", "1", "CNY")
    with pytest.raises(ValueError, match="price of b, model big: CNY, but the ledger counts in EUR"):
        Prices({"a": euro, "b": {"big": yuan}})
    with pytest.raises(ValueError, match="price of a: EUR, but the ledger counts in USD"):
        Prices({"a": euro}, currency="USD")


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        (0, "0.0000"),
        (1, "<0.0001"),
        (50_000, "<0.0001"),
        (50_001, "0.0001"),
        (150_000, "0.0002"),
        (1_234_567_890_000_000, "1,234,567.8900"),
    ],
)
def test_amounts_for_people(nano: int, text: str) -> None:
    assert amount(nano) == text
