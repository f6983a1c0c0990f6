from __future__ import annotations

import pytest

from policies.explain import WIDTH, explain_policy, tier_in_words
from policies.files import library_names, library_policy, read_policy


def explained(text: str) -> str:
    return explain_policy(read_policy(text, "p.yaml"))


def rule(text: str) -> str:
    """What is said of the only rule of a file, on one line."""
    heading, words, _ = explained(f"rules: [{{name: all, {text}}}]").split("\n\n", 2)
    assert heading == "p.yaml: 1 rule, for every request."
    return " ".join(words.split()).removeprefix("1. all All requests. ")


def requests(when: str) -> str:
    """How the requests of a condition are called."""
    words = explained(f"rules:\n  - {{name: first, when: {{{when}}}}}\n  - name: all").split("\n\n")[1]
    return " ".join(words.partition("   Any backend")[0].split()).removeprefix("1. first ")


def test_the_default_policy_in_words() -> None:
    assert (
        explain_policy(read_policy(library_policy("local-first"), "local-first"))
        == """\
local-first: 1 rule, for every request.

1. local first
   All requests.
   They are offered, in this order, to
     a) site local, while a slot is free; from 85% full until less than 70% full it is reported as
        spilling;
     b) any other backend, while a slot is free.
   In each, weighted-qps chooses.
   When none has room, a request waits for up to 10 s and then goes to the least loaded backend that
   may serve it, unless all are 150% full. 200 may wait at once; one more is answered 429.

weighted-qps: Requests per second in proportion to `weight`, each backend below its own limit.
"""
    )


def test_rules_are_numbered_and_each_policy_is_explained_once() -> None:
    text = explained(
        """\
rules:
  - {name: classified stays home, when: {data_class: [restricted, secret]}, sites: [local]}
  - {name: trial, when: {tenant: acme}, pick: random}
  - {name: rest, prefer: [{site: local}, {site: remote, pick: random}], pick: least-load}
"""
    )
    assert text.startswith(
        "p.yaml: 3 rules. The first that matches a request decides.\n\n1. classified stays home\n"
    )
    assert "\n\n3. rest\n   All other requests.\n" in text
    assert text.endswith(
        "\n\nleast-load: The emptiest: least saturation, so that large and small backends compare.\n"
        "random: By chance, in proportion to `weight`.\n"
    )


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("data_class: [restricted, secret]", "Requests with data class restricted or secret."),
        ("model: 'qwen*', tenant: [a, b, c]", "Requests for model qwen*, of tenant a, b or c."),
        ("endpoint: chat, stream: true", "Streamed requests to endpoint chat."),
        ("stream: false", "Unstreamed requests."),
        ("priority: 5", "Requests with priority 5."),
        ("priority: {min: 5}", "Requests with priority at least 5."),
        ("prompt_tokens: {max: 8000}", "Requests with a prompt of at most 8000 tokens (estimated)."),
        ("prompt_tokens: {min: 1, max: 9}", "Requests with a prompt of 1 to 9 tokens (estimated)."),
        ("labels: {team: sales, kind: batch}", "Requests labelled team=sales and kind=batch."),
        ("sla: [gold, silver], task: chat", "Requests of SLA class gold or silver, for the task chat."),
        ("time: 22:00-06:00", "Requests from 22:00 to 06:00 (UTC)."),
        ("days: [mon-fri, sun]", "Requests on mon-fri and sun (UTC)."),
        ("time: 22:00-06:00, days: sat", "Requests from 22:00 to 06:00 on sat (UTC)."),
    ],
)
def test_which_requests(when: str, expected: str) -> None:
    assert requests(when) == expected


