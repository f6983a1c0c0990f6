from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

import policies
from policies.base import BackendView, RequestFacts, Send
from policies.explain import explain_policy
from policies.filechecks import KEYED_BY_BACKEND, LISTS_SITES, KnownKeys
from policies.files import (
    DEFAULT_POLICY,
    CompiledPolicy,
    KnownNames,
    library_names,
    library_policy,
    read_policy,
)
from policies.fileschema import PolicyFile, offset_seconds, weekday_numbers, window_minutes
from policies.match import Hours, Match, Selector
from policies.rules import Queue, Spill, Tier
from policies.state import Backend, Fleet
from policies.weights import WithWeights
from policies.yamlfile import BadValueError, FileProblems, Problem, parse_yaml
from proxy.access.keys import _WORD
from tests.patience import examples

KNOWN = KnownNames(
    [
        BackendView("appliance"),
        BackendView("nj", site="nanjing", data_classes=frozenset({"public", "internal"})),
        BackendView("sz", site="suzhou", data_classes=frozenset({"public"}), labels={"card": "h20"}),
    ],
    sites=frozenset({"beijing"}),
)

LABELLED = KnownNames(
    [
        BackendView("appliance", labels={"release": "stable"}, price_input=0.0, price_output=0.0),
        BackendView("nj", site="nanjing", labels={"release": "next"}, price_input=0.2, price_output=0.4),
        BackendView("xn", site="xining", carbon_gco2_kwh=60.0, price_input=1.0, price_output=2.0),
        BackendView("sh", site="shanghai", carbon_gco2_kwh=390.0),
        BackendView("xa", site="xian", carbon_gco2_kwh=650.0),
    ],
)
"""All that the library speaks of."""

LAST = "\n  - name: everything else"


def problems(text: str, known: KnownNames | None = KNOWN) -> str:
    with pytest.raises(FileProblems) as caught:
        read_policy(text, "p.yaml", known)
    return str(caught.value)


def warnings(text: str) -> list[str]:
    return [
        f"{problem.line}:{problem.column}: {problem.path}: {problem.message}"
        + (f" (did you mean {problem.suggestion}?)" if problem.suggestion else "")
        for problem in read_policy(text, "p.yaml", KNOWN).warnings
    ]


def test_a_file_is_compiled_rule_by_rule() -> None:
    compiled = read_policy(
        """\
utc_offset: "+08:00"
rules:
  - {name: classified stays home, when: {data_class: [restricted]}, sites: [local]}
  - name: much
    when:
      model: "qwen*"
      tenant: [acme, globex]
      endpoint: chat
      priority: 5
      prompt_tokens: {min: 100, max: 8000}
      stream: true
      labels: {team: sales}
      time: 22:00-06:00
      days: [fri-sat, mon]
    prefer:
      - {site: local, spill: {enter: 120%, leave: 0.9}}
      - {labels: {card: h20}, pick: power-of-two}
      - {backend: [nj, sz]}
    pick: {policy: weighted-qps, max_qps: {nj: 5}}
    queue: {wait: 500ms, depth: 7, cold_start: 8m}
  - name: everything else
""",
        "p.yaml",
        KNOWN,
    )
    home, much, rest = compiled.rules.rules
    assert (home.match, home.require) == (
        Match(data_classes=frozenset({"restricted"})),
        Selector(sites=frozenset({"local"})),
    )
    assert (home.policy_name, home.tiers, home.queue) == ("least-load", (Tier(),), Queue(10.0, 200))
    assert much.match == Match(
        models=("qwen*",),
        tenants=frozenset({"acme", "globex"}),
        endpoints=frozenset({"chat"}),
        min_priority=5,
        max_priority=5,
        min_prompt_tokens=100,
        max_prompt_tokens=8000,
        stream=True,
        labels={"team": "sales"},
        hours=Hours(1320, 360, frozenset({0, 4, 5}), 8 * 3600),
    )
    assert [(tier.selector, tier.spill, tier.policy_name) for tier in much.tiers] == [
        (Selector(sites=frozenset({"local"})), Spill(1.2, 0.9), ""),
        (Selector(labels={"card": "h20"}), None, "power-of-two"),
        (Selector(backends=frozenset({"nj", "sz"})), None, ""),
    ]
    assert [chooser.name for chooser in much.choosers] == ["weighted-qps", "power-of-two", "weighted-qps"]
    assert (much.policy_name, much.queue) == ("weighted-qps", Queue(0.5, 7, cold_start_s=480.0))
    assert rest.matches_all
    assert compiled.warnings == []


def test_the_hash_tells_versions_apart() -> None:
    one, same, other = (read_policy(f"rules: [{{name: {name}}}]", "p.yaml") for name in ("a", "a", "b"))
    assert one.text_hash == same.text_hash != other.text_hash
    assert len(one.text_hash) == 64


# --- what admins get wrong -----------------------------------------------------------------------------------

