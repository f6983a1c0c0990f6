"""docs/policies.md is complete and true."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
from pydantic import BaseModel

import policies
from policies.backendschema import Described, Part, Selection
from policies.base import BackendView, RequestFacts, Send
from policies.explain import explain_policy
from policies.files import read_policy
from policies.fileschema import PolicyFile, Queue, Rule, Tier, When
from policies.yamlfile import FileProblems

PAGE = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")


def section(start: str) -> str:
    """The table that follows a sentence."""
    return PAGE.partition(start)[2].partition("|\n\n")[0]


@pytest.mark.parametrize(
    ("start", "model", "told_elsewhere"),
    [
        ("At the top of the file:", PolicyFile, ()),
        ("In a rule:", Rule, ()),
        ("In `when`, everything", When, ()),
        ("In a tier of `prefer`", Tier, Selection.model_fields),
        ("In a part of `split`", Part, Described.model_fields),
        ("A selector says which backends", Selection, ()),
        ("In `queue`:", Queue, ()),
    ],
)
def test_every_key_has_its_row_and_no_other_has_one(
    start: str, model: type[BaseModel], told_elsewhere: Collection[str]
) -> None:
    keys = set(re.findall(r"^\| `(\w+)` \|", section(start), re.M))
    assert keys == model.model_fields.keys() - set(told_elsewhere)


def test_every_policy_is_described_as_its_class_describes_itself() -> None:
    rows = []
    for name in policies.POLICIES:
        what = policies.summary(name).rstrip(".:")
        takes = [
            f"`{parameter.name}` ({parameter.takes}): {parameter.doc}"
            for parameter in policies.parameters(name)
        ]
        rows.append(f"| `{name}` | {what}. | {'<br>'.join(takes)} |")
    assert section("| policy | chooses | parameters |\n|---|---|---|\n") + "|" == "\n".join(rows)


def test_the_policy_of_ones_own_works_as_it_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (pick,) = re.findall(r"In a rule: `pick: (\{.*?\})`", PAGE)
    (tmp_path / "my_policy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    rules = f"rules: [{{name: all, pick: {pick}}}]"
    compiled = read_policy(rules, "p.yaml", tried=True)
    monkeypatch.delitem(sys.modules, "my_policy")
    assert compiled.warnings == []
    assert "my_policy:Nearest: The nearest backend that is not too full." in explain_policy(compiled)
    near = BackendView("near", slots=10, in_flight=7, rtt_s=0.01)
    far = BackendView("far", rtt_s=0.02)
    policy = compiled.rules.rules[0].policy
    assert policy.choose(RequestFacts("1", "m"), [far, near], 0.0) == Send("near", reason="nearest of 2")
    near.in_flight = 8
    assert policy.choose(RequestFacts("2", "m"), [far, near], 0.0) == Send("far", reason="nearest of 1")


def test_its_example_compiles_and_is_read_back_like_that() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    assert f"```text\n{explain_policy(read_policy(example, 'my-policy.yaml'))}```" in PAGE


def test_the_mistakes_it_shows_are_told_like_that() -> None:
    mistaken = """\
rules:
  - name: classified stays home
    when: {data_clas: [restricted]}
  - name: everything else
    prefer:
      - site: local
        spill: {enter: 85%, leave: 90%}
"""
    with pytest.raises(FileProblems) as caught:
        read_policy(mistaken, "my-policy.yaml")
    assert f"$ tidegate check my-policy.yaml\n{caught.value}\n```" in PAGE


def test_every_key_is_described_for_editors() -> None:
    schema = PolicyFile.model_json_schema()
    for model in [schema, *schema["$defs"].values()]:
        for name, field in model["properties"].items():
            assert field.get("description"), f"{model['title']}.{name}"
