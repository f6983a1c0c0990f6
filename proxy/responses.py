"""Which backend has which stored response, and whose it is.

`GET /v1/responses/{id}`, its `DELETE` and `cancel`, and a `previous_response_id` must reach the backend that made
the response, since no other has it; and only its own tenant may name it. The last `MOST_RESPONSES` are known; older
ones are forgotten, as if they had never been.

A file of JSON lines in the state directory keeps them over a restart. A thread adds to its end a few times a
second, and writes it anew, as a start does, when most of it is about forgotten ones. What a crash takes are the
ids of the last moment: those are not found any more.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from proxy.appended import AppendedFile

log = logging.getLogger("tidegate")

MOST_RESPONSES: Final = 100_000
"""About 30 MB in memory, and twice as much on the disk."""


@dataclass(slots=True)
class StoredResponse:
    """One response that a backend keeps."""

    backend: str
    tenant: str
    model: str
    """As the backend names it."""
    metered: bool
    """Its tokens are in the ledger, all of them."""
    prompt: int = 0
    completion: int = 0
    """Those that are there already, by estimate: of a stream that was left."""


class StoredResponses:
    """The last ones, by id. Belongs to the event loop, but for `write`."""

    def __init__(self, path: Path | None = None, most: int = MOST_RESPONSES, *, shared: bool = False) -> None:
        """`path`: the file, read now and written anew; None: they are kept in memory only. `shared`: as in
        `share`. Raises OSError."""
        self._path = path
        self._most = most
        self._known: dict[str, StoredResponse] = {}
        self._unwritten: list[bytes] = []
        self._failed = False
        self._lines = 0
        """In the file."""
        self._others: AppendedFile | None = None
        """While another process writes the file too."""
        if path is not None and shared:
            self._others = AppendedFile(path)
            self._learn()
        elif path is not None:
            self._known = _read(path, most)
            self._write_anew(path, self._known)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, name: str, tenant: str) -> StoredResponse | None:
        """The response of that id, if it is this tenant's."""
        if name not in self._known:
            self._learn()
        stored = self._known.get(name)
        return stored if stored is not None and stored.tenant == tenant else None

    def add(self, name: str, stored: StoredResponse) -> None:
        """Remember a response. An id that is taken stays who it belongs to, whatever another backend says."""
        if name in self._known:
            return
        self._known[name] = stored
        if len(self._known) > self._most:
            del self._known[next(iter(self._known))]
        self._note(name, stored)

    def count(
        self, name: str, prompt: int, completion: int, *, ended: bool, resumed: bool = False
    ) -> tuple[int, int]:
        """What is to be counted of the tokens that were seen: those that never were before.

        `ended`: there will be no more, and these are exact. `resumed`: they do not include those seen before.
        """
        self._learn()
        stored = self._known.get(name)
        if stored is None or stored.metered:
            return 0, 0
        if resumed:
            prompt, completion = prompt + stored.prompt, completion + stored.completion
        new = max(prompt - stored.prompt, 0), max(completion - stored.completion, 0)
        stored.prompt, stored.completion = stored.prompt + new[0], stored.completion + new[1]
        stored.metered = ended
        self._note(name, stored)
        return new

    def forget(self, name: str) -> None:
        """It was deleted."""
        if self._known.pop(name, None) is not None and self._path is not None:
            self._unwritten.append(orjson.dumps([name]))

    def share(self) -> None:
        """Another process reads and writes the file too, from now on: it is not written anew."""
        if self._path is not None and self._others is None:
            self._others = AppendedFile(self._path, at_end=True)

    def unshare(self) -> None:
        """The other process has ended."""
        self._learn()
        self._others = None

    def _learn(self) -> None:
        """What the other process has written, if there is one."""
        others = self._others
        if others is None:
            return
        try:
            news = others.news()
        except OSError as error:
            log.warning("%s cannot be read: %s", others.path, error)
            return
        for line in news:
            _apply(line, self._known)
        _shorten(self._known, self._most)

    def take_unwritten(self) -> bytes:
        """What the file does not have yet."""
        if not self._unwritten:
            return b""
        lines, self._unwritten = self._unwritten, []
        return b"\n".join(lines) + b"\n"

    def write(self, lines: bytes) -> None:
        """Write to the end of the file. May run in a thread. What fails is said once and costs no request."""
        path = self._path
        if path is None or not lines:
            return
        if self._failed:
            lines = b"\n" + lines  # the last line may be cut
        try:
            # Opened each time: it may have been written anew.
            with open(path, "ab", opener=_private) as file:
                file.write(lines)
            self._lines += lines.count(b"\n")
            if self._lines > 2 * self._most and self._others is None:
                self._write_anew(path, _read(path, self._most))
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.error("stored responses will not be found after a restart: %s", error)

    def _write_anew(self, path: Path, known: dict[str, StoredResponse]) -> None:
        """Only what is known. Raises OSError."""
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb", opener=_private) as file:
            file.writelines(_line(name, stored) + b"\n" for name, stored in known.items())
        temporary.replace(path)
        self._lines = len(known)

    def _note(self, name: str, stored: StoredResponse) -> None:
        if self._path is not None:
            self._unwritten.append(_line(name, stored))


def _line(name: str, stored: StoredResponse) -> bytes:
    line = [name, stored.backend, stored.tenant, stored.model, stored.metered]
    if stored.prompt or stored.completion:
        line += [stored.prompt, stored.completion]
    return orjson.dumps(line)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _read(path: Path, most: int) -> dict[str, StoredResponse]:
    """The last `most` of a file, by id. Raises OSError."""
    known: dict[str, StoredResponse] = {}
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return known
    for line in lines:
        _apply(line, known)
    _shorten(known, most)
    return known


def _apply(line: bytes, known: dict[str, StoredResponse]) -> None:
    """A line of the file; what was counted stays counted, whoever says so."""
    try:
        match orjson.loads(line):
            case [str(name)]:
                known.pop(name, None)
            case [str(name), str(backend), str(tenant), str(model), bool(metered), *counts]:
                prompt, completion = counts if len(counts) == 2 else (0, 0)
                if (before := known.pop(name, None)) is not None:
                    metered = metered or before.metered
                    prompt, completion = max(prompt, before.prompt), max(completion, before.completion)
                known[name] = StoredResponse(backend, tenant, model, metered, prompt, completion)
    except orjson.JSONDecodeError:
        pass  # the end of a line that a crash has cut, or nothing


def _shorten(known: dict[str, StoredResponse], most: int) -> None:
    for name in list(known)[: max(len(known) - most, 0)]:
        del known[name]
