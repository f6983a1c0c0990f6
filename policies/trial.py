"""One request, to see whether a policy that is somebody else's works at all.

The proxy goes on without a policy that fails (`guarded.py`); whoever checks a file learns of it here.
"""

from __future__ import annotations

from collections.abc import Sequence

from policies.base import BackendView, Finished, Outcome, Policy, RequestFacts, Send
from policies.guarded import Guarded
from policies.speeds import TPOT, TTFT

_FLEET = (BackendView("a"), BackendView("b", site="remote"))


def failure(policy: Policy, name: str, fleet: Sequence[BackendView] = ()) -> str:
    """What goes wrong when `policy`, a fresh object, sends a request to a backend like those of `fleet`, all idle;
    empty: nothing."""
    backends = [_idle(backend) for backend in fleet or _FLEET]
    request = RequestFacts(
        "trial", model="any", prompt_tokens=1000, expected_tokens=200, session="trial", prefix=(1, 2)
    )
    tried = Guarded(policy, name)
    decision = tried.choose(request, backends, 0.0)
    if isinstance(decision, Send) and not tried.failures:
        chosen = next(backend for backend in backends if backend.name == decision.backend)
        chosen.in_flight, chosen.prefilling = 1, 1
        tried.dispatched(request, chosen, 0.0)
        chosen.prefilling = 0
        tried.first_token(request, chosen, 0.1)
        chosen.in_flight = 0
        tried.finished(Finished(request, chosen.name, Outcome.OK, 1.0, 0.0, 0.1, 1000, 0, 200, name))
    return tried.last_failure


def _idle(backend: BackendView) -> BackendView:
    """As it is configured, and with the figures that it has before anything is measured."""
    return BackendView(
        backend.name,
        site=backend.site,
        slots=backend.slots,
        weight=backend.weight,
        models=backend.models,
        labels=backend.labels,
        operator=backend.operator,
        location=backend.location,
        data_classes=backend.data_classes,
        price_input=backend.price_input,
        price_output=backend.price_output,
        carbon_gco2_kwh=backend.carbon_gco2_kwh,
        ttft_fit=TTFT,
        tpot_fit=TPOT,
    )
