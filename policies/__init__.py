"""Everything that decides; pure: no I/O, no clock, no asyncio, no global randomness.

Here: the registry of policies, and how a name and its parameters in a file become an object. A name is one of
`POLICIES`, one that an installed package declares as an entry point of group `tidegate.policies`, or
`package.module:Class`. A policy class takes a random generator and keyword parameters:

    class Cheapest(Policy):
        def __init__(
            self, rng: Random, *, slack: Annotated[float, "Share that it may cost more.", Tunable(0.0, 1.0)] = 0.1
        ): ...

The annotations are what `load` checks values against, and the texts in them are the documentation. A parameter with
a `Tunable` is one that `tidegate tune` may search.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import resources
from importlib.metadata import entry_points
from pkgutil import resolve_name
from random import Random
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from policies.base import Policy, Tunable
from policies.mistakes import Mistake, WrongParametersError
from policies.units import BadValueError, Duration, parse_duration

POLICIES: dict[str, str] = {
    "round-robin": "policies.simple:RoundRobin",
    "random": "policies.simple:RandomChoice",
    "least-load": "policies.simple:LeastLoad",
    "power-of-two": "policies.simple:PowerOfTwo",
    "weighted-qps": "policies.simple:WeightedQps",
    "session-affinity": "policies.prefix:SessionAffinity",
    "prefix-affinity": "policies.prefix:PrefixAffinity",
    "cache-aware": "policies.cache:CacheAware",
    "skylb": "policies.pushing:SkyLB",
    "kv-threshold": "policies.pushing:KvThreshold",
    "weighted-scores": "policies.scores:WeightedScores",
    "geo": "policies.geo:Geo",
    "shortest-path": "policies.geo:ShortestPath",
    "cost": "policies.cost:Cost",
    "nash": "policies.game:Nash",
    "wardrop": "policies.game:Wardrop",
    "prequal": "policies.latency:Prequal",
    "peak-ewma": "policies.latency:PeakEwma",
    "forecast": "policies.latency:Forecast",
    "lmetric": "policies.prefill:Lmetric",
    "gorgo": "policies.prefill:Gorgo",
    "mooncake": "policies.prefill:Mooncake",
}
"""Name to `module:Class`; imported when asked for."""

ENTRY_POINTS = "tidegate.policies"
"""Group of entry points by which other packages add policies. They cannot replace a built-in name."""

REQUIRED: Any = inspect.Parameter.empty
"""`Parameter.default` of a parameter that has none."""


class PolicyError(ValueError):
    """A name or a parameter is wrong; the message says what would be right."""

    def __init__(self, message: str, mistakes: Sequence[Mistake] = ()) -> None:
        super().__init__(message)
        self.mistakes = mistakes or [Mistake(message, ())]
        """All that is wrong, each with its place below the parameters."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a policy."""

    name: str
    annotation: Any
    """Its Python type, as pydantic takes it."""
    default: Any
    """`REQUIRED` if it has none."""
    doc: str
    """One line."""
    tunable: Tunable | None = None
    """Where to search it; None: it is not searched."""

    @property
    def type(self) -> str:
        """Its type in words: `number`, `map of text to number`."""
        return _in_words(self.annotation)

    @property
    def is_duration(self) -> bool:
        """Whether it is seconds, which a file may write as `500ms`."""
        return self.annotation == Duration or Duration in get_args(self.annotation)

    @property
    def takes(self) -> str:
        """Its type and default in words: `number, default 1.25`."""
        if self.default is REQUIRED:
            return f"{self.type}, required"
        if self.default is None or self.default == () or isinstance(self.default, Mapping):
            return self.type
        written = str(self.default).lower() if isinstance(self.default, bool) else str(self.default)
        if self.is_duration:
            written = f"{1000 * self.default:g}ms" if self.default < 1.0 else f"{self.default:g}s"
        return f"{self.type}, default {written}"


def load(name: str, rng: Random, /, **parameters: object) -> Policy:
    """Make a policy.

    Raises:
        PolicyError: no such policy, no such parameter, or a value it does not accept; or it fails to be made, in
            whatever way.
    """
    policy_class = find(name)
    make: Callable[..., Policy] = policy_class
    try:
        takes = _parameters_of(policy_class)
        wrong = _wrong(name, takes, parameters)
        policy = None if wrong else make(rng, **_in_seconds(takes, parameters))
    except WrongParametersError as error:
        mistakes = [one._replace(message=f"policy {name}: {one.message}") for one in error.mistakes]
        raise PolicyError(f"policy {name}: {error}", mistakes) from error
    except Exception as error:  # annotations and constructor are somebody else's code
        raise PolicyError(f"policy {name}: {_said(error)}") from error
    if policy is None:
        raise PolicyError(wrong)
    if not isinstance(getattr(policy, "needs", None), frozenset):
        raise PolicyError(f"policy {name} is no policy, it has no `needs` (a frozenset)")
    return policy


def find(name: str) -> type[Policy]:
    """The class behind a name.

    Raises:
        PolicyError: no such policy, or it cannot be imported, or it is none.
    """
    target = POLICIES.get(name) or (name if ":" in name else _installed().get(name))
    if target is None:
        known = names()
        raise PolicyError(
            f"no policy {_meant(name, known)} There are {', '.join(known)}, and package.module:Class"
        )
    try:
        found = resolve_name(target)
    except Exception as error:  # importing runs somebody else's code
        message = f"policy {name} cannot be imported from {target}: {_said(error)}"
        module = target.partition(":")[0]
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            message += "; install its package here, or name the folder of the module in PYTHONPATH"
        raise PolicyError(message) from error
    if not isinstance(found, type):
        raise PolicyError(f"policy {name}: {target} is no class")
    for method in ("choose", "dispatched", "first_token", "finished"):
        if not callable(getattr(found, method, None)):
            raise PolicyError(f"policy {name}: {target} is no policy, it has no `{method}`")
    policy_class: type[Policy] = found
    return policy_class


