"""Templates: what they come to, what is refused and where it stands, and a file that people and commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.plans import Forecast
from policies.units import BadValueError
from policies.yamlfile import FileProblems
from proxy.scaling.images import Missing, Wanted
from proxy.scaling.offers import Offer
from proxy.scaling.templates import (
    Automatic,
    Shortage,
    Template,
    Templates,
    check_templates,
    choose,
    fires,
)

QUICK = Forecast(0.4, 0.03, 300.0, 10)
OFFERS = {
    one.name: one
    for one in (
        Offer("nj-1", "nanjing", ("qwen3-32b",), "generate", "H20", 1, 10.0, False, QUICK),
        Offer("nj-2", "nanjing", ("qwen3-32b",), "generate", "H20", 1, 8.0, False, QUICK),
        Offer(
            "xa-1",
            "xian",
            ("qwen3-32b", "qwen3-8b"),
            "generate",
            "910B",
            2,
            5.0,
            False,
            Forecast(2.0, 0.2, 9, 10),
        ),
        Offer("xa-2", "xian", ("bge-m3",), "embed", "L40", 1, None, False, Forecast()),
    )
}
SITES = frozenset({"nanjing", "xian"})


def names(**fields: Any) -> list[str]:
    return [one.name for one in choose(Template(**{"model": "qwen3-32b"} | fields), OFFERS, SITES)]


def refused(**fields: Any) -> BadValueError:
    with pytest.raises(BadValueError) as caught:
        names(**fields)
    return caught.value


# What they come to


def test_the_cheapest_that_fit() -> None:
    assert names() == ["xa-1"]
    assert names(count=3) == ["xa-1", "nj-2", "nj-1"]
    assert names(sites=["nanjing"]) == ["nj-2"]
    assert names(cards=["NVIDIA h20"], count=2) == ["nj-2", "nj-1"]
    assert names(sla={"ttft": "1s"}) == ["nj-2"]
    assert names(standbys=["nj-1", "xa-1"]) == ["xa-1", "nj-1"]
    assert names(standbys=["nj-1", "nj-2"], count=1) == ["nj-2"]
    assert names(model="bge-m3", task="embed") == ["xa-2"]


def test_others_take_the_place_of_what_cannot_start_now() -> None:
    def without(*out: str, **fields: Any) -> list[str]:
        template = Template(**{"model": "qwen3-32b"} | fields)
        return [one.name for one in choose(template, OFFERS, SITES, out)]

    assert without("xa-1") == ["nj-2"]
    assert without("xa-1", count=2) == ["nj-2", "nj-1"]
    assert without("nj-2", count=3) == ["xa-1", "nj-1"], "as many as there are"
    assert without("xa-1", "nj-1", "nj-2") == ["xa-1"], "if nobody can, its plan says why"


@pytest.mark.parametrize(
    ("fields", "at", "said", "meant"),
    [
        ({"model": "qwen3-32"}, ("model",), "no standby serves 'qwen3-32'", "qwen3-32b"),
        ({"sites": ["nanjing", "nanjin"]}, ("sites", 1), "there is no site 'nanjin'", "nanjing"),
        ({"standbys": ["nj1"]}, ("standbys", 0), "there is no standby 'nj1'", "nj-1"),
        ({"cards": ["H200"]}, ("cards",), "the nearest is 'nj-2', which has H20, and not H200", "H20"),
        ({"task": "embed"}, ("task",), "which is for generate, and not for embed", None),
        ({"sla": {"ttft": 0.1}}, ("sla", "ttft"), "expected to need 0.40 s to the first token", None),
        ({"sla": {"tpot": "1ms"}}, ("sla", "tpot"), "expected to need 0.030 s per token", None),
        ({"count": 4}, ("count",), "4 are wanted, and 3 standbys fit: xa-1, nj-2 and nj-1", "3"),
        ({"model": "qwen3-8b", "count": 2}, ("count",), "1 standby fits: xa-1", "1"),
        ({"standbys": ["nj-1", "xa-1"], "sites": ["nanjing"]}, ("standbys", 1), "'xa-1' is at xian", None),
        ({"model": "bge-m3", "task": "embed", "budget": 5}, ("budget",), "give its `cost_per_hour`", None),
    ],
)
def test_what_cannot_work_is_named_with_the_nearest(
    fields: dict[str, Any], at: tuple[str | int, ...], said: str, meant: str | None
) -> None:
    error = refused(**fields)
    assert (error.at, error.suggestion) == (at, meant)
    assert said in error.message


def test_a_task_without_an_image_is_refused() -> None:
    missing = Missing(Wanted("qwen3-32b", "MLU370"), None, {})
    offered = {"mlu": Offer("mlu", "nanjing", ("qwen3-32b",), card="MLU370", launch=missing)}
    with pytest.raises(BadValueError, match="there is no image for qwen3-32b on MLU370") as caught:
        choose(Template(model="qwen3-32b"), offered, SITES)
    assert caught.value.at == ("task",)


def test_without_a_standby_nothing_can_work() -> None:
    with pytest.raises(BadValueError, match="no standby at all"):
        choose(Template(model="m"), {}, SITES)


templates = st.builds(
    Template,
    model=st.sampled_from(["qwen3-32b", "qwen3-8b", "bge-m3"]),
    task=st.sampled_from(["generate", "embed"]),
    sites=st.lists(st.sampled_from(sorted(SITES)), max_size=2),
    cards=st.lists(st.sampled_from(["H20", "910B", "L40"]), max_size=2),
    count=st.none() | st.integers(1, 4),
    standbys=st.lists(st.sampled_from(sorted(OFFERS)), max_size=3, unique=True),
    budget=st.none() | st.just(5.0),
)


@given(templates)
def test_what_is_chosen_is_what_was_asked_for(template: Template) -> None:
    try:
        found = choose(template, OFFERS, SITES)
    except BadValueError:
        return
    assert len(found) == (template.count or len(template.standbys) or 1)
    for one in found:
        assert template.model in one.models
        assert one.task == template.task
        assert not template.sites or one.site in template.sites
        assert not template.cards or one.card in template.cards
        assert not template.standbys or one.name in template.standbys
    costs = [one.rank for one in found]
    assert costs == sorted(costs)


# Firing


@pytest.mark.parametrize(
    ("when", "now", "said"),
    [
        ({"spilling": "30s"}, Shortage(spilling_s=29), ""),
        ({"spilling": "30s"}, Shortage(spilling_s=31), "local has been too full for 31 s"),
        ({"spilling": 0}, Shortage(), ""),
        ({"queue": 20}, Shortage(queue=19), ""),
        ({"queue": 20}, Shortage(queue=20), "20 requests wait"),
        ({"oldest": "10s"}, Shortage(oldest_s=9.9), ""),
        ({"oldest": "10s"}, Shortage(oldest_s=12), "a request has waited for 12 s"),
        ({"saturation": "90%"}, Shortage(saturation=0.89), ""),
        ({"saturation": "90%", "queue": 99}, Shortage(saturation=0.95), "local backends are 95% full"),
    ],
)
def test_when_a_template_fires(when: dict[str, Any], now: Shortage, said: str) -> None:
    assert fires(Automatic(**when), now) == said


# The file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("templates:\n  a: {modle: m}", "t.yaml:2:7: templates.a.modle"),
        ("templates:\n  a: {model: qwen3-32b, mode: car}", "t.yaml:2:31: templates.a.mode"),
        ("templates:\n  a: {model: qwen3-32b, count: 0}", "t.yaml:2:32: templates.a.count"),
        (
            "templates:\n  a: {model: qwen3-32b, automatic: {}}",
            "t.yaml:2:36: templates.a.automatic: say when",
        ),
        (
            "templates:\n  a: {model: qwen3-32b, sites: [xi-an]}",
            "t.yaml:2:33: templates.a.sites[0]: there is no site",
        ),
        (
            "templates:\n  a:\n    model: qwen3-32b\n    sla:\n      ttft: 1ms",
            "t.yaml:5:13: templates.a.sla.ttft",
        ),
        (
            "templates:\n  a: {model: m, automatic: {queue: 1}}\n  b: {model: m, automatic: {queue: 2}}",
            "t.yaml:3:28: templates.b.automatic: 'a' fires for model 'm' already",
        ),
    ],
)
def test_mistakes_have_their_line(text: str, said: str) -> None:
    with pytest.raises(FileProblems) as caught:
        check_templates(text, "t.yaml", OFFERS, SITES)
    assert said in str(caught.value)


@pytest.fixture
def kept(tmp_path: Path) -> Templates:
    return Templates(tmp_path / "templates.yaml")


def save(kept: Templates, name: str, **fields: Any) -> Template:
    return kept.save(name, {"model": "qwen3-32b"} | fields, OFFERS, SITES)


def test_what_is_saved_is_read_again(kept: Templates) -> None:
    saved = save(kept, "rush", sla={"ttft": "2s"}, automatic={"queue": 20}, budget=12.5, sites=["nanjing"])
    assert saved.sla.ttft == 2.0
    other = Templates(kept.path)
    assert other.look()
    assert other.all() == kept.all() == {"rush": saved}
    assert not other.look()


def test_a_command_leaves_what_people_wrote(kept: Templates) -> None:
    kept.path.write_text(
        "# ours\ntemplates:\n  night: # cheap\n    model: qwen3-32b\n    sla: {ttft: 2s}   # as agreed\n"
    )
    save(kept, "rush")
    text = kept.path.read_text()
    assert "# ours" in text
    assert "# cheap" in text
    assert "sla: {ttft: 2s}   # as agreed" in text
    assert list(kept.all()) == ["night", "rush"]
    kept.delete("rush")
    assert list(kept.all()) == ["night"]
    assert "# as agreed" in kept.path.read_text()


def test_what_cannot_work_is_not_saved(kept: Templates) -> None:
    save(kept, "rush")
    before = kept.path.read_text()
    for fields in ({"count": 9}, {"sites": ["nowhere"]}, {"typo": 1}, {"mode": "maybe"}):
        with pytest.raises(FileProblems, match=r"templates\.yaml:\d+:\d+: templates\.bad"):
            save(kept, "bad", **fields)
    with pytest.raises(FileProblems):
        save(kept, "no name")
    deep: Any = []
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(BadValueError, match="nested too deep"):
        save(kept, "bad", sites=deep)
    assert kept.path.read_text() == before


@pytest.mark.parametrize(
    "text", ["# rush: {model: qwen3-32b}\n", "templates:\n  # rush: {model: qwen3-32b}\n"]
)
def test_what_is_commented_out_is_gone_and_stays_to_be_read(kept: Templates, text: str) -> None:
    save(kept, "rush", automatic={"queue": 1})
    kept.path.write_text(text)
    assert kept.look()
    assert (kept.all(), kept.trouble) == ({}, "")
    save(kept, "night")
    assert list(kept.all()) == ["night"]
    assert "# rush: {model: qwen3-32b}" in kept.path.read_text()


def test_a_broken_file_keeps_what_was_there_and_is_not_written_over(kept: Templates) -> None:
    save(kept, "rush")
    kept.path.write_text("templates: [")
    assert kept.look()
    assert "templates.yaml:1:" in kept.trouble
    assert list(kept.all()) == ["rush"]
    with pytest.raises(FileProblems):
        save(kept, "more")
    with pytest.raises(FileProblems):
        kept.delete("rush")
    assert kept.path.read_text() == "templates: ["
    kept.path.unlink()
    assert kept.look()
    assert (kept.all(), kept.trouble) == ({}, "")


def test_an_unknown_name_says_what_was_meant(kept: Templates) -> None:
    save(kept, "rush-hour")
    with pytest.raises(KeyError, match="did you mean 'rush-hour'"):
        kept.find("rush_hour")
    with pytest.raises(KeyError, match="there is no template 'x'"):
        kept.delete("x")
