"""`Idempotency-Key`: a client that sends a request again, not knowing what became of the first, pays once.

A key belongs to its tenant for 24 hours. It is taken when its request is admitted, and free again when that ends
without a charge: nothing was generated that anybody pays for, so another attempt is welcome. Otherwise it is spent:
who comes again gets the same answer if it is kept, and else a 409 that names the operation.

What is kept is bounded: so many keys of each tenant, and answers that are no streams, up to a size each and in all.
Keys are written to a file in the state directory, in a thread, a moment after they are taken or spent; answers are
not. A key whose request was running when the process died counts as spent, since its row may have a cost.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from proxy.appended import AppendedFile
from proxy.errors import RequestError
from proxy.tasks import Tasks

log = logging.getLogger("tidegate")

LIFETIME_S: Final = 24 * 3600.0
KEYS_PER_TENANT: Final = 10_000
"""Beyond, the oldest that is not running is forgotten."""
ANSWER_BYTES: Final = 256 * 1024
"""A longer answer is not kept."""
ANSWERS_BYTES: Final = 64 * 1024 * 1024
"""All kept answers; beyond, the oldest are dropped, but not their keys."""
LONGEST_KEY: Final = 255
FILE_LINES: Final = 50_000
"""A file of more lines, and of twice as many as there are keys, is written anew."""

RETRY_S: Final = 1.0
"""After a write that failed."""

RUNNING: Final = "running"
SPENT: Final = "spent"
FREE: Final = "free"


@dataclass(slots=True)
class Claim:
    """One key, taken by the request `op`."""

    tenant: str
    name: str
    """Hash of the key."""
    request: str
    """Hash of endpoint and body."""
    op: str
    at: float
    """Unix time at which it was taken."""
    state: str = RUNNING
    answer: tuple[int, bytes, bytes] | None = None
    """Status, field lines and body, if they are kept."""
    ours: bool = False
    """Taken by this process."""

    def line(self) -> bytes:
        fields = [self.tenant, self.name, self.request, self.op, self.at, self.state]
        return orjson.dumps(fields) + b"\n"


class IdempotencyKeys:
    """The keys of all tenants. All of it belongs to the event loop, but for the file."""

    def __init__(self) -> None:
        self._tenants: dict[str, dict[str, Claim]] = {}
        """By tenant and name of the key, the oldest first."""
        self._answers: dict[tuple[str, str], Claim] = {}
        """Those that have an answer, the oldest first."""
        self._answers_bytes = 0
        self._path: Path | None = None
        self._tasks: Tasks | None = None
        self._unwritten: list[bytes] = []
        self._lines = 0
        """In the file."""
        self._writing = False
        self._failed = False
        self._others: AppendedFile | None = None
        """While another process takes and ends keys too."""

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def take(self, tenant: str, key: bytes, endpoint: str, body: bytes, op: str, now: float) -> Claim:
        """The claim of this request, to be given back with `end`; or of an earlier one, with its answer.

        `now`: Unix time. Raises RequestError when the key is in use, spent without an answer that is kept, or was
        used for something else.
        """
        if len(key) > LONGEST_KEY or not key.isascii() or not key.decode("latin-1").isprintable():
            message = f"an Idempotency-Key has up to {LONGEST_KEY} printable ASCII characters"
            raise RequestError("invalid_value", message, "Idempotency-Key")
        if self._others is not None:
            self._learn(self._others)
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        request = hashlib.blake2b(endpoint.encode() + b"\0" + body, digest_size=16).hexdigest()
        claims = self._tenants.setdefault(tenant, {})
        before = claims.get(name)
        if before is not None and (before.state == RUNNING or now - before.at < LIFETIME_S):
            if before.request != request:
                message = f"this Idempotency-Key was sent with another request before ({before.op})"
                raise RequestError("idempotency_mismatch", message, "Idempotency-Key")
            if before.state == RUNNING:
                message = f"the first request with this Idempotency-Key is still running ({before.op})"
                raise RequestError("idempotency_running", message, "Idempotency-Key", retry_after_s=1.0)
            if before.answer is None:
                message = (
                    f"the request with this Idempotency-Key was done as {before.op}; its answer is not kept, "
                    "send another key to have it done again"
                )
                raise RequestError("idempotency_spent", message, "Idempotency-Key")
            return before
        if before is not None:
            self._forget(claims, before)
        self._make_room(claims, now)
        claim = claims[name] = Claim(tenant, name, request, op, now, ours=True)
        self._note(claim)
        return claim

    def end(self, claim: Claim, spent: bool, answer: tuple[int, bytes, bytes] | None = None) -> None:
        """Its request has ended: `spent` if anything of it is charged or answered."""
        claims = self._tenants.get(claim.tenant, {})
        claim.state = SPENT if spent else FREE
        if claims.get(claim.name) is not claim:
            return
        if not spent:
            self._forget(claims, claim)
        elif answer is not None and len(answer[1]) + len(answer[2]) <= ANSWER_BYTES:
            claim.answer = answer
            self._answers[claim.tenant, claim.name] = claim
            self._answers_bytes += _size(answer)
            while self._answers_bytes > ANSWERS_BYTES:
                self._drop_answer(next(iter(self._answers.values())))
        self._note(claim)

    def _make_room(self, claims: dict[str, Claim], now: float) -> None:
        """For one more: forget what is too old, and the oldest if there are too many."""
        while claims:
            oldest = next(iter(claims.values()))
            if oldest.state == RUNNING or now - oldest.at < LIFETIME_S:
                break
            self._forget(claims, oldest)
        if len(claims) >= KEYS_PER_TENANT:
            ended = (claim for claim in claims.values() if claim.state != RUNNING)
            self._forget(claims, next(ended, None) or next(iter(claims.values())))

    def _forget(self, claims: dict[str, Claim], claim: Claim) -> None:
        self._drop_answer(claim)
        del claims[claim.name]

    def _drop_answer(self, claim: Claim) -> None:
        if claim.answer is not None:
            self._answers_bytes -= _size(claim.answer)
            claim.answer = None
            del self._answers[claim.tenant, claim.name]

    # The file

    def open(self, path: Path, tasks: Tasks, now: float, *, shared: bool = False) -> None:
        """Read what an earlier process left, and write there from now on; `shared`: as in `share`, for that
        process is still there. Raises OSError."""
        self._path, self._tasks = path, tasks
        if shared:
            self._others = AppendedFile(path)
            self._learn(self._others)
            return
        lines = path.read_bytes().splitlines() if path.exists() else []
        unread = 0
        for line in lines:
            claim = _read(line)
            if claim is None:
                unread += 1
                continue
            claims = self._tenants.setdefault(claim.tenant, {})
            claims.pop(claim.name, None)
            if claim.state != FREE and now - claim.at < LIFETIME_S:
                claim.state = SPENT  # or it ran when its process died
                claims[claim.name] = claim
                if len(claims) > KEYS_PER_TENANT:
                    del claims[next(iter(claims))]
        if unread:
            log.warning("%s: %d of %d lines cannot be read and are left out", path, unread, len(lines))
        self._replace(self._all())

    def share(self) -> None:
        """Another process reads and writes the file too, from now on: nothing in it is written anew."""
        if self._path is not None and self._others is None:
            self._others = AppendedFile(self._path, at_end=True)

    def unshare(self) -> None:
        """The other process has ended: what it still ran counts as spent."""
        if self._others is None:
            return
        self._learn(self._others)
        self._others = None
        for claim in self._all():
            if not claim.ours:
                claim.state = SPENT

    def _learn(self, others: AppendedFile) -> None:
        """What the other process has taken and ended."""
        try:
            news = others.news()
        except OSError as error:
            log.warning("%s cannot be read: %s", others.path, error)
            return
        for claim in filter(None, map(_read, news)):
            claims = self._tenants.setdefault(claim.tenant, {})
            before = claims.get(claim.name)
            if before is not None and before.ours:
                continue
            if before is not None and (claim.state != FREE or before.op == claim.op):
                self._forget(claims, before)
            if claim.state != FREE:
                claims[claim.name] = claim

    def close(self) -> None:
        """Write what is not written yet. Blocks."""
        try:
            if self._failed:
                self._write_everything(self._all())
            elif self._path is not None and self._unwritten:
                self._write(self._taken())
        except OSError as error:
            log.error("idempotency keys were not written, the next start does not know all: %s", error)

    def _note(self, claim: Claim) -> None:
        tasks = self._tasks
        if tasks is None:
            return
        if len(self._unwritten) > FILE_LINES:
            self._unwritten.clear()  # writing fails for long; everything is written when it does no more
        self._unwritten.append(claim.line())
        if not self._writing:
            self._writing = True
            tasks.spawn(self._write_all(), "write idempotency keys")

    async def _write_all(self) -> None:
        try:
            while self._unwritten or self._failed:
                try:
                    if self._failed or (
                        self._lines > max(FILE_LINES, 2 * len(self)) and self._others is None
                    ):
                        self._unwritten.clear()
                        await asyncio.to_thread(self._write_everything, self._all())
                    else:
                        await asyncio.to_thread(self._write, self._taken())
                except OSError as error:
                    # Serving goes on: it is the memory of a restart that is lost.
                    if not self._failed:
                        log.error("idempotency keys are not written, a restart would forget them: %s", error)
                    self._failed = True
                    await asyncio.sleep(RETRY_S)
                    continue
                if self._failed:
                    self._failed = False
                    log.warning("idempotency keys are written again, all of them")
        finally:
            self._writing = False

    def _taken(self) -> list[bytes]:
        lines, self._unwritten = self._unwritten, []
        return lines

    def _all(self) -> list[Claim]:
        return [claim for claims in self._tenants.values() for claim in claims.values()]

    def _write(self, lines: list[bytes]) -> None:
        assert self._path is not None
        with self._path.open("ab") as file:
            file.write(b"".join(lines))
        self._lines += len(lines)

    def _write_everything(self, claims: list[Claim]) -> None:
        if self._others is None:
            self._replace(claims)
        else:
            self._write([claim.line() for claim in claims])

    def _replace(self, claims: list[Claim]) -> None:
        assert self._path is not None
        temporary = self._path.with_suffix(".tmp")
        temporary.touch(mode=0o600)
        temporary.write_bytes(b"".join([claim.line() for claim in claims]))
        temporary.replace(self._path)
        self._lines = len(claims)


def _size(answer: tuple[int, bytes, bytes]) -> int:
    return len(answer[1]) + len(answer[2])


def _read(line: bytes) -> Claim | None:
    """A line of the file; None: it is none."""
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(fields, list) or list(map(type, fields)) != [str, str, str, str, float, str]:
        return None
    return Claim(*fields)
