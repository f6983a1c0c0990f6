from __future__ import annotations

from math import nan
from typing import Any

import pytest

from sim.calibrate import Search
from sim.from_ledger import InForce, Served, read_past
from sim.ledger_speed import FEW, LEAST, MOST, busiest, profile_from
from sim.timings import Timing
from sim.workload import Arrival, Workload
from tests.sim.ledgers import EPOCH, RTT, played, row_of


def workload(count: int = 40, every_ms: int = 400) -> Workload:
    """Sessions, tenants, classes and prompts that begin alike."""
    return Workload(
        "made",
        [
            Arrival(
                number * every_ms * 1000,
                1200 + 13 * number,
                60 + number % 7,
                (number % 5, 100 + number),
                tenant="vip" if number % 4 == 0 else "acme",
                model="m",
                priority=3 if number % 4 == 0 else 0,
                session=f"s{number % 6}",
                labels=(("kind", "batch"),) if number % 4 == 0 else (),
            )
            for number in range(count)
        ],
        512,
    )


KEYS = {"k": (3, {"kind": "batch"})}


def test_known_rows_give_back_the_workload() -> None:
    made = workload()
    past = read_past([row_of(trip) for trip in played(made)], {}, KEYS)
    assert past.workload.arrivals == made.arrivals
    assert past.workload.unit_tokens == 512
    assert past.epoch == EPOCH


def test_what_another_policy_decided_is_told() -> None:
    rows = [row_of(trip, rule="gone" if n < 3 else "all") for n, trip in enumerate(played(workload()))]
    changed = rows[10].arrived - 0.2
    before, rule = read_past(rows, present=InForce(frozenset({"all"}), changed)).notes[:2]
    assert before.startswith("10 of 40 requests came before the policy file was last changed")
    assert "--from-ledger 2023-11-14T23:53:24 leaves them out" in before
    assert rule == "3 of 40 requests met a rule that the present policy file does not have"
    told = read_past(rows, present=InForce(frozenset({"all", "gone"}), EPOCH)).notes
    assert told == read_past(rows).notes


def test_what_was_is_what_the_rows_say() -> None:
    trips = played(workload())
    past = read_past([row_of(trip, cost_nano=7, currency="EUR") for trip in trips], {}, KEYS)
    for trip, one in zip(trips, past.served, strict=True):
        assert one.at == pytest.approx(EPOCH + trip.facts.arrived, abs=1e-6)
        assert one.site == {"appliance": "local", "nj": "nanjing"}[trip.backend]
        assert (one.ttft_s, one.tpot_s) == (pytest.approx(trip.ttft_s), pytest.approx(trip.tpot_s))
        assert (one.outcome, one.cost_nano) == ("ok", 7)
    assert {one.site for one in past.served} == {"local", "nanjing"}
    assert past.backends["nj"].rtt_s == RTT["nj"] / 1e6
    assert past.backends["nj"].slots == 64
    assert past.backends["nj"].models == past.backends["appliance"].models == {"m"}


def one_row(**changes: Any) -> Any:
    (trip,) = played(workload(1))
    return row_of(trip, **changes)


REFUSED = {
    "prompt_tokens": 0,
    "completion_tokens": 0,
    "ttft_s": None,
    "backend": "",
    "site": "",
    "attempts": 0,
}


def test_a_request_that_the_router_refused_comes_with_estimated_lengths() -> None:
    changes = REFUSED | {"outcome": "rejected", "code": "queue_full", "served_model": "", "model": "gpt"}
    past = read_past([one_row(**changes, body_bytes=4000, expected_tokens=77)], {"gpt": "m"})
    (arrival,) = past.workload
    assert (arrival.prompt_tokens, arrival.output_tokens, arrival.model) == (1000, 77, "m")
    assert past.served[0][2:6] == ("rejected", "", None, None)
    assert any(note.startswith("of 1 requests no lengths are known") for note in past.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            REFUSED | {"outcome": "rejected", "code": "rate_limit_tokens"},
            "refused by a limit or for their key",
        ),
        (
            REFUSED | {"outcome": "rejected", "code": "model_not_allowed"},
            "refused by a limit or for their key",
        ),
        (REFUSED | {"outcome": "client_error", "code": "context_length"}, "errors of their clients"),
        ({"endpoint": "embeddings"}, "are for no text"),
        ({"attempts": 0}, "answered from what was kept"),
        (REFUSED | {"outcome": "client_gone"}, "had left before they were sent"),
    ],
)
def test_what_is_no_part_of_the_workload_is_counted(changes: dict[str, Any], said: str) -> None:
    good = one_row()
    past = read_past([good, one_row(**changes)])
    assert len(past.workload) == len(past.served) == 1
    assert any(note.startswith("1 requests ") and said in note for note in past.notes)
    with pytest.raises(ValueError, match=f"no request for text is in this part of the ledger.*{said}"):
        read_past([one_row(**changes)])


