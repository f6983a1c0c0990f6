"""Requests to servers of this machine, past any HTTP proxy that the environment names."""

from __future__ import annotations

import urllib.request

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str, timeout_s: float = 10.0) -> str:
    """The body at a URL. Raises OSError, also for an error status."""
    return _read(urllib.request.Request(url), timeout_s)


def post(url: str, timeout_s: float = 10.0) -> str:
    """What comes back for a POST without a body. Raises OSError, also for an error status."""
    return _read(urllib.request.Request(url, data=b"", method="POST"), timeout_s)


def _read(request: urllib.request.Request, timeout_s: float) -> str:
    with _opener.open(request, timeout=timeout_s) as answer:
        text: str = answer.read().decode()
        return text