MISTAKES = {
    "key misspelt": (
        "rules:\n  - name: all\n    preffer: [{site: local}]\n",
        """\
p.yaml:3:5: rules[0].preffer: unknown key (did you mean 'prefer'?)
  3 |     preffer: [{site: local}]
    |     ^""",
    ),
    "key at the wrong place": (
        "rules:\n  - name: all\n    spill: {enter: 0.85, leave: 0.7}\n    prefer: [{site: local}]\n",
        """\
p.yaml:3:5: rules[0].spill: unknown key here; it belongs in rules[].prefer[]
  3 |     spill: {enter: 0.85, leave: 0.7}
    |     ^""",
    ),
    "star without quotes": (
        "rules:\n  - name: all\n    prefer: [{site: local}, {site: *}]\n",
        """\
p.yaml:3:36: a bare * starts an alias in YAML; put it in quotes (did you mean "*"?)
  3 |     prefer: [{site: local}, {site: *}]
    |                                    ^""",
    ),
    "leave above enter": (
        "rules:\n  - name: all\n    prefer:\n      - site: local\n        spill: {enter: 0.70, leave: 0.85}\n",
        """\
p.yaml:5:37: rules[0].prefer[0].spill.leave: leave (0.85) must be below enter (0.7), or spill would flap
  5 |         spill: {enter: 0.70, leave: 0.85}
    |                                     ^""",
    ),
    "percent without its sign": (
        "rules:\n  - name: all\n    prefer: [{site: local, spill: {enter: 85, leave: 70%}}]\n",
        """\
p.yaml:3:43: rules[0].prefer[0].spill.enter: expected a saturation above 0 and up to 4 (1 is full), or a \
percentage, got 85 (did you mean '85%'?)
  3 |     prefer: [{site: local, spill: {enter: 85, leave: 70%}}]
    |                                           ^""",
    ),
    "policy misspelt": (
        "rules:\n  - name: all\n    pick: weighted_qps\n",
        """\
p.yaml:3:11: rules[0].pick: unknown policy 'weighted_qps' (did you mean 'weighted-qps'?)
  3 |     pick: weighted_qps
    |           ^""",
    ),
    "parameter misspelt": (
        "rules:\n  - name: all\n    pick: {policy: weighted-qps, maxqps: {nj: 3}}\n",
        """\
p.yaml:3:34: rules[0].pick.maxqps: weighted-qps has no such parameter (did you mean 'max_qps'?)
  3 |     pick: {policy: weighted-qps, maxqps: {nj: 3}}
    |                                  ^""",
    ),
    "parameter for a policy that takes none": (
        "rules:\n  - name: all\n    prefer:\n      - site: local\n        pick: {policy: random, bound: 3}\n",
        """\
p.yaml:5:32: rules[0].prefer[0].pick.bound: random has no such parameter; it takes none
  5 |         pick: {policy: random, bound: 3}
    |                                ^""",
    ),
    "parameter of the wrong type": (
        "rules:\n  - name: all\n    pick: {policy: weighted-qps, max_qps: {nj: fast}}\n",
        """\
p.yaml:3:48: rules[0].pick.max_qps.nj: expected a number, got 'fast'
  3 |     pick: {policy: weighted-qps, max_qps: {nj: fast}}
    |                                                ^""",
    ),
    "parameter that the policy itself refuses": (
        "rules:\n  - name: all\n    pick: {policy: weighted-qps, max_qps: {nj: 0}}\n",
        """\
p.yaml:3:48: rules[0].pick.max_qps.nj: policy weighted-qps: max_qps of nj must be above 0, not 0
  3 |     pick: {policy: weighted-qps, max_qps: {nj: 0}}
    |                                                ^""",
    ),
    "no rule for the rest": (
        "rules:\n  - name: classified\n    when: {data_class: restricted}\n    sites: local\n",
        """\
p.yaml:3:5: rules[0].when: the last rule must match every request: add one without 'when' below it
  3 |     when: {data_class: restricted}
    |     ^""",
    ),
    "rules in the wrong order": (
        "rules:\n  - name: everything\n  - name: classified\n    when: {data_class: restricted}\n  - name: rest\n",
        """\
p.yaml:3:5: rules[1]: this rule never applies: rule 1 ('everything') above takes every request
  3 |   - name: classified
    |     ^
p.yaml:5:5: rules[2]: this rule never applies: rule 1 ('everything') above takes every request
  5 |   - name: rest
    |     ^""",
    ),
    "tier below one that takes all": (
        'rules:\n  - name: all\n    prefer:\n      - site: "*"\n      - site: local\n',
        """\
p.yaml:5:9: rules[0].prefer[1]: this tier is never asked: tier 1 above takes all of its backends
  5 |       - site: local
    |         ^""",
    ),
    "site and backend that nobody knows": (
        "rules:\n  - name: all\n    sites: [local, nanking]\n    prefer: [{backend: applianc}, {site: mars}]\n",
        """\
p.yaml:3:20: rules[0].sites[1]: unknown site 'nanking' (did you mean 'nanjing'?)
  3 |     sites: [local, nanking]
    |                    ^
p.yaml:4:24: rules[0].prefer[0].backend: unknown backend 'applianc' (did you mean 'appliance'?)
  4 |     prefer: [{backend: applianc}, {site: mars}]
    |                        ^
p.yaml:4:42: rules[0].prefer[1].site: unknown site 'mars'; known: beijing, local, nanjing, suzhou
  4 |     prefer: [{backend: applianc}, {site: mars}]
    |                                          ^""",
    ),
    "tier outside the wall": (
        "rules:\n  - name: all\n    sites: [local, nanjing]\n    prefer: [{site: local}, {site: suzhou}]\n",
        """\
p.yaml:4:36: rules[0].prefer[1].site: site 'suzhou' is not among the rule's sites ('local' or 'nanjing')
  4 |     prefer: [{site: local}, {site: suzhou}]
    |                                    ^""",
    ),
    "remote tier behind a wall around the local site": (
        "rules:\n  - name: all\n    sites: local\n    prefer: [{site: remote}]\n",
        """\
p.yaml:4:21: rules[0].prefer[0].site: site 'remote' is not among the rule's sites ('local')
  4 |     prefer: [{site: remote}]
    |                     ^""",
    ),
    "time and weekdays": (
        f"rules:\n  - name: night\n    when: {{time: 22-6, days: [Monday, tue-thr]}}{LAST}\n",
        """\
p.yaml:3:18: rules[0].when.time: expected a time of day such as 08:00-18:00, got '22-6' \
(did you mean '22:00-06:00'?)
  3 |     when: {time: 22-6, days: [Monday, tue-thr]}
    |                  ^
p.yaml:3:31: rules[0].when.days[0]: expected a weekday such as mon, or mon-fri, got 'Monday' (did you mean 'mon'?)
  3 |     when: {time: 22-6, days: [Monday, tue-thr]}
    |                               ^
p.yaml:3:39: rules[0].when.days[1]: expected a weekday such as mon, or mon-fri, got 'tue-thr' \
(did you mean 'tue-thu'?)
  3 |     when: {time: 22-6, days: [Monday, tue-thr]}
    |                                       ^""",
    ),
    "zone by name": (
        "utc_offset: UTC+8\nrules: [{name: all}]\n",
        """\
p.yaml:1:13: utc_offset: expected an offset from UTC such as +08:00 (zones by name are not known), got 'UTC+8' \
(did you mean '+08:00'?)
  1 | utc_offset: UTC+8
    |             ^""",
    ),
    "names and bounds": (
        "rules:\n  - name: 5\n    when: {priority: high, prompt_tokens: {min: 9, max: 3}, labels: {gpu: 4}}\n",
        """\
p.yaml:2:11: rules[0].name: expected text, got 5 (did you mean "5"?)
  2 |   - name: 5
    |           ^
p.yaml:3:22: rules[0].when.priority: expected a number, or bounds such as {min: 1, max: 5}, got 'high'
  3 |     when: {priority: high, prompt_tokens: {min: 9, max: 3}, labels: {gpu: 4}}
    |                      ^
p.yaml:3:49: rules[0].when.prompt_tokens.min: min (9) is above max (3): no number fits
  3 |     when: {priority: high, prompt_tokens: {min: 9, max: 3}, labels: {gpu: 4}}
    |                                                 ^
p.yaml:3:75: rules[0].when.labels.gpu: expected text, got 4 (did you mean "4"?)
  3 |     when: {priority: high, prompt_tokens: {min: 9, max: 3}, labels: {gpu: 4}}
    |                                                                           ^""",
    ),
    "queue without unit or sense": (
        "rules:\n  - name: all\n    queue: {wait: 10 seconds, depth: -1}\n",
        """\
p.yaml:3:19: rules[0].queue.wait: expected a duration such as 10s, 500ms or 2m, got '10 seconds' \
(did you mean '10s'?)
  3 |     queue: {wait: 10 seconds, depth: -1}
    |                   ^
p.yaml:3:38: rules[0].queue.depth: must be at least 0, got -1
  3 |     queue: {wait: 10 seconds, depth: -1}
    |                                      ^""",
    ),
    "two rules of one name": (
        "rules:\n  - {name: a, when: {tenant: x}}\n  - {name: a}\n",
        """\
p.yaml:3:12: rules[1].name: rule 1 is already called 'a'
  3 |   - {name: a}
    |            ^""",
    ),
    "a tier of nothing": (
        "rules:\n  - name: all\n    prefer:\n      - spill: {enter: 0.9, leave: 0.8}\n",
        """\
p.yaml:4:9: rules[0].prefer[0]: say which backends, by one at least of site, backend, labels, operator, \
price, carbon, rtt (did you mean site: "*"?)
  4 |       - spill: {enter: 0.9, leave: 0.8}
    |         ^""",
    ),
    "a weight for nobody": (
        "rules:\n  - name: all\n    weights: {nj: 2, aplliance: 3}\n",
        """\
p.yaml:3:5: rules[0].weights: weights mean nothing to least-load: pick weighted-qps, or another policy \
that goes by weight
  3 |     weights: {nj: 2, aplliance: 3}
    |     ^
p.yaml:3:22: rules[0].weights.aplliance: unknown backend 'aplliance' (did you mean 'appliance'?)
  3 |     weights: {nj: 2, aplliance: 3}
    |                      ^""",
    ),
    "data classes that no key can have": (
        f"rules:\n  - name: a\n    when: {{data_class: Internal}}\n"
        f"  - name: b\n    when: {{data_class: [internal, Top Secret, '']}}{LAST}\n",
        """\
p.yaml:3:24: rules[0].when.data_class: expected a data class in lower case, such as internal, \
got 'Internal' (did you mean 'internal'?)
  3 |     when: {data_class: Internal}
    |                        ^
p.yaml:5:35: rules[1].when.data_class[1]: expected a data class in lower case, such as internal, \
got 'Top Secret' (did you mean 'top-secret'?)
  5 |     when: {data_class: [internal, Top Secret, '']}
    |                                   ^
p.yaml:5:47: rules[1].when.data_class[2]: expected a data class in lower case, such as internal, \
got ''
  5 |     when: {data_class: [internal, Top Secret, '']}
    |                                               ^""",
    ),
    "weights for a policy that knows none": (
        "rules:\n  - name: all\n    prefer: [{site: local, pick: geo}, {site: remote}]\n    weights: {nj: 0}\n",
        """\
p.yaml:4:5: rules[0].weights: weights mean nothing to least-load or geo: pick weighted-qps, or another policy that \
goes by weight
  4 |     weights: {nj: 0}
    |     ^""",
    ),
    "maps without an entry": (
        "rules:\n  - name: a\n    when: {labels: {}}\n"
        "  - name: b\n    prefer: [{labels: {}}]\n    weights: {}\n",
        """\
p.yaml:3:20: rules[0].when.labels: needs at least 1 entry
  3 |     when: {labels: {}}
    |                    ^
p.yaml:5:23: rules[1].prefer[0].labels: needs at least 1 entry
  5 |     prefer: [{labels: {}}]
    |                       ^
p.yaml:6:14: rules[1].weights: needs at least 1 entry
  6 |     weights: {}
    |              ^""",
    ),
    "a policy that cannot be imported": (
        "rules:\n  - name: all\n    pick: tests.policies.broken_module:Policy\n",
        """\
p.yaml:3:11: rules[0].pick: policy tests.policies.broken_module:Policy cannot be imported from \
tests.policies.broken_module:Policy: ZeroDivisionError: on import
  3 |     pick: tests.policies.broken_module:Policy
    |           ^""",
    ),
    "a limit for nobody": (
        "rules:\n  - name: all\n    prefer:\n"
        "      - {site: local, pick: {policy: weighted-qps, max_qps: {locl: 5, nj: 1}}}\n",
        """\
p.yaml:4:62: rules[0].prefer[0].pick.max_qps.locl: unknown backend 'locl'; known: appliance, nj, sz
  4 |       - {site: local, pick: {policy: weighted-qps, max_qps: {locl: 5, nj: 1}}}
    |                                                              ^""",
    ),
    "a site in the list of a policy": (
        "rules:\n  - name: all\n    pick: {policy: kv-threshold, prefer: [nanjng, local, remote]}\n",
        """\
p.yaml:3:43: rules[0].pick.prefer[0]: unknown site 'nanjng' (did you mean 'nanjing'?)
  3 |     pick: {policy: kv-threshold, prefer: [nanjng, local, remote]}
    |                                           ^
p.yaml:3:58: rules[0].pick.prefer[2]: unknown site 'remote'; known: beijing, local, nanjing, suzhou
  3 |     pick: {policy: kv-threshold, prefer: [nanjng, local, remote]}
    |                                                          ^""",
    ),
    "no rules": ("rules: []\n", "p.yaml:1:8: rules: needs at least 1 entry\n  1 | rules: []\n    |        ^"),
    "nothing": ("# soon\n", "p.yaml:1:1: the file is empty\n  1 | # soon\n    | ^"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_with_their_place_and_what_was_meant(mistake: str) -> None:
    text, expected = MISTAKES[mistake]
    assert problems(text) == expected


def test_all_that_policies_refuse_comes_at_once_and_with_what_is_wrong_elsewhere() -> None:
    text = """\
rules:
  - name: long
    when: {prompt_tokens: {min: 5000}}
    pick:
      policy: weighted-scores
      scorers: {prefx: 3, queue: -1}
      filters: [least-queue, not-satured]
      temperature: 0
  - name: all
    sites: mars
    prefer:
      - site: local
        pick: {policy: cost, tpot: -1, money: -3, cached_share: 3}
      - site: remote
        pick: {policy: prefix-affinity, fallback: least, bound: 0.5, blocks: 0}
    pick: {policy: shortest-path, classes: {chat: {rrt: 1, queue: -2}}}
"""
    with pytest.raises(FileProblems) as caught:
        read_policy(text, "p.yaml", KNOWN)
    found = [(one.line, one.path.partition("pick.")[2] or one.path) for one in caught.value.problems]
    assert found == [
        (6, "scorers.prefx"),
        (6, "scorers.queue"),
        (7, "filters[1]"),
        (8, "temperature"),
        (10, "rules[1].sites"),
        (12, "rules[1].prefer[0].site"),
        (13, "tpot"),
        (13, "money"),
        (13, "cached_share"),
        (15, "fallback"),
        (15, "bound"),
        (15, "blocks"),
        (16, "classes.chat.rrt"),
        (16, "classes.chat.queue"),
    ]
    misspelt = caught.value.problems[0]
    assert (misspelt.column, misspelt.message[:65]) == (
        17,
        "policy weighted-scores: no scorer 'prefx'; did you mean 'prefix'?",
    )


def test_what_is_wrong_with_one_parameter_hides_nothing_of_the_others() -> None:
    text = "rules: [{name: all, pick: {policy: cost, ttft: 2 sec, tpot: 50ms, moneey: 1, carbon: -1}}]"
    with pytest.raises(FileProblems) as caught:
        read_policy(text, "p.yaml")
    found = [(one.path.rpartition(".")[2], one.message, one.suggestion) for one in caught.value.problems]
    assert found == [
        ("ttft", "expected a duration such as 10s, 500ms or 2m, got '2 sec'", "2s"),
        ("moneey", "cost has no such parameter", "money"),
        ("carbon", "policy cost: carbon must be 0 or more, not -1", None),
    ]


def test_data_classes_are_those_that_a_key_can_have() -> None:
    for name in (
        "public",
        "a",
        "0",
        "x_1-y",
        "a" * 64,
        "",
        "A",
        "-a",
        "_a",
        "a b",
        "a.b",
        "é",
        "a" * 65,
        "a\n",
    ):
        try:
            read_policy(f"rules: [{{name: a, when: {{data_class: {name!r}}}}}, {{name: b}}]", "p.yaml")
            taken = True
        except FileProblems:
            taken = False
        assert taken == bool(_WORD(name)), name


def test_every_parameter_that_names_backends_or_sites_is_known_as_such() -> None:
    described = {
        (name, parameter.name)
        for name in policies.POLICIES
        for parameter in policies.parameters(name)
        if "by backend name" in parameter.doc
    }
    assert described == KEYED_BY_BACKEND
    of_sites = {
        (name, parameter.name)
        for name in policies.POLICIES
        for parameter in policies.parameters(name)
        if "Sites" in parameter.doc
    }
    assert of_sites == LISTS_SITES


def test_names_are_checked_only_when_the_fleet_is_known() -> None:
    text = "rules: [{name: all, sites: [mars], pick: random, weights: {nj: 2}}]"
    assert read_policy(text, "p.yaml").warnings == []
    assert "unknown site 'mars'" in problems(text)


def test_sites_of_the_configuration_without_backends_are_known() -> None:
    assert warnings("rules: [{name: all, sites: beijing}]") == [
        "1:28: rules[0].sites: no backend stands at 'beijing' now: all that rule 'all' matches is refused with 404"
    ]


REFUSED = "all that rule 'first' matches is refused with 404"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sites: remote", []),
        ("prefer: [{site: local}, {site: remote}]", []),
        ("prefer: [{site: remote}, {site: '*'}]", []),
        ("prefer: [{site: nanjing, rtt: {max: 5ms}}, {site: nanjing}]", []),
        ("require: {price: {max: 2}}", [f"2:28: rules[0].require: no backend is like this now: {REFUSED}"]),
        (
            "prefer: [{labels: {card: a100}}, {labels: {card: a10}}]",
            [
                f"2:27: rules[0].prefer: no backend is in any of its tiers now: {REFUSED}",
                "2:28: rules[0].prefer[0]: no backend is in this tier now",
                "2:52: rules[0].prefer[1]: no backend is in this tier now",
            ],
        ),
        (
            "split: [{name: a, share: 5%, price: {max: 2}}, {name: b, share: 95%, carbon: {min: 5}}]",
            [
                f"2:26: rules[0].split: no backend is in any of its parts now: {REFUSED}",
                "2:27: rules[0].split[0]: no backend is in this part now",
                "2:66: rules[0].split[1]: no backend is in this part now",
            ],
        ),
        (
            "avoid: [{carbon: {min: 5}}]",
            ["2:27: rules[0].avoid[0]: no backend of this rule is like this now"],
        ),
        (
            "split: [{name: a, share: 5%, backend: nj}, {name: b, share: 95%, site: nanjing}]",
            ["2:62: rules[0].split[1]: no backend is in this part now"],
        ),
        (
            "avoid: [{labels: {cart: h20}}, {labels: {card: h2}}, {labels: {a: b}}]",
            [
                "2:27: rules[0].avoid[0]: no backend of this rule is like this now",
                "2:37: rules[0].avoid[0].labels.cart: no backend has a label 'cart' (did you mean card?)",
                "2:50: rules[0].avoid[1]: no backend of this rule is like this now",
                "2:66: rules[0].avoid[1].labels.card: no backend is labelled card=h2 (did you mean h20?)",
                "2:72: rules[0].avoid[2]: no backend of this rule is like this now",
            ],
        ),
        (
            "prefer: [{labels: {card: a100}}, {site: '*'}]",
            ["2:28: rules[0].prefer[0]: no backend is in this tier now"],
        ),
        (
            "prefer: [{backend: nj}, {site: nanjing}]",
            ["2:43: rules[0].prefer[1]: no backend is in this tier now"],
        ),
        (
            "sites: suzhou, when: {data_class: internal}",
            [
                "2:53: rules[0].when.data_class: no backend of this rule accepts data class 'internal': it will be "
                "refused"
            ],
        ),
        ("when: {data_class: [secret, internal]}", []),
        (
            "when: {data_class: [intrenal]}",
            [
                "2:39: rules[0].when.data_class[0]: no site names data class 'intrenal' (did you mean internal?)"
            ],
        ),
    ],
)
def test_what_does_nothing_now_is_a_warning(rule: str, expected: list[str]) -> None:
    last = LAST if "when" in rule else ""
    assert warnings(f"rules:\n  - {{name: first, {rule}}}{last}") == expected


