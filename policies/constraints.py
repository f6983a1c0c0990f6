"""What no policy can overrule: which backends may serve a request at all.

The same check stands before a first choice, a spill and a retry. It says nothing about whether a backend is
up: a backend can be feasible and not available. The difference makes the answer: a request that nothing may
serve is the client's to change (`model_not_found`, `data_class`, `context_length`); one whose backends are
all down is not (`no_backend`), nor is one for a model that a backend may name at the next look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Generic, NamedTuple, TypeVar

from policies.base import BackendView, Reject, RequestFacts

RETRY_AFTER_S: Final = 5.0
"""What a client is told to wait when no backend is up: probes and breakers move on this scale."""

AnyBackend = TypeVar("AnyBackend", bound=BackendView)


class Feasible(NamedTuple, Generic[AnyBackend]):
    """Backends that may serve a request, why the others may not, and the answer if there is none."""

    backends: list[AnyBackend]
    """In the order they were given."""
    removed: dict[str, str]
    """Backend name to the reason, in words."""
    refusal: Reject | None
    """None as long as there is a backend. Else named after the check that the best of them failed."""


def least_context(request: RequestFacts) -> int:
    """Context the request needs at the very least, tokens.

    `prompt_tokens` is an estimate from bytes and may be twice the truth (scripts with several bytes per
    token, markup), so only half of it is counted: a request is removed for its length when it is clearly
    too long, and an engine that knows better answers the rest with its own 400.
    """
    return request.prompt_tokens // 2 + request.max_tokens


def feasible(
    request: RequestFacts,
    backends: Iterable[AnyBackend],
    allows: Callable[[AnyBackend], bool] | None = None,
    rule: str = "",
) -> Feasible[AnyBackend]:
    """Check every backend: model served, data class accepted, context long enough, allowed by the rule.

    A data class has to be accepted by name (or by a backend that accepts all, `data_classes` None): what
    nobody has thought of stays out. `allows` is the filter of the rule called `rule`.
    """
    kept: list[AnyBackend] = []
    removed: dict[str, str] = {}
    need = least_context(request)
    longest = 0
    passed = 0  # checks that the best of the removed ones has passed
    awaited = False
    for backend in backends:
        limit = backend.context_tokens.get(request.model)
        if request.model not in backend.models:
            unknown = backend.models_unknown
            if unknown:
                removed[backend.name] = f"models unknown: {unknown}"
            else:
                removed[backend.name] = f"does not serve {request.model}"
            awaited = awaited or backend.models_awaited
        elif backend.data_classes is not None and request.data_class not in backend.data_classes:
            removed[backend.name] = f"{backend.site} does not accept data class {request.data_class}"
            passed = max(passed, 1)
        elif limit is not None and need > limit:
            removed[backend.name] = f"too long for its context of {limit} tokens"
            longest = max(longest, limit)
            passed = max(passed, 2)
        elif allows is not None and not allows(backend):
            removed[backend.name] = f"not among the backends of rule {rule!r}"
            passed = 3
        else:
            kept.append(backend)
    return Feasible(kept, removed, None if kept else _refusal(request, passed, longest, awaited))


def _refusal(request: RequestFacts, passed: int, longest: int, awaited: bool) -> Reject:
    """The answer; it holds for every request of the same kind and length bucket, so it names none's length."""
    if passed == 0 and awaited:
        message = "not every backend has said yet which models it has, so yours may be there"
        return Reject("no_backend", message, RETRY_AFTER_S)
    if passed == 0:
        return Reject("model_not_found", f"no backend serves model {request.model!r}")
    if passed == 1:
        message = (
            f"no site with the model {request.model!r} accepts data class {request.data_class!r}, "
            "which this request has by its API key ('public' without one)"
        )
        return Reject("data_class", message)
    if passed == 2:
        message = f"prompt and answer do not fit the longest context of {request.model!r}, {longest} tokens"
        return Reject("context_length", message)
    # To this client the model does not exist; 503 would invite it to try again for ever.
    return Reject("model_not_found", f"the policy lets no backend serve {request.model!r} here")
