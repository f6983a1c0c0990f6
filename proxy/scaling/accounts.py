"""What plans and the fleet say of money and of shortage, for `planning.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from policies.match import LOCAL
from policies.plans import Plan
from policies.state import Fleet
from policies.valve import Valve
from proxy.scaling.spending import Span
from proxy.scaling.templates import Shortage


def running_for(plans: Iterable[Plan], template: str) -> list[str]:
    """Standbys that run on the account of a template."""
    found: list[str] = []
    for plan in plans:
        if plan.template == template and plan.began is not None:
            gone = dict(plan.stopped)
            found += (name for name in plan.started if name not in gone)
    return found


def accounts(plans: Iterable[Plan]) -> dict[str, Sequence[Span]]:
    """When which standbys ran on the account of which template."""
    found: dict[str, list[Span]] = {}
    for plan in plans:
        if plan.template and (began := plan.began) is not None:
            ended = dict(plan.stopped)
            spans = found.setdefault(plan.template, [])
            spans += (Span(name, began, ended.get(name)) for name in plan.started)
    return dict(found)


def room(plans: Sequence[Plan], template: str, most: int) -> int:
    """How many standbys a template may start by itself, so that `most` run: none while a plan of it is open."""
    if any(plan.open and plan.template == template for plan in plans):
        return 0
    return max(most - len(running_for(plans, template)), 0)


def shortage(fleet: Fleet, valve: Valve, model: str, now: float) -> Shortage:
    """How short of capacity the local backends of a model are."""
    of = [backend for backend in fleet if model in backend.models]
    names = {backend.name for backend in of}
    spilling = [now - flag.moved_at for flag in valve.rules.spills if flag.open and flag.backends & names]
    waiting, _ = valve.waiting_by_model().get(model, (0, 0))
    local = [backend.saturation(now) for backend in of if backend.site == LOCAL and backend.available]
    return Shortage(
        max(spilling, default=0.0),
        waiting,
        valve.oldest_age(now, model),
        sum(local) / len(local) if local else 0.0,
    )
