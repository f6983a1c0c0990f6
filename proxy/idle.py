"""What a configuration would do with a request while every backend is up and idle: for `tidegate explain --request`
where no proxy runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from policies.state import Fleet
from policies.valve import Valve
from proxy.access.keys import Key, list_keys
from proxy.access.limits import Refusal
from proxy.admin.whatif import asked, what_if
from proxy.build import DEFAULT_SLOTS, health, load_policy, make_backends, slots_of
from proxy.config import Config
from proxy.database import DATABASE_FILE, open_database
from proxy.openai import RequestBody, read_body

NOBODY_RUNS = "no proxy runs: every backend is taken to be up and idle, and nothing of a key to be used yet"

NO_ROUND_TRIPS = "no round trip is measured, so no backend is inside of any bounds of `rtt`"


class Imagined:
    """A proxy that does not run, as a `proxy.admin.whatif.Reading`."""

    def __init__(self, config: Config, model: str) -> None:
        """`model`: what backends are taken to serve whose models nobody has asked for.

        Raises FileProblems, ValueError and OSError for a policy or a profile that cannot be used.
        """
        self.notes = [NOBODY_RUNS]
        backends = make_backends(config)
        self.policy = load_policy(config, backends, config.seed or 0)
        """Makes this the `HasPolicy` of `built`."""
        self.built = self
        unasked, unsized = [], []
        for section, backend in zip(config.backends, backends, strict=True):
            if section.models == "auto":
                unasked.append(section.name)
                backend.models, backend.models_unknown, backend.models_awaited = frozenset({model}), "", False
            slots = slots_of(section)
            if slots is None:
                unsized.append(section.name)
            backend.slots = backend.full_slots = slots or DEFAULT_SLOTS
        if unasked:
            self.notes.append(f"taken to serve {model}, for nobody has asked them: {', '.join(unasked)}")
        if unsized:
            self.notes.append(f"taken to have {DEFAULT_SLOTS} slots: {', '.join(unsized)}")
        if any(rule.rtts for rule in self.policy.rules.rules):
            self.notes.append(NO_ROUND_TRIPS)
        standbys = [backend.name for backend in backends if backend.asleep]
        if standbys:
            self.notes.append(f"taken to sleep, being standbys: {', '.join(standbys)}")
        self.scaling = None
        self.fleet = Fleet(backends, health(config))
        self.fleet.refresh(self.now())
        self.valve = Valve(self.policy.rules, self.fleet)
        self.aliases, self.salt, self.total_s = config.aliases, b"", config.timeouts.total
        self.wall: Callable[[], float] = time.time

    def now(self) -> float:
        return 0.0

    def probes(self) -> dict[str, Any]:
        return {}

    def holder(self, response: str, tenant: str) -> str | None:
        return None

    def refusal(self, key: Key, body: RequestBody, facts: object) -> Refusal | None:
        return None


def explanation(config: Config, given: list[tuple[str, str]], raw: bytes) -> dict[str, Any]:
    """What the admin port of a proxy with this configuration would answer to `POST /explain`.

    Raises AskedError and RequestError as it does, and OpenError for keys that cannot be read.
    """
    wanted = asked(given, lambda key_id: _key(config, key_id), time.time())
    body = read_body(wanted.endpoint, raw, media_urls=config.media_urls)
    imagined = Imagined(config, config.aliases.get(body.model, body.model))
    shown = what_if(imagined, body, wanted)
    return {**shown, "notes": imagined.notes + shown["notes"]}


def _key(config: Config, key_id: str) -> Key | None:
    if config.database is None and not (Path(config.state) / DATABASE_FILE).exists():
        return None
    engine = open_database(config.database or config.state, check=False)
    try:
        return next(
            (one.key for one in list_keys(engine) if one.key.id == key_id and one.revoked is None), None
        )
    finally:
        engine.dispose()
