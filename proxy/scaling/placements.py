"""What a scheduling platform has placed for us, until its time is over. No I/O, no clock.

`now` is monotonic. A file has Unix times, so that what is loaded goes when it would have gone; whatever was done
to the clock meanwhile, nothing stays longer than the time it was given.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import orjson

from proxy.scaling.messages import MessageError, Placement, Progress, Resources, validated
from proxy.scaling.signing import TOLERANCE_S

MOST_PLACEMENTS = 256
MOST_SITES = 256
MOST_ANSWERED = 20_000
"""Messages that are remembered, within the time in which their signatures hold: as many placements as there may be,
each renewed every ten seconds, fill three quarters of it."""
REMEMBER_S = 2 * TOLERANCE_S
"""Signed as far in the future as is taken, a message holds for so long."""

T = TypeVar("T", Placement, Resources)


@dataclass(frozen=True, slots=True)
class Held(Generic[T]):
    """Something with a time to live."""

    value: T
    until: float
    """Monotonic."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A message that was taken, and what was said."""

    content: str
    """Digest of its route and body."""
    status: int
    answer: str
    at: float
    """Monotonic."""


class Placements:
    """Placements by id, resources by site, and the messages that they came by."""

    def __init__(self) -> None:
        self._placements: dict[str, Held[Placement]] = {}
        self._resources: dict[str, Held[Resources]] = {}
        self._answered: dict[str, Answered] = {}

    def check(self, placement: Placement, now: float) -> None:
        """Raises MessageError: there are too many, its name is another's or was another, or it costs more than it
        did: what somebody has approved is what is paid."""
        before = self.find(placement.id, now)
        if before is None and len(self.all(now)) >= MOST_PLACEMENTS:
            raise MessageError("", f"there are {MOST_PLACEMENTS} placements already")
        if before is not None and before.name != placement.name:
            raise MessageError("name", f"this placement is called '{before.name}': its name cannot change")
        if before is not None and (field := _dearer(before, placement)):
            raise MessageError(
                field, "it cannot rise while it is placed: delete the placement, and place another"
            )
        if any(one.name == placement.name and one.id != placement.id for one in self.all(now)):
            raise MessageError("name", f"another placement is called '{placement.name}'")

    def put(self, placement: Placement, now: float) -> None:
        """A new one, or a renewal. Raises MessageError as `check` does."""
        self.check(placement, now)
        self._placements[placement.id] = Held(placement, now + placement.ttl_s)

    def progressed(self, progress: Progress, now: float) -> bool:
        """What has become of one; False: there is none."""
        held = self._placements.get(progress.placement)
        if held is None or held.until <= now:
            return False
        update = progress.model_dump(include={"state", "progress", "detail", "run"})
        self._placements[progress.placement] = replace(held, value=held.value.model_copy(update=update))
        return True

    def remove(self, id: str) -> bool:
        """Whether there was one, expired or not."""
        return self._placements.pop(id, None) is not None

    def expire(self, now: float) -> list[Placement]:
        """Those whose time is over; they are gone now."""
        over = [held.value for held in self._placements.values() if held.until <= now]
        for placement in over:
            del self._placements[placement.id]
        self._resources = {site: held for site, held in self._resources.items() if held.until > now}
        self._answered = {id: one for id, one in self._answered.items() if now - one.at <= REMEMBER_S}
        return over

    def find(self, id: str, now: float) -> Placement | None:
        """One whose time is not over."""
        held = self._placements.get(id)
        return held.value if held is not None and held.until > now else None

    def all(self, now: float) -> list[Placement]:
        """Those whose time is not over, in the order in which they came."""
        return [held.value for held in self._placements.values() if held.until > now]

    def left_s(self, id: str, now: float) -> float:
        """Seconds until it goes."""
        held = self._placements.get(id)
        return 0.0 if held is None else max(held.until - now, 0.0)

    # Resources

    def put_resources(self, resources: Resources, now: float) -> None:
        """Raises MessageError: there are too many sites."""
        if resources.site not in self._resources and len(self._resources) >= MOST_SITES:
            raise MessageError("", f"there are {MOST_SITES} sites already")
        self._resources[resources.site] = Held(resources, now + resources.ttl_s)

    def resources(self, now: float) -> dict[str, Resources]:
        """By site, as far as they are not too old."""
        return {site: held.value for site, held in self._resources.items() if held.until > now}

    # Messages

    def answered(self, id: str, content: str, now: float) -> Answered | None:
        """What was said to a message when it came before. Raises MessageError: it said something else then."""
        found = self._answered.get(id)
        if found is None or now - found.at > REMEMBER_S:
            return None
        if found.content != content:
            raise MessageError("webhook-id", "another message had this id")
        return found

    def remember(self, id: str, answered: Answered) -> None:
        """A message was taken. Call `has_room` before."""
        self._answered[id] = answered

    @property
    def has_room(self) -> bool:
        """Whether one more message can be remembered."""
        return len(self._answered) < MOST_ANSWERED

    # Files

    def dump(self, now: float, wall: float) -> bytes:
        """As a file has it. `wall`: Unix time of `now`."""
        return orjson.dumps(
            {
                "placements": _with_times(self._placements.values(), now, wall),
                "resources": _with_times(self._resources.values(), now, wall),
                "answered": [
                    [id, one.content, one.status, one.answer, wall + (one.at - now)]
                    for id, one in self._answered.items()
                ],
            }
        )

    @classmethod
    def load(cls, data: bytes, now: float, wall: float) -> Placements:
        """Raises ValueError: this is no file of ours."""
        found = cls()
        try:
            document = orjson.loads(data)
            for value, until in document["placements"]:
                placement = validated(value, Placement)
                found._placements[placement.id] = Held(placement, now + _left(until - wall, placement.ttl_s))
            for value, until in document["resources"]:
                resources = validated(value, Resources)
                found._resources[resources.site] = Held(resources, now + _left(until - wall, resources.ttl_s))
            for id, content, status, answer, at in document["answered"]:
                age_s = _left(wall - at, REMEMBER_S)
                found._answered[str(id)] = Answered(str(content), int(status), str(answer), now - age_s)
        except (KeyError, TypeError, MessageError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        found.expire(now)
        return found


def _dearer(before: Placement, now: Placement) -> str:
    """The field of what costs more, or nobody knows what any more; empty: none."""
    if before.cost_per_hour is not None and (
        now.cost_per_hour is None or now.cost_per_hour > before.cost_per_hour
    ):
        return "cost_per_hour"
    if before.price is None or now.price is None:
        return "" if before.price is None else "price"
    for name in ("input", "output", "cached_input"):
        was, is_now = getattr(before.price, name), getattr(now.price, name)
        if was is not None and is_now is not None and is_now > was:
            return f"price.{name}"
    return ""


def _left(seconds: float, most: float) -> float:
    return min(max(seconds, 0.0), most)


def _with_times(held: Iterable[Held[Any]], now: float, wall: float) -> list[Any]:
    return [[one.value.model_dump(mode="json"), wall + (one.until - now)] for one in held]