def names() -> list[str]:
    """All names known here, sorted."""
    return sorted({*POLICIES, *_installed()})


def parameters(name: str) -> tuple[Parameter, ...]:
    """The parameters of a policy, in the order of its constructor.

    Raises PolicyError as `find` does, and if its annotations cannot be read.
    """
    policy_class = find(name)
    try:
        return _parameters_of(policy_class)
    except Exception as error:
        raise PolicyError(f"policy {name}: its parameters cannot be read: {_said(error)}") from error


def summary(name: str) -> str:
    """What a policy does, in one line. Raises PolicyError as `find` does."""
    return (inspect.getdoc(_as_written(find(name))) or "").partition("\n")[0]


@lru_cache(maxsize=1)
def _installed() -> dict[str, str]:
    """Looking for them reads a file of every installed package: once is enough."""
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


@lru_cache(maxsize=64)
def _as_written(policy_class: type[Policy]) -> type[Policy]:
    """The class out of its source, which stands beside what was compiled of it (hatch_build.py).

    Compiled classes keep neither their docstrings nor the annotations of their constructors.
    """
    package, _, module = policy_class.__module__.rpartition(".")
    if inspect.isfunction(policy_class.choose) or package != __name__:
        return policy_class
    source = resources.files(package) / f"{module}.py"
    if not source.is_file():
        return policy_class
    names: dict[str, Any] = {"__name__": policy_class.__module__}
    exec(source.read_text(encoding="utf-8"), names)  # noqa: S102  what was compiled and imported already
    written: type[Policy] = names[policy_class.__qualname__]
    return written


def _parameters_of(policy_class: type[Policy]) -> tuple[Parameter, ...]:
    constructor = _as_written(policy_class).__init__
    hints = get_type_hints(constructor, include_extras=True)
    found = []
    # The first two are `self` and the random generator.
    for parameter in list(inspect.signature(constructor).parameters.values())[2:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        annotation, doc, tunable = hints.get(parameter.name, Any), "", None
        if get_origin(annotation) is Annotated:
            plain, *more = get_args(annotation)
            doc = next((one for one in more if isinstance(one, str)), "")
            tunable = next((one for one in more if isinstance(one, Tunable)), None)
            rest = [
                one for one in more if not isinstance(one, str | Tunable)
            ]  # such as what makes it a Duration
            annotation = Annotated[(plain, *rest)] if rest else plain
        found.append(Parameter(parameter.name, annotation, parameter.default, doc, tunable))
    return tuple(found)


def _wrong(name: str, takes: Iterable[Parameter], given: Mapping[str, object]) -> str:
    """What is wrong with the parameters given to a policy; empty: nothing."""
    known = {parameter.name: parameter for parameter in takes}
    for key, value in given.items():
        if key not in known:
            return f"policy {name} has no parameter {_meant(key, known)} {_accepted(known.values())}"
        if not _fits(value, known[key].annotation):
            return f"policy {name}: {key} must be {known[key].type}, not {value!r}"
    for key, parameter in known.items():
        if parameter.default is REQUIRED and key not in given:
            return f"policy {name} needs the parameter {key} ({parameter.type})"
    return ""


def _in_seconds(takes: Iterable[Parameter], given: Mapping[str, object]) -> dict[str, object]:
    """The parameters with durations that are written as text, such as `500ms`, as numbers."""
    written = {one.name for one in takes if one.is_duration and isinstance(given.get(one.name), str)}
    return {key: parse_duration(value) if key in written else value for key, value in given.items()}


def _said(error: Exception) -> str:
    """An exception in words; with its type where its words may be no sentence, as in `KeyError: 'x'`."""
    if isinstance(error, ImportError | AttributeError | TypeError | ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _meant(given: str, known: Iterable[str]) -> str:
    close = get_close_matches(given, known, n=1)
    return f"{given!r}; did you mean {close[0]!r}?" if close else f"{given!r}."


def _accepted(known: Iterable[Parameter]) -> str:
    listed = ", ".join(f"{parameter.name} ({parameter.type})" for parameter in known)
    return f"It accepts {listed or 'none'}"


def _fits(value: object, annotation: Any) -> bool:
    """Whether a value out of a YAML file is of a type; NaN is no number."""
    if annotation is Any:
        return True
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation == Duration and isinstance(value, str):
        return _is_duration(value)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(one, inner[1]) for key, one in value.items()
        )
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(_fits(one, inner[0]) for one in value)
    return origin is not None or isinstance(value, annotation)  # what is unknown here, its constructor checks


def _is_duration(text: str) -> bool:
    try:
        parse_duration(text)
    except BadValueError:
        return False
    return True


def _in_words(annotation: Any) -> str:
    plain = {float: "number", int: "whole number", str: "text", bool: "true or false", NoneType: "null"}
    if annotation == Duration:
        return "duration"
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(inner[0])
    if annotation in plain:
        return plain[annotation]
    if origin in (Union, UnionType):
        return " or ".join(_in_words(one) for one in inner)
    if origin is Literal:
        return "one of " + ", ".join(str(one) for one in inner)
    if origin is not None and issubclass(origin, Mapping):
        return f"map of {_in_words(inner[0])} to {_in_words(inner[1])}"
    if origin is not None and issubclass(origin, Sequence):
        return f"list of {_in_words(inner[0])}"
    return "anything" if annotation is Any else str(annotation.__name__)