def test_a_name_may_be_that_of_a_placement_to_come() -> None:
    text = "rules:\n  - name: all\n    prefer:\n      - backend: later\n"
    text += "      - {site: local, pick: {policy: weighted-qps, max_qps: {later: 5}}}\n"
    assert "unknown backend 'later'" in problems(text)
    found = read_policy(text, "p.yaml", replace(KNOWN, placements=True)).warnings
    assert [one.path for one in found if one.message.startswith("unknown backend 'later'")] == [
        "rules[0].prefer[0].backend",
        "rules[0].prefer[1].pick.max_qps.later",
    ]


KEYS = KnownKeys(
    frozenset({"vip", "acme"}),
    frozenset({"public", "internal"}),
    {"sla": frozenset({"golden"}), "task": frozenset({"chat"}), "kind": frozenset({"batch"})},
)
NOBODY = {
    "model: 'qwne*'": "model[0]: no backend lists model 'qwne*'",
    "tenant: [acme, vpi]": "tenant[1]: no key has tenant 'vpi' (did you mean vip?)",
    "data_class: secret": "data_class: no key has data class 'secret'",
    "sla: gloden": "sla: no key has the label sla 'gloden' (did you mean golden?)",
    "task: caht": "task: no key has the label task 'caht' (did you mean chat?)",
    "labels: {knid: batch}": "labels.knid: no key has a label 'knid' (did you mean kind?)",
    "labels: {kind: btach}": "labels.kind: no key is labelled kind=btach (did you mean batch?)",
}
"""What no request carries, and the warning."""


