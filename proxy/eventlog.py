"""The proxy's event log (`policies/eventlog.py` has its form): who tells it what, and its file.

`RecordedRuntime` and `RecordedObserver` stand in for their parents when `tidegate serve --record FILE` asks for
it; nothing of this runs, or is loaded, without it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any, Final

import orjson

from policies.eventlog import EventLog, PolicySource, RecordedFleet, RecordedValve, Retries
from policies.files import library_policy
from policies.hedging import Hedging
from probes.passive import AttemptError
from proxy.build import Built, ConfigError
from proxy.config import is_policy_file
from proxy.config_sections import HedgingConfig
from proxy.exchange import Exchange
from proxy.linewriter import INTERVAL_S, PATIENCE_S, LineWriter
from proxy.observe import Observer
from proxy.readable import in_words
from proxy.runtime import Runtime

log = logging.getLogger("tidegate")

MOST_PENDING: Final = 50_000
"""Records that wait to be written at most: those of some ten thousand requests, about 30 MB."""


class LogFile(LineWriter[bytes]):
    """JSON lines. What cannot be written, or not in time, ends the recording, never a request."""

    def __init__(
        self, descriptor: int, most_pending: int = MOST_PENDING, interval_s: float = INTERVAL_S
    ) -> None:
        """`descriptor` is closed when the recording ends."""
        self.ended = False
        """It takes no more records."""
        self.failed = False
        """Nor can those that wait be written."""
        super().__init__("event log", descriptor, most_pending, interval_s)

    @classmethod
    def create(cls, path: Path) -> LogFile:
        """A new file, for its owner alone: it names tenants, keys and models. Raises ConfigError or OSError."""
        try:
            return cls(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            raise _exists(path) from None

    def record(self, record: dict[str, Any]) -> None:
        """Take a record, unless the recording has ended."""
        if self.ended:
            return
        try:
            line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError as error:
            self._end(f"a record cannot be written: {error}")
        else:
            self.write(line)

    def finish(self) -> None:
        """As its parent."""
        self.ended = True
        super().finish()

    def close(self) -> bool:
        """As its parent."""
        written = super().close()
        if not written:
            self._end(f"it could not be written within {PATIENCE_S:g} s")
        return written

    def _end(self, why: str) -> None:
        log.warning("the event log ends here: %s", why)
        self.finish()

    def _overflow(self) -> None:
        self._end(f"its disk is too slow, {len(self._lines)} records wait to be written")

    def _encode(self, line: bytes) -> bytes:
        return line

    def _unwritten(self, lines: int, error: OSError) -> None:
        self.failed = True
        self._end(f"it cannot be written: {in_words(error)}")

    def _flush(self) -> None:
        if not self.failed:  # behind half a line nothing may follow
            super()._flush()

    def _finished(self) -> None:
        try:
            os.close(self._descriptor)
        except OSError as error:
            self._end(f"it cannot be closed: {in_words(error)}")


class RecordedRuntime(Runtime):
    """Tells the log when the valve is polled, and why."""

    events: EventLog
    file: LogFile | None = None
    """None: the ports are not open yet."""
    freeing = False
    """Amid `capacity_freed`, which polls too."""

    def record(self, path: Path, seed: int) -> None:
        """Begin, before anything has happened. `seed`: of the policies. Raises ConfigError or OSError."""
        if os.path.lexists(path):
            raise _exists(path)
        built, retries = self.built, self.config.retries
        source = PolicySource(Path(built.policy.name).name, _policy_text(built), seed)
        self._path = path
        self._early: list[dict[str, Any]] = []
        """Records that are older than the file."""
        self.events = events = EventLog(
            self._early.append, source, float(int(self.now())), self._salted_session, self._finish_file
        )
        self.fleet = fleet = RecordedFleet(built.backends, events, built.health)
        self.valve = RecordedValve(built.policy.rules, fleet, events)
        observer = RecordedObserver(self.config.recent, self.observer.log)
        observer.events = events
        self.observer = observer
        events.begin(fleet, Retries(retries.ratio, retries.per_second, retries.attempts))

    def write_record(self) -> None:
        """The ports are open: make the file. Raises ConfigError or OSError."""
        self.file = file = LogFile.create(self._path)
        for record in self._early:
            file.record(record)
        self._early.clear()
        self.events.write = file.record

    def _new_hedging(self, config: HedgingConfig) -> Hedging | None:
        """A record has one attempt of a request at a time."""
        if config.after != "off":
            log.warning("hedging is off while an event log is recorded")
        return None

    def end_record(self) -> None:
        """The proxy has stopped: wait until all is written."""
        if self.file is not None:
            self.events.end("the proxy was stopped")
            self.file.close()

    def _finish_file(self, reason: str) -> None:
        if self.file is not None and not self.file.ended:
            log.info("the event log ends here: %s", reason)
            self.file.finish()

    def _salted_session(self, session: str) -> str:
        return self.salted(session.encode("utf-8", "replace"))

    def capacity_freed(self, now: float) -> None:
        """As its parent."""
        submitted = self.events.freed(now)
        self.freeing = submitted
        super().capacity_freed(now)
        self.freeing = False

    def poll(self, now: float) -> None:
        """As its parent."""
        events = self.events
        if events.polling:
            super().poll(now)  # it is noted, and done by the poll that runs
            return
        if not self.freeing:
            events.poll(now)
        events.polling = True
        try:
            super().poll(now)
        finally:
            events.polling = False


class RecordedObserver(Observer):
    """Tells the log how attempts and requests end."""

    events: EventLog

    def attempt_failed(self, backend: str, error: AttemptError | int) -> None:
        """As its parent."""
        self.events.failed(error if isinstance(error, int) else error.value)
        super().attempt_failed(backend, error)

    def ended(self, exchange: Exchange) -> None:
        """As its parent."""
        self.events.ended(exchange.row.op)
        super().ended(exchange)


def _policy_text(built: Built) -> str:
    """What the policy in force was read from."""
    name = built.config.policy
    text = Path(name).read_text(encoding="utf-8") if is_policy_file(name) else library_policy(name)
    if hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() != built.policy.text_hash:
        raise ConfigError(f"the policy {name} has changed while the proxy started: start it again")
    return text


def _exists(path: Path) -> ConfigError:
    message = f"the event log {path} exists already, and is not overwritten"
    return ConfigError(f"{message}: move it away, or give another name with --record")
