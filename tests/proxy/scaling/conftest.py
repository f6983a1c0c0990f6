"""Fixtures of this folder."""

from __future__ import annotations

from tests.proxy.scaling.planned import start

__all__ = ["start"]