@pytest.mark.parametrize("when", NOBODY)
def test_names_that_no_request_carries_are_warned_of(when: str) -> None:
    known = KnownNames([BackendView("a", models=frozenset({"qwen3-8b"}))], keys=KEYS)
    (found,) = read_policy(f"rules: [{{name: a, when: {{{when}}}}}, {{name: b}}]", "p.yaml", known).warnings
    hint = f" (did you mean {found.suggestion}?)" if found.suggestion else ""
    key, _, message = NOBODY[when].partition(": ")
    assert found.path.removeprefix("rules[0].when.").removesuffix("[0]") == key.removesuffix("[0]")
    assert f"{found.message}{hint}" == message


@pytest.mark.parametrize(
    ("when", "models", "keys"),
    [
        ("model: ['QWEN*', 'qwen*'], tenant: vip", {"QWEN", "qwen3-8b"}, KEYS),
        ("labels: {kind: batch, sla: golden}, task: chat, data_class: internal", {"m"}, KEYS),
        ("tenant: vpi, sla: gloden, labels: {knid: batch}", {"m"}, None),
        ("model: 'qwne*'", set(), KEYS),
    ],
)
def test_names_that_are_there_or_may_be_are_not_warned_of(
    when: str, models: set[str], keys: KnownKeys | None
) -> None:
    known = KnownNames([BackendView("a", models=frozenset(models))], keys=keys)
    assert read_policy(f"rules: [{{name: a, when: {{{when}}}}}, {{name: b}}]", "p.yaml", known).warnings == []


