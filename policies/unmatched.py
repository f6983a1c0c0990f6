"""Why a rule does not match a request, in words."""

from __future__ import annotations

from collections.abc import Collection

from policies.base import RequestFacts
from policies.match import SLA, TASK, Match
from policies.yamlproblems import listed


def why_not(match: Match, request: RequestFacts) -> str:
    """The first condition that does not hold; empty: all do."""
    if match.accepts(request):
        return ""
    if match.models and not Match(models=match.models).accepts(request):
        return f"its model is {request.model}, not {listed(match.models)}"
    for what, value, wanted in (
        ("tenant", request.tenant, match.tenants),
        ("data class", request.data_class, match.data_classes),
        ("endpoint", request.endpoint, match.endpoints),
    ):
        if wanted and value not in wanted:
            return f"its {what} is {value}, not {_any(wanted)}"
    if match.stream is not None and request.stream != match.stream:
        return f"it is {'a' if request.stream else 'no'} stream"
    for what, number, low, high in (
        ("priority", request.priority, match.min_priority, match.max_priority),
        ("prompt in tokens", request.prompt_tokens, match.min_prompt_tokens, match.max_prompt_tokens),
    ):
        if low is not None and number < low:
            return f"its {what} is {number}, below {low}"
        if high is not None and number > high:
            return f"its {what} is {number}, above {high}"
    one_each = ((key, frozenset({value})) for key, value in match.labels.items())
    for key, values in ((SLA, match.sla), (TASK, match.task), *one_each):
        have = request.labels.get(key)
        if values and have not in values:
            said = "no label" if have is None else f"the label {key}={have}, not"
            return f"it has {said} {_any([f'{key}={value}' for value in values])}"
    if match.hours is not None and not match.hours.contains(request.wall):
        return "it is not the time"
    return "its `when` does not hold"


def _any(names: Collection[str]) -> str:
    return listed(sorted(names))
