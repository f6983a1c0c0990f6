from __future__ import annotations

from typing import Annotated, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, Field, model_validator

from policies.yamlfile import (
    MAX_CHARACTERS,
    BadValueError,
    Duration,
    FileModel,
    FileProblems,
    Fraction,
    Problem,
    Size,
    parse_yaml,
    read_yaml,
)
from tests.patience import examples


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even")
    return value


class Backend(FileModel):
    name: str = Field(min_length=1)
    url: str
    slots: int | None = Field(None, ge=1)
    weight: float = Field(1.0, gt=0)
    kind: Literal["local", "remote"] = "local"
    prefer: float | Literal["never"] = 1.0
    labels: dict[str, str] = Field({})


class Limits(FileModel):
    low: Fraction = 0.1
    high: Fraction = 0.9
    pairs: Annotated[int, AfterValidator(_even)] = 2

    @model_validator(mode="after")
    def _ordered(self) -> Limits:
        if self.low > self.high:
            raise BadValueError(f"must not be below low ({self.low:g})", "low", at=("high",))
        return self


class Config(FileModel):
    listen: str = "127.0.0.1:8080"
    wait: Duration = 1.0
    body: Size = 1024
    stream: bool = False
    limits: Limits = Limits()
    backends: list[Backend] = Field([], max_length=3)
    sites: dict[str, Limits] = Field({})


def message(text: str) -> str:
    with pytest.raises(FileProblems) as caught:
        read_yaml(text, "c.yaml", Config)
    return str(caught.value)


def heads(text: str) -> list[str]:
    """The message without the lines of the file."""
    return [line.removeprefix("c.yaml:") for line in message(text).splitlines() if line.startswith("c.yaml:")]


def test_a_good_file_becomes_its_model() -> None:
    config = read_yaml(
        """
        listen: "0.0.0.0:80"      # a comment
        wait: 1m30s
        body: 16MiB
        limits: &same {low: 10%, high: 0.5}
        backends:
          - {name: a, url: http://x, prefer: never, labels: {card: h20x2}}
        sites: {here: *same}
        """,
        "c.yaml",
        Config,
    )
    assert config == Config(
        listen="0.0.0.0:80",
        wait=90.0,
        body=16 * 2**20,
        limits=Limits(low=0.1, high=0.5),
        backends=[Backend(name="a", url="http://x", prefer="never", labels={"card": "h20x2"})],
        sites={"here": Limits(low=0.1, high=0.5)},
    )


