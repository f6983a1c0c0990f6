"""How much longer than promised a test may wait: `make verify` grants nothing, elsewhere machines are shared."""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("TIDEGATE_PATIENCE", "5"))
