"""What admins get wrong when they say which backends: told with its place, and what was meant."""

from __future__ import annotations

from typing import Any

import pytest

from policies.backendschema import Described, Part, Selection, selector
from policies.fileschema import PolicyFile
from policies.match import Between, Selector
from tests.policies.test_files import problems

RULE = "rules:\n  - name: all\n    "

MISTAKES: dict[str, tuple[str, list[str]]] = {
    "a bare price": (
        RULE + "prefer: [{price: 2}]\n",
        [
            "3:22: rules[0].prefer[0].price: expected bounds such as {max: 2}, got 2 (did you "
            "mean '{max: 2}'?)",
        ],
    ),
    "words and a switch in place of bounds": (
        RULE + "require: {price: cheap, carbon: false}\n",
        [
            "3:22: rules[0].require.price: expected bounds such as {max: 2}, got 'cheap'",
            "3:37: rules[0].require.carbon: expected bounds such as {max: 400}, got false",
        ],
    ),
    "milliseconds without a unit": (
        RULE + "require: {rtt: 50}\n    avoid: [{rtt: {min: 30}}]\n",
        [
            "3:20: rules[0].require.rtt: expected bounds such as {max: 50ms}, got 50 (did you mean "
            "'{max: 50ms}'?)",
            "4:25: rules[0].avoid[0].rtt.min: expected a round trip such as 50ms, got 30 (did you mean "
            "'30ms'?)",
        ],
    ),
    "a bare round trip": (
        RULE + "require: {rtt: 50ms}\n",
        [
            "3:20: rules[0].require.rtt: expected bounds such as {max: 50ms}, got '50ms' (did you "
            "mean '{max: 50ms}'?)",
        ],
    ),
    "a round trip without its unit": (
        RULE + "require: {rtt: {max: 80}}\n",
        [
            "3:26: rules[0].require.rtt.max: expected a round trip such as 50ms, got 80 (did you "
            "mean '80ms'?)",
        ],
    ),
    "a round trip of nothing": (
        RULE + "require: {rtt: {max: 0}}\n",
        [
            "3:26: rules[0].require.rtt.max: no backend is as near as that",
        ],
    ),
    "bounds the wrong way round": (
        RULE + "avoid: [{carbon: {min: 500, max: 400}}]\n",
        [
            "3:28: rules[0].avoid[0].carbon.min: min (500) is above max (400): nothing fits",
        ],
    ),
    "no bounds": (
        RULE + "avoid: [{carbon: {}}, {price: {}}]\n",
        [
            "3:22: rules[0].avoid[0].carbon: expected bounds such as {max: 2}, got none",
            "3:35: rules[0].avoid[1].price: expected bounds such as {max: 2}, or {output: {max: "
            "1}}, got none",
        ],
    ),
    "a negative price": (
        RULE + "require: {price: {output: {max: -1}}}\n",
        [
            "3:37: rules[0].require.price.output.max: must be at least 0, got -1",
        ],
    ),
    "a price below its parts": (
        RULE + "require: {price: {max: 1, input: {min: 2}}}\n",
        [
            "3:28: rules[0].require.price.max: max (1) is below what input and output cost at "
            "least (2): nothing fits",
        ],
    ),
    "a price above its parts": (
        RULE + "require: {price: {min: 9, input: {max: 2}, output: {max: 3}}}\n",
        [
            "3:28: rules[0].require.price.min: min (9) is above what input and output cost at "
            "most (5): nothing fits",
        ],
    ),
    "a price with its currency": (
        RULE + "require: {price: {max: 2 USD}}\n",
        [
            "3:28: rules[0].require.price.max: expected a number, got '2 USD'",
        ],
    ),
    "an operator that nobody knows": (
        RULE + "require: {operator: njclud}\n",
        [
            "3:25: rules[0].require.operator: unknown operator 'njclud'; known: none",
        ],
    ),
    "names that nobody knows": (
        RULE + "require: {site: nanking}\n    avoid: [{backend: applianc}]\n",
        [
            "3:21: rules[0].require.site: unknown site 'nanking' (did you mean 'nanjing'?)",
            "4:23: rules[0].avoid[0].backend: unknown backend 'applianc' (did you mean 'appliance'?)",
        ],
    ),
    "a selector of nothing": (
        RULE + "require: {}\n    avoid: [{}]\n",
        [
            "3:14: rules[0].require: say which backends, by one at least of site, backend, labels, operator, "
            'price, carbon, rtt (did you mean site: "*"?)',
            "4:13: rules[0].avoid[0]: say which backends, by one at least of site, backend, labels, operator, "
            'price, carbon, rtt (did you mean site: "*"?)',
        ],
    ),
    "said twice": (
        RULE + "sites: local\n    require: {site: local}\n",
        [
            "4:21: rules[0].require.site: sites says this already: keep one of the two",
        ],
    ),
    "one selector where a list is": (
        RULE + "avoid: {site: local}\n",
        [
            "3:12: rules[0].avoid: expected a list, got keys and values",
        ],
    ),
    "a tier that require empties": (
        RULE + "require: {labels: {trust: contracted}, price: {max: 1}}\n"
        "    prefer: [{labels: {trust: none}}, {price: {min: 2}}, {site: local}]\n",
        [
            "4:23: rules[0].prefer[0].labels: this tier is empty: no backend has the labels of "
            "both this tier and 'require'",
            "4:47: rules[0].prefer[1].price: this tier is empty: no backend has the price of both "
            "this tier and 'require'",
        ],
    ),
    "a site that require leaves out": (
        RULE + "require: {site: local}\n    prefer: [{site: nanjing}]\n",
        [
            "4:21: rules[0].prefer[0].site: site 'nanjing' is not among those of 'require' ('local')",
        ],
    ),
    "a tier that avoid empties": (
        RULE + "prefer: [{site: local}, {site: nanjing}]\n    avoid: [{site: nanjing}]\n",
        [
            "3:29: rules[0].prefer[1]: avoid takes every backend of this tier, so it is never "
            "asked here: leave one of them out",
        ],
    ),
    "avoiding all": (
        RULE + "sites: local\n    avoid: [{site: local}]\n",
        [
            "4:13: rules[0].avoid[0]: this is every backend of the rule: say which are to be "
            "asked before them",
        ],
    ),
    "avoiding nobody": (
        RULE + "sites: local\n    avoid: [{site: remote}]\n",
        [
            "4:20: rules[0].avoid[0].site: 'sites' leaves out everything with this site already",
        ],
    ),
    "avoiding what no tier has": (
        RULE + "prefer: [{site: local}]\n    avoid: [{site: nanjing}]\n",
        [
            "4:13: rules[0].avoid[0]: no tier of this rule has backends like this: leave it out",
        ],
    ),
    "avoiding twice": (
        RULE + "avoid: [{site: nanjing}, {site: nanjing, labels: {a: b}}]\n",
        [
            "3:30: rules[0].avoid[1]: what stands above it has all of its backends",
        ],
    ),
    "shares that are not all": (
        RULE + "split: [{name: a, share: 5%, backend: nj}, {name: b, share: 90%}]\n",
        [
            "3:65: rules[0].split[1].share: the shares make 95%, and have to make 100% (did you mean '95%'?)",
        ],
    ),
    "shares of too much": (
        RULE + "split: [{name: a, share: 100%, backend: nj}, {name: b, share: 5%}]\n",
        [
            "3:67: rules[0].split[1].share: the shares make 105%, and have to make 100%",
        ],
    ),
    "a share without its sign": (
        RULE + "split: [{name: a, share: 5, backend: nj}, {name: b, share: 95%}]\n",
        [
            "3:30: rules[0].split[0].share: expected a fraction from 0 to 1 or a percentage, got "
            "5 (did you mean '5%'?)",
        ],
    ),
    "one part": (
        RULE + "split: [{name: a, share: 100%}]\n",
        [
            "3:12: rules[0].split: needs at least 2 entries",
        ],
    ),
    "parts of one name": (
        RULE + "split: [{name: a, share: 5%, backend: nj}, {name: a, share: 95%}]\n",
        [
            "3:55: rules[0].split[1].name: an earlier part is called 'a', too",
        ],
    ),
    "a part behind the rest": (
        RULE + "split: [{name: a, share: 95%}, {name: b, share: 5%, backend: nj}]\n",
        [
            "3:36: rules[0].split[1]: this part is empty: part 1 above takes all of its backends",
        ],
    ),
    "a part that require leaves out": (
        RULE + "sites: local\n    split: [{name: a, share: 5%, site: nanjing}, {name: b, share: 95%}]\n",
        [
            "4:40: rules[0].split[0].site: this part is empty: 'sites' leaves out everything with this site",
        ],
    ),
    "a part that no tier has": (
        RULE
        + "prefer: [{site: local}]\n    split: [{name: a, share: 5%, site: nanjing}, {name: b, share: 95%}]\n",
        [
            "4:13: rules[0].split[0]: this part is empty: no tier of this rule has backends like this",
        ],
    ),
    "a part that moves": (
        RULE + "split: [{name: a, share: 5%, rtt: {max: 5ms}}, {name: b, share: 95%}]\n",
        [
            "3:34: rules[0].split[0].rtt: unknown key here; it belongs in rules[].require, in "
            "rules[].prefer[] or in rules[].avoid[]",
        ],
    ),
    "a part without a share": (
        RULE + "split: [{name: a, backend: nj}, {name: b, share: 95%}]\n",
        [
            "3:13: rules[0].split[0].share: this key is required",
        ],
    ),
    "an SLA class and another": (
        "rules:\n  - name: a\n    when: {sla: gold, labels: {sla: silver}}\n  - name: all\n",
        [
            "3:37: rules[0].when.labels.sla: no request has the label sla 'silver' and one of sla "
            "here: leave one out",
        ],
    ),
    "a key that is misspelt": (
        RULE + "require: {oprator: x}\n    avoid: [{label: {a: b}}]\n",
        [
            "3:15: rules[0].require.oprator: unknown key (did you mean 'operator'?)",
            "4:14: rules[0].avoid[0].label: unknown key (did you mean 'labels'?)",
        ],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_with_their_place_and_what_was_meant(mistake: str) -> None:
    text, expected = MISTAKES[mistake]
    told = [line for line in problems(text).splitlines() if line.startswith("p.yaml:")]
    assert told == [f"p.yaml:{line}" for line in expected]


def test_what_is_written_becomes_a_set_of_backends() -> None:
    written: dict[str, Any] = {
        "site": ["nanjing", "remote"],
        "backend": "nj",
        "labels": {"trust": "contracted", "card": "h20x2"},
        "operator": "njcloud",
        "price": {"max": 3, "input": {"min": 0.1}, "output": {"max": 2}},
        "carbon": {"min": 10, "max": 400},
        "rtt": {"max": "50ms"},
    }
    assert set(written) == Selection.model_fields.keys()
    assert selector(Selection.model_validate(written)) == Selector(
        sites=frozenset({"nanjing", "remote"}),
        backends=frozenset({"nj"}),
        labels={"trust": "contracted", "card": "h20x2"},
        operators=frozenset({"njcloud"}),
        price=Between(0.0, 3.0),
        price_input=Between(low=0.1),
        price_output=Between(0.0, 2.0),
        carbon=Between(10.0, 400.0),
        rtt=Between(0.0, 0.05),
    )


def test_sites_of_the_rule_stand_for_those_that_require_does_not_name() -> None:
    assert selector(None, ("local",)) == Selector(sites=frozenset({"local"}))
    section = Selection.model_validate({"operator": "x"})
    assert selector(section, ("local",)) == Selector(sites=frozenset({"local"}), operators=frozenset({"x"}))
    assert selector(section) == Selector(operators=frozenset({"x"}))


def test_a_part_may_be_the_rest_but_not_what_moves() -> None:
    assert selector(Part(name="rest", share=0.5)) == Selector()
    assert Part.model_fields.keys() - Described.model_fields.keys() == {"name", "share", "strict"}


def test_editors_are_offered_what_may_be_written() -> None:
    schema = PolicyFile.model_json_schema()["$defs"]
    for name in ("Tier", "Selection"):
        assert set(schema[name]["properties"]) >= Selection.model_fields.keys()
    assert "rtt" not in schema["Part"]["properties"]
    assert set(schema["Price"]["properties"]) == {"min", "max", "input", "output"}