def test_all_problems_come_at_once_in_the_order_of_the_file_with_the_line_and_a_caret() -> None:
    assert (
        message(
            "wait: 10 sec\n"
            "backends:\n"
            "  - {nam: x, url: 5, slots: 0}\n"
            "  - name: y\n"
            "    url: http://y\n"
            "    wait: 3\n"
            "wait: 2\n"
        )
        == """\
c.yaml:1:7: wait: expected a duration such as 10s, 500ms or 2m, got '10 sec' (did you mean '10s'?)
  1 | wait: 10 sec
    |       ^
c.yaml:3:6: backends[0].nam: unknown key (did you mean 'name'?)
  3 |   - {nam: x, url: 5, slots: 0}
    |      ^
c.yaml:3:19: backends[0].url: expected text, got 5 (did you mean "5"?)
  3 |   - {nam: x, url: 5, slots: 0}
    |                   ^
c.yaml:3:29: backends[0].slots: must be at least 1, got 0
  3 |   - {nam: x, url: 5, slots: 0}
    |                             ^
c.yaml:6:5: backends[1].wait: unknown key here; it belongs at the top level
  6 |     wait: 3
    |     ^
c.yaml:7:1: wait: this key is already given in line 1
  7 | wait: 2
    | ^"""
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1:1: the file is empty"),
        ("# only words\n", "1:1: the file is empty"),
        ("- a\n", "1:1: expected keys and values at the top of the file, got a list"),
        ("hello", "1:1: expected keys and values at the top of the file, got a single value"),
        ("a: 1\n--- \nb: 2", "2:1: a second YAML document starts here; a file holds one"),
        ("listen: x\n\twait: 1", "2:1: a tab cannot indent in YAML; use spaces"),
        ("listen: {site: *}", '1:16: a bare * starts an alias in YAML; put it in quotes (did you mean "*"?)'),
        ("listen: 'x\nwait: 1\n", "1:9: this quote is never closed"),
        ('listen: "\\q"', "1:11: unknown escape character 'q' in quoted text"),
        ("listen: @x", "1:9: a value cannot start with @; put it in quotes"),
        (
            "listen: a: b",
            "1:10: a ':' cannot stand here: check the indentation, or put text with ': ' in quotes",
        ),
        ("listen: - b", "1:9: a list item '- ' cannot stand here; start it on a line of its own"),
        ("listen: x\nwait\nbody: 1", "2:1: expected a ':' after this key"),
        ("sites: [1\nwait: 3", "2:5: expected ',' or ']': the bracket of line 1 is still open"),
        ("sites: {", "1:9: the file ends too early: a bracket is still open"),
        ("sites: }", "1:8: this '}' closes nothing"),
        (
            "sites:\n    a: 1\n  b: 1\n",
            "3:3: this does not fit the block that starts in line 1: check indentation and quotes",
        ),
        ("listen: a\x00b", "1:10: character U+0000 is not allowed in YAML"),
        (
            "listen: !!python/name:os.system x",
            "1:9: listen: YAML tags such as 'tag:yaml.org,2002:python/name:os.system' are not used here",
        ),
        ("listen: *other", "1:9: listen: no anchor 'other' stands before this alias"),
        ("sites: &a [*a]", "1:12: sites[0]: no anchor 'a' stands before this alias"),
        ("? [a]\n: 1", "1:3: a key must be a single word or text"),
        ("<<: {a: 1}", "1:1: merge keys (<<) are not used here; write the keys out"),
        ("sites: " + "[" * 200, "1:58: sites[0][0]: nested more than 50 levels deep"),
    ],
)
def test_what_yaml_itself_cannot_read(text: str, expected: str) -> None:
    assert heads(text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("listen:", "1:1: listen: expected text, got nothing"),
        ("listen: true", '1:9: listen: expected text, got true (did you mean "true"?)'),
        ("stream: maybe", "1:9: stream: expected true or false, got 'maybe'"),
        ("backends: x", "1:11: backends: expected a list, got 'x' (did you mean '[x]'?)"),
        ("sites: [a]", "1:8: sites: expected keys and values, got a list"),
        ("backends: [a]", "1:12: backends[0]: expected keys and values, got 'a'"),
        (
            "limits: {low: 85}",
            "1:15: limits.low: expected a fraction from 0 to 1 or a percentage, got 85 (did you mean '85%'?)",
        ),
        (
            "limits: {low: abc}",
            "1:15: limits.low: expected a fraction such as 0.85 or a percentage such as 85%, got 'abc'",
        ),
        ("limits: {high: 0.05}", "1:16: limits.high: must not be below low (0.1) (did you mean 'low'?)"),
        ("limits: {low: 0.95}", "1:9: limits.high: must not be below low (0.95) (did you mean 'low'?)"),
        ("limits: {pairs: 3}", "1:17: limits.pairs: must be even"),
        ("limits: {pairs: 2.5}", "1:17: limits.pairs: expected a whole number, got 2.5"),
        (
            "body: 16mib",
            "1:7: body: expected a size such as 16MiB or 64KB, got '16mib' (did you mean '16MiB'?)",
        ),
        ("body: 16M", "1:7: body: expected a size such as 16MiB or 64KB, got '16M' (did you mean '16MiB'?)"),
        ("body: .inf", "1:7: body: expected a size such as 16MiB or 64KB, got '.inf'"),
        ("wait: -3", "1:7: wait: expected a duration such as 10s, 500ms or 2m, got -3"),
        ("wait: [1]", "1:7: wait: expected a duration such as 10s, 500ms or 2m, got a list"),
        ("Listen: x", "1:1: Listen: unknown key (did you mean 'listen'?)"),
        ("zzz: x", "1:1: zzz: unknown key; known here: listen, wait, body, stream, limits, backends, sites"),
        ("low: 3", "1:1: low: unknown key here; it belongs in limits or in sites.*"),
        (
            "backends: [{}]",
            "1:12: backends[0].name: this key is required|1:12: backends[0].url: this key is required",
        ),
        ("backends: [{name: '', url: x}]", "1:19: backends[0].name: must not be empty"),
        (
            "backends: [{name: a, url: x, slots: abc}]",
            "1:37: backends[0].slots: expected a whole number, got 'abc'",
        ),
        ("backends: [{name: a, url: x, weight: 0}]", "1:38: backends[0].weight: must be more than 0, got 0"),
        (
            "backends: [{name: a, url: x, kind: Locl}]",
            "1:36: backends[0].kind: expected 'local' or 'remote', got 'Locl' (did you mean 'local'?)",
        ),
        (
            "backends: [{name: a, url: x, labels: {gpu: 4}}]",
            '1:44: backends[0].labels.gpu: expected text, got 4 (did you mean "4"?)',
        ),
        ("sites: {a.b c: {pairs: 1}}", "1:24: sites['a.b c'].pairs: must be even"),
    ],
)
def test_what_the_model_does_not_take(text: str, expected: str) -> None:
    assert "|".join(heads(text)) == expected


