"""Bounds on what a site's machine says of itself, from the policy file to the decision."""

from __future__ import annotations

import pytest

from policies.explain import explain_policy
from policies.files import CompiledPolicy, read_policy
from policies.host import HOST_FIGURES, HOST_FIGURES_VALID_S, HostBounds
from policies.valve import Valve
from policies.yamlfile import FileProblems
from tests.policies.builders import backend, decided, fleet, request


def policy(host: str, spill: str = "") -> CompiledPolicy:
    return read_policy(
        f"rules: [{{name: all, prefer: [{{site: local{spill}, host: {host}}}, {{site: '*'}}], "
        "queue: {wait: 5s, depth: 9}}]",
        "test",
    )


def test_a_busy_host_has_no_free_slot_in_its_tier_and_heals_by_itself() -> None:
    homes = fleet(backend("local", slots=8), backend("away", slots=2))
    valve = Valve(policy("{gpu_utilisation: {max: 90%}}").rules, homes)
    assert decided(valve.submit(request("a"), 1.0)) == "local"
    homes["local"].host, homes["local"].host_at = {"gpu_utilisation": 0.95}, 2.0
    assert [decided(valve.submit(request(name), 2.0)) for name in "bcd"] == ["away", "away", "hold"]
    homes["local"].host, homes["local"].host_at = {"gpu_utilisation": 0.9}, 3.0
    assert [decided(routing) for routing in valve.poll(3.0)] == ["local"]


def test_stale_figures_are_ignored() -> None:
    homes = fleet(backend("local", slots=8), backend("away"))
    valve = Valve(policy("{gpu_utilisation: {max: 90%}}").rules, homes)
    homes["local"].host, homes["local"].host_at = {"gpu_utilisation": 1.0}, 0.0
    assert decided(valve.submit(request("a"), HOST_FIGURES_VALID_S)) == "away"
    assert decided(valve.submit(request("b"), HOST_FIGURES_VALID_S + 0.1)) == "local"


def test_so_are_figures_that_did_not_come() -> None:
    bounds = HostBounds((("gpu_temperature", 0.0, 80.0), ("cpu", 0.2, 1.0)))
    one = backend("a")
    for figures, inside in (
        ({}, True),
        ({"gpu_temperature": 80.0}, True),
        ({"gpu_temperature": 80.1}, False),
        ({"gpu_temperature": 50.0, "cpu": 0.1}, False),
        ({"memory": 1.0}, True),
    ):
        one.host, one.host_at = figures, 1.0
        assert bounds.accept(one, 1.0) == inside, figures


def test_a_spill_above_full_sends_nothing_past_the_bounds() -> None:
    homes = fleet(backend("local", slots=1), backend("away", slots=1))
    rules = policy("{cpu: {max: 50%}}", ", spill: {enter: 300%, leave: 100%}").rules
    valve = Valve(rules, homes)
    homes["local"].host, homes["local"].host_at = {"cpu": 0.6}, 1.0
    assert [decided(valve.submit(request(name), 1.0)) for name in "ab"] == ["away", "hold"]


def test_when_its_wait_is_over_a_request_goes_there_all_the_same() -> None:
    homes = fleet(backend("local"))
    valve = Valve(policy("{cpu: {max: 50%}}").rules, homes)
    homes["local"].host, homes["local"].host_at = {"cpu": 0.6}, 1.0
    assert decided(valve.submit(request("a", arrived=1.0), 1.0)) == "hold"
    assert [decided(routing) for routing in valve.poll(6.0)] == ["local"]


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("{}", "say which figure"),
        ("{gpu: {max: 1}}", "unknown key"),
        ("{gpu_utilisation: {}}", "got none"),
        ("{gpu_utilisation: {max: 90}}", "did you mean '90%'"),
        ("{gpu_temperature: {min: 80, max: 70}}", "nothing fits"),
        ("{cpu: 0.5}", "cpu"),
    ],
)
def test_what_makes_no_sense_is_said(host: str, message: str) -> None:
    with pytest.raises(FileProblems) as caught:
        policy(host)
    assert message in str(caught.value)


def test_every_figure_has_a_key_and_is_told_in_words() -> None:
    bounds = ", ".join(f"{name}: {{min: 0.25, max: 0.5}}" for name in HOST_FIGURES)
    compiled = policy(f"{{{bounds}}}")
    host = compiled.rules.rules[0].tiers[0].host
    assert host == HostBounds(tuple((name, 0.25, 0.5) for name in HOST_FIGURES))
    words = " ".join(explain_policy(compiled).split())
    assert "only while its host has gpu_utilisation at least 0.25 and at most 0.5, " in words
