"""A policy that fails loses no request, so the operator has to be told."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from proxy.admin.http import state
from proxy.metrics import Metrics
from proxy.policy_failures import TOLD_EVERY_S, failing, failure_in_words
from proxy.status import _lines
from tests.policies.builders import Broken, one_tier
from tests.proxy.fakes import World

FIRST = "failed in 1 call, the least loaded backend chosen instead: ZeroDivisionError: choose"


def broken() -> World:
    world = World("a", "b")
    world.runtime.valve.swap(one_tier(Broken()), world.loop.now)
    return world


def metrics(world: World) -> str:
    registry = CollectorRegistry()
    registry.register(Metrics(world.runtime))
    return generate_latest(registry).decode()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "failed in" in record.getMessage()]


def test_log_status_and_metrics_tell_of_it(caplog: pytest.LogCaptureFixture) -> None:
    world = broken()
    (rule,) = world.runtime.valve.rules.rules
    guard, name = rule.guarded, f"policy {rule.policy_name} of rule '{rule.name}'"
    assert not failing(world.runtime.valve.rules)
    assert not [line for line in _lines(state(world.runtime, 0.0)) if line.startswith("! policy")]
    guard.decide(world.start().facts, list(world.runtime.fleet), 0.0)  # type: ignore[arg-type]
    world.runtime.sweep(world.loop.now)
    failures = guard.failures
    assert failures >= 2
    shown = state(world.runtime, 0.0)
    (found,) = shown["policy"]["failing"]
    assert (found["rule"], found["policy"], found["failures"]) == (rule.name, rule.policy_name, failures)
    words = failure_in_words(rule.name, rule.policy_name, failures, guard.last_failure)
    assert f"! {words}" in list(_lines(shown))
    assert told(caplog) == [words]
    assert words.startswith(f"{name} failed in {failures} calls, ")
    labels = f'{{policy="{rule.policy_name}",rule="{rule.name}"}}'
    assert f"tidegate_policy_failures_total{labels} {failures}.0\n" in metrics(world)


def test_the_log_gets_a_line_a_minute_and_the_count_outlives_a_reload(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = broken()
    rules, counts = world.runtime.valve.rules, world.runtime.observer.policies
    request = world.start().facts
    assert request is not None
    now = world.loop.now

    def fail() -> None:
        rules.rules[0].guarded.choose(request, list(world.runtime.fleet), now)

    counts.look(rules, now)
    before = sum(counts.counts.values())
    fail()
    counts.look(rules, now + TOLD_EVERY_S - 1.0)
    counts.look(rules, now + TOLD_EVERY_S)  # nothing new to tell
    assert len(told(caplog)) == 1
    fail()
    counts.look(rules, now + TOLD_EVERY_S)
    assert len(told(caplog)) == 2
    rules = one_tier(Broken())
    counts.look(rules, now)
    fail()
    counts.look(rules, now)
    assert sum(counts.counts.values()) == before + 3
    assert failing(rules)[0]["failures"] == 1


def test_what_a_policy_says_is_one_short_line() -> None:
    words = failure_in_words("all", "own", 1, "ZeroDivisionError: choose")
    assert words == f"policy own of rule 'all' {FIRST}"
    long = failure_in_words("all", "own", 1200, "KeyError: \n\nx" + "y" * 9000)
    assert "\n" not in long
    assert len(long) < 500
    assert "failed in 1,200 calls" in long
