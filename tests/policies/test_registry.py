from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, Optional

import pytest

import policies
from policies import POLICIES, REQUIRED, Parameter, PolicyError, find, load, names, parameters, summary
from policies.base import BackendView, Decision, Policy, RequestFacts, Send
from policies.files import read_policy
from policies.yamlfile import FileProblems

HERE = __name__


class First(Policy):
    """Takes the first.

    Really.
    """

    def choose(self, request: RequestFacts, backends: Sequence[BackendView], now: float) -> Decision:
        return Send(backends[0].name)


class Everything(First):
    def __init__(
        self,
        rng: Random,
        count: Annotated[int, "How many."],
        *,
        share: Annotated[float, "How much."] = 0.5,
        name: str = "x",
        mode: Literal["a", "b"] = "a",
        maybe: Optional[float] = None,  # noqa: UP045  the older spelling has to work too
        on: bool | None = None,
        limits: Mapping[str, Sequence[float]] = {},
        anything: Any = None,
        odd: type[int] = int,
        untyped=None,  # type: ignore[no-untyped-def]
        **rest: float,
    ) -> None:
        self.given = {"count": count, "share": share, "limits": limits, "rest": rest}


class NoGenerator(First):
    def __init__(self) -> None: ...


class RaisesKeyError(First):
    def __init__(self, rng: Random) -> None:
        raise KeyError("secret")


class Unresolved(First):
    def __init__(self, rng: Random, *, x: Nowhere = 1) -> None: ...  # type: ignore[name-defined]  # noqa: F821


class OddlyNamed(First):
    def __init__(self, rng: Random, *, model_dump: int = 1) -> None: ...


class Needy:
    """Has all methods, and no `needs`."""

    def __init__(self, rng: Random) -> None: ...

    choose = dispatched = first_token = finished = First.choose


not_a_class = First.choose


class NoPolicy:
    def choose(self) -> None: ...


def test_every_name_loads() -> None:
    for name in POLICIES:
        assert Policy in type(load(name, Random(0))).__mro__


def test_every_policy_and_parameter_is_documented() -> None:
    for name in POLICIES:
        assert summary(name).endswith((".", ":")), name
        for parameter in parameters(name):
            assert parameter.doc.endswith("."), (name, parameter)
            assert parameter.type != "anything", (name, parameter)


def test_parameters_tell_type_default_and_doc() -> None:
    assert parameters("round-robin") == ()
    assert [(p.name, p.type, p.default) for p in parameters("session-affinity")] == [
        ("fallback", "text", "least-load"),
        ("bound", "number", 1.25),
        ("bound_from", "number", 0.5),
    ]
    assert [(p.name, p.type) for p in parameters("geo")] == [
        ("home", "list of number or null"),
        ("skip_full", "true or false"),
    ]
    (classes,) = parameters("shortest-path")
    assert classes.type == "map of text to map of text to number"
    assert classes.annotation == Mapping[str, Mapping[str, float]]


def test_every_kind_of_parameter() -> None:
    assert [(p.name, p.type, p.doc) for p in parameters(f"{HERE}:Everything")] == [
        ("count", "whole number", "How many."),
        ("share", "number", "How much."),
        ("name", "text", ""),
        ("mode", "one of a, b", ""),
        ("maybe", "number or null", ""),
        ("on", "true or false or null", ""),
        ("limits", "map of text to list of number", ""),
        ("anything", "anything", ""),
        ("odd", "type", ""),
        ("untyped", "anything", ""),
    ]
    assert parameters(f"{HERE}:Everything")[0] == Parameter("count", int, REQUIRED, "How many.")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "least-laod",
            "no policy 'least-laod'; did you mean 'least-load'? There are "
            f"{', '.join(sorted(POLICIES))}, and package.module:Class",
        ),
        ("zzz", f"no policy 'zzz'. There are {min(POLICIES)}, "),
        (
            "nowhere.at_all:Policy",
            "policy nowhere.at_all:Policy cannot be imported from nowhere.at_all:Policy: No ",
        ),
        ("policies.simple:Nothing", "has no attribute 'Nothing'"),
        ("not a module:X", "cannot be imported"),
        (f"{HERE}:not_a_class", "is no class"),
        (f"{HERE}:NoPolicy", "is no policy, it has no `dispatched`"),
        (f"{HERE}:NoGenerator", "takes 1 positional argument but 2 were given"),
        (f"{HERE}:RaisesKeyError", f"policy {HERE}:RaisesKeyError: KeyError: 'secret'"),
        (f"{HERE}:Unresolved", f"policy {HERE}:Unresolved: NameError: name 'Nowhere' is not defined"),
        (f"{HERE}:Needy", f"policy {HERE}:Needy is no policy, it has no `needs`"),
        (
            "tests.policies.broken_module:X",
            "cannot be imported from tests.policies.broken_module:X: ZeroDivision",
        ),
    ],
)
def test_wrong_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load(name, Random(0))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "weighted-qps",
            {"max_rps": {}},
            "policy weighted-qps has no parameter 'max_rps'; did you mean 'max_qps'? "
            "It accepts max_qps (map of text to number)",
        ),
        ("round-robin", {"x": 1}, "policy round-robin has no parameter 'x'. It accepts none"),
        ("geo", {"home": "Suzhou"}, "policy geo: home must be list of number or null, not 'Suzhou'"),
        ("geo", {"home": [1.0, "2"]}, "home must be list of number or null"),
        ("geo", {"skip_full": 1}, "skip_full must be true or false, not 1"),
        (
            "geo",
            {"home": [100.0, 2.0]},
            "policy geo: home must be [latitude, longitude] in degrees, not [100.0, 2.0]",
        ),
        ("weighted-qps", {"max_qps": {"b": True}}, "max_qps must be map of text to number, not {'b': True}"),
        ("weighted-qps", {"max_qps": {1: 2.0}}, "max_qps must be map"),
        ("weighted-qps", {"max_qps": 5}, "max_qps must be map"),
        ("weighted-qps", {"max_qps": {"b": float("nan")}}, "max_qps must be map"),
        (
            "session-affinity",
            {"fallback": "least"},
            "policy session-affinity: no policy 'least'; did you mean",
        ),
        (f"{HERE}:Everything", {}, "needs the parameter count (whole number)"),
        (f"{HERE}:Everything", {"count": 1.5}, "count must be whole number, not 1.5"),
        (f"{HERE}:Everything", {"count": False}, "count must be whole number"),
        (f"{HERE}:Everything", {"count": 1, "mode": "c"}, "mode must be one of a, b, not 'c'"),
    ],
)
def test_wrong_parameters_are_named(name: str, given: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load(name, Random(0), **given)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["Unresolved", "OddlyNamed", "RaisesKeyError", "Needy"])
def test_a_policy_that_fails_is_a_mistake_in_the_file_that_picks_it(name: str) -> None:
    with pytest.raises(FileProblems, match=f"{HERE}:{name}"):
        read_policy(f"rules: [{{name: all, pick: {HERE}:{name}}}]", "p.yaml")


