"""Placements and time: whatever comes in whatever order, there are exactly those whose time is not over."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.scaling import placements as module
from proxy.scaling.messages import MessageError, Placement, Progress, Resources
from proxy.scaling.placements import REMEMBER_S, Answered, Placements

IDS = st.sampled_from(["a", "b", "c"])
TIMES = st.integers(1, 50)  # whole seconds: the file rounds what floats cannot hold
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), IDS, TIMES),
        st.tuples(st.just("remove"), IDS),
        st.tuples(st.just("wait"), TIMES),
        st.tuples(st.just("expire")),
        st.tuples(st.just("progress"), IDS),
        st.tuples(st.just("restart"), st.integers(-1000, 1000)),
    ),
    max_size=30,
)


def placement(id: str = "a", ttl_s: float = 30.0, **fields: Any) -> Placement:
    return Placement.model_validate(
        {
            "id": id,
            "name": f"p-{id}",
            "url": "http://93.184.215.14:8000",
            "site": "nanjing",
            "models": ["m"],
            "ttl_s": ttl_s,
            **fields,
        }
    )


@given(STEPS)
def test_exactly_those_whose_time_is_not_over(steps: list[tuple[Any, ...]]) -> None:
    store, now, wall = Placements(), 0.0, 1e9
    until: dict[str, float] = {}
    expired: list[str] = []
    for step, *more in steps:
        if step == "put":
            id, ttl_s = more
            store.put(placement(id, ttl_s), now)
            until[id] = now + ttl_s
        elif step == "remove":
            had = store.find(more[0], now) is not None
            assert had == (until.get(more[0], -inf) > now)
            store.remove(more[0])
            until.pop(more[0], None)
        elif step == "wait":
            now += more[0]
            wall += more[0]
        elif step == "expire":
            over = {id for id, end in until.items() if end <= now}
            expired = [one.id for one in store.expire(now)]
            assert set(expired) == over
            for id in expired:
                del until[id]
        elif step == "progress":
            alive = until.get(more[0], -inf) > now
            assert store.progressed(Progress(placement=more[0], state="ready"), now) == alive
        else:
            data = store.dump(now, wall)
            until = {id: end for id, end in until.items() if end > now}
            left = {id: end - now for id, end in until.items()}
            now = more[0]  # a monotonic clock begins anywhere
            store = Placements.load(data, now, wall)
            until = {id: now + seconds for id, seconds in left.items()}
        alive_now = {id for id, end in until.items() if end > now + 1e-3}
        assert (
            alive_now
            <= {one.id for one in store.all(now)}
            <= {id for id, end in until.items() if end > now - 1e-3}
        )
        assert all((store.find(one.id, now) is not None) for one in store.all(now))


@pytest.mark.parametrize("jump", [-1e9, -100.0, 100.0, 1e9])
def test_no_jump_of_the_clock_makes_anything_stay_longer(jump: float) -> None:
    store = Placements()
    store.put(placement(ttl_s=30.0), 0.0)
    store.remember("m", Answered("c", 200, "{}", 0.0))
    again = Placements.load(store.dump(10.0, 1e9), 0.0, 1e9 + jump)
    assert again.left_s("a", 0.0) <= 30.0
    assert again.all(30.0) == []
    assert again.answered("m", "c", REMEMBER_S + 1.0) is None


def test_a_name_belongs_to_one_placement_for_good() -> None:
    store = Placements()
    store.put(placement("a"), 0.0)
    with pytest.raises(MessageError, match="its name cannot change") as raised:
        store.put(placement("a", name="other"), 1.0)
    assert raised.value.field == "name"
    with pytest.raises(MessageError, match="another placement"):
        store.put(placement("b", name="p-a"), 1.0)
    store.put(placement("b", name="p-a"), 31.0)  # the other's time is over


@pytest.mark.parametrize(
    ("was", "now", "field"),
    [
        ({"cost_per_hour": 10}, {"cost_per_hour": 10.5}, "cost_per_hour"),
        ({"cost_per_hour": 10}, {}, "cost_per_hour"),
        ({"cost_per_hour": 10}, {"cost_per_hour": 9}, ""),
        ({}, {"cost_per_hour": 9}, ""),
        ({"price": {"input": 1, "output": 2}}, {"price": {"input": 1, "output": 3}}, "price.output"),
        ({"price": {"input": 1, "output": 2}}, {}, "price"),
        ({"price": {"input": 1, "output": 2}}, {"price": {"input": 0.5, "output": 2}}, ""),
    ],
)
def test_what_was_approved_does_not_become_dearer(was: Any, now: Any, field: str) -> None:
    store = Placements()
    store.put(placement(**was), 0.0)
    if field:
        with pytest.raises(MessageError, match="cannot rise") as raised:
            store.put(placement(**now), 1.0)
        assert raised.value.field == field
    else:
        store.put(placement(**now), 1.0)
    store.remove("a")
    store.put(placement(**now), 2.0)


def test_there_are_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PLACEMENTS", 1)
    store = Placements()
    store.put(placement("a"), 0.0)
    with pytest.raises(MessageError, match="1 placements already"):
        store.put(placement("b"), 1.0)
    store.put(placement("a"), 1.0)


def test_resources_grow_old() -> None:
    store = Placements()
    found = Resources.model_validate(
        {"site": "nanjing", "cards": [{"card": "h20", "total": 8, "free": 3}], "ttl_s": 10}
    )
    store.put_resources(found, 0.0)
    assert store.resources(9.0) == {"nanjing": found}
    assert store.resources(10.0) == {}


def test_a_message_that_came_before_is_known_and_no_other_may_have_its_id() -> None:
    store = Placements()
    said = Answered("digest", 201, "{}", 0.0)
    store.remember("m", said)
    assert store.answered("m", "digest", 1.0) == said
    assert store.answered("n", "digest", 1.0) is None
    with pytest.raises(MessageError, match="had this id"):
        store.answered("m", "other", 1.0)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"placements":[1]}', b'{"placements":[[{},1]]}'])
def test_a_file_that_is_not_ours(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Placements.load(data, 0.0, 0.0)
