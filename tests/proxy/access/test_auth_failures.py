from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access.limits import AuthFailures


def test_a_burst_is_told_401_then_the_storm_429() -> None:
    failures = AuthFailures(per_minute=20, burst=5)
    assert [failures.failed("192.0.2.1", 100.0) for _ in range(5)] == [0.0] * 5
    assert failures.failed("192.0.2.1", 100.0) == pytest.approx(3.0)
    assert failures.failed("192.0.2.1", 102.0) == pytest.approx(1.0)
    assert failures.failed("192.0.2.1", 103.5) == 0.0
    assert failures.failed("192.0.2.1", 103.5) > 0.0


@given(st.lists(st.floats(0, 20), max_size=80), st.integers(1, 60), st.integers(1, 10))
def test_never_more_than_burst_and_rate(pauses: list[float], per_minute: int, burst: int) -> None:
    failures = AuthFailures(per_minute, burst)
    now = 0.0
    answered: list[float] = []
    for pause in pauses:
        now += pause
        if failures.failed("192.0.2.1", now) == 0.0:
            answered.append(now)
    for first, start in enumerate(answered):
        for last in range(first, len(answered)):
            allowed = burst + (answered[last] - start) * per_minute / 60
            assert last - first + 1 <= allowed + 1e-6


def test_addresses_do_not_disturb_each_other() -> None:
    failures = AuthFailures(burst=1)
    assert failures.failed("192.0.2.1", 0.0) == 0.0
    assert failures.failed("192.0.2.2", 0.0) == 0.0
    assert failures.failed("192.0.2.1", 0.0) > 0.0


def test_memory_is_bounded_and_the_least_recently_failing_is_forgotten() -> None:
    failures = AuthFailures(burst=1, addresses=3)
    for address in ("a", "b", "c", "a", "d"):
        failures.failed(address, 0.0)
    assert len(failures) == 3
    assert failures.failed("a", 0.0) > 0.0
    assert failures.failed("b", 0.0) == 0.0
    for number in range(100):
        failures.failed(f"198.51.100.{number}", 0.0)
    assert len(failures) == 3


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8:0:1::1", "2001:db8::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2", True),
        ("not:an:address", "not:another", False),
        ("", "192.0.2.1", False),
    ],
)
def test_ipv6_counts_by_network(one: str, other: str, same: bool) -> None:
    failures = AuthFailures(burst=1)
    assert failures.failed(one, 0.0) == 0.0
    assert (failures.failed(other, 0.0) > 0.0) is same
