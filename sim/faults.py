"""Faults to order: what an emulated backend does wrong, for a share of its requests or for a time.

Some concern single completions and are drawn for each (`PER_REQUEST`), the others the backend as a whole. They are
ordered when it starts, and over its control endpoint while it runs.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from enum import StrEnum
from random import Random
from typing import Annotated, Final, Protocol

from pydantic import Field, ValidationError, model_validator

from policies.yamlfile import FileModel
from policies.yamlproblems import dotted, explain


class FaultKind(StrEnum):
    """What goes wrong."""

    ERROR = "error"
    """An error status before the first byte."""
    GARBAGE = "garbage"
    """Bytes that are no HTTP, then the end of the connection."""
    CUT = "cut"
    """The connection is reset half way through."""
    STALL = "stall"
    """Nothing more comes half way through."""
    ERROR_EVENT = "error_event"
    """The engine fails half way through: under 200, an event with an error and then `[DONE]`; 500 for a whole
    answer."""
    SLOW = "slow"
    """Every step of the engine takes `factor` times as long."""
    UNHEALTHY = "unhealthy"
    """`/health` answers 503; all else goes on."""
    DIE = "die"
    """Connections are reset and refused, and all is forgotten; from the start on, it is a cold start."""


PER_REQUEST: Final = frozenset(
    (FaultKind.ERROR, FaultKind.GARBAGE, FaultKind.CUT, FaultKind.STALL, FaultKind.ERROR_EVENT)
)

GARBAGE: Final = b"\x16\x03\x01\x00\xff\x00HTTP\x00/1.1 \xfe\xff\r\n\x00\r\n"
"""Neither a status line nor anything else that a client could take for one."""


class Fault(FileModel):
    """One fault. Times are seconds of emulated time."""

    kind: FaultKind
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the completions that it meets."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """How long it lasts, from when it is ordered; None: until it is taken back."""
    status: Annotated[int, Field(ge=400, le=599)] = 500
    """Of `error`."""
    retry_after: Annotated[int, Field(ge=0)] | None = None
    """Of `error`: the header of that name, seconds on the wall."""
    factor: Annotated[float, Field(gt=0)] = 2.0
    """Of `slow`."""

    @model_validator(mode="after")
    def _says_nothing_idle(self) -> Fault:
        belongs = {
            "share": self.kind in PER_REQUEST,
            "status": self.kind is FaultKind.ERROR,
            "retry_after": self.kind is FaultKind.ERROR,
            "factor": self.kind is FaultKind.SLOW,
        }
        for name in self.model_fields_set & belongs.keys():
            if not belongs[name]:
                raise ValueError(f"a fault of kind {self.kind.value} has no {name}")
        return self


def reset(transport: asyncio.Transport) -> None:
    """End a connection at once, so that the other side sees a reset and not an orderly end."""
    try:
        # Closing sends RST with a linger time of zero; else FIN, unless something is left to be read.
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    except OSError:
        pass  # it is closed already
    transport.abort()


def parse_fault(text: str) -> Fault:
    """A fault as the command line has it: `KIND` or `KIND,NAME=VALUE,...`. Raises ValueError, in one line."""
    kind, *settings = text.split(",")
    values = dict(setting.partition("=")[::2] for setting in settings)
    try:
        return Fault.model_validate_strings({"kind": kind, **values})
    except ValidationError as error:
        first = explain(error, Fault, {"kind": kind, **values})[0]
        where = f"{dotted(first.path)}: " if first.path else ""
        hint = f" (did you mean {first.suggestion!r}?)" if first.suggestion else ""
        raise ValueError(f"{text!r}: {where}{first.message}{hint}") from error


class CallLater(Protocol):
    """`loop.call_later`."""

    def __call__(self, delay: float, callback: Callable[[Fault], object], fault: Fault, /) -> object: ...


class Faults:
    """Those in force at one backend."""

    def __init__(self, call_later: CallLater, *, seed: int = 0, speed: float = 1.0) -> None:
        """`seed`: decides which completions they meet. `speed`: emulated seconds in a second."""
        self._call_later = call_later
        self._random = Random(seed)  # noqa: S311 - which requests go wrong is no secret
        self._speed = speed
        self.active: list[Fault] = []
        """In the order in which they were ordered."""
        self.changed: Callable[[], object] = lambda: None
        """Called when `active` has changed."""

    def order(self, fault: Fault) -> None:
        """Let it happen from now on."""
        self.active.append(fault)
        if fault.seconds is not None:
            self._call_later(fault.seconds / self._speed, self._end, fault)
        self.changed()

    def take_back(self) -> None:
        """End all of them."""
        self.active.clear()
        self.changed()

    def _end(self, fault: Fault) -> None:
        # The very one: an equal one may have been ordered later.
        left = [other for other in self.active if other is not fault]
        if len(left) < len(self.active):
            self.active[:] = left
            self.changed()

    def draw(self) -> Fault | None:
        """What happens to the next completion; the first that meets it decides."""
        for fault in self.active:
            if fault.kind in PER_REQUEST and self._random.random() < fault.share:
                return fault
        return None

    @property
    def factor(self) -> float:
        """How many times as long everything takes."""
        factor = 1.0
        for fault in self.active:
            if fault.kind is FaultKind.SLOW:
                factor *= fault.factor
        return factor

    @property
    def healthy(self) -> bool:
        """Whether `/health` says so."""
        return not self._any(FaultKind.UNHEALTHY)

    @property
    def dead(self) -> bool:
        """Whether connections are refused."""
        return self._any(FaultKind.DIE)

    def _any(self, kind: FaultKind) -> bool:
        return any(fault.kind is kind for fault in self.active)