@pytest.mark.parametrize("tenant", ["'*'", "'vip*'", "[vip, '?']"])
def test_tenants_are_no_patterns(tenant: str) -> None:
    text = f"rules: [{{name: a, when: {{tenant: {tenant}}}}}, {{name: b}}]"
    assert "tenants are no patterns: list them, or leave 'tenant' out" in problems(text)


@pytest.mark.parametrize(
    ("wide", "narrow", "covered"),
    [
        ("tenant: a", "tenant: a, stream: true", True),
        ("tenant: [a, b]", "tenant: b", True),
        ("tenant: b", "tenant: [a, b]", False),
        ("priority: {min: 1}", "priority: 5", True),
        ("priority: {min: 1, max: 4}", "priority: {min: 2}", False),
        ("prompt_tokens: {max: 10}", "prompt_tokens: {min: 2, max: 10}", True),
        ("labels: {a: x}", "labels: {a: x, b: y}", True),
        ("labels: {a: x}", "labels: {a: y}", False),
        ("time: 08:00-18:00", "time: 08:00-18:00, tenant: a", True),
        ("time: 08:00-18:00", "tenant: a", False),
        ("stream: false", "stream: true", False),
        ("model: [a, b], endpoint: chat", "model: a, endpoint: chat", True),
        ("data_class: x", "tenant: a", False),
        ("sla: [gold, silver]", "sla: gold, task: chat", True),
        ("sla: gold", "sla: [gold, silver]", False),
        ("sla: gold", "labels: {sla: gold}", True),
        ("labels: {task: chat}", "task: chat", True),
        ("labels: {task: chat}", "task: [chat, code]", False),
    ],
)
def test_a_rule_that_an_earlier_one_leaves_nothing_is_refused(wide: str, narrow: str, covered: bool) -> None:
    text = f"rules:\n  - {{name: wide, when: {{{wide}}}}}\n  - {{name: narrow, when: {{{narrow}}}}}{LAST}"
    if covered:
        assert "rule 1 ('wide') above takes all of its requests" in problems(text)
    else:
        assert read_policy(text, "p.yaml").warnings == []


