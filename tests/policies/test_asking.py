"""Asking a platform for capacity: when our own would not do, once, and not for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from policies.asking import LIFE_S, Ask, Asking
from policies.scaling import Pool, ScalingSettings, Unit
from policies.standby import State

SETTINGS = ScalingSettings(up=0.8, down=0.4, settle_s=300.0)


def pool(demand: float, *units: Unit) -> Pool:
    return Pool("m", units or (local(1000),), tokens_in_use=demand)


def local(tokens: float, available: bool = True) -> Unit:
    return Unit("local", tokens=tokens, available=available)


def unit(name: str, tokens: float, state: State, allowed: bool = True) -> Unit:
    return Unit(name, tokens=tokens, state=state, allowed=allowed)


def test_what_our_own_can_take_is_not_asked_for() -> None:
    sleeping = unit("own", 1000, State.STANDBY)
    assert Asking(SETTINGS).decide([pool(1500, local(1000), sleeping)], frozenset(), 0.0) == []


def test_what_is_missing_is_asked_for_once() -> None:
    asking = Asking(SETTINGS)
    (ask,) = asking.decide([pool(1600)], frozenset(), 0.0)
    assert (ask.model, ask.tokens) == ("m", 1000.0)
    assert "above 80% of 1000" in ask.reason
    assert asking.decide([pool(1600)], frozenset(), 0.0) == [ask], "until the platform has it"
    asking.sent(ask, 0.0)
    assert asking.decide([pool(1600)], frozenset(), 1.0) == []


def test_what_cannot_serve_is_not_our_own() -> None:
    units = (local(1000, available=False), unit("f", 900, State.FAILED), unit("c", 900, State.STANDBY, False))
    (ask,) = Asking(SETTINGS).decide([pool(80, *units)], frozenset(), 0.0)
    assert ask.tokens == 100.0


def test_placements_do_not_answer_the_request_that_keeps_them() -> None:
    asking = Asking(SETTINGS)
    asking.sent(Ask("m", 1000.0, ""), 0.0)
    units = (local(1000), unit("p", 5000, State.READY))
    assert asking.decide([pool(1600, *units)], {"p"}, 1.0) == []
    (ask,) = asking.decide([pool(1600, *units)], {"p"}, LIFE_S / 2)
    assert ask.tokens == 1000.0, "still wanted"


def test_more_is_asked_for_when_demand_has_grown() -> None:
    asking = Asking(SETTINGS)
    asking.sent(Ask("m", 1000.0, ""), 0.0)
    assert asking.decide([pool(1700)], frozenset(), 1.0) == []
    (ask,) = asking.decide([pool(2400)], frozenset(), 1.0)
    assert ask.tokens == 2000.0


def test_it_is_given_back_when_our_own_has_been_enough_for_a_while() -> None:
    asking = Asking(SETTINGS)
    asking.sent(Ask("m", 1000.0, ""), 0.0)
    assert asking.decide([pool(300)], frozenset(), 10.0) == []
    assert asking.decide([pool(500)], frozenset(), 200.0) == [], "in between: the wait begins anew"
    assert asking.decide([pool(300)], frozenset(), 250.0) == []
    (still,) = asking.decide([pool(300)], frozenset(), 320.0)
    asking.sent(still, 320.0)
    (back,) = asking.decide([pool(300)], frozenset(), 550.0)
    assert back.tokens == 0.0
    asking.sent(back, 550.0)
    assert asking.decide([pool(300)], frozenset(), 551.0) == []


@given(st.lists(st.tuples(st.floats(0, 5000), st.floats(0, 400)), max_size=40))
def test_never_two_messages_for_one_demand_in_a_row(steps: list[tuple[float, float]]) -> None:
    """What was sent is not decided again at the same moment."""
    asking, now = Asking(SETTINGS), 0.0
    for demand, wait_s in steps:
        now += wait_s
        for ask in asking.decide([pool(demand)], frozenset(), now):
            asking.sent(ask, now)
        assert asking.decide([pool(demand)], frozenset(), now) == []
