"""From what is known of a target to its backend: models, slots, figures, and what to tell the operator."""

from __future__ import annotations

import json
from typing import Any

import pytest

from policies.state import NOT_ASKED, Backend, Fleet
from probes.base import ModelsSeen, ProbeResult, Sample, Target, Timing
from probes.status import Liveness, TargetStatus

URL = "http://127.0.0.1:8000"


def alive(rtt_s: float = 0.001) -> ProbeResult[Liveness]:
    return ProbeResult(True, "", 0.002, Liveness(rtt_s))


def dead() -> ProbeResult[Liveness]:
    return ProbeResult(False, "TCP connect: Connection refused", 0.001)


def listed(*names: str) -> ProbeResult[ModelsSeen]:
    return ProbeResult(True, "", 0.001, ModelsSeen(frozenset(names), dict.fromkeys(names, 2048), {}))


def refused(status: int) -> ProbeResult[Any]:
    return ProbeResult(False, f"GET /v1/models: {status}", 0.001, None, status)


def sampled(at: float, **figures: Any) -> ProbeResult[Sample]:
    return ProbeResult(True, "", 0.001, Sample(at=at, **figures))


def status_of(models: set[str] | None = None, slots: int | None = None) -> TargetStatus:
    target = Target(
        "a", URL, frozenset(models) if models is not None else None, slots, {"Authorization": "geheim"}
    )
    return TargetStatus.new(target, Timing())


def test_models_auto_are_those_it_serves() -> None:
    status = status_of()
    backend = Backend(name="a", models_unknown=NOT_ASKED, models_awaited=True)
    assert not status.apply(backend, 0.0)
    status.learn_models(listed("m", "n"), 0.0)
    assert status.apply(backend, 0.0)
    assert backend.models == {"m", "n"}
    assert backend.context_tokens == {"m": 2048, "n": 2048}
    assert not status.apply(backend, 0.0)
    assert status.misconfigured == []


def test_listed_models_count_until_it_is_known_what_it_serves() -> None:
    status, backend = status_of({"m", "n"}), Backend(name="a")
    status.apply(backend, 0.0)
    assert backend.models == {"m", "n"}
    status.learn_models(listed("m", "other"), 0.0)
    assert status.apply(backend, 0.0)
    assert backend.models == {"m"}
    assert backend.context_tokens == {"m": 2048}
    assert status.misconfigured == ["does not serve model n (it serves: m, other)"]


def test_a_failed_look_changes_nothing() -> None:
    status = status_of()
    status.learn_models(listed("m"), 0.0)
    status.learn_models(ProbeResult(False, "GET /v1/models: no answer within 1 s", 1.0), 10.0)
    assert status.served == {"m"}
    assert status.misconfigured == []


def test_what_an_operator_has_to_mend() -> None:
    status = status_of({"m"})
    status.learn_models(refused(401), 0.0)
    assert status.misconfigured == ["GET /v1/models: 401: is its key right?"]
    assert status.served == {"m"}  # a key may be good for chat and not for the list
    status = status_of()
    status.learn_models(refused(404), 0.0)
    assert status.misconfigured == ["GET /v1/models: 404: list its models in the configuration"]
    status.learn_models(listed(), 1.0)
    assert status.misconfigured == ["serves no model"]


@pytest.mark.parametrize(
    ("answer", "reason", "awaited"),
    [
        (None, NOT_ASKED, True),
        (refused(500), "GET /v1/models: 500: list its models in the configuration", True),
        (ProbeResult(False, "GET /v1/models: no answer", 1.0), "GET /v1/models: no answer", True),
        (refused(401), "GET /v1/models: 401: is its key right?", False),
        (refused(403), "GET /v1/models: 403: is its key right?", False),
        (refused(404), "GET /v1/models: 404: list its models in the configuration", False),
        (listed("m"), "", False),
        (listed(), "", False),
    ],
)
def test_why_models_are_unknown_and_whether_they_may_come(
    answer: ProbeResult[Any] | None, reason: str, awaited: bool
) -> None:
    status, backend = status_of(), Backend(name="a")
    if answer is not None:
        status.learn_check(alive(), 0.0)
        status.learn_models(answer, 0.0)
    status.apply(backend, 0.0)
    assert (backend.models_unknown, backend.models_awaited) == (reason, awaited)