@pytest.mark.parametrize(
    ("first", "second", "covered"),
    [
        ("site: [local, nanjing]", "site: nanjing", True),
        ("site: remote", "site: nanjing", True),
        ("site: remote", "site: [nanjing, local]", False),
        ("site: [local, remote]", "site: '*'", True),
        ("site: nanjing", "site: remote", False),
        ("site: nanjing", "backend: nj", False),
        ("labels: {card: h20}", "labels: {card: h20}, site: nanjing", True),
        ("backend: [nj, sz]", "backend: nj", True),
        ("operator: [x, y]", "operator: y", True),
        ("operator: x", "site: nanjing", False),
        ("price: {max: 3}", "price: {min: 1, max: 2}", True),
        ("price: {max: 3}", "price: {output: {max: 2}}", False),
        ("price: {max: 3}", "site: nanjing", False),
        ("carbon: {max: 3}", "carbon: {max: 4}", False),
        ("rtt: {max: 50ms}", "rtt: {max: 0.05}", True),
        ("rtt: {max: 50ms}", "site: '*'", False),
    ],
)
def test_a_tier_that_an_earlier_one_leaves_nothing_is_refused(first: str, second: str, covered: bool) -> None:
    text = f"rules: [{{name: all, prefer: [{{{first}}}, {{{second}}}]}}]"
    if covered:
        assert "tier 1 above takes all of its backends" in problems(text, None)
    else:
        read_policy(text, "p.yaml")


