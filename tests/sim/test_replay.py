"""Logs of simulated clusters, replayed; and that a replay finds what is wrong with a log. For logs of a real proxy:
`tests/e2e/test_replay.py`."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import policies
from policies.base import RequestFacts
from policies.breaker import Breaker
from policies.eventlog import (
    EventLog,
    PolicySource,
    RecordedFleet,
    RecordedValve,
    Retries,
    backend_from,
    facts_from,
)
from policies.files import read_policy
from policies.state import Backend, Fleet
from probes.passive import AttemptError
from sim.cluster import SECOND, Cluster
from sim.members import Change, Incident
from sim.recording import BadLogError, Recording
from sim.replay import compare
from sim.router import Request, Router
from sim.workload import Workload
from tests.patience import examples
from tests.sim.test_cluster import LOCAL_FIRST, every, member, scenes

PICK = "rules: [{{name: all, pick: {}, queue: {{wait: 2s, depth: 8}}}}]"
POLICIES = [LOCAL_FIRST, *(PICK.format(name) for name in policies.names())]
POLICIES.append(PICK.format("{policy: weighted-qps, max_qps: {a: 2}}"))
POLICIES += [
    "rules: [{name: all, split: [{name: x, share: 30%, backend: a}, {name: y, share: 70%}], queue: {wait: 2s}}]",
    "rules: [{name: all, prefer: [{rtt: {max: 10ms}}, {site: '*'}], avoid: [{backend: a}], queue: {wait: 2s}}]",
]
Records = list[dict[str, Any]]


def record(scene: dict[str, Any], policy: str, seed: int = 3, **retries: Any) -> Records:
    """The log of one simulation, as it is read from a file."""
    options = dict(scene)
    members = [member(**values) for values in options.pop("members")]
    workload = Workload("test", options.pop("arrivals"))
    lines: list[bytes] = []
    log = EventLog(lambda one: lines.append(orjson.dumps(one)), PolicySource("test", policy, seed))
    rules = read_policy(policy, "test", seed=seed).rules
    Cluster(members, rules, seed=7, log=log, **options, **retries).run(workload)
    log.end("the workload is over")
    return [orjson.loads(line) for line in lines]


def eventful() -> Records:
    """Two backends of which one fails, is full and dies, clients that leave, a queue that is full."""
    members = [{"name": "a", "slots": 2, "rtt": 2_000}, {"name": "b", "site": "away", "slots": 1}]
    incidents = [
        Incident(3 * SECOND, "a", Change.FAIL),
        Incident(12 * SECOND, "a", Change.FULL, retry_after_s=1.5),
        Incident(14 * SECOND, "a", Change.MENDED),
        Incident(20 * SECOND, "b", Change.DOWN),
        Incident(29 * SECOND, "b", Change.UP),
    ]
    arrivals = every(0.08, 400, output=40)
    scene = {"members": members, "arrivals": arrivals, "incidents": incidents, "patience_s": 3.0}
    return record(scene, LOCAL_FIRST)


def renumbered(records: Records) -> Records:
    return [{**one, "n": number} for number, one in enumerate(records)]


@given(scenes(), st.sampled_from(POLICIES), st.integers(1, 4), st.sampled_from([0.0, 0.5, 10.0]))
@settings(max_examples=examples(150))
def test_what_a_cluster_decided_is_decided_again(
    scene: dict[str, Any], policy: str, attempts: int, retries_per_s: float
) -> None:
    """Law 9."""
    records = record(scene, policy, attempts=attempts, retries_per_s=retries_per_s, retry_ratio=0.1)
    found = compare(records)
    assert found.difference is None, found.difference.text
    assert found.end == "the workload is over"
    assert found.decisions == sum("decision" in one for one in records)
    assert found.requests == len(scene["arrivals"])


def test_an_eventful_log_is_equal_and_holds_what_can_happen() -> None:
    records = eventful()
    assert compare(records).difference is None
    assert {one["event"] for one in records if "event" in one} == {
        *("start", "arrival", "first token", "failed", "ended", "freed", "poll", "figures", "refresh", "end")
    }
    assert {one["decided_by"] for one in records if "decision" in one} >= {
        *("least-load", "tiers", "queue", "fallback")
    }
    assert {one["outcome"] for one in records if one.get("event") == "ended"} == {"ok", "failed", "ignored"}


@pytest.mark.parametrize(
    ("key", "other"),
    [("send", "?"), ("fallbacks", ["?"]), ("reject", "?"), ("hold", 0.5), ("tier", 7), ("decided_by", "?")],
)
def test_a_decision_that_is_not_the_same_is_found_where_it_stands(key: str, other: Any) -> None:
    records = eventful()
    place = [one["n"] for one in records if "decision" in one and key in one][-1]
    records[place] |= {key: other}
    difference = compare(records).difference
    assert difference is not None
    assert difference.number == place
    assert difference.recorded == records[place]
    assert f'"{key}":' in difference.text


def test_every_record_that_is_missing_is_found() -> None:
    records = eventful()
    for place in range(0, len(records) - 1, 23):
        without = records[:place] + records[place + 1 :]
        if place == 0:
            with pytest.raises(BadLogError, match="first line"):
                compare(without)
        else:
            difference = compare(without).difference
            assert difference is not None
            assert difference.number == place


@pytest.mark.parametrize("event", ["arrival", "failed", "ended", "freed", "decision"])
def test_a_missing_event_is_found_by_what_follows_from_it_and_not_by_its_number_alone(event: str) -> None:
    records = eventful()
    places = [one["n"] for one in records if event in (one.get("event"), *one)]
    for place in places[:: max(len(places) // 8, 1)]:
        assert compare(renumbered(records[:place] + records[place + 1 :])).difference is not None, place


def overrated() -> Records:
    """A backend whose engine takes fewer than its slots say: only its figures tell that it is full."""
    members = [{"name": "a", "slots": 30}, {"name": "b", "site": "away"}]
    return record({"members": members, "arrivals": every(0.05, 100, output=100)}, LOCAL_FIRST)


@pytest.mark.parametrize(
    ("event", "scene"), [("first token", eventful), ("figures", overrated), ("poll", eventful)]
)
def test_some_event_that_only_informs_is_missed_by_a_later_decision(
    event: str, scene: Callable[[], Records]
) -> None:
    """Not each: a figure may be stale before anybody looks at it."""
    records = scene()
    rest = [one for one in records if one.get("event") != event]
    assert compare(renumbered(rest)).difference is not None


def test_another_seed_decides_otherwise() -> None:
    scene = {"members": [{"name": "a"}, {"name": "b"}], "arrivals": every(0.5, 30)}
    records = record(scene, PICK.format("random"))
    assert compare(records).difference is None
    records[0]["policy"]["seed"] += 1
    found = compare(records)
    assert found.difference is not None
    assert found.requests < 30


def test_a_log_that_breaks_off_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    records = eventful()
    file = tmp_path / "log.jsonl"
    text = b"".join(orjson.dumps(one) + b"\n" for one in records)
    file.write_bytes(text[: len(text) // 2])
    found = compare(Recording(file))
    assert (found.difference, found.end) == (None, "")
    assert found.decisions > 0


@pytest.mark.parametrize(
    "first", [{"event": "poll"}, {"event": "start", "format": 0}, {"event": "start", "format": 1}]
)
def test_what_is_no_log_is_refused(first: dict[str, Any]) -> None:
    with pytest.raises(BadLogError, match=r"line 1: .*(format|first line|required)"):
        compare([first])


names = st.text(st.characters(codec="utf-8"), max_size=5)


@given(
    st.builds(
        RequestFacts,
        id=names,
        model=names,
        tenant=names,
        arrived=st.floats(1e6, 1e7),
        deadline=st.one_of(st.just(inf), st.floats(1e6, 1e7)),
        session=names,
        stream=st.booleans(),
        priority=st.integers(-5, 5),
        labels=st.dictionaries(names, names, max_size=2),
        prefix=st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple),
    ),
    st.integers(0, 1_000_000).map(float),
)
def test_facts_come_back_to_the_last_bit(facts: RequestFacts, start: float) -> None:
    lines: list[bytes] = []
    log = EventLog(lambda one: lines.append(orjson.dumps(one)), PolicySource("", "", 0), start)
    log.arrival(facts, facts.arrived)
    (line,) = lines
    assert facts_from(orjson.loads(line)["request"], start) == facts


def test_backends_come_back() -> None:
    backend = Backend(
        "a",
        "away",
        3,
        0.5,
        frozenset({"m", "n"}),
        labels={"card": "L40"},
        operator="o",
        location=(1.5, -2.0),
        data_classes=frozenset({"public"}),
        context_tokens={"m": 4096},
        price_input=0.1,
        asleep=True,
        standby=True,
        breaker=Breaker(threshold=2, base_s=1.0),
    )
    lines: list[bytes] = []
    log = EventLog(lambda one: lines.append(orjson.dumps(one)), PolicySource("", "", 0))
    log.begin(Fleet([backend, Backend("b")]), Retries())
    first = orjson.loads(lines[0])
    assert [backend_from(one, 0.0) for one in first["backends"]] == [backend, Backend("b")]


class ByHand(Router):
    """A router whose requests do as the test says."""

    def send(self, request: Request, now: float) -> None: ...

    def over(self, request: Request, now: float) -> None: ...


def test_what_was_held_for_standbys_is_decided_again() -> None:
    records: Records = []
    source = PolicySource("test", PICK.format("prefix-affinity"), 0)
    log = EventLog(lambda one: records.append(orjson.loads(orjson.dumps(one))), source)
    homes = [Backend(name, slots=2, models=frozenset({"m"}), asleep=True) for name in "yz"]
    router = ByHand(homes, read_policy(source.text, source.name).rules, log=log)
    requests = [Request(RequestFacts(f"r{n}", "m", arrived=float(n), prefix=(1, 2, n))) for n in range(12)]
    for number, request in enumerate(requests[:6]):
        router.submit(request, float(number))
    router.fleet.put("z", 6.0, asleep=False)
    router.poll(6.0)
    router.begun(requests[0], 6.5)
    router.fleet.put("z", 7.0, asleep=True, draining=True)
    router.submit(requests[6], 7.0)
    router.fleet.put("z", 7.5, asleep=False)
    router.finished(requests[0], (9, 0, 3), 8.0)
    for number in range(1, 5):  # its breaker opens
        router.failed(requests[number], AttemptError.RESET, 9.0 + number)
    router.failed(requests[5], 429, 15.0, 60.0)
    router.fleet.put("z", 16.0, asleep=True)
    router.submit(requests[7], 16.0)
    router.fleet.put("y", 17.0, asleep=False)
    router.poll(17.0)
    router.fleet.put("z", 18.0, asleep=False)  # without the breaker and the pause that it had
    router.submit(requests[8], 18.0)
    router.submit(requests[9], 18.5)
    for at, over_budget in ((18.7, True), (18.9, False)):
        for home in homes:
            home.over_budget = over_budget
        router.fleet.version += 1
        router.fleet.refresh(at)
        if over_budget:
            router.submit(requests[11], 18.8)
    router.submit(requests[10], 19.0)
    router.left(requests[10], 19.5)
    router.sweep(400.0)
    log.end("it is over")
    said = [record.get("decided_by") for record in records]
    assert said.count("standby") >= 8
    assert {record.get("send") for record in records} == {None, "y", "z"}
    found = compare(records)
    assert found.difference is None, found.difference.text
    assert found.end == "it is over"


def test_a_budget_that_is_used_up_counts_again_in_a_replay() -> None:
    records: Records = []
    source = PolicySource("test", PICK.format("least-load"), 0)
    log = EventLog(lambda one: records.append(orjson.loads(orjson.dumps(one))), source)
    homes = [Backend(name, slots=9, models=frozenset({"m"})) for name in "yz"]
    router = ByHand(homes, read_policy(source.text, source.name).rules, log=log)
    for number in range(9):
        if number in (3, 6):
            router.fleet["z"].over_budget = number == 3
            router.fleet.version += 1
            router.fleet.refresh(float(number))
            router.poll(float(number))
        router.submit(Request(RequestFacts(f"r{number}", "m", arrived=float(number))), float(number))
    log.end("it is over")
    assert "".join(record["send"] for record in records if "send" in record)[3:6] == "yyy"
    assert compare(records).difference is None
    told = next(record for record in records if record.get("event") == "figures")
    del told["backends"]["z"]["over_budget"]
    assert compare(records).difference is not None


def test_a_request_that_left_the_queue_has_the_time_at_which_it_left() -> None:
    records: Records = []
    source = PolicySource("test", PICK.format("least-load"), 0)
    log = EventLog(records.append, source)
    fleet = RecordedFleet([Backend("a", slots=1, models=frozenset({"m"}))], log)
    valve = RecordedValve(read_policy(source.text, source.name).rules, fleet, log)
    valve.submit(RequestFacts("first", "m"), 1.0)
    valve.submit(RequestFacts("second", "m"), 2.0)
    assert valve.cancel("second", 2.75)
    log.ended("second")
    assert (records[-1]["event"], records[-1]["request"], records[-1]["at"]) == ("ended", "second", 2.75)


def test_why_models_are_unknown_is_not_told() -> None:
    records: Records = []
    log = EventLog(records.append, PolicySource("", "", 0))
    backends = [Backend("a", models_unknown="no certificate for gpu.example"), Backend("b")]
    log.begin(Fleet(backends), Retries())
    assert [backend_from(one, 0.0).models_unknown for one in records[0]["backends"]] == ["unknown", ""]
    backends[0].models_unknown = "gpu.example refuses"
    log.figures(backends, 1.0)
    assert len(records) == 1, "another reason changes nothing"
    backends[0].models_unknown, backends[1].models_unknown = "", "gpu.example is not known"
    log.figures(backends, 2.0)
    assert records[1]["backends"] == {"a": {"models_unknown": ""}, "b": {"models_unknown": "unknown"}}
