"""What the exchanges of one running proxy share, and the few things they ask of it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_to_bytes

import orjson

from policies.base import Outcome, RequestFacts
from policies.hedging import Hedging
from policies.retries import RetryBudget
from policies.routing import STANDBY
from policies.state import Fleet
from policies.valve import Valve
from proxy.access.keys import Key, KeyStore
from proxy.access.limits import AuthFailures, Limits
from proxy.answers import answer
from proxy.build import Built
from proxy.client_address import TrustedProxies
from proxy.config_sections import HedgingConfig
from proxy.endpoints import ANTHROPIC, BY_PATH, Route, dialect_of, find, no_such_path
from proxy.errors import RequestError
from proxy.heartbeat import beat
from proxy.http1 import HeadLimits, RequestGrammar, RequestHead, chunk
from proxy.idempotency import IdempotencyKeys
from proxy.journal import Journal
from proxy.ledger import Ledger
from proxy.observe import Observer
from proxy.pressure import DROP_KEEP_ALIVE, Pressure
from proxy.records import OperationIds
from proxy.responses import StoredResponses
from proxy.tasks import Tasks
from proxy.upstream import Endpoint

if TYPE_CHECKING:
    from proxy.exchange import Exchange
    from proxy.scaling.planning import Planning
    from proxy.scaling.wake import Waker
    from proxy.server import ClientConnection

log = logging.getLogger("tidegate")

_MODELS: Final = b"/v1/models"

_LOCAL_ORIGIN: Final = re.compile(rb"https?://(?:localhost|127\.[0-9.]++|\[::1\])(?::[0-9]++)?")
"""Web pages of this machine's own."""

