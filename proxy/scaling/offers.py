"""What each standby offers: model, site, card, image, price and what it promises; and what cannot work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from policies.match import LOCAL
from policies.plans import Forecast, Plan, Resources, Trigger, forecast_of
from policies.profile import Profile, read_profile
from policies.units import BadValueError
from policies.yamlfile import FileProblems
from policies.yamlproblems import closest
from proxy.config import BackendConfig, Config
from proxy.scaling.images import Images, Launch, Missing, Wanted, load_images
from proxy.scaling.sections import SchedulerPlatform
from proxy.scaling.signing import secrets_of

BRINGS_OWN: Final = frozenset({"process", "sleep"})
"""Providers that run what is there: no image is looked up for them."""
ENGINE_PORT: Final = 8000
"""Of an engine whose URL names none, since something before it is what answers there."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One standby."""

    name: str
    site: str
    models: tuple[str, ...]
    task: str = "generate"
    card: str = ""
    """Empty: nobody has said it."""
    cards: int = 1
    cost_per_hour: float | None = None
    priced: bool = False
    """Whether its tokens have a price."""
    forecast: Forecast = field(default_factory=Forecast)
    launch: Launch | Missing | None = None
    """What runs on it; None: its provider brings its own, or nobody has said the card."""

    @property
    def image(self) -> str:
        """Empty: the provider brings its own."""
        return str(self.launch) if isinstance(self.launch, Launch) else ""

    @property
    def rank(self) -> tuple[float, str]:
        """Cheapest capacity first; of unknown cost last."""
        if self.cost_per_hour is None:
            return float("inf"), self.name
        return self.cost_per_hour / max(self.forecast.concurrency or 1, 1), self.name


def offers(config: Config, images: Images) -> dict[str, Offer]:
    """Of every standby of the configuration, by name. A profile that cannot be read promises nothing."""
    return {
        backend.name: offer(backend, images) for backend in config.backends if backend.standby is not None
    }


def offer(backend: BackendConfig, images: Images) -> Offer:
    """Of one that has a `standby` section."""
    section = backend.standby
    assert section is not None
    profile = _profile(backend.profile)
    card = section.card or backend.labels.get("card") or (profile.card if profile is not None else "")
    launch: Launch | Missing | None = None
    models = () if backend.models == "auto" else tuple(backend.models)
    if section.image is not None:
        launch = Launch(section.image, source="the configuration")
    elif card and (section.kind == "scheduler" or (section.card and section.kind not in BRINGS_OWN)):
        port = urlsplit(backend.url).port or ENGINE_PORT
        found = [images.launch(Wanted(model, card, section.task), section.cards, port) for model in models]
        launch = next((one for one in found if isinstance(one, Missing)), found[0] if found else None)
        if isinstance(launch, Missing) and section.card is None:
            launch = None  # a platform may have an image that we do not know
    return Offer(
        backend.name,
        backend.site,
        models,
        section.task,
        card,
        section.cards if profile is None else max(section.cards, profile.cards),
        section.cost_per_hour,
        backend.price is not None or bool(backend.prices),
        forecast_of(profile, None if backend.slots == "auto" else backend.slots),
        launch,
    )


def draft(
    chosen: Sequence[Offer],
    *,
    id: str,
    trigger: Trigger,
    reason: str,
    mode: str,
    created: float,
    waits_s: float,
    budget_left: float | None,
    figures: Mapping[str, float],
    template: str,
) -> Plan:
    """A plan to start these standbys, with what they take, cost and promise together."""
    forecast = chosen[0].forecast
    for one in chosen[1:]:
        forecast = forecast.and_then(one.forecast)
    known = [one.cost_per_hour for one in chosen if one.cost_per_hour is not None]
    return Plan(
        id=id,
        standbys=tuple(one.name for one in chosen),
        trigger=trigger,
        reason=reason,
        mode=mode,
        created=created,
        expires=created + waits_s,
        resources=Resources(
            model=_joined(model for model in chosen[0].models if all(model in one.models for one in chosen)),
            task=chosen[0].task,
            site=_joined(one.site for one in chosen),
            card=_joined(one.card for one in chosen),
            cards=max(one.cards for one in chosen),
            count=len(chosen),
            image=_joined(one.image for one in chosen),
        ),
        forecast=forecast,
        cost_per_hour=sum(known) if len(known) == len(chosen) else None,
        budget_left=budget_left,
        figures=figures,
        template=template,
    )


