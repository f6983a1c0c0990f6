"""The benchmark of scaling: its rule, its bound and its coarse simulation are what they say they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from random import Random

import numpy as np
import pytest

from benchmarks.scaling import __main__ as command
from benchmarks.scaling import coarse as coarse_module
from benchmarks.scaling import load
from benchmarks.scaling.__main__ import Verdict, hours_at
from benchmarks.scaling.bound import lower_bound
from benchmarks.scaling.coarse import Coarse, Outcome, most_slots
from benchmarks.scaling.exact import Units, play
from benchmarks.scaling.load import BIN_S, DAY_S, Demand, demand_of, joined, times
from benchmarks.scaling.rules import HorizontalPodAutoscaler, Static
from policies.scaling import Controller, Pool, ScalingSettings, Unit
from policies.standby import Event, State
from sim.autoscale import Scaler, StandbyTerms
from sim.profile import load_profile
from sim.traces.servegen import Columns
from sim.workload import Arrival, Workload

TERMS = StandbyTerms(cold_start_s=180.0, stop_s=0.0, min_on_s=0.0, min_off_s=0.0)
MEAN_S = 10.0


def demand(curve: Callable[[float], float], hours: float) -> Demand:
    """Slots that are held, by hour."""
    slots = np.array([curve(at * BIN_S / 3600) for at in range(int(hours * 3600 / BIN_S))])
    return Demand(slots * BIN_S / MEAN_S, slots * BIN_S)


def run(of: Demand, scaler: Scaler, units: int = 20, terms: StandbyTerms = TERMS, ready: int = 1) -> Outcome:
    return Coarse(of, units, 10, terms, scaler, ttft_s=5.0, wait_s=10.0, ready=ready).run()


def pool(demand: float, ready: int, starting: int = 0, off: int = 20) -> Pool:
    states = [State.READY] * ready + [State.STARTING] * starting + [State.STANDBY] * off
    return Pool(
        "m",
        [
            Unit(f"u{at}", tokens=10.0, state=state, available=state is State.READY)
            for at, state in enumerate(states)
        ],
        tokens_in_use=demand,
    )


@pytest.mark.parametrize(
    ("demand", "wanted"), [(54.0, 10), (55.0, 10), (55.1, 12), (100.0, 20), (45.1, 10), (44.9, 9)]
)
def test_the_rule_is_that_of_kubernetes(demand: float, wanted: int) -> None:
    """Ten units of ten tokens, target 50 %: within a tenth of it nothing happens."""
    rule = HorizontalPodAutoscaler(0.5)
    steps = rule.decide([pool(demand, 8, 2)], 0.0, 0.0)
    change = sum(1 if step.event is Event.START else -1 for step in steps)
    assert 10 + change == wanted


def test_the_rule_goes_down_to_the_highest_of_the_last_300_s() -> None:
    rule = HorizontalPodAutoscaler(0.5)
    rule.decide([pool(50.0, 10)], 0.0, 0.0)
    assert rule.decide([pool(10.0, 10)], 15.0, 15.0) == []
    assert rule.decide([pool(30.0, 10)], 285.0, 285.0) == []
    assert len(rule.decide([pool(10.0, 10)], 300.0, 300.0)) == 4


def test_static_capacity_for_the_peak_serves_all_and_costs_every_hour() -> None:
    of = demand(lambda hour: 30.0 + 25.0 * (3 < hour < 5), 8)
    units = ceil(most_slots(of) / 10)
    found = run(of, Static(units), ready=units)
    assert units == 6
    assert found.attainment == 1.0
    assert found.hours == pytest.approx(6 * 8)


def test_too_little_capacity_misses_what_has_no_room() -> None:
    found = run(demand(lambda _: 30.0, 4), Static(2), ready=2)
    assert found.attainment < 0.01, "all wait for longer than they may, since the queue is always full"


def test_what_starts_is_paid_and_serves_when_it_is_ready() -> None:
    found = run(demand(lambda _: 20.0, 1), Static(4), ready=1)
    late = [sample for sample in found.samples if sample.capacity < 40.0]
    assert late[-1].at_s == 180.0 - BIN_S
    assert found.hours == pytest.approx(4.0, abs=0.02)


def test_the_bound_is_what_a_clairvoyant_pays() -> None:
    """One burst of an hour above a base: a unit for each ten slots, and a cold start for each that starts."""
    of = demand(lambda hour: 50.0 if 3 <= hour < 4 else 20.0, 8)
    assert lower_bound(of, 10, TERMS, 1.0) == pytest.approx(2 * 8 + 3 * 1 + 5 * 180 / 3600, rel=1e-3)


def test_through_a_gap_shorter_than_a_cold_start_it_stays_on() -> None:
    of = demand(lambda hour: 0.0 if 1 <= hour < 1 + 100 / 3600 else 10.0, 2)
    assert lower_bound(of, 10, TERMS, 1.0) == pytest.approx(2 + 180 / 3600, rel=1e-3)


@pytest.mark.parametrize("scaler", [HorizontalPodAutoscaler(0.7), Controller(), Static(5)])
def test_nobody_is_below_the_bound(scaler: Scaler) -> None:
    of = demand(lambda hour: 40.0 + 35.0 * np.sin(hour * 2) + 5.0 * np.sin(hour * 37), 12)
    found = run(of, scaler)
    assert lower_bound(of, 10, TERMS, found.attainment) <= found.hours * 1.001


def rush(hour: float) -> float:
    """From 20 to 80 slots at eight, within five minutes."""
    return 20.0 + 60.0 * min(max((hour % 24 - 8) * 12, 0.0), 1.0)


def test_the_forecast_hides_the_cold_start_on_the_second_day() -> None:
    slow = StandbyTerms(cold_start_s=600.0)
    of = demand(rush, 34)
    found = run(of, Controller(), units=10, terms=slow, ready=4)
    day = DAY_S // BIN_S
    came = of.requests
    assert found.requests_by_day == pytest.approx([came[:day].sum(), came[day:].sum()])
    missed = [came[:day].sum() - found.met_by_day[0], came[day:].sum() - found.met_by_day[1]]
    second = found.part(1, 1)
    assert second.attainment == pytest.approx(1.0 - missed[1] / came[day:].sum())
    assert (second.hours, second.samples[0].at_s) == (found.hours_by_day[1], DAY_S)
    assert missed[0] > 100
    assert missed[1] < missed[0] / 5
    reactive = run(of, Controller(ScalingSettings(quantile=0.0)), units=10, terms=slow, ready=4)
    assert came[day:].sum() - reactive.met_by_day[1] > missed[0] / 2, "which it owes to the forecast"


def test_times_on_a_full_unit_leave_room_for_the_prompts_that_come() -> None:
    profile = load_profile("l40-4-32b")
    ttft, tpot = times(profile, 15, 200.0, 120.0)
    step = profile.step
    alone = (step.alpha_us + 15 * (step.beta_us + step.gamma_us * 260)) / 1e6
    prompts = 15 / (120.0 * tpot) * 200.0 * step.delta_us / 1e6
    assert tpot * (1.0 - prompts) == pytest.approx(alone)
    assert ttft == pytest.approx(alone + 200 * step.delta_us / 1e6)


def columns(arrivals: Sequence[Arrival]) -> Columns:
    rows = [(one.at, one.prompt_tokens, one.output_tokens) for one in arrivals]
    return Columns(*(np.array(column) for column in zip(*rows, strict=True)))


def test_what_comes_is_added_up_by_bins() -> None:
    days = [
        [Arrival(0, 1, 11), Arrival(14_999_999, 1, 1), Arrival(15_000_000, 1, 21)],
        [Arrival(30_000_000, 1, 1)],
    ]
    found = joined(demand_of([columns(day)], 1.0, 0.1, 3) for day in days)
    assert found.requests.tolist() == [2, 1, 0, 0, 0, 1]
    assert found.slot_s.tolist() == pytest.approx([3.0, 3.0, 0, 0, 0, 1.0])
    assert found.slots.tolist() == pytest.approx([0.2, 0.2, 0, 0, 0, 1 / 15])
    assert found.mean_s == pytest.approx(7 / 4)


def test_the_coarse_simulation_agrees_with_the_exact_one() -> None:
    """Forty minutes of a load that doubles for ten of them: hours and misses."""
    profile = load_profile("l40-4-32b")
    random = Random(1)
    arrivals, at = [], 0.0
    while at < 2400.0:
        arrivals.append(Arrival(round(at * 1e6), 200, 120))
        at += random.expovariate(6.0 if 1200 <= at < 1800 else 3.0)
    workload = Workload("test", arrivals)
    terms = StandbyTerms(cold_start_s=120.0, min_on_s=0.0)
    units = Units(profile, 8, 15, terms, 5.0, 0.1, 10.0)
    hours, attainment, _ = play(workload, units, HorizontalPodAutoscaler(0.7))
    ttft, tpot = times(profile, 15, 200.0, 120.0)
    of = demand_of([columns(arrivals)], ttft, tpot, 160)
    coarse = Coarse(
        of, 8, 15, terms, HorizontalPodAutoscaler(0.7), ttft_s=5.0 - ttft, wait_s=10.0, ready=0
    ).run()
    assert coarse.hours == pytest.approx(hours, rel=0.1)
    assert coarse.attainment == pytest.approx(attainment, abs=0.05)
    assert 0.5 < attainment < 1.0


def test_the_command_tunes_tests_and_judges(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On days of an hour."""

    def made(day: int, share: float, seed: int = 0, seconds: float = 3600.0) -> Workload:
        random = Random(day)
        busy = [at for at in range(0, 3600, 2) if at >= 1800 or at % 6 == 0]
        return Workload("made", [Arrival(at * 10**6 + random.randrange(10**6), 200, 120) for at in busy])

    def asked(day: int, share: float, seed: int, ttft_s: float, tpot_s: float) -> Demand:
        return demand_of([columns(list(made(day, share)))], ttft_s, tpot_s, 3600 // BIN_S)

    for module in (coarse_module, load):
        monkeypatch.setattr(module, "DAY_S", 3600)
    monkeypatch.setattr(command, "draw", made)
    monkeypatch.setattr(command, "demand_of_day", asked)
    command.main(share=0.01, seed=0, exact=True, quick=True, check=False, result=False)
    said = capsys.readouterr().out
    assert "fewer unit-hours than the rule at equal attainment" in said
    assert "lower cost than static capacity for the peak" in said
    assert said.count("first test day, request by request") == 4
    assert said.count("*") == 3, "the best of each, and what the mark means"


def test_hours_at_equal_attainment_are_those_between_two_settings() -> None:
    points = [(0.9, 100.0), (0.99, 200.0), (0.95, 210.0), (1.0, 400.0)]
    assert hours_at(points, 0.9) == 100.0
    assert hours_at(points, 0.945) == pytest.approx(150.0)
    assert hours_at(points, 0.995) == pytest.approx(300.0)
    assert hours_at(points, 0.5) == 100.0
    assert hours_at(points, 1.0) == 400.0


def test_what_is_promised_follows_from_what_the_bound_leaves() -> None:
    much, little = Verdict(100.0, 70.0, 50.0, 200.0), Verdict(100.0, 86.0, 82.0, 100.0)
    assert much.asked == 0.25
    assert [kept for kept, _ in much.promises()] == [True, True]
    assert little.asked == pytest.approx(0.12)
    assert [kept for kept, _ in little.promises()] == [True, False]
    assert not Verdict(100.0, 89.0, 82.0, 200.0).promises()[0][0]
