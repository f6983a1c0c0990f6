"""All targets, by name."""

from __future__ import annotations

from typing import Final

from tests.fuzz import files, media, wire
from tests.fuzz.target import Target

TARGETS: Final[dict[str, Target]] = {**wire.TARGETS, **media.TARGETS, **files.TARGETS}
