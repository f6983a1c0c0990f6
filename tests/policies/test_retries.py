from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.retries import RetryBudget


def granted(budget: RetryBudget, asked: int, now: float) -> int:
    return sum(budget.withdraw(now) for _ in range(asked))


def test_a_quiet_proxy_may_retry_up_to_the_floor() -> None:
    budget = RetryBudget(ratio=0.2, floor_per_s=1.0, ttl_s=10.0)
    assert granted(budget, 50, 100.0) == 10
    assert budget.refused == 40


def test_requests_deposit_their_share() -> None:
    budget = RetryBudget(ratio=0.2, floor_per_s=0.0, ttl_s=10.0)
    for _ in range(100):
        budget.deposit(5.0)
    assert granted(budget, 50, 5.0) == 20


def test_deposits_and_withdrawals_expire() -> None:
    budget = RetryBudget(ratio=1.0, floor_per_s=1.0, ttl_s=10.0)
    for _ in range(7):
        budget.deposit(0.5)
    assert granted(budget, 50, 0.5) == 17
    assert not budget.withdraw(9.9)
    assert granted(budget, 50, 10.1) == 10
    assert granted(budget, 50, 1e6) == 10


def test_what_was_deposited_before_a_pause_expires_in_it() -> None:
    budget = RetryBudget(ratio=1.0, floor_per_s=0.0, ttl_s=10.0)
    for second in range(10):
        budget.deposit(second + 0.5)
    assert budget.balance(14.5) == 5.0
    assert budget.balance(30.0) == 0.0


def test_an_outage_does_not_multiply() -> None:
    """Everything fails and every attempt is retried as long as it is allowed: 1.2 x requests, and the floor."""
    budget = RetryBudget(ratio=0.2, floor_per_s=10.0, ttl_s=10.0)
    attempts = 0
    for step in range(60_000):  # 1000 requests a second for a minute
        now = step / 1000.0
        budget.deposit(now)
        attempts += 1
        while budget.withdraw(now):
            attempts += 1
    assert attempts <= 1.2 * 60_000 + 10.0 * 60.0 + 100.0


@given(st.lists(st.tuples(st.floats(0.0, 2.0), st.booleans()), max_size=200))
def test_grants_stay_within_the_budget(steps: list[tuple[float, bool]]) -> None:
    budget = RetryBudget(ratio=0.5, floor_per_s=0.2, ttl_s=10.0)
    now = 3.0
    deposits: list[float] = []
    grants: list[float] = []
    for pause, is_request in steps:
        now += pause
        if is_request:
            budget.deposit(now)
            deposits.append(now)
        elif budget.withdraw(now):
            grants.append(now)
            recent = sum(at > now - 9.0 for at in grants)
            assert recent <= 2.0 + 0.5 * sum(at >= now - 10.0 for at in deposits) + 1e-9