def _joined(words: Iterable[str]) -> str:
    """Each once, in their order."""
    return ", ".join(dict.fromkeys(filter(None, words)))


def _profile(file: Path | None) -> Profile | None:
    if file is None:
        return None
    try:
        return read_profile(file.read_text(encoding="utf-8"), str(file))
    except (OSError, ValueError, FileProblems):
        return None  # `tidegate check` says so, and a start is refused


def unworkable(config: Config) -> Iterator[BadValueError]:
    """What cannot work of `scaling` and of standbys, with its place in the configuration."""
    scaling = config.scaling
    if scaling.scheduler is not None:
        yield from _unworkable_platform(config, scaling.scheduler)
    try:
        images = load_images(scaling.images)
    except FileProblems as error:
        yield BadValueError(str(error), at=("scaling", "images"))
        return
    except (OSError, UnicodeDecodeError) as error:
        reason = (
            (error.strerror or "cannot be read").lower() if isinstance(error, OSError) else "is not UTF-8"
        )
        yield BadValueError(f"{scaling.images}: {reason}", at=("scaling", "images"))
        return
    places = {LOCAL, *config.sites, *(backend.site for backend in config.backends)}
    for key in ("budgets", "most"):
        named = scaling.budgets.sites if key == "budgets" else scaling.most
        path = ("scaling", "budgets", "sites") if key == "budgets" else ("scaling", "most")
        for site in named:
            if site not in places:
                yield BadValueError(f"there is no site '{site}'", closest(site, places), at=(*path, site))
    for notice, path in (
        (scaling.approval_webhook, ("scaling", "approval_webhook")),
        (scaling.budgets.webhook, ("scaling", "budgets", "webhook")),
    ):
        if notice is not None:
            try:
                secrets_of(notice.secret_env, (*path, "secret_env"))
            except BadValueError as error:
                yield error
    for number, backend in enumerate(config.backends):
        section = backend.standby
        if section is None:
            continue
        at = ("backends", number, "standby")
        found = offer(backend, images)
        if isinstance(found.launch, Missing):
            yield BadValueError(
                f"{found.launch}: give `image`, or an own file in `scaling.images`", at=(*at, "card")
            )
        if why := unpriced(config, backend):
            yield BadValueError(why, at=(*at, "cost_per_hour"))


def _unworkable_platform(config: Config, platform: SchedulerPlatform) -> Iterator[BadValueError]:
    at = ("scaling", "scheduler")
    try:
        secrets_of(platform.secret_env, (*at, "secret_env"))
    except BadValueError as error:
        yield error
    if platform.api_key_env is not None and not os.environ.get(platform.api_key_env, "").strip():
        yield BadValueError("this variable is not set in the environment", at=(*at, "api_key_env"))
    if not config.probing.enabled:
        yield BadValueError(
            "without probes nobody sees a placement answer: leave `probing.enabled` out", at=at
        )
    if not config.sites.keys() - {LOCAL}:
        yield BadValueError("a placement stands at one of `sites`, and there is none but `local`", at=at)


def unpriced(config: Config, backend: BackendConfig) -> str:
    """Why a standby has to say what an hour of it costs; empty: it does, or no ceiling is over it."""
    assert backend.standby is not None
    ceiling = _ceiling_over(config, backend.site)
    if not ceiling or backend.standby.cost_per_hour is not None or backend.price or backend.prices:
        return ""
    return f"{ceiling} cannot be kept without it: what does an hour of '{backend.name}' cost? 0, if nothing"


def _ceiling_over(config: Config, site: str) -> str:
    budgets = config.scaling.budgets
    if site in budgets.sites:
        return f"scaling.budgets.sites.{site}"
    return "scaling.budgets.month" if budgets.month is not None and site != LOCAL else ""
