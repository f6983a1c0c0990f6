"""All targets, by name."""

from __future__ import annotations

from typing import Final

from tests.fuzz import files, wire
from tests.fuzz.target import Target

TARGETS: Final[dict[str, Target]] = {**wire.TARGETS, **files.TARGETS}