# --- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("08:00-18:30", (480, 1110)), ("22:00-06:00", (1320, 360)), ("00:00-24:00", (0, 1440))],
)
def test_windows(text: str, minutes: tuple[int, int]) -> None:
    assert window_minutes(text) == minutes


@pytest.mark.parametrize("text", ["8:00-9:00", "08:00", "25:00-26:00", "08:00-08:00", "08:00-24:30", ""])
def test_bad_windows(text: str) -> None:
    with pytest.raises(BadValueError):
        window_minutes(text)


@pytest.mark.parametrize(
    ("text", "days"),
    [("mon", {0}), ("mon-fri", {0, 1, 2, 3, 4}), ("sat-mon", {5, 6, 0}), ("sun-sun", {6})],
)
def test_weekdays(text: str, days: set[int]) -> None:
    assert weekday_numbers(text) == days


@pytest.mark.parametrize("text", ["", "-", "mon-", "-fri", "mo", "mon,tue", "MON"])
def test_bad_weekdays(text: str) -> None:
    with pytest.raises(BadValueError):
        weekday_numbers(text)


@pytest.mark.parametrize(("text", "seconds"), [("+08:00", 28800), ("-03:30", -12600), ("+00:00", 0)])
def test_offsets(text: str, seconds: int) -> None:
    assert offset_seconds(text) == seconds


@pytest.mark.parametrize("text", ["8", "Asia/Shanghai", "+15:00", "+08:60", "Z", ""])
def test_bad_offsets(text: str) -> None:
    with pytest.raises(BadValueError):
        offset_seconds(text)


def test_days_without_a_time_are_whole_days_and_a_time_without_days_is_every_day() -> None:
    compiled = read_policy(
        f"rules:\n  - {{name: a, when: {{days: sat-sun}}}}\n  - {{name: b, when: {{time: 06:00-07:00}}}}{LAST}",
        "p.yaml",
    )
    assert [rule.match.hours for rule in compiled.rules.rules[:2]] == [
        Hours(0, 1440, frozenset({5, 6})),
        Hours(360, 420, frozenset(range(7))),
    ]


# --- weights, chance -----------------------------------------------------------------------------------------


def fleet(*names: str) -> Fleet:
    return Fleet([Backend(name, models=frozenset({"m"}), slots=10_000) for name in names])


def shares(compiled: CompiledPolicy, count: int) -> dict[str, int]:
    """How many of `count` requests, all in flight at once, each backend gets."""
    backends = fleet("a", "b", "c")
    for number in range(count):
        routing = compiled.rules.route(RequestFacts(str(number), "m"), backends, 0.0)
        assert isinstance(routing.decision, Send)
        backends.lease(routing.request, routing.decision.backend, 0.0, routing.policy)
    return {backend.name: backend.in_flight for backend in backends}


def test_weights_of_a_rule_replace_those_of_the_configuration() -> None:
    text = "rules: [{name: all, pick: weighted-qps, weights: {a: 5, b: 0}}]"
    assert shares(read_policy(text, "p.yaml"), 60) == {"a": 50, "b": 0, "c": 10}


def test_weights_reach_those_tiers_whose_policy_goes_by_weight() -> None:
    text = (
        "rules: [{name: all, weights: {a: 5}, pick: random, prefer: [{backend: a, pick: geo}, {backend: b}]}]"
    )
    (rule,) = read_policy(text, "p.yaml").rules.rules
    assert [isinstance(chooser.policy, WithWeights) for chooser in rule.choosers] == [False, True]
    assert rule.weights == {"a": 5}


def test_a_policy_with_weights_never_changes_the_backends_themselves() -> None:
    compiled = read_policy("rules: [{name: all, pick: random, weights: {a: 5}}]", "p.yaml")
    policy = compiled.rules.rules[0].policy
    assert isinstance(policy, WithWeights)
    view = BackendView("a")
    policy.choose(RequestFacts("1", "m"), [view, BackendView("b")], 0.0)
    assert view.weight == 1.0


def test_a_seed_repeats_itself_and_rules_draw_apart() -> None:
    def drawn(text: str, seed: int, rule: int = 0) -> list[str]:
        policy = read_policy(text, "p.yaml", seed=seed).rules.rules[rule].policy
        views = [BackendView("a"), BackendView("b")]
        decisions = [policy.choose(RequestFacts(str(n), "m"), views, 0.0) for n in range(64)]
        return [decision.backend for decision in decisions if isinstance(decision, Send)]

    one = "rules: [{name: all, pick: random}]"
    two = "rules:\n  - {name: first, when: {tenant: x}, pick: random}\n  - {name: all, pick: random}"
    assert drawn(one, 1) == drawn(one, 1) == drawn(two, 1, rule=1)
    assert drawn(one, 1) != drawn(one, 2)
    assert drawn(two, 1, rule=0) != drawn(two, 1, rule=1)


# --- the library ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", library_names())
@pytest.mark.parametrize("known", [None, LABELLED], ids=["any fleet", "known fleet"])
def test_library_files_compile_without_warnings(name: str, known: KnownNames | None) -> None:
    assert read_policy(library_policy(name), name, known).warnings == []


def test_the_default_is_in_the_library_and_local_first() -> None:
    (rule,) = read_policy(library_policy(DEFAULT_POLICY), DEFAULT_POLICY).rules.rules
    assert rule.policy_name == "weighted-qps"
    assert rule.tiers == (
        Tier(Selector(sites=frozenset({"local"})), Spill(0.85, 0.7)),
        Tier(Selector(sites=frozenset({"*"}))),
    )


