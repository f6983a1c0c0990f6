"""Backends that are used although they look sick, because too few others are left.

A backend is doubtful (`Backend.doubtful`) when either its probes or its breaker hold it for sick, not both, and
somebody answered there when it was last tried. Two rules bring it back, for a request that it may serve:

* **Most ejected.** Breakers take out at most a share of the backends, and one in any case. The others stay, those
  first whose breakers were open for the shortest time: what breaks all over the place is seldom the backends.
* **Panic.** If fewer than a share of the backends would still be left, all doubtful ones are used.

Both choose among the backends that may serve the request at all (`constraints.py`), so neither leads past a data
class. Both ideas are Envoy's (`max_ejection_percent`, panic threshold).
"""

from __future__ import annotations

from collections.abc import Sequence

from policies.health import Health
from policies.state import Backend


def in_spite(feasible: Sequence[Backend], health: Health) -> list[Backend]:
    """Of the backends that may serve a request, the doubtful ones that are used."""
    doubtful = [backend for backend in feasible if backend.doubtful]
    if not doubtful:
        return doubtful
    count = sum(not (one.draining or one.asleep or one.over_budget) for one in feasible)
    ejected = [backend for backend in doubtful if backend.probed_up]
    ejected.sort(key=lambda backend: backend.breaker.backoff_s)
    most = max(1, int(health.most_ejected * count + 1e-9))
    spared = ejected[: max(len(ejected) - most, 0)]
    left = sum(backend.available for backend in feasible) + len(spared)
    return doubtful if left < health.panic * count else spared
