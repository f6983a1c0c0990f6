"""What a key may use: requests and tokens per minute, requests at once, money per calendar month.

The law of the two rates: *in no span of 60 seconds are more than the limit admitted.* Uses are added up by
whole second and a second is forgotten 61 seconds after it began, so the sum always covers at least the last
60 seconds. A token bucket or GCRA would keep a single number, but lets through up to twice the limit in 60
seconds (a full bucket and its refill); an exact log of uses keeps one entry per request. Sums by second keep
at most 61 integers per rate and cost at most one second of extra waiting. Users can be told it in one
sentence: what you use comes back a minute later.

Everything is reserved on admission, in one synchronous call, all of it or nothing: one request, its estimated
tokens, one place, its estimated cost. `settle` then replaces the estimates by what was really used. So
requests that run side by side cannot pass a limit together, and a limit is overshot at most by what single
requests use beyond their own reservation:

* tokens that were reserved but not used are given back to the second they were taken from; tokens used beyond
  the reservation are added to the second in which the request ends;
* cost counts in the month in which its request was admitted, also when it ends in the next one.

Refused requests use nothing. Time comes in with every call. A clock that jumps backwards counts as one that
stands still: no window is emptied and no month is begun by it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from ipaddress import IPv6Address, ip_address
from math import ceil, inf

from proxy.access.keys import Key

WINDOW_S = 61
"""Seconds after which the uses of a whole second are forgotten: 60, plus the second itself."""

RETRY_SOON_S = 1.0
"""Advice where the wait depends on other requests of the same key and not on time."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not admitted: an answer with status 429."""

    code: str
    """`rate_limit_requests`, `rate_limit_tokens`, `concurrency` or `budget`."""
    message: str
    retry_after_s: float | None
    """Seconds after which the same request may pass; None: it can never pass under this limit."""


class Window:
    """Sums of one quantity over the last 60 seconds, by whole second."""

    __slots__ = ("by_second", "second", "total")

    def __init__(self) -> None:
        self.by_second: dict[int, int] = {}
        """Whole second to what was used in it, above 0; oldest first, none older than the window."""
        self.second = 0
        """The latest second seen: this clock never goes back."""
        self.total = 0

    def advance(self, now: float) -> int:
        """Forget what has left the window. Returns what is still in it."""
        second = int(now)
        if second > self.second:
            self.second = second
            for old in list(self.by_second):
                if old > second - WINDOW_S:
                    break
                self.total -= self.by_second.pop(old)
        return self.total

    def add(self, amount: int) -> None:
        """Count a use in the current second."""
        if not amount:
            return
        self.by_second[self.second] = self.by_second.get(self.second, 0) + amount
        self.total += amount

    def give_back(self, amount: int, second: int) -> None:
        """Undo a part of the use counted in `second`; what has left the window has come back already."""
        used = self.by_second.get(second)
        if used is None:
            return
        self.total -= amount
        if used > amount:
            self.by_second[second] = used - amount
        else:
            del self.by_second[second]

    def wait(self, amount: int, limit: int, now: float) -> float | None:
        """Seconds until `amount` more fit under `limit`; None: they never do."""
        if amount > limit:
            return None
        missing = self.total + amount - limit
        wait = 0.0
        for second, used in self.by_second.items():
            if missing <= 0:
                break
            missing -= used
            wait = second + WINDOW_S - now
        return wait

    def empty_in(self, now: float) -> int:
        """Seconds, rounded up, until nothing is left in the window."""
        if not self.by_second:
            return 0
        return ceil(next(reversed(self.by_second)) + WINDOW_S - now)


class Month:
    """Money of one key in one calendar month, nano-units of the ledger's currency."""

    __slots__ = ("elsewhere", "end", "reserved", "spent")

    def __init__(self, end: float, spent: int = 0, elsewhere: int = 0) -> None:
        self.end = end
        """Unix time at which the month ends: which month it is."""
        self.spent = spent
        self.elsewhere = elsewhere
        """Spent by other proxies on the same database, when it was last read (`shared.py`)."""
        self.reserved = 0

    def allows(self, cost: int, budget: int) -> bool:
        """Whether `cost` more fits. A budget that is used up allows nothing, not even what seems free."""
        committed = self.spent + self.elsewhere + self.reserved
        return committed < budget and committed + cost <= budget