def test_of_a_union_only_the_branch_that_was_meant_complains() -> None:
    assert heads("backends: [{name: a, url: x, prefer: [1]}]") == [
        "1:38: backends[0].prefer: expected a number or 'never', got a list"
    ]
    assert heads("backends: [{name: a, url: x, prefer: nevr}]") == [
        "1:38: backends[0].prefer: expected a number or 'never', got 'nevr' (did you mean 'never'?)"
    ]


def test_very_many_problems_are_cut_short() -> None:
    found = heads("".join(f"k{n}: 1\n" for n in range(1000)))
    assert len(found) == 101
    assert "1:1: 900 more problems are not shown" in found


def test_long_lines_are_cut_around_the_caret_and_wide_characters_keep_it_in_place() -> None:
    lines = message("limits: {" + "x" * 300 + ": 1, low: 2}").splitlines()
    assert max(map(len, lines[-2:])) < 120
    assert lines[-2][lines[-1].index("^")] == "2"
    assert message("sites: {南京: 1}").splitlines()[1:] == ["  1 | sites: {南京: 1}", "    |               ^"]


def test_no_control_character_reaches_the_terminal() -> None:
    assert "\x1b" not in message('zzz: 1\n"a\\e[31m": 2')
    assert "\x9b" not in message("zzz: 1 # \x9b")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n"
        + "".join(
            f"{k}: &{k} [{', '.join([f'*{j}'] * 10)}]\n" for j, k in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "".join(f"k{n}: &k{n} {{a: {f'*k{n - 1}' if n else 1}}}\n" for n in range(80)),
    ],
    ids=["wide", "deep"],
)
def test_aliases_cannot_blow_up(text: str) -> None:
    assert "once aliases are followed" in message(text)


def test_a_file_is_bounded() -> None:
    assert message("#" * (MAX_CHARACTERS + 1)) == "c.yaml:1:1: the file is larger than 1 MiB"


def test_problems_beyond_the_schema_point_at_the_deepest_part_that_is_there() -> None:
    document = parse_yaml("a:\n  - {b: 1}\n", "c.yaml")
    assert document.problem(("a", 0, "b"), "m") == Problem(2, 9, "a[0].b", "m")
    assert document.problem(("a", 0, "b"), "m", at_key=True) == Problem(2, 6, "a[0].b", "m")
    assert document.problem(("a", 0, "c", 3), "m", "s") == Problem(2, 5, "a[0].c", "m", "s")
    assert document.problem(("a", 0, "b", 0), "m") == Problem(2, 9, "a[0].b", "m")
    assert document.problem((), "m") == Problem(1, 1, "", "m")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_are_counted_for_every_kind_of_line_end_and_a_byte_order_mark_is_nothing(newline: str) -> None:
    assert message(f"\ufefflisten: a{newline}# x{newline}wiat: 1").splitlines() == [
        "c.yaml:3:1: wiat: unknown key (did you mean 'wait'?)",
        "  3 | wiat: 1",
        "    | ^",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("0o17", 15),
        ("010", 10),
        ("0x1F", 31),
        ("10:30", "10:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("TRUE", True),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("1e999", "1e999"),
        ("9" * 5000, "9" * 5000),
        (".nan", ".nan"),
        ("'1'", "1"),
        ("|\n  a\n  b\n", "a\nb\n"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert parse_yaml(f"k: {text}", "c.yaml").value == {"k": value}


_INDICATORS = list(":-{}[],?|>#%@`\"'\\")
_WORDS = [
    "&a",
    "*a",
    "!!int",
    "---",
    "...",
    "<<",
    "listen",
    "backends",
    "limits",
    "low",
    "sites",
    "wait",
    "body",
]
_SCALARS = ["null", "true", "0.5", "1e400", "-1", "10s", "é", "京"]
_SPACES = ["\n", "\n  ", " ", ": ", "- ", "\t", "\x85", "\u2028", "\ufeff", "\x00", "\ud800"]
yaml_like = st.lists(st.sampled_from(_INDICATORS + _WORDS + _SCALARS + _SPACES), max_size=40).map("".join)


@given(yaml_like | st.text())
@example("%YAML 9" * 3)
@example("%TAG ! !\n--- !x")
@example('a: "\\UFFFFFFFF"')
@example("&a")
@settings(max_examples=examples(500), deadline=None)
def test_any_text_is_read_or_raises_file_problems_that_can_be_printed(text: str) -> None:
    problems: list[Problem] = []
    try:
        read_yaml(text, "c.yaml", Config)
    except FileProblems as error:
        problems = error.problems
        str(error).encode()
    lines = text.count("\n") + text.count("\r") + sum(map(text.count, "\x85\u2028\u2029")) + 1
    assert problems == sorted(problems, key=lambda problem: problem[:4])
    assert all(1 <= problem.line <= lines + 1 and problem.column >= 1 for problem in problems)
