"""The proxy's event log (`policies/eventlog.py` has its form): who tells it what, and its file.

`RecordedRuntime` and `RecordedObserver` stand in for their parents when `tidegate serve --record FILE` asks for
it; nothing of this runs, or is loaded, without it.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import orjson

from policies.eventlog import EventLog, PolicySource, RecordedFleet, RecordedValve, Retries
from policies.files import library_policy
from policies.hedging import Hedging
from probes.passive import AttemptError
from proxy.build import Built, ConfigError
from proxy.config import HedgingConfig, is_policy_file
from proxy.exchange import Exchange
from proxy.observe import Observer
from proxy.runtime import Runtime

log = logging.getLogger("tidegate")


class LogFile:
    """JSON lines. What cannot be written ends the recording, never a request."""

    def __init__(self, path: Path) -> None:
        """Raises OSError. A file that is there is overwritten."""
        self._file = path.open("wb", buffering=1 << 20)
        self.failed = False

    def write(self, record: dict[str, Any]) -> None:
        if self.failed:
            return
        try:
            self._file.write(orjson.dumps(record) + b"\n")
        except (OSError, orjson.JSONEncodeError) as error:
            self._fail(error)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        log.error("the event log ends here, it cannot be written: %s", error)


class RecordedRuntime(Runtime):
    """Tells the log when the valve is polled, and why."""

    events: EventLog
    file: LogFile
    freeing = False
    """Amid `capacity_freed`, which polls too."""

    def record(self, path: Path, seed: int) -> None:
        """Begin, before anything has happened. `seed`: of the policies. Raises ConfigError or OSError."""
        self.file = file = LogFile(path)
        built, retries = self.built, self.config.retries
        source = PolicySource(Path(built.policy.name).name, _policy_text(built), seed)
        self.events = events = EventLog(file.write, source, float(int(self.now())), self._salted_session)
        self.fleet = fleet = RecordedFleet(built.backends, events)
        self.valve = RecordedValve(built.policy.rules, fleet, events)
        observer = RecordedObserver(self.config.recent, self.observer.log)
        observer.events = events
        self.observer = observer
        events.begin(fleet, Retries(retries.ratio, retries.per_second, retries.attempts))

    def _new_hedging(self, config: HedgingConfig) -> Hedging | None:
        """A record has one attempt of a request at a time."""
        if config.after != "off":
            log.warning("hedging is off while an event log is recorded")
        return None

    def end_record(self) -> None:
        """The proxy has stopped."""
        self.events.end("the proxy was stopped")
        self.file.close()

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
