"""Event logs that were changed into something else: a replay says in which line and what is wrong, or finds the
difference, and nothing else ever."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.eventlog import CONFIGURED, FACTS, OBSERVED
from probes.base import Timing
from sim.cluster import SECOND
from sim.members import Change, Incident
from sim.record_forms import BackendForm, FactsForm, FiguresForm, damage
from sim.recording import BadLogError, Recording
from sim.replay import compare
from tests.patience import examples
from tests.sim.damage import DROP, NEVER, Records, changed, kind_of, paths_in, places
from tests.sim.test_cluster import every
from tests.sim.test_replay import eventful, record


def brief() -> Records:
    """As many kinds of records as few requests can make."""
    rule = "{name: all, prefer: [{site: local}, {site: '*'}], pick: least-load, queue: {wait: 1s, depth: 3}}"
    incidents = [
        Incident(SECOND, "a", Change.FAIL),
        Incident(2 * SECOND, "a", Change.FULL, retry_after_s=1.0),
        Incident(5 * SECOND // 2, "a", Change.MENDED),
        Incident(3 * SECOND // 2, "b", Change.DOWN),
        Incident(3 * SECOND, "b", Change.UP),
    ]
    scene = {
        "members": [{"name": "a", "slots": 2, "rtt": 2_000}, {"name": "b", "site": "away", "slots": 1}],
        "arrivals": every(0.1, 40, output=40),
        "incidents": incidents,
        "patience_s": 0.5,
        "timing": Timing(interval_s=0.3, retry_s=0.2, timeout_s=0.1, down=2),
    }
    return record(scene, f"rules: [{rule}]")


RECORDS = brief()


def refusal(records: Records) -> str:
    """What is said against a log."""
    with pytest.raises(BadLogError) as caught:
        compare(records)
    return str(caught.value)


def test_the_log_that_is_damaged_here_has_every_kind_of_record() -> None:
    assert {kind_of(one) for one in RECORDS} == {
        *("start", "arrival", "first token", "failed", "ended", "freed", "poll", "figures", "refresh", "end"),
        *("send", "hold", "reject"),
    }


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (FactsForm, {field.name for field in FACTS}),
        (BackendForm, {*CONFIGURED, "breaker", "adaptive"}),
        (FiguresForm, set(OBSERVED)),
    ],
)
def test_forms_have_the_fields_that_are_recorded(form: Any, names: set[str]) -> None:
    assert set(form.model_fields) == names


def test_what_no_field_may_hold_is_found_in_each() -> None:
    for place, path in places(RECORDS):
        assert not damage(RECORDS[place])
        problem = damage(changed(RECORDS, place, path, NEVER)[place])
        assert str(path[0]) in problem, path


def test_a_field_that_is_missing_is_found_in_each_record() -> None:
    for place, path in places(RECORDS):
        if len(path) == 1:
            assert damage(changed(RECORDS, place, path, DROP)[place]), path


def test_damage_is_refused_with_its_line_and_field() -> None:
    for place in {kind_of(one): one["n"] for one in RECORDS}.values():
        field = "n" if kind_of(RECORDS[place]) != "arrival" else "request"
        problem = refusal(changed(RECORDS, place, (field,), NEVER))
        assert problem.startswith(f"line {place + 1}: {field}"), place
    assert refusal(changed(RECORDS, 2, ("request", "arrived"), "noon")) == (
        "line 3: request.arrived: expected a number, got 'noon'"
    )


ANYTHING = st.one_of(
    st.sampled_from(
        [DROP, None, True, False, 0, -1, 2**63 - 1, 1e308, -1e308, 5e-324, "", "?", [], {}, [[]]]
    ),
    st.sampled_from([value for one in RECORDS for value in one.values()]),
    st.integers(0, len(RECORDS)),
    st.floats(-10.0, 100.0),
)


@given(st.data())
@settings(max_examples=examples(100))
def test_whatever_a_field_holds_a_replay_ends_with_an_answer(data: st.DataObject) -> None:
    records = RECORDS
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(records) - 1))
        path = data.draw(st.sampled_from(list(paths_in(records[place])) or [("n",)]))
        records = changed(records, place, path, data.draw(ANYTHING))
    with suppress(BadLogError):
        compare(records)


@settings(max_examples=30)
@given(st.lists(st.integers(0, len(RECORDS) - 1), min_size=1, max_size=4), st.integers(0, len(RECORDS)))
def test_records_out_of_place_end_with_an_answer(copies: list[int], to: int) -> None:
    records = [*RECORDS[:to], *(RECORDS[place] for place in copies), *RECORDS[to:]]
    with suppress(BadLogError):
        compare([{**one, "n": number} for number, one in enumerate(records)])


def test_a_request_that_arrives_twice_a_backend_that_is_none_and_a_second_log_are_named() -> None:
    def problem(place: int, record: dict[str, Any]) -> str:
        return refusal([*RECORDS[:place], {**record, "n": place}, *RECORDS[place:]])

    arrival = next(one for one in RECORDS if kind_of(one) == "arrival")
    twice = arrival["n"] + 2  # behind its decision
    assert (
        problem(twice, arrival)
        == f"line {twice + 1}: the request '{arrival['request']['id']}' has arrived already"
    )
    figures = {"event": "figures", "at": 0.0, "backends": {"z": {"full_slots": 2}}}
    assert problem(1, figures) == "line 2: its first line has no backend 'z'"
    assert problem(1, RECORDS[0]) == "line 2: another log begins"
    assert problem(len(RECORDS), RECORDS[-1]).endswith(": the log goes on behind its end")


def test_a_policy_that_cannot_be_read_is_a_fault_of_the_first_line() -> None:
    with pytest.raises(BadLogError, match=r"(?s)line 1: its policy cannot be read: .*rules"):
        compare(changed(RECORDS, 0, ("policy", "text"), "rules: 7"))


# Files


def written(file: Path, records: Records) -> Path:
    file.write_bytes(b"".join(orjson.dumps(one, option=orjson.OPT_APPEND_NEWLINE) for one in records))
    return file


def test_a_file_is_read_one_record_at_a_time(tmp_path: Path) -> None:
    file = written(tmp_path / "log.jsonl", RECORDS)
    with file.open("ab") as more:
        more.write(b"no JSON\n")
    recording = Recording(file)
    reading = iter(recording)
    assert next(reading) == RECORDS[0]
    assert recording.position == len(orjson.dumps(RECORDS[0])) + 1
    with pytest.raises(BadLogError, match=f"line {len(RECORDS) + 1}: this is no JSON"):
        list(reading)
    assert recording.position == recording.size == file.stat().st_size


def test_a_replay_holds_one_record_of_the_log() -> None:
    records, pulled, told = eventful(), 0, []

    def one_by_one() -> Any:
        nonlocal pulled
        for pulled, one in enumerate(records, 1):  # noqa: B007
            yield one

    def progress(done: int) -> None:
        assert pulled <= done + 1
        told.append(done)

    assert compare(one_by_one(), progress).difference is None
    assert told == sorted(told)
    assert told[-1] > len(records) - 2000


@pytest.mark.parametrize("cut", [1, 20])
def test_a_last_line_that_is_not_whole_is_named_and_what_came_before_is_compared(
    cut: int, tmp_path: Path
) -> None:
    file = written(tmp_path / "log.jsonl", RECORDS[:50])
    file.write_bytes(file.read_bytes()[: -1 - cut])
    found = compare(recording := Recording(file))
    assert recording.torn == 50
    assert (found.difference, found.end) == (None, "")
    assert found.decisions == sum("decision" in one for one in RECORDS[:49])


def test_a_last_line_that_only_lacks_its_end_is_whole(tmp_path: Path) -> None:
    file = written(tmp_path / "log.jsonl", RECORDS)
    file.write_bytes(file.read_bytes()[:-1])
    found = compare(recording := Recording(file))
    assert (recording.torn, found.end) == (0, "the workload is over")