def test_an_empty_ledger_is_said_to_be_one() -> None:
    with pytest.raises(ValueError, match=r"no request for text is in this part of the ledger$"):
        read_past([])


def test_what_is_not_known_is_noted() -> None:
    rows = [one_row(stream=False, ttft_s=None), one_row(outcome="cut"), one_row(key_id="gone")]
    past = read_past(rows, {}, KEYS)
    assert any("1 of 3 requests were no streams" in note for note in past.notes)
    assert any("1 answers ended early" in note for note in past.notes)
    assert any("of 1 requests the key is gone" in note for note in past.notes)
    assert [one.outcome for one in past.served] == ["ok", "failed", "ok"]
    assert past.served[0] == Served(EPOCH, False, "ok", "local", None, None, None)


def test_rows_of_older_versions_tell_no_round_trip() -> None:
    past = read_past([one_row(candidates=[["nj", 0.5, 3]])])
    assert "nj" not in past.backends


# Speed


def timings(count: int, every_ms: float = 100.0) -> list[Timing]:
    return [Timing(round(n * every_ms * 1000), 500, 50, 100_000.0, 2_000_000.0) for n in range(count)]


def test_the_busiest_requests_are_taken() -> None:
    assert busiest(timings(10)) == timings(10)
    quiet, busy = timings(MOST, 1000.0), timings(MOST, 10.0)
    late = [replaced._replace(at=replaced.at + 10**10) for replaced in busy]
    assert busiest([*quiet, *late, *(one._replace(at=one.at + 10**11) for one in quiet)]) == late


def test_too_few_answers_make_no_profile() -> None:
    with pytest.raises(ValueError, match=f"29 complete answers in the ledger, {LEAST} are the least"):
        profile_from("a", timings(29), 0.0, 4)


def test_few_answers_are_called_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.ledger_speed.SEARCH", Search(starts=1, evaluations=24))
    assert f"(few: {FEW} would tell more)" in profile_from("a", timings(LEAST), 0.0, 4)[1]
    assert "few" not in profile_from("a", timings(FEW), 0.0, 4)[1]


def test_a_fitted_profile_foretells_what_was() -> None:
    """The rows of a simulated appliance, before whose engine a server takes 0.3 s; its requests are simulated again
    with what was fitted to them."""
    trips = played(workload(240, 700))
    past = read_past([row_of(trip) for trip in trips])
    before = 300_000.0
    seen = [
        one._replace(ttft=one.ttft + before, e2e=one.e2e + before)
        for one in past.backends["appliance"].timings
    ]
    assert len(seen) >= LEAST
    profile, told = profile_from("appliance", seen, 0.0, 6)
    assert "fitted to the ledger's own times" in told
    from sim.calibrate import measured_times, replay
    from sim.profile import engine_settings

    measured = measured_times(seen)
    again = replay(engine_settings(profile), seen, len(seen))
    again[[0, 2]] += profile.overhead_us
    assert again.mean(axis=1) == pytest.approx(measured.mean(axis=1), rel=0.1)


def test_answers_that_are_no_streams_tell_no_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.ledger_speed.SEARCH", Search(starts=1, evaluations=24))
    unseen = [one._replace(ttft=nan) for one in timings(LEAST)]
    with pytest.raises(ValueError, match="none of its answers was a stream"):
        profile_from("a", unseen, 0.0, 4)
    mixed = [*unseen[::2], *timings(LEAST)[1::2]]
    assert profile_from("a", mixed, 0.0, 4)[0].overhead_us > 0.0


def test_the_network_is_no_part_of_an_engines_time() -> None:
    near = timings(LEAST)
    far = [one._replace(ttft=one.ttft + 5e4, e2e=one.e2e + 5e4) for one in near]
    assert profile_from("a", near, 0.0, 4)[0].step == profile_from("a", far, 0.05, 4)[0].step