def test_right_parameters_arrive() -> None:
    limits = {"a": [1, 2.5], "b": ()}
    policy = load(
        f"{HERE}:Everything", Random(0), count=3, share=1, limits=limits, odd=int, anything=object()
    )
    assert isinstance(policy, Everything)
    assert policy.given == {"count": 3, "share": 1, "limits": limits, "rest": {}}


def test_times_are_written_as_durations() -> None:
    times = [(name, one) for name in POLICIES for one in parameters(name) if one.is_duration]
    assert [(name, one.name, one.takes) for name, one in times] == [
        ("cost", "ttft", "duration or null"),
        ("cost", "tpot", "duration or null"),
        ("nash", "arrivals_s", "duration, default 20s"),
        ("wardrop", "arrivals_s", "duration, default 20s"),
        ("peak-ewma", "decay", "duration, default 10s"),
        ("forecast", "ttft", "duration, default 2s"),
        ("forecast", "tpot", "duration, default 100ms"),
        ("mooncake", "ttft", "duration or null"),
        ("mooncake", "tpot", "duration or null"),
    ]
    for name, one in times:
        with pytest.raises(PolicyError, match=f"{one.name} must be {one.type}, not '2 parsecs'"):
            load(name, Random(0), **{one.name: "2 parsecs"})
    for given in ("500ms", 0.5):
        assert load("peak-ewma", Random(0), decay=given).__dict__["_decay"] == 0.5
        assert load("cost", Random(0), ttft=given, tpot=None).__dict__["_ttft"] == 0.5


def test_a_compiled_class_is_described_by_its_source() -> None:
    facts = {"__module__": "policies.simple", "__doc__": None, "choose": dict.get}
    compiled = type("WeightedQps", (), facts)
    assert policies._parameters_of(compiled) == parameters("weighted-qps") != ()
    assert (policies._as_written(compiled).__doc__ or "").startswith(summary("weighted-qps"))
    without = type("Nameless", (), {**facts, "__module__": "policies.no_such_source"})
    assert policies._as_written(without) is without


def test_a_summary_is_one_line() -> None:
    assert summary(f"{HERE}:First") == "Takes the first."
    assert summary(f"{HERE}:NoGenerator") == "Takes the first."


@pytest.fixture
def looked_for_anew() -> Iterator[None]:
    """Installed policies are looked for again, before and after."""
    policies._installed.cache_clear()
    yield
    policies._installed.cache_clear()


@pytest.mark.usefixtures("looked_for_anew")
def test_installed_packages_add_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "somebody-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[tidegate.policies]\nfirst = {HERE}:First\nleast-load = {HERE}:First\ngone = nowhere:Gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {"first", "gone", "least-load"} <= set(names())
    assert find("first") is First
    assert find("least-load") is not First, "built-in names cannot be taken"
    with pytest.raises(PolicyError, match="policy gone cannot be imported from nowhere:Gone"):
        find("gone")
    with pytest.raises(PolicyError, match="did you mean 'first'"):
        find("frist")


def test_importing_the_registry_imports_no_policy() -> None:
    code = "import policies, sys; print([name for name in sys.modules if name.startswith('policies.')])"
    root = str(Path(policies.__file__).parents[1])
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert (
        shown.stdout.strip() == "['policies.values', 'policies.base', 'policies.mistakes', 'policies.units']"
    )