def test_a_condition_without_conditions_is_none() -> None:
    assert rule("when: {}, pick: random").startswith(
        "Any backend with a free slot may serve them; random chooses."
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sites: local", "They never go anywhere but site local, not even when every backend there is down."),
        ("sites: [nanjing, suzhou]", "They never go anywhere but site nanjing or suzhou,"),
        ("sites: [remote]", "They never go anywhere but any remote site,"),
        ("sites: ['*']", "Any backend with a free slot may serve them; least-load chooses."),
        ("prefer: [{site: nj}]", "They go to site nj and nowhere else; least-load chooses."),
        (
            "prefer: [{site: nj, spill: {enter: 0.9, leave: 0.5}, pick: random}]",
            "They go to site nj and nowhere else; random chooses. From 90% full until less than 50% full it is "
            "reported as spilling.",
        ),
        (
            "prefer: [{backend: [a, b]}, {site: '*'}]",
            "a) backend a or b, while a slot is free; b) any other backend, ",
        ),
        ("prefer: [{labels: {card: h20}}]", "They go to any backend labelled card=h20 and nowhere else;"),
        (
            "prefer: [{site: nj, labels: {card: h20}}]",
            "They go to any backend at site nj labelled card=h20 and nowhere",
        ),
        ("prefer: [{site: nj, backend: [a, b]}]", "They go to backend a or b at site nj and nowhere else;"),
        (
            "prefer: [{site: local, spill: {enter: 120%, leave: 90%}}, {site: remote}]",
            "a) site local; without a free slot too, so that requests queue in its engines, until it is 120% full; "
            "from then on, until it is less than 90% full, only while a slot is free; b) any remote site, while a "
            "slot is free.",
        ),
        (
            "prefer: [{site: a, pick: random}, {site: b}]",
            "a) site a, while a slot is free; random chooses; b) site b,",
        ),
        ("prefer: [{site: a, pick: random}, {site: b}]", "Otherwise, least-load chooses."),
        (
            "prefer: [{site: a, pick: random}, {site: b, pick: random}]",
            "b) site b, while a slot is free; random chooses. When",
        ),
        (
            "pick: {policy: weighted-qps, max_qps: {a: 5, b: 2.5}}",
            "weighted-qps chooses (with max_qps {a: 5, b: 2.5}).",
        ),
        (
            "pick: {policy: geo, home: [39.9, 116], skip_full: false}",
            "geo chooses (with home [39.9, 116], skip_full false).",
        ),
        ("pick: random, weights: {a: 3, b: 0.5}", "Weights here: a=3 and b=0.5."),
        (
            "require: {operator: x, labels: {trust: contracted}}",
            "Nobody else may ever serve them, not even when all of these are down: any backend labelled "
            "trust=contracted of operator x. Any backend with a free slot may serve them;",
        ),
        (
            "prefer: [{price: {max: 2}}, {price: {min: 1, output: {max: 1.5}}, carbon: {min: 10, max: 400}}]",
            "a) any backend with input and output together at most 2 per million tokens, while a slot is free; b) "
            "any other backend with input and output together at least 1 per million tokens, output at most 1.5 "
            "per million tokens and carbon at least 10 and at most 400 g/kWh, while a slot is free.",
        ),
        (
            "prefer: [{site: remote, rtt: {max: 50ms}}, {rtt: {min: 0.2s, max: 1s}}]",
            "a) any remote site with a measured round trip of at most 50 ms, while a slot is free; b) any other "
            "backend with a measured round trip of at least 200 ms and at most 1 s, while a slot is free.",
        ),
        (
            "avoid: [{backend: a}, {labels: {card: l40}}]",
            "They are offered, in this order, to a) any backend but those below, while a slot is free; b) what is "
            "avoided, while a slot is free: backend a or any backend labelled card=l40. In each, least-load",
        ),
        (
            "prefer: [{site: local, pick: random}, {site: remote}], avoid: [{site: x}]",
            "b) any remote site, while a slot is free; c) of the above, what is avoided, while a slot is free: "
            "site x. Otherwise, least-load chooses.",
        ),
        (
            "split: [{name: next, share: 5%, backend: a, strict: true}, {name: rest, share: 0.95}]",
            "They are split by session, those without one each for itself: - 5% to next: backend a; while none of "
            "these is available, they are refused; - 95% to rest: any other backend; while none of these is "
            "available, they go to other parts. What follows is about the backends of a request's part.",
        ),
        ("queue: {wait: 90s, depth: 3}", "waits for up to 90 s and then"),
        (
            "queue: {wait: 2h}",
            "waits for up to 2 h and then goes to the least loaded backend that may serve it, unless all are 150% "
            "full. 200 may",
        ),
        (
            "queue: {wait: 0, overflow: 200%}",
            "goes to the least loaded backend that may serve it at once, unless all are 200% full.",
        ),
        ("queue: {depth: 0}", "When none has room, a request is answered 429 at once."),
        (
            "queue: {cold_start: 8m}",
            "one more is answered 429. When nothing but a standby may serve it, a request waits for up to 8 min.",
        ),
        ("queue: {cold_start: 0}", "nothing but a standby may serve it, a request is answered 503 at once."),
    ],
)
def test_where_they_go(text: str, expected: str) -> None:
    assert expected in rule(text)


@pytest.mark.parametrize("name", library_names())
def test_library_files_are_explained_in_lines_that_fit(name: str) -> None:
    text = explain_policy(read_policy(library_policy(name), name))
    assert text.startswith(f"{name}: ")
    assert all(len(line) <= WIDTH and line == line.rstrip() for line in text.splitlines())


def test_tiers_are_named_for_those_who_ask_why() -> None:
    (plain, avoiding) = read_policy(
        "rules:\n  - {name: a, when: {tenant: x}, prefer: [{site: local}, {site: '*'}]}\n"
        "  - {name: b, avoid: [{site: x}]}",
        "p.yaml",
    ).file.rules
    assert [tier_in_words(plain, tier) for tier in range(3)] == ["site local", "any other backend", ""]
    assert [tier_in_words(avoiding, tier) for tier in range(3)] == ["any backend", "what it avoids", ""]


def test_times_among_parameters_have_their_unit_however_they_are_written() -> None:
    """So that who meant milliseconds sees it."""
    assert "cost chooses (with ttft 500 s, tpot 50 ms, money 3)." in rule(
        "pick: {policy: cost, ttft: 500, tpot: 50ms, money: 3}"
    )
    assert "(with ttft null)." in rule("pick: {policy: cost, ttft: null}")
