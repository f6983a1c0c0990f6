"""The hook between this balancer and a scheduling platform, in both directions.

We ask the platform for capacity (`request`, `release`) and it answers later, by what it pushes to the admin port:
placements, resources, progress. A placement becomes a backend that need not run, and the provider `scheduler`
starts it when traffic needs it. Pushes are taken one at a time. What changes placements is on the disk before it is
answered, what renews them within a second; one that cannot be served from changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import orjson

from policies.asking import LIFE_S, Ask
from policies.lengths import EXPECTED_TOKENS
from policies.match import LOCAL
from policies.state import Backend
from policies.units import BadValueError
from probes.resolver import Resolver
from proxy.config import Config
from proxy.readable import in_words
from proxy.scaling.calls import Caller, RefusedError, new_id
from proxy.scaling.messages import (
    Budget,
    Demand,
    MessageError,
    Placement,
    Progress,
    Resources,
    ScaleRequest,
    Sla,
    read_message,
)
from proxy.scaling.overlay import LeftOut, with_placements
from proxy.scaling.placements import Answered, Placements
from proxy.scaling.provider import ProviderError
from proxy.scaling.sections import SchedulerPlatform
from proxy.scaling.signing import SignatureError, secrets_of, verify, what_is_signed
from proxy.ssrf import check_url, checked_addresses

log = logging.getLogger("tidegate")

FILE: Final = "placements.json"
EXPIRE_S: Final = 1.0
"""How often it is looked whose time is over."""
LOOK_UP_S: Final = 5.0
"""How long the host of a new placement may take to be resolved."""
NOT_FOUND: Final = 404
WITHIN_S: Final = 60.0
"""How long a scale request is tried for."""


class Served(Protocol):
    """What serves from the placements: `proxy.serve.Service`."""

    def configured(self) -> Config:
        """The configuration as the file has it."""

    def serve_placements(self) -> None:
        """Serve from the placements there are now, and from no others. Raises ConfigError: nothing has changed."""

    def drain(self, name: str) -> None:
        """Send nothing new to a placement, and stop it."""


class Reply(NamedTuple):
    """What a push is answered."""

    status: int
    body: dict[str, Any]


def refusal(status: int, message: str, field: str = "") -> Reply:
    """What is wrong, and where."""
    error = {"message": message} | ({"field": field} if field else {})
    return Reply(status, {"error": error})


class Platform:
    """One platform's placements, and the way to it."""

    def __init__(
        self,
        served: Served,
        resolver: Resolver,
        state: Path,
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Reads what `state` has of an earlier life. Placements of a file that is damaged are gone: their platform
        sends them again."""
        self._served = served
        self._resolver = resolver
        self._file = state / FILE
        self._now, self._wall = now, wall
        self._turn = asyncio.Lock()
        self._left = False
        self._unwritten = self._urgent = False
        """Whether something is not in the file yet, and may not be answered before it is."""
        self._trouble = ""
        """Why the file cannot be written, as the log has it; empty: it can."""
        self._caller: tuple[SchedulerPlatform, Caller] | None = None
        self._callers: list[Caller] = []
        """That one, and those of earlier configurations."""
        self._said: dict[str, str] = {}
        """Of placements that do not fit: why, as the log has it."""
        self.placements = Placements()
        self._candidates: list[Placement] | None = None
        try:
            self.placements = Placements.load(self._file.read_bytes(), now(), wall())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.error(
                "%s cannot be read, the platform has to send its placements again: %s", self._file, error
            )

    @property
    def section(self) -> SchedulerPlatform | None:
        """`scaling.scheduler` as the file has it now."""
        return self._served.configured().scaling.scheduler

    # As backends

    def overlaid(self, config: Config) -> Config:
        """The configuration with the placements there are; what does not fit is told of once."""
        candidates = self._candidates
        overlaid, left_out = with_placements(
            config, self.placements.all(self._now()) if candidates is None else candidates
        )
        if candidates is None:
            self._tell(left_out)
        elif left_out and left_out[-1].placement is candidates[-1]:
            raise left_out[-1].problem
        return overlaid

    def _tell(self, left_out: Sequence[LeftOut]) -> None:
        said = {one.placement.id: _words(one.problem) for one in left_out}
        for id, words in said.items():
            if self._said.get(id) != words:
                log.warning("placement %s is left out: %s", id, words)
        self._said = said

    def seen_from(self, backends: Mapping[str, Backend], now: float) -> None:
        """Round trips that the platform tells of count until they have been measured."""
        for placement in self.placements.all(now) if self._candidates is None else self._candidates:
            backend = backends.get(placement.name)
            if backend is not None and placement.route.rtt_ms is not None and backend.rtt_at == -inf:
                backend.observe_rtt(placement.route.rtt_ms / 1e3, now)

    # What the platform pushes

    async def push(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """A message that came to the admin port. `path`: as it was asked for."""
        section = self.section
        if section is None:
            return refusal(404, "the configuration has no scaling.scheduler")
        try:
            secrets = secrets_of(section.secret_env)
            id = verify(secrets, headers, what_is_signed(method, path, body), self._wall())
        except BadValueError as error:
            return refusal(503, error.message)
        except SignatureError as error:
            return refusal(401, str(error))
        content = hashlib.sha256(f"{method} {path}\n".encode() + body).hexdigest()
        misplaced = await self._misplaced(method, path, body, section)
        async with self._turn:
            if self._left:
                return refusal(503, "another process takes over: send it again")
            now = self._now()
            try:
                before = self.placements.answered(id, content, now)
            except MessageError as error:
                return refusal(409, error.message, error.field)
            if before is not None:
                reply = Reply(before.status, orjson.loads(before.answer))
            elif not self.placements.has_room:
                return refusal(429, "too many messages within the time that their signatures hold")
            else:
                try:
                    reply = self._take(method, path, body, misplaced)
                except MessageError as error:
                    return refusal(422, error.message, error.field)
                if reply.status >= 300:
                    return reply
                answer = orjson.dumps(reply.body).decode()
                self.placements.remember(id, Answered(content, reply.status, answer, now))
                self._unwritten = True
            if self._urgent and not await self._written():
                return refusal(503, "it could not be kept: send it again")
            return reply

    async def _misplaced(
        self, method: str, path: str, body: bytes, section: SchedulerPlatform
    ) -> MessageError | None:
        """Why a placement may not stand where it says. Not in the turn of its message: a lookup may take long, and
        others have to be renewed meanwhile."""
        if method != "PUT" or not path.startswith("/platform/placements/"):
            return None
        try:
            placement = read_message(body, Placement)
        except MessageError:
            return None  # `_take` says so
        before = self.placements.find(placement.id, self._now())
        if before is not None and before.url == placement.url:
            return None
        try:
            url = check_url(placement.url, section.networks)
            async with asyncio.timeout(LOOK_UP_S):
                await checked_addresses(url, self._resolver.look_up, section.networks)
        except BadValueError as error:
            return MessageError("url", error.message)
        except (OSError, UnicodeError):
            return MessageError("url", "its host cannot be resolved")
        return None

    def _take(self, method: str, path: str, body: bytes, misplaced: MessageError | None) -> Reply:
        """Raises MessageError."""
        match (method, *path.removeprefix("/platform/").split("/")):
            case ("PUT", "placements", id):
                placement = read_message(body, Placement)
                if placement.id != id:
                    raise MessageError("id", "not the one of the path")
                if misplaced is not None:
                    raise misplaced
                return self._put(placement)
            case ("DELETE", "placements", id):
                return self._delete(id)
            case ("PUT", "sites", site, "resources"):
                resources = read_message(body, Resources)
                if resources.site != site:
                    raise MessageError("site", "not the one of the path")
                if site not in self._served.configured().sites:
                    raise MessageError("site", f"'{site}' is not in the configuration")
                self.placements.put_resources(resources, self._now())
                return Reply(200, {"site": site})
            case ("POST", "progress"):
                progress = read_message(body, Progress)
                if not self.placements.progressed(progress, self._now()):
                    return refusal(404, "there is no such placement: put it first", "placement")
                return Reply(200, {"placement": progress.placement})
        return refusal(404, "no such message")

    def _put(self, placement: Placement) -> Reply:
        now = self._now()
        store = self.placements
        before = store.find(placement.id, now)
        store.check(placement, now)
        if before is None or _served_from(before) != _served_from(placement) or placement.id in self._said:
            others = [one for one in store.all(now) if one.id != placement.id]
            if not self._try([*others, placement]):
                return refusal(
                    503, "it cannot be served from now, the log of the proxy says why: send it again"
                )
            self._said.pop(placement.id, None)
            self._urgent = True
        store.put(placement, now)
        return Reply(200 if before is not None else 201, {"id": placement.id, "ttl_s": placement.ttl_s})

    def _try(self, candidates: list[Placement]) -> bool:
        """Serve from these, the last of which is new. False: the configuration itself cannot be used now. Raises
        MessageError: the new one does not fit. Either way nothing has changed."""
        self._candidates = candidates
        try:
            self._served.serve_placements()
        except MessageError:
            raise
        except Exception as error:
            log.error("placement %s cannot be served from now: %s", candidates[-1].id, in_words(error))
            return False
        finally:
            self._candidates = None
        return True

    def _delete(self, id: str) -> Reply:
        placement = self.placements.find(id, self._now())
        if placement is None:
            return refusal(404, "there is no such placement")
        self.placements.remove(id)
        self._urgent = True
        self._without(placement)
        return Reply(200, {"id": id})

    def _without(self, *gone: Placement) -> None:
        """Serve from the others. What cannot be taken out, since the configuration cannot be used now, is
        stopped."""
        try:
            self._served.serve_placements()
        except Exception as error:
            for placement in gone:
                log.error("placement %s is gone and only drains: %s", placement.id, in_words(error))
                self._served.drain(placement.name)

    async def expire(self) -> None:
        """Take out those whose time is over, for as long as the proxy runs."""
        while True:
            await asyncio.sleep(EXPIRE_S)
            async with self._turn:
                await self.expired()

    async def expired(self) -> None:
        """Take out those whose time is over now, and keep what renewals have said since."""
        if self._left:
            return
        over = self.placements.expire(self._now())
        for placement in over:
            log.warning("placement %s was not renewed within %g s: it drains", placement.id, placement.ttl_s)
        if over:
            self._without(*over)
            self._unwritten = True
        if self._unwritten:
            await self._written()

    def leave(self) -> None:
        """Another process has taken over, and with it the file."""
        self._left = True

    async def _written(self) -> bool:
        """Have all of it on the disk. False, and told once: that cannot be."""
        try:
            await asyncio.to_thread(self._write)
        except OSError as error:
            trouble = f"{self._file} cannot be written: {in_words(error)}"
            if trouble != self._trouble:
                log.error("%s", trouble)
            self._trouble = trouble
            return False
        self._unwritten = self._urgent = False
        self._trouble = ""
        return True

    def _write(self) -> None:
        """In a thread: it may be two megabytes, and nothing changes meanwhile."""
        _write(self._file, self.placements.dump(self._now(), self._wall()))

    # What we ask of the platform

    def caller(self) -> tuple[str, Caller]:
        """Where the platform is, and what calls it. Raises BadValueError: there is none, or no secret."""
        section = self.section
        if section is None:
            raise BadValueError("the configuration has no scaling.scheduler", at=("scaling", "scheduler"))
        if self._caller is None or self._caller[0] != section:
            self._caller = section, caller_of(section)
            self._callers.append(self._caller[1])
        return section.url, self._caller[1]

    async def request(self, wanted: ScaleRequest) -> None:
        """Ask for capacity. What the platform places comes later. Raises ProviderError or BadValueError."""
        url, caller = self.caller()
        content = wanted.model_dump(mode="json", exclude_none=True)
        await caller.call("POST", f"{url}/v1/scale-requests", content, id=new_id(), within_s=WITHIN_S)

    def placed(self) -> set[str]:
        """Names of the backends that it has placed."""
        return {placement.name for placement in self.placements.all(self._now())}

    async def ask(
        self,
        ask: Ask,
        tokens_per_request: float = 2000.0,
        month_left: float | None = None,
        sites: Sequence[str] | None = None,
        data_classes: Sequence[str] = (),
    ) -> bool:
        """Send what `policies.asking` decided; False: it has not arrived, and the log says why.

        `month_left`: of this month's budgets; None: nobody counts it. `sites`: where it may place; None: at all
        but `local`. `data_classes`: that its requests hold, and that these sites may see.
        """
        config = self._served.configured()
        objective = config.scaling.objective
        if sites is None:
            sites = sorted(site for site in config.sites if site != LOCAL)
        id = request_id(ask.model)
        # Nobody tells prompts and answers apart: an answer as of whom nothing is known, the rest is prompt.
        tokens = max(round(tokens_per_request), 2)
        output = min(EXPECTED_TOKENS, tokens // 2)
        try:
            if ask.tokens <= 0.0:
                await self.release(id)
            else:
                wanted = ScaleRequest(
                    id=id,
                    model=ask.model,
                    demand=Demand(
                        requests=ask.tokens / tokens,
                        tokens=ask.tokens,
                        prompt_tokens=tokens - output,
                        output_tokens=output,
                    ),
                    sla=Sla(ttft_s=objective.ttft, tpot_s=objective.tpot),
                    budget=Budget(month_left=month_left, currency=config.ledger_currency),
                    data_classes=list(data_classes),
                    sites=list(sites),
                    expires=self._wall() + LIFE_S,
                )
                await self.request(wanted)
        except RefusedError as error:
            log.warning("the platform refuses: %s", error)
            return ask.tokens <= 0.0 and error.status == NOT_FOUND
        except (ProviderError, BadValueError, ValueError) as error:
            log.warning("the platform was not asked for capacity for %s: %s", ask.model, error)
            return False
        log.info("asked the platform for %.0f tokens of %s: %s", ask.tokens, ask.model, ask.reason)
        return True

    async def release(self, id: str) -> None:
        """Ask for it no more: the platform takes its placements back. Raises ProviderError or BadValueError."""
        url, caller = self.caller()
        await caller.call("DELETE", f"{url}/v1/scale-requests/{id}", id=new_id(), within_s=WITHIN_S)

    async def close(self) -> None:
        """Write what is not written, and let connections go."""
        async with self._turn:
            if self._unwritten and not self._left:
                await self._written()
        for caller in self._callers:
            await caller.close()
        self._callers, self._caller = [], None

    def shown(self) -> dict[str, Any]:
        """For `GET /platform`."""
        now = self._now()
        return {
            "placements": [
                {
                    **one.model_dump(mode="json"),
                    "left_s": round(self.placements.left_s(one.id, now), 1),
                    "left_out": self._said.get(one.id),
                }
                for one in self.placements.all(now)
            ],
            "resources": [one.model_dump(mode="json") for one in self.placements.resources(now).values()],
        }


def request_id(model: str) -> str:
    """Of the scale request for a model: always the same, so that a restart asks for nothing twice."""
    digest = hashlib.sha256(model.encode()).hexdigest()[:8]
    return f"want-{re.sub('[^A-Za-z0-9._-]', '-', model)[:48]}-{digest}"


def caller_of(section: SchedulerPlatform) -> Caller:
    """What calls a platform. Raises BadValueError: its secret is not there."""
    secrets = secrets_of(section.secret_env, ("scaling", "scheduler", "secret_env"))
    return Caller(secrets, timeout_s=section.timeout)


def _served_from(placement: Placement) -> dict[str, Any]:
    """What of a placement a backend is made of."""
    return placement.model_dump(exclude={"state", "progress", "detail", "run", "ttl_s", "request"})


def _words(problem: MessageError) -> str:
    return f"{problem.field}: {problem.message}" if problem.field else problem.message


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and on the disk. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=f".{FILE}-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
