"""The table of moves, and pools out of a fleet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.pools import MeanTokens, Terms, pools
from policies.standby import LONGEST_PAUSE_S, MOVES, PAID, STEADY_S, WORK, Event, Standby, State, pause_after
from policies.state import Backend, Fleet

EVENTS = st.lists(st.tuples(st.sampled_from(list(Event)), st.floats(0.0, 1000.0)), max_size=60)


def reached(start: State) -> set[State]:
    found, new = {start}, [start]
    while new:
        state = new.pop()
        for (before, _), after in MOVES.items():
            if before is state and after not in found:
                found.add(after)
                new.append(after)
    return found


@pytest.mark.parametrize("state", list(State))
def test_every_state_is_reached_and_left_for_standby(state: State) -> None:
    assert state in reached(State.STANDBY)
    assert State.STANDBY in reached(state)


def test_whatever_may_run_is_stopped_before_it_is_a_standby_again() -> None:
    last = {before for (before, _), after in MOVES.items() if after is State.STANDBY}
    assert all(WORK[state] == "stop" for state in last)
    assert State.STANDBY not in PAID


@given(EVENTS)
def test_a_run_has_one_name_from_its_start_to_its_end(events: list[tuple[Event, float]]) -> None:
    standby, wall, runs = Standby("a"), 1e9, set()
    for event, later in events:
        wall += later
        before, run = standby.state, standby.run
        may = standby.may(event)
        move = standby.move(event, "x", wall)
        assert (move is not None) is may
        if move is None:
            assert standby.state is before
        elif before is State.STANDBY:
            assert move.run not in runs
            runs.add(move.run)
        else:
            assert move.run == run
        assert 0.0 <= standby.pause_left(wall) <= LONGEST_PAUSE_S
        assert standby.pause_left(wall - 1e8) <= LONGEST_PAUSE_S


def life(standby: Standby, *events: Event, wall: float = 1e9) -> None:
    for event in events:
        assert standby.move(event, "x", wall) is not None


def test_failures_are_forgotten_after_a_steady_life_alone() -> None:
    standby = Standby("a")
    life(standby, Event.START, Event.FAIL, Event.RECOVERED, Event.START, Event.PREPARED, Event.FAIL)
    assert standby.failures == 2
    life(standby, Event.RECOVERED, Event.START, Event.STOP, Event.STOPPED)
    assert standby.failures == 2, "it was never ready"
    life(standby, Event.START, Event.PREPARED, Event.STARTED)
    life(standby, Event.STOP, Event.DRAINED, Event.STOPPED, wall=1e9 + STEADY_S)
    assert standby.failures == 0
    assert pause_after(1) < pause_after(2) <= LONGEST_PAUSE_S == pause_after(100)


class Waits:
    def waiting_by_model(self) -> dict[str, tuple[int, int]]:
        return {"m": (2, 500)}

    def waiting_for_standbys(self) -> list[tuple[frozenset[str], int, float]]:
        return [(frozenset({"b"}), 2, 500.0), (frozenset({"c"}), 1, 1.0)]


def test_pools_are_of_the_models_of_standbys() -> None:
    fleet = Fleet(
        [
            Backend("a", models=frozenset({"m"}), slots=4, in_flight=1, in_flight_tokens=100),
            Backend("b", models=frozenset({"m"}), slots=4, kv_tokens=1000, available=False),
            Backend("c", models=frozenset({"other"})),
        ]
    )
    means, costs = MeanTokens(), {"b": Terms(cost_per_hour=3.0, in_state_s=7.0)}
    (pool,) = pools(fleet, Waits(), {"b": Standby("b")}, costs, 0.0, 0.0, means)
    assert (pool.model, pool.demand, pool.waiting, pool.only) == ("m", 600.0, 2, [frozenset({"b"})])
    a, b = pool.units
    assert (a.state, a.tokens) == (None, 4 * 200), "of three requests, 200 tokens each on average"
    assert (b.state, b.tokens, b.cost_per_hour, b.in_state_s) == (State.STANDBY, 800.0, 3.0, 7.0)
