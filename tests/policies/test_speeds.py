"""Learning how fast a backend is: the lines against the law that the times were made by."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from policies.base import BackendView, Outcome
from policies.speeds import TPOT, TTFT, Line, capacity_rps, tpot_s, ttft_s
from policies.state import Backend, Fleet
from tests.policies.driver import request


@pytest.mark.parametrize("truth", [(0.2, 6e-4, 4e-3), (0.03, 3e-5, 0.0), (1.5, 1e-5, 0.05)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_line_finds_what_times_are_made_of(truth: tuple[float, ...], noise: float) -> None:
    rng = Random(4)
    line = Line(TTFT, 0.01)
    for _ in range(1500):
        inputs = (1.0, rng.uniform(10, 8000), float(rng.randrange(30)))
        seconds = sum(one * value for one, value in zip(truth, inputs, strict=True))
        line.note(inputs, seconds * (1.0 + rng.uniform(-noise, noise)))
    for inputs in ((1.0, 100.0, 0.0), (1.0, 4000.0, 10.0), (1.0, 8000.0, 29.0)):
        seconds = sum(one * value for one, value in zip(truth, inputs, strict=True))
        assert line.expected(inputs) == pytest.approx(seconds, rel=0.02 + 0.6 * noise)


def test_without_forgetting_it_is_weighted_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy, on the same samples with the weights that it gave them."""
    rng = Random(1)
    line = Line(TPOT, 0.001)
    monkeypatch.setattr(line, "_forget", 1.0)
    rows, targets = [[1 / TPOT[0], 0.0], [0.0, 1 / TPOT[1]]], [1.0, 1.0]  # the prior, as samples
    for _ in range(50):
        inputs = (1.0, rng.uniform(0, 20))
        seconds = 0.02 + 0.001 * inputs[1] * rng.uniform(0.8, 1.2)
        deviation = 0.1 * line.expected(inputs)
        rows.append([one / deviation for one in inputs])
        targets.append(seconds / deviation)
        line.note(inputs, seconds)
    expected = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    assert line.theta == pytest.approx(list(expected), rel=1e-6)


def test_it_follows_a_backend_that_changes() -> None:
    line = Line(TPOT, 0.001)
    for base in (0.02, 0.1):
        for number in range(800):
            line.note((1.0, float(number % 10)), base)
    assert line.expected((1.0, 5.0)) == pytest.approx(0.1, rel=0.05)


def test_samples_that_are_all_alike_blow_nothing_up() -> None:
    line = Line(TTFT, 0.01)
    for _ in range(100_000):
        line.note((1.0, 500.0, 0.0), 0.3)
    assert line.expected((1.0, 500.0, 0.0)) == pytest.approx(0.3, rel=1e-3)
    line.note((1.0, 4000.0, 20.0), 2.0)
    assert 0.0 <= line.expected((1.0, 500.0, 0.0)) < 1.0
    assert all(one >= 0.0 for one in line.coefficients)


def test_it_still_finds_them_after_very_many() -> None:
    """What rounding leaves between the halves of a symmetric matrix grows by 1/e with each `MEMORY` of samples."""
    rng = Random(2)
    line = Line(TTFT, 0.01)
    for _ in range(20_000):
        inputs = (1.0, rng.uniform(100, 2000), float(rng.randint(15, 30)))
        seconds = 0.06 + 4e-5 * inputs[1]
        line.note(inputs, seconds * rng.uniform(0.97, 1.03))
        assert line.expected(inputs) == pytest.approx(seconds, rel=0.1) or line.samples < 100


def test_a_fleet_learns_only_where_it_is_needed() -> None:
    fleet = Fleet([Backend("a")])
    assert fleet["a"].ttft_fit == ()
    fleet.see_to(frozenset({"speed"}))
    assert fleet["a"].ttft_fit == TTFT
    now = 0.0
    for number in range(300):
        now += 1.0
        others = [fleet.lease(request(f"{number}.{index}"), "a", now) for index in range(number % 4)]
        for lease in others:
            fleet.first_token(lease, now + 0.1)
        facts = request(str(number), prompt_tokens=100 + 37 * number % 2000)
        asked = fleet.lease(facts, "a", now + 0.2)
        fleet.first_token(asked, now + 0.2 + 0.1 + 2e-4 * facts.prompt_tokens + 0.01 * len(others))
        for lease in others:
            lease.backend.speed = None  # theirs are no measure of this law
            fleet.release(lease, Outcome.OK, now + 1.0)
            fleet.see_to(frozenset({"speed"}))
        fleet.release(
            asked, Outcome.OK, asked.first_token_at + 0.02 * 99 if asked.first_token_at else 0, (1, 0, 100)
        )
    fleet.see_to(frozenset())
    assert (fleet["a"].ttft_fit, fleet["a"].tpot_fit, fleet["a"].speed) == ((), (), None)


def test_what_is_expected_of_a_backend() -> None:
    backend = BackendView("a", slots=10, in_flight=4, prefilling=1, prefill_tokens=500)
    backend.ttft_fit, backend.tpot_fit = (0.1, 0.001, 0.01), (0.02, 0.001)
    facts = request(prompt_tokens=1000, cached={"a": 800})
    assert ttft_s(backend, facts) == pytest.approx(0.1 + 0.7 + 0.03)
    assert tpot_s(backend) == pytest.approx(0.024)
    assert tpot_s(backend, 9) == pytest.approx(0.029)
    assert capacity_rps(backend, 200, 101) == pytest.approx(10 / (0.1 + 0.2 + 0.09 + 2.9))
    unknown = BackendView("b")
    assert ttft_s(unknown, facts) == pytest.approx(TTFT[0] + 1000 * TTFT[1])


def test_a_stall_is_no_speed() -> None:
    """One first token after a minute among prompts that are all alike, and the next ones are as ever."""
    line = Line(TTFT, 0.01)
    inputs = (1.0, 500.0, 0.0)
    for seconds in (*[0.1] * 300, 60.0, *[0.1] * 10):
        line.note(inputs, seconds)
    assert line.expected(inputs) == pytest.approx(0.1, rel=0.3)


def test_who_is_slow_from_the_beginning_is_believed() -> None:
    line = Line(TTFT, 0.01)
    for _ in range(20):
        line.note((1.0, 500.0, 0.0), 60.0)
    assert line.expected((1.0, 500.0, 0.0)) > 30.0


def test_who_takes_no_time_has_a_capacity() -> None:
    backend = BackendView("b", slots=4, ttft_fit=(0.0, 0.0, 0.0), tpot_fit=(0.0, 0.0))
    assert capacity_rps(backend, 200, 101) == pytest.approx(4e6)
