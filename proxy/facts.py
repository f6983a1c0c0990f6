"""What a decision needs to know of a request, read out of its body, its head and its key."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from policies.base import BackendView, RequestFacts
from proxy.access.keys import Key
from proxy.endpoints import Route
from proxy.errors import RequestError
from proxy.openai import RequestBody


def facts_of(
    body: RequestBody,
    route: Route,
    model: str,
    key: Key | None,
    *,
    op: str,
    session: bytes,
    arrived: float,
    wall: float,
    total_s: float,
    body_bytes: int,
) -> RequestFacts:
    """The facts, less hashes of the prompt and a backend that alone could serve it.

    `model`: as backends name it. `session`: the value of `x-session-id`. `total_s`: what a request may take.
    """
    facts = RequestFacts(
        op,
        model,
        route.name,
        arrived=arrived,
        wall=wall,
        deadline=arrived + total_s,
        stream=body.stream,
        body_bytes=body_bytes,
        prompt_tokens=body.prompt_tokens,
        max_tokens=body.max_tokens,
        expected_tokens=body.expected_tokens if route.generates else 0,
    )
    if key is not None:
        facts.tenant, facts.key_id, facts.data_class = key.tenant, key.id, key.data_class
        facts.priority = key.priority
        facts.labels = key.labels
    named = session.decode("latin-1")[:256] if session else body.session
    if named:
        facts.session = f"{facts.tenant}\0{named}"
    return facts


def wants_hashes(needs: Collection[str], route: Route) -> bool:
    """Whether policies with these `needs` are to know the hashes of a prompt; media have none."""
    return ("prefix" in needs or "hashes" in needs) and not route.media


def check_model(key: Key | None, asked: str, model: str) -> None:
    """Raise RequestError if the key may use neither of these names of a model."""
    if key is not None and key.models is not None and not (asked in key.models or model in key.models):
        raise RequestError("model_not_allowed", f"this key may not use the model {asked[:128]!r}", "model")


def no_model(asked: str, model: str, fleet: Iterable[BackendView]) -> str:
    """What the client is told of a model that nothing may serve it. `asked`: as it was called."""
    backends = list(fleet)
    name = asked[:128]
    if any(model in backend.models for backend in backends):
        return f"the policy of this proxy lets no backend serve the model {name!r} to this request"
    if model != asked:
        return f"the alias {name!r} stands for {model[:128]!r}, which no backend serves"
    if any(backend.models_unknown for backend in backends):
        return f"no backend is known to serve the model {name!r}"
    return f"the model {name!r} does not exist"