def test_an_unknown_library_name_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'local-first'"):
        library_policy("local_first")
    with pytest.raises(ValueError, match="there are cheapest-inside-sla, green-first, "):
        library_policy("zzz")


# --- any text, any file --------------------------------------------------------------------------------------

names = st.text("abc-_ é京", min_size=1, max_size=8)
one_or_more = st.one_of(names, st.lists(names, min_size=1, max_size=3))
levels = st.one_of(st.floats(0.01, 4.0), st.integers(1, 400).map(lambda n: f"{n}%"))


def sections(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=optional)


ranges = st.one_of(st.integers(0, 9), sections(min=st.integers(0, 5), max=st.integers(4, 9)))
picks = st.sampled_from(
    ["random", {"policy": "least-load"}, {"policy": "weighted-qps", "max_qps": {"a": 2}}, "no-such"]
)
whens = sections(
    model=one_or_more,
    tenant=one_or_more,
    data_class=st.one_of(one_or_more, st.sampled_from(["public", ["internal", "x-1"]])),
    endpoint=st.sampled_from(["chat", ["tokenize", "completions"]]),
    priority=ranges,
    prompt_tokens=ranges,
    stream=st.booleans(),
    labels=st.dictionaries(names, names, max_size=2),
    sla=one_or_more,
    task=one_or_more,
    time=st.sampled_from(["08:00-18:00", "22:00-06:00"]),
    days=st.sampled_from(["mon", ["sat-sun", "wed"]]),
)
amounts = sections(min=st.floats(0.0, 5.0), max=st.floats(4.0, 9.0))
described: dict[str, st.SearchStrategy[Any]] = {
    "site": one_or_more,
    "backend": one_or_more,
    "labels": st.dictionaries(names, names, max_size=2),
    "operator": one_or_more,
    "price": st.one_of(amounts, sections(input=amounts, output=amounts, max=st.floats(0.0, 9.0))),
    "carbon": amounts,
}
round_trips = sections(min=st.sampled_from(["5ms", 0.01]), max=st.sampled_from(["9ms", 0.02]))
selections = sections(**described, rtt=round_trips)
parts = sections(
    **described, name=names, share=st.sampled_from(["50%", 0.5, "5%", "95%"]), strict=st.booleans()
)
tiers = sections(
    **described,
    rtt=round_trips,
    spill=st.fixed_dictionaries({"enter": levels, "leave": levels}),
    pick=picks,
)
rules = st.fixed_dictionaries(
    {"name": names},
    optional={
        "when": whens,
        "sites": one_or_more,
        "require": selections,
        "prefer": st.lists(tiers, min_size=1, max_size=3),
        "avoid": st.lists(selections, min_size=1, max_size=2),
        "split": st.lists(parts, min_size=2, max_size=3),
        "pick": picks,
        "weights": st.dictionaries(names, st.floats(0, 100), max_size=2),
        "queue": sections(wait=st.sampled_from([0, "10s", 1.5, "500ms"]), depth=st.integers(0, 9)),
    },
)
files = st.fixed_dictionaries(
    {"rules": st.lists(rules, min_size=1, max_size=3)},
    optional={"utc_offset": st.sampled_from(["+08:00", "-03:30"])},
)


def dump(value: object) -> str:
    stream = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_unicode = True
    yaml.dump(value, stream)
    return stream.getvalue()


def same(text: str) -> PolicyFile:
    return parse_yaml(text, "p.yaml").validate(PolicyFile)


@given(files)
@settings(max_examples=examples(200), deadline=None)
def test_what_was_read_and_written_is_read_again_as_the_same(value: dict[str, Any]) -> None:
    try:
        file = same(dump(value))
    except FileProblems:
        return
    assert same(dump(file.model_dump(mode="json", exclude_none=True))) == file
    assert same(dump(file.model_dump(mode="json", exclude_defaults=True))) == file


pieces = [
    "rules:",
    "name: a",
    "when:",
    "prefer:",
    "site: local",
    "spill:",
    "enter: 85%",
    "leave: 0.7",
    "pick: random",
]
text_like_a_file = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(["", "- "]), st.sampled_from(pieces) | st.text(max_size=8)),
    max_size=12,
).map(lambda lines: "\n".join("  " * depth + dash + piece for depth, dash, piece in lines))


@given(st.one_of(files.map(dump), text_like_a_file, st.text()))
@example("rules: [{name: a, pick: {policy: 'os:system'}}]")
@example("rules: [{name: a, pick: {policy: 'x:y'}}]")
@example("rules: [{name: a, pick: {policy: geo, home: [1, 2, 3], skip_full: maybe}}]")
@example("rules: [{name: a, pick: {policy: shortest-path, classes: {a: {rtt: x}, b: 3}}}]")
@example("rules: [{name: a, pick: {policy: session-affinity, fallback: 3, bound: 0.1, rng: 3, self: 4}}]")
@settings(max_examples=examples(300), deadline=None)
def test_any_text_compiles_or_raises_file_problems(text: str) -> None:
    found: list[Problem] = []
    try:
        compiled = read_policy(text, "p.yaml", KNOWN, seed=1)
        assert compiled.rules.rules[-1].matches_all
        assert explain_policy(compiled)
    except FileProblems as error:
        found = error.problems
        str(error).encode()
    assert len(found) == len(set(found))