class Usage:
    """What one key uses now."""

    __slots__ = ("month", "requests", "running", "tokens")

    def __init__(self, month: Month) -> None:
        self.requests = Window()
        self.tokens = Window()
        self.running = 0
        """Requests admitted and not yet settled."""
        self.month = month


class Reservation:
    """What one admitted request holds until it is settled."""

    __slots__ = ("cost_nano", "month", "second", "settled", "tokens", "usage")

    def __init__(
        self, usage: Usage | None, tokens: int, second: int, cost_nano: int, month: Month | None
    ) -> None:
        self.usage = usage
        """None: the key has no limits."""
        self.tokens = tokens
        self.second = second
        """The second of the token window they were taken from; -1: the key has no limit of tokens."""
        self.cost_nano = cost_nano
        self.month = month
        """None: the key has no budget."""
        self.settled = False


class Limits:
    """The use of every key since start. One instance belongs to one event loop and is not thread-safe.

    Memory is bounded by the number of keys: at most 61 sums per rate, and `keep` drops revoked keys.
    """

    def __init__(
        self,
        wall: float,
        spent: Callable[[float], Mapping[str, int]] | None = None,
        zone: tzinfo = UTC,
    ) -> None:
        """`wall` is the Unix time of the start, `zone` decides when months begin.

        `spent` is called once, here: given the Unix time at which the current month began, it answers key id
        -> nano-units settled for requests admitted since (what the ledger holds).
        """
        self._zone = zone
        begin, self._month_end = month_bounds(wall, zone)
        self._usage: dict[str, Usage] = {}
        self._months: dict[str, dict[str, Month]] = {}
        """By currency, other than the present one: what was counted in it before."""
        self._elsewhere: Mapping[str, int] = {}
        self._elsewhere_end = self._month_end
        if spent is not None:
            for key_id, nano in spent(begin).items():
                self._usage[key_id] = Usage(Month(self._month_end, nano))

    def admit(self, key: Key, tokens: int, cost_nano: int, now: float, wall: float) -> Reservation | Refusal:
        """Reserve a request with its estimated tokens (prompt and answer) and cost: all or nothing."""
        rpm, tpm, concurrency, budget = key.rpm, key.tpm, key.concurrency, key.budget_nano
        if rpm is None and tpm is None and concurrency is None and budget is None:
            return Reservation(None, 0, -1, 0, None)
        usage = self.usage(key, wall)
        month = usage.month
        if (
            (concurrency is None or usage.running < concurrency)
            and (rpm is None or usage.requests.advance(now) < rpm)
            and (tpm is None or usage.tokens.advance(now) + tokens <= tpm)
            and (budget is None or month.allows(cost_nano, budget))
        ):
            usage.running += 1
            second = -1
            if rpm is not None:
                usage.requests.add(1)
            if tpm is not None:
                usage.tokens.add(tokens)
                second = usage.tokens.second
            if budget is None:
                return Reservation(usage, tokens, second, 0, None)
            month.reserved += cost_nano
            return Reservation(usage, tokens, second, cost_nano, month)
        return _refusal(key, usage, tokens, cost_nano, now, wall)

    def check(self, key: Key, now: float, wall: float) -> Refusal | None:
        """Why even a request without tokens would be refused now; None: it would not. Nothing is reserved."""
        if key.rpm is None and key.tpm is None and key.concurrency is None and key.budget_nano is None:
            return None
        usage = self.usage(key, wall)
        if (
            (key.concurrency is None or usage.running < key.concurrency)
            and (key.rpm is None or usage.requests.advance(now) < key.rpm)
            and (key.tpm is None or usage.tokens.advance(now) <= key.tpm)
            and (key.budget_nano is None or usage.month.allows(0, key.budget_nano))
        ):
            return None
        return _refusal(key, usage, 0, 0, now, wall)

    def foresee(self, key: Key, tokens: int, cost_nano: int, now: float, wall: float) -> Refusal | None:
        """Why `admit` would refuse such a request now; None: it would not. Nothing is reserved or kept."""
        if key.rpm is None and key.tpm is None and key.concurrency is None and key.budget_nano is None:
            return None
        known = self._usage.get(key.id)
        usage = Usage(self._new_month(key.id))
        if known is not None:
            if wall < known.month.end:
                usage.month = known.month
            usage.requests, usage.tokens, usage.running = known.requests, known.tokens, known.running
        if (
            (key.concurrency is None or usage.running < key.concurrency)
            and (key.rpm is None or usage.requests.advance(now) < key.rpm)
            and (key.tpm is None or usage.tokens.advance(now) + tokens <= key.tpm)
            and (key.budget_nano is None or usage.month.allows(cost_nano, key.budget_nano))
        ):
            return None
        return _refusal(key, usage, tokens, cost_nano, now, wall)

    def settle(self, reservation: Reservation, tokens: int, cost_nano: int, now: float) -> None:
        """Put what was really used in the place of what was reserved, once; a second call does nothing."""
        usage = reservation.usage
        if usage is None or reservation.settled:
            return
        reservation.settled = True
        usage.running -= 1
        if reservation.second >= 0:
            unused = reservation.tokens - tokens
            if unused > 0:
                usage.tokens.give_back(unused, reservation.second)
            elif unused < 0:
                usage.tokens.advance(now)
                usage.tokens.add(-unused)
        month = reservation.month
        if month is not None:
            month.reserved -= reservation.cost_nano
            month.spent += cost_nano

    def headers(self, key: Key, now: float) -> bytes:
        """OpenAI's `x-ratelimit-*` header lines, each with its CRLF; empty for a key without rates.

        `remaining` is what would be admitted now, `reset` the time until nothing counts any more.
        """
        rpm, tpm = key.rpm, key.tpm
        if rpm is None and tpm is None:
            return b""
        usage = self._usage.get(key.id)
        lines = ""
        if rpm is not None:
            lines = _header_lines("requests", rpm, None if usage is None else usage.requests, now)
        if tpm is not None:
            lines += _header_lines("tokens", tpm, None if usage is None else usage.tokens, now)
        return lines.encode()

    def usage(self, key: Key, wall: float) -> Usage:
        """What the key uses in the month of `wall`; the object is live."""
        if wall >= self._month_end:
            _, self._month_end = month_bounds(wall, self._zone)
        usage = self._usage.get(key.id)
        if usage is None:
            usage = self._usage[key.id] = Usage(self._new_month(key.id))
        elif usage.month.end != self._month_end:
            # Requests still running hold the old month and settle into it.
            usage.month = self._new_month(key.id)
        return usage

    def spent_elsewhere(self, nano: Mapping[str, int], month_end: float) -> None:
        """What others have spent from each key's budget in the month that ends then, nano-units by key id."""
        if month_end < self._month_end:
            return  # of a month that is over
        self._month_end = self._elsewhere_end = month_end
        self._elsewhere = nano
        for key_id, usage in self._usage.items():
            if usage.month.end == month_end:
                usage.month.elsewhere = nano.get(key_id, 0)

    def _new_month(self, key_id: str) -> Month:
        is_known = self._elsewhere_end == self._month_end
        return Month(self._month_end, 0, self._elsewhere.get(key_id, 0) if is_known else 0)

    def change_currency(self, old: str, new: str) -> None:
        """Count money in another currency from now on: from nothing, or on from where it was last counted in it (a
        mistake that is mended grants no budget anew). What runs settles into the old."""
        self._months[old] = {key_id: usage.month for key_id, usage in self._usage.items()}
        known = self._months.pop(new, {})
        self._elsewhere = {}  # of the old one
        for key_id, usage in self._usage.items():
            month = known.get(key_id)
            if month is None or month.end != self._month_end:
                month = Month(self._month_end)
            usage.month = month

    def keep(self, ids: Collection[str]) -> None:
        """Drop the state of keys not among `ids` (a set). Their running requests may still settle."""
        for gone in [key_id for key_id in self._usage if key_id not in ids]:
            del self._usage[gone]

    def __len__(self) -> int:
        """Keys that state is held for."""
        return len(self._usage)