_ID_BYTES: Final = frozenset(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_.:")


@dataclass(slots=True)
class Admission:
    """What is decided of a request from its head alone."""

    endpoint: str = ""
    key: Key | None = None
    answer: bytes | None = None
    """An answer that needs no backend."""
    error: RequestError | None = None
    """A refusal that leaves the connection in order."""

    @property
    def repeatable(self) -> bool:
        """Whether the same head is admitted in the same way as long as keys and configuration stay."""
        return self.answer is None and self.error is None and (self.key is None or self.key.expires is None)


@dataclass(slots=True)
class Deadlines:
    """Those of the configured timeouts that are looked at all the time, seconds."""

    head: float
    body: float
    idle: float
    first_token: float
    answer: float
    between_tokens: float
    total: float
    client_write: float
    connection: float


class Runtime:
    """Shared state. All of it belongs to the event loop."""

    def __init__(
        self,
        built: Built,
        *,
        loop: asyncio.AbstractEventLoop,
        journal: Journal,
        ledger: Ledger,
        keys: KeyStore,
        limits: Limits,
        observer: Observer,
        salt: bytes,
        forward_model: str = "",
    ) -> None:
        """`salt`: secret of this installation, for hashes in the ledger and cache salts.

        `forward_model`: pass every path on, to backends of that model; for conformance tests only.
        """
        config = built.config
        self.loop = loop
        self.now = time.monotonic
        self.wall = time.time
        self.journal = journal
        self.ledger = ledger
        self.keys = keys
        self.limits = limits
        self.observer = observer
        self.salt = salt
        self.forward_model = forward_model
        self.instance = journal.instance
        self.operation_ids = OperationIds()
        self.idempotency = IdempotencyKeys()
        self.auth_failures = AuthFailures()
        self.tasks = Tasks()
        self.clients: set[ClientConnection] = set()
        self.exchanges: set[Exchange] = set()
        """Those that have been sent to a backend."""
        self.held: dict[str, Exchange] = {}
        self.body_bytes = 0
        """Of request bodies, those that are still coming included."""
        self.draining = False
        self.handed_over = False
        """Another process accepts: a client that was promised its connection may use it once more."""
        self.pressure = Pressure()
        self.shedding = 0
        """Stage of `proxy.pressure`; 0: nothing is given up."""
        self.most_clients = config.limits.connections
        """Fewer than configured where the system allows fewer open files."""
        self.no_room_until = 0.0
        """Until then all connections are taken to be busy (`proxy.room`)."""
        self.probes: Callable[[], Mapping[str, Any]] = dict
        """What the probes know, by backend, for `/state`."""
        self.hosts: Callable[[], Mapping[str, Any]] = dict
        """What the hosts say, by site, likewise."""
        self.planning: Planning | None = None
        self.scaling: Waker | None = None
        """None: nobody starts standbys."""
        self.fleet = Fleet(built.backends, built.health)
        self.valve = Valve(built.policy.rules, self.fleet)
        self.retry_budget = RetryBudget(config.retries.ratio, config.retries.per_second)
        self.responses = StoredResponses()
        self._writing_responses = False
        self.hedging: Hedging | None = None
        self._hedging_as: object = None
        """The configuration that it was made of."""
        self._polling = False
        self._poll_again = False
        self._wake: asyncio.TimerHandle | None = None
        self._cache_salts: dict[str, str] = {}
        self._breakers: dict[str, str] = {}
        """State of each backend's circuit breaker, as last told in the log."""
        self._in_spite: frozenset[str] = frozenset()
        """Backends that are used although they look sick, as last told in the log."""
        self.use(built)

    def use(self, built: Built) -> None:
        """Run by another configuration from now on; requests that have begun end as they began."""
        config = built.config
        self.built = built
        self.config = config
        self.fleet.health = built.health
        self._fleet_looked_at = -1
        self.endpoints: dict[str, Endpoint] = built.endpoints
        self.prices = built.prices
        self.aliases = config.aliases
        self._dangling: set[str] = set()
        """Aliases of models that nobody serves, as far as the log has them."""
        self.strict = config.durability == "strict"
        if config.hedging != self._hedging_as:
            self._hedging_as = config.hedging
            self.hedging = self._new_hedging(config.hedging)
        limits = config.limits
        # What every request asks for: an attribute of a pydantic model costs fifty times as much as one of ours.
        timeouts = config.timeouts
        first = timeouts.head, timeouts.body, timeouts.idle, timeouts.first_token, timeouts.answer
        rest = timeouts.between_tokens, timeouts.total, timeouts.client_write, timeouts.connection
        self.timeouts = Deadlines(*first, *rest)
        self.most_requests = limits.requests
        self.most_body_bytes = limits.body
        self.most_bodies_bytes = limits.bodies
        self.media_urls = config.media_urls
        self.trusted_proxies: TrustedProxies | None = None
        addresses = config.forwarded_field if config.trusted_proxies else ""
        if config.trusted_proxies:
            self.trusted_proxies = TrustedProxies(config.trusted_proxies, addresses)
        self.grammar = RequestGrammar(
            HeadLimits(limits.head, limits.target, limits.fields), tuple(config.forward_headers), addresses
        )

    def _new_hedging(self, config: HedgingConfig) -> Hedging | None:
        """None: it is off."""
        if config.after == "off":
            return None
        return Hedging(None if isinstance(config.after, str) else config.after, config.ratio)

    # What a head alone decides

    def generation(self) -> tuple[object, object]:
        """Changes with the keys and with the configuration."""
        return self.keys.version, self.config

    def admit(self, head: RequestHead, peer: str) -> Admission:
        """Authenticate and find the endpoint."""
        if self.forward_model:
            return Admission("forward")
        key: Key | None = None
        keys = self.keys
        if not keys.empty:
            key = keys.authenticate(head.credential, self.wall())
            if key is None:
                return Admission(error=self._unauthorized(head, peer))
        elif head.origin and _LOCAL_ORIGIN.fullmatch(head.origin) is None:
            # A browser sends it, for whatever page its user looks at; without keys nothing else stops that page.
            return Admission(error=RequestError("origin_refused", "web pages need an API key here"))
        path = head.target.partition(b"?")[0]
        route = BY_PATH.get(path)
        if route is not None and head.method == b"POST":
            return Admission(route.name, key)
        found = find(head.method, head.target if path.startswith(b"/v1/responses/") else path)
        if isinstance(found, Route):
            return Admission(found.name, key)
        if found:
            return Admission(
                error=RequestError("method_not_allowed", f"{path.decode()} takes {found}", allow=found)
            )
        if path.startswith(_MODELS):
            return self._models(head, path, key)
        return Admission(error=RequestError("not_found", no_such_path(path)))

    def _unauthorized(self, head: RequestHead, peer: str) -> RequestError:
        wait = self.auth_failures.failed(peer, self.now())
        if wait > 0:
            return RequestError(
                "auth_rate_limit", "too many requests without a valid key", retry_after_s=wait
            )
        # Whoever has an Anthropic client has no say in the field that it uses.
        anthropic = head.by_api_key or dialect_of(head.target) == ANTHROPIC
        field = "x-api-key: KEY" if anthropic else "Authorization: Bearer KEY"
        return RequestError("invalid_api_key", f"no valid API key: send it as `{field}`")

    def _models(self, head: RequestHead, path: bytes, key: Key | None) -> Admission:
        rest = path[len(_MODELS) :]
        if rest and not rest.startswith(b"/"):
            return Admission(error=RequestError("not_found", no_such_path(path)))
        if head.method not in (b"GET", b"HEAD"):
            return Admission(
                error=RequestError("method_not_allowed", "models are read with GET", allow="GET, HEAD")
            )
        rows = self.models(key)
        if rest in (b"", b"/"):
            body = orjson.dumps({"object": "list", "data": list(rows.values())})
        else:
            name = unquote_to_bytes(rest[1:]).decode("utf-8", "replace")
            if name not in rows:
                message = f"the model {name[:128]!r} does not exist"
                return Admission(error=RequestError("model_not_found", message, "model"))
            body = orjson.dumps(rows[name])
        reply = answer(
            200,
            body,
            fields=b"x-request-id: %b\r\n" % self.request_id(head).encode("ascii"),
            keep_alive=head.keep_alive and not self.draining and not self.shedding,
            version=head.version,
            without_body=head.method == b"HEAD",
        )
        return Admission(answer=reply)

    def models(self, key: Key | None) -> dict[str, dict[str, object]]:
        """The models of all backends that may see the key's data, and their aliases, as rows of `/v1/models`, by
        name."""
        limits: dict[str, int | None] = {}
        data_class = "public" if key is None else key.data_class
        for backend in self.fleet:
            if backend.data_classes is not None and data_class not in backend.data_classes:
                continue
            for model in backend.models:
                length = backend.context_tokens.get(model)
                known = limits.get(model)
                limits[model] = length if known is None or (length is not None and length > known) else known
        for alias, model in self.aliases.items():
            if model in limits:
                limits[alias] = limits[model]
        return {
            model: {
                "id": model,
                "object": "model",
                "created": 0,
                "owned_by": "tidegate",
                "root": self.aliases.get(model, model),
                "parent": None,
                "max_model_len": length,
            }
            for model, length in sorted(limits.items())
            if key is None
            or key.models is None
            or model in key.models
            or self.aliases.get(model, model) in key.models
        }

    # What connections and exchanges ask

    def request_id(self, head: RequestHead | None) -> str:
        """The client's own id if it is short and plain, else a new one."""
        given = head.request_id if head is not None else b""
        if given and len(given) <= 128 and _ID_BYTES.issuperset(given):
            return given.decode("ascii")
        return self.operation_ids.mint()

    def salted(self, value: bytes) -> str:
        """A hash that tells equal values and nothing else."""
        return hashlib.blake2b(value, key=self.salt, digest_size=12).hexdigest()

    def cache_salt(self, tenant: str) -> str:
        """Keeps tenants' prefix caches apart inside an engine; empty without keys, where there is one tenant."""
        if self.keys.empty:
            return ""
        salt = self._cache_salts.get(tenant)
        if salt is None:
            if len(self._cache_salts) > 10_000:
                self._cache_salts.clear()
            salt = self._cache_salts[tenant] = self.salted(b"cache " + tenant.encode())
        return salt

    def check_limits(self, key: Key) -> None:
        """Raise RequestError if the key may not send even the smallest request now."""
        refusal = self.limits.check(key, self.now(), self.wall())
        if refusal is not None:
            raise RequestError(refusal.code, refusal.message, retry_after_s=refusal.retry_after_s)

    def estimate_cost(self, facts: RequestFacts, answer_tokens: int) -> int:
        """The most that a request may cost, nano-units: at the dearest backend of its model."""
        return max(
            (
                self.prices.cost(backend.name, facts.model, facts.prompt_tokens, 0, answer_tokens)[0]
                for backend in self.fleet
                if facts.model in backend.models
            ),
            default=0,
        )

    def forward_request(self, endpoint: Endpoint, head: RequestHead, body: bytes, request_id: str) -> bytes:
        """A request that is passed on as it is."""
        if head.codings:
            coding = b"transfer-encoding: %b, chunked\r\n" % b", ".join(head.codings)
            request = endpoint.request(
                head.method, head.target, head.forward + coding, None, request_id.encode("ascii")
            )
            return request + chunk(body) + b"0\r\n\r\n"
        has_body = bool(body) or head.chunked or head.method in (b"POST", b"PUT", b"PATCH")
        return endpoint.request(
            head.method, head.target, head.forward, body if has_body else None, request_id.encode("ascii")
        )

    def hold(self, exchange: Exchange) -> None:
        """The valve keeps a request."""
        self.held[exchange.row.op] = exchange
        if self.scaling is not None and exchange.routings[-1].decided_by == STANDBY:
            self.scaling.wanted()  # at once, not when it looks next
        self._schedule()

    def cancel_hold(self, operation: str) -> None:
        """The client of a held request has left."""
        self.valve.cancel(operation, self.now())
        self.held.pop(operation, None)

    def capacity_freed(self, now: float) -> None:
        """A request has ended: somebody may be waiting for its place."""
        if self.valve.queued:
            self.poll(now)

    def poll(self, now: float) -> None:
        """Let the valve answer those that it holds."""
        if self._polling:
            self._poll_again = True
            return
        self._polling = True
        try:
            while True:
                self._poll_again = False
                for routing in self.valve.poll(now):
                    exchange = self.held.pop(routing.request.id, None)
                    if exchange is None:
                        if routing.lease is not None:
                            self.fleet.release(routing.lease, Outcome.IGNORED, now)
                        continue
                    try:
                        exchange.released(routing)
                    except Exception:  # the others that were answered must hear of it all the same
                        log.exception("%r could not go on", exchange)
                        exchange.fail()
                if not self._poll_again:
                    break
        finally:
            self._polling = False
        self._schedule()

    def _schedule(self) -> None:
        """Wake up when the next hold ends."""
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if not self.held:
            return
        wait = self.valve.next_wake() - self.now()
        self._wake = self.loop.call_later(min(max(wait, 0.001), 3600.0), self._woken)

    def _woken(self) -> None:
        self._wake = None
        self.poll(self.now())

    # Time

    def sweep(self, now: float) -> None:
        """Look at every deadline; called a few times a second."""
        self.shedding = self.pressure.look(self.body_bytes, self.most_bodies_bytes)
        if self.shedding >= DROP_KEEP_ALIVE:
            for client in list(self.clients):
                client.close_if_idle()
        everybody: list[Exchange | ClientConnection] = [*self.exchanges, *self.clients]
        for swept in everybody:
            try:
                swept.sweep(now)
            except Exception:  # one that fails must not keep the others from their deadlines
                log.exception("sweep of %r failed", swept)
        for endpoint in self.endpoints.values():
            endpoint.pool.sweep(now)
        self._write_responses()
        self.fleet.refresh(now)
        self._tell_breakers(now)
        self._tell_in_spite()
        self._tell_aliases()
        self.observer.policies.look(self.valve.rules, now)
        self.poll(now)
        beat(self, now)

    def _write_responses(self) -> None:
        """Have a thread write down what is new about stored responses."""
        if not self._writing_responses and (lines := self.responses.take_unwritten()):
            self._writing_responses = True
            self.tasks.spawn(self._written(lines), "write responses")

    async def _written(self, lines: bytes) -> None:
        try:
            await asyncio.to_thread(self.responses.write, lines)
        finally:
            self._writing_responses = False

    def _tell_aliases(self) -> None:
        """Say in the log, once per configuration, that an alias leads nowhere: only its clients would notice."""
        if self._fleet_looked_at == self.fleet.version:
            return
        self._fleet_looked_at = self.fleet.version
        if any(backend.models_unknown for backend in self.fleet):
            return
        served = {model for backend in self.fleet for model in backend.models}
        for alias, model in self.aliases.items():
            if model not in served and alias not in self._dangling:
                self._dangling.add(alias)
                log.warning("the alias '%s' stands for '%s', which no backend serves", alias, model)

    def _tell_breakers(self, now: float) -> None:
        """Say in the log when a circuit breaker moves: traffic changes its way without any probe failing."""
        for backend in self.fleet:
            state = backend.breaker.state(now)
            if state != self._breakers.get(backend.name, "closed"):
                log.warning("backend %s: circuit breaker is %s", backend.name, state)
            self._breakers[backend.name] = state

    def _tell_in_spite(self) -> None:
        """Say in the log which backends are used although they look sick."""
        now_used = self.valve.rules.in_spite
        if not now_used and not self._in_spite:
            return
        fleet = self.fleet.backends
        for name in sorted(now_used - self._in_spite):
            log.warning("backend %s looks sick and is used: too few others are left", name)
        # Only a request finds out that it needs one: until then those that are still doubtful stay.
        self._in_spite = frozenset(
            name
            for name in self._in_spite | now_used
            if name in now_used or (name in fleet and fleet[name].doubtful)
        )
