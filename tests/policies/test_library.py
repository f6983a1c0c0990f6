"""Each ready policy file with a request for each of its branches. That they compile, and are explained:
`test_files.py` and `test_explain.py`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from policies.explain import explain_policy
from policies.files import library_names, library_policy, read_policy
from policies.state import Fleet
from policies.valve import Valve
from tests.policies.builders import backend, decided, fleet, request


def homes() -> Fleet:
    """The local site, three others, and what the library's comments ask for; one slot each."""
    own: dict[str, Any] = {"slots": 1, "data_classes": None}
    return fleet(
        backend("local", rtt_s=0.001, price_input=0.0, price_output=0.0, labels={"release": "stable"}, **own),
        backend(
            "near",
            location=(39.0, 117.2),
            rtt_s=0.01,
            price_input=2.0,
            price_output=4.0,
            carbon_gco2_kwh=650.0,
            labels={"release": "next"},
            **own,
        ),
        backend(
            "hydro",
            location=(36.6, 101.8),
            rtt_s=0.045,
            price_input=1.0,
            price_output=2.0,
            carbon_gco2_kwh=60.0,
            **own,
        ),
        backend(
            "cheap",
            location=(43.8, 87.6),
            rtt_s=0.08,
            price_input=0.3,
            price_output=0.6,
            carbon_gco2_kwh=390.0,
            **own,
        ),
    )


def at(hour: int, day: int = 23) -> float:
    """Unix time; 23 July 2026 is a Thursday."""
    return datetime(2026, 7, day, hour, tzinfo=UTC).timestamp()


ALL = ["local", "near", "hydro", "cheap"]
BRANCHES: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("cheapest-inside-sla", "gold", {"labels": {"sla": "gold"}}, ["local", "cheap", "hydro", "near"]),
    ("cheapest-inside-sla", "batch", {"labels": {"sla": "batch"}}, ["local", "cheap", "hydro"]),
    ("cheapest-inside-sla", "everyone else", {}, ["local", "cheap", "hydro", "near"]),
    ("green-first", "may wait", {"labels": {"task": "batch"}}, ["hydro", "cheap", "local", "near"]),
    ("green-first", "everyone else", {"labels": {"task": "chat"}}, ["hydro", "local", "cheap", "near"]),
    ("local-first", "local first", {}, ["local"]),
    ("model-upgrade-canary", "pinned", {"labels": {"release": "stable"}}, ["local"]),
    ("model-upgrade-canary", "canary", {"session": "t/30"}, ["near"]),
    ("model-upgrade-canary", "canary", {"session": "t/1"}, ["local", "hydro", "cheap"]),
    ("nearest-site", "nearest site", {}, ["local", "near", "hydro", "cheap"]),
    ("night-on-remote", "batch by night", {"labels": {"kind": "batch"}, "wall": at(15)}, []),
    ("night-on-remote", "batch by day", {"labels": {"kind": "batch"}, "wall": at(5)}, ["local"]),
    ("night-on-remote", "batch by day", {"labels": {"kind": "batch"}, "wall": at(15, 25)}, ["local"]),
    ("night-on-remote", "people", {"wall": at(15)}, ["local"]),
    ("sticky-sessions", "long conversations", {"prompt_tokens": 4000, "session": "t/1"}, ["local"]),
    ("sticky-sessions", "everything else", {"prompt_tokens": 100}, ["local"]),
    ("vip-stays-local", "classified stays home", {"data_class": "secret"}, ["local", "hold"]),
    ("vip-stays-local", "vip", {"priority": 5}, ["local"]),
    ("vip-stays-local", "everyone else", {}, ["local"]),
]
"""File, rule, facts of the request, and where such requests go, one after the other, as backends fill."""


@pytest.mark.parametrize(("name", "rule", "facts", "expected"), BRANCHES)
def test_each_branch_leads_where_its_comment_says(
    name: str, rule: str, facts: dict[str, Any], expected: list[str]
) -> None:
    compiled = read_policy(library_policy(name), name)
    assert f". {rule}\n" in explain_policy(compiled)
    valve = Valve(compiled.rules, homes())
    answers = [valve.submit(request(str(number), **facts), 1.0) for number in range(len(ALL) + 1)]
    assert {routing.rule for routing in answers} == {rule}
    names = [decided(routing) for routing in answers]
    assert names[: len(expected)] == expected
    if rule in ("batch", "pinned", "canary", "classified stays home"):
        assert set(names[len(expected) :]) <= {"hold"}  # a wall, or a part: nobody else
    if rule == "batch by night":
        assert set(names[:3]) == {"near", "hydro", "cheap"}


def test_every_rule_of_every_file_has_its_branch() -> None:
    rules = {
        (name, rule.name)
        for name in library_names()
        for rule in read_policy(library_policy(name), name).rules.rules
    }
    assert rules == {(name, rule) for name, rule, _, _ in BRANCHES}


def test_a_twentieth_of_the_conversations_tries_the_new_version() -> None:
    compiled = read_policy(library_policy("model-upgrade-canary"), "canary")
    machines = homes()
    for one in machines:
        one.slots = one.full_slots = 10_000
    valve = Valve(compiled.rules, machines)
    for number in range(4000):
        valve.submit(request(str(number), session=f"t/{number}"), 1.0)
    assert abs(machines["near"].in_flight / 4000 - 0.05) < 0.015


@pytest.mark.parametrize(("sla", "expected"), [("gold", "hydro"), ("silver", "cheap"), ("batch", "local")])
def test_the_cheapest_that_keeps_the_sla_is_chosen_of_each_class(sla: str, expected: str) -> None:
    """Where it costs nothing the first token comes after five seconds, at the next after one."""
    machines = homes()
    for one in machines:
        one.slots = one.full_slots = 10
    valve = Valve(read_policy(library_policy("cheapest-inside-sla"), "cheapest").rules, machines)
    machines["local"].ttft_fit, machines["cheap"].ttft_fit = (5.0, 0.0, 0.0), (1.0, 0.0, 0.0)
    for one in machines:
        one.in_flight = 1  # what was measured counts in full
    assert decided(valve.submit(request("r", labels={"sla": sla}), 1.0)) == expected