def month_bounds(wall: float, zone: tzinfo = UTC) -> tuple[float, float]:
    """Unix times at which the calendar month of `wall` begins and ends in `zone`."""
    day = datetime.fromtimestamp(wall, zone)
    begin = datetime(day.year, day.month, 1, tzinfo=zone)
    following = (day.year + 1, 1) if day.month == 12 else (day.year, day.month + 1)
    return begin.timestamp(), datetime(*following, 1, tzinfo=zone).timestamp()


def _refusal(key: Key, usage: Usage, tokens: int, cost: int, now: float, wall: float) -> Refusal:
    """Of all limits in the way the one that takes longest to pass: the advice must not be refused again."""
    refusals: list[Refusal] = []
    month = usage.month
    if key.budget_nano is not None and not month.allows(cost, key.budget_nano):
        refusals.append(_budget_refusal(month, cost, key.budget_nano, wall))
    if key.tpm is not None and usage.tokens.advance(now) + tokens > key.tpm:
        wait = usage.tokens.wait(tokens, key.tpm, now)
        message = f"This request may use {tokens} tokens; the key is limited to {key.tpm} tokens per minute"
        used = "" if wait is None else f" and {usage.tokens.total} are used"
        refusals.append(Refusal("rate_limit_tokens", f"{message}{used}.", wait))
    if key.rpm is not None and usage.requests.advance(now) >= key.rpm:
        wait = usage.requests.wait(1, key.rpm, now)
        message = f"The key is limited to {key.rpm} requests per minute and all are used."
        refusals.append(Refusal("rate_limit_requests", message, wait))
    if key.concurrency is not None and usage.running >= key.concurrency:
        message = f"The key is limited to {key.concurrency} requests at once and all are running."
        refusals.append(Refusal("concurrency", message, RETRY_SOON_S))
    return max(refusals, key=lambda refusal: inf if refusal.retry_after_s is None else refusal.retry_after_s)


