"""How much longer than promised a test may wait: `make verify` grants nothing, elsewhere machines are shared."""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("TIDEGATE_PATIENCE", "5"))


def examples(count: int) -> int:
    """How many of the examples that a dear property test asks for it gets: all in `make verify`, else a quarter."""
    return count if PATIENCE <= 1 else max(count // 4, 5)