def test_nothing_is_awaited_of_a_backend_that_is_down() -> None:
    status, backend = status_of(), Backend(name="a")
    status.learn_check(dead(), 0.0)
    status.apply(backend, 0.0)
    assert (backend.models_unknown, backend.models_awaited) == ("TCP connect: Connection refused", False)
    status, backend = status_of({"m"}), Backend(name="b")  # the configuration knows them
    status.learn_check(dead(), 0.0)
    status.apply(backend, 0.0)
    assert (backend.models_unknown, backend.models_awaited) == ("", False)


def test_slots_come_from_the_engine_unless_the_configuration_gives_them() -> None:
    for configured, reported, slots in [(None, 22.75, 22), (None, 0.4, 1), (None, None, 32), (24, 99.0, 24)]:
        status, backend = status_of({"m"}, configured), Backend("a", slots=configured or 32)
        status.apply(backend, 0.0)
        status.learn_metrics(sampled(0.0, max_concurrency=reported))
        assert status.apply(backend, 0.0) == (slots != (configured or 32))
        Fleet([backend]).refresh(0.0)
        assert backend.slots == backend.full_slots == slots


def test_figures_reach_the_backend_with_their_age() -> None:
    status, backend = status_of(), Backend(name="a")
    status.learn_metrics(sampled(5.0, running=3, waiting=2, kv_use=0.5))
    status.apply(backend, 5.5)
    assert (backend.running, backend.waiting, backend.kv_use, backend.sampled_at) == (3, 2, 0.5, 5.0)
    status.learn_metrics(ProbeResult(False, "GET /metrics: 404", 0.0, None, 404))
    status.apply(backend, 9.0)
    assert backend.sampled_at == 5.0
    assert backend.saturation(9.0) == 0.0  # too old to count
    assert status.metrics_failures == 1


def test_one_slow_handshake_does_not_move_the_round_trip() -> None:
    status = status_of()
    for rtt_s in (0.004, 0.003, 0.5):
        status.learn_check(alive(rtt_s), 0.0)
    assert status.rtt_s == 0.003


def test_nothing_is_said_of_a_backend_before_the_first_check() -> None:
    status, backend = status_of(), Backend(name="a")
    status.apply(backend, 0.0)
    assert backend.probed_up
    assert status.snapshot(0.0)["up"] is None


def test_a_new_backend_object_is_brought_in_line_at_once() -> None:
    status = status_of()
    status.learn_check(dead(), 1.0)
    status.learn_models(listed("m"), 1.0)
    backend = Backend(name="a")
    assert status.apply(backend, 2.0)
    assert not backend.probed_up
    assert backend.models == {"m"}


def test_the_snapshot_is_plain_and_holds_no_key() -> None:
    status = status_of({"m", "gone"})
    assert json.dumps(status.snapshot(0.0))
    status.learn_check(alive(0.004), 1.0)
    status.learn_models(listed("m"), 1.0)
    status.learn_metrics(
        sampled(2.0, running=1, kv_use=0.5, prefix_queries=8.0, prefix_hits=2.0, max_concurrency=9.0)
    )
    status.learn_check(dead(), 3.0)
    shown = status.snapshot(4.0)
    assert "geheim" not in json.dumps(shown)
    assert shown["up"] is True
    assert (shown["reason"], shown["checked_age_s"]) == ("TCP connect: Connection refused", 1.0)
    assert (shown["since_s"], shown["rtt_ms"], shown["slots_reported"]) == (3.0, 4.0, 9)
    assert shown["engine"]["age_s"] == 2.0
    assert shown["engine"]["prefix_hit_rate"] == 0.25
    assert shown["misconfigured"] == ["does not serve model gone (it serves: m)"]


def test_the_snapshot_tells_why_and_since_when_it_is_down() -> None:
    status = status_of()
    status.learn_check(alive(), 0.0)
    for now in (2.0, 4.0, 6.0):
        status.learn_check(dead(), now)
    shown = status.snapshot(7.0)
    assert (shown["up"], shown["since_s"], shown["reason"]) == (False, 1.0, "TCP connect: Connection refused")