def _budget_refusal(month: Month, cost: int, budget: int, wall: float) -> Refusal:
    if cost > budget:
        return Refusal("budget", "This request may cost more than the key's budget for a whole month.", None)
    spent = month.spent + month.elsewhere
    if spent < budget and spent + cost <= budget:
        message = "The key's budget for this month is reserved by requests that are running."
        return Refusal("budget", message, RETRY_SOON_S)
    message = "The key's budget for this month does not cover this request."
    return Refusal("budget", message, max(month.end - wall, RETRY_SOON_S))


def _header_lines(what: str, limit: int, window: Window | None, now: float) -> str:
    remaining, reset = limit, 0
    if window is not None:
        remaining = limit - window.advance(now)
        if remaining < 0:
            remaining = 0
        reset = window.empty_in(now)
    duration = f"{reset}s" if reset < 60 else f"{reset // 60}m{reset % 60}s"
    return (
        f"x-ratelimit-limit-{what}: {limit}\r\n"
        f"x-ratelimit-remaining-{what}: {remaining}\r\n"
        f"x-ratelimit-reset-{what}: {duration}\r\n"
    )


class AuthFailures:
    """Failed authentications by source address, so that a storm of bad keys is answered cheaply.

    Ask it only after a key was refused: good keys pass whatever happens at their address, which may be a
    whole company behind one NAT or a load balancer. Guessing is hopeless at 256 bits; this bounds work, not
    luck.

    GCRA (ITU-T I.371) per address: `burst` failures at once, `per_minute` in the long run. One number per
    address, `addresses` of them; the least recently failing one is forgotten first. IPv6 counts by /64, the
    least a network hands to one host.
    """

    def __init__(self, per_minute: int = 20, burst: int = 20, addresses: int = 4096) -> None:
        self._interval = 60.0 / per_minute
        self._tolerance = self._interval * (burst - 1)
        self._addresses = addresses
        self._next: OrderedDict[str, float] = OrderedDict()
        """Address to the time at which, at the long-run rate, its failures so far are paid for."""

    def failed(self, address: str, now: float) -> float:
        """An authentication failed. 0.0: answer 401; else answer 429, close, log nothing: seconds to wait."""
        source = _source(address)
        paid = max(self._next.get(source, now), now)
        wait = paid - self._tolerance - now
        if wait > 0.0:
            self._next.move_to_end(source)
            return wait
        self._next[source] = paid + self._interval
        self._next.move_to_end(source)
        if len(self._next) > self._addresses:
            self._next.popitem(last=False)
        return 0.0

    def __len__(self) -> int:
        return len(self._next)


def _source(address: str) -> str:
    if ":" not in address:
        return address
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{int(parsed) >> 64:x}::/64"
