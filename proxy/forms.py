"""Bodies that are uploads (`multipart/form-data`): what a decision or the meter needs of them, and what goes on.

They are kept whole like any other body, so that another backend can be tried. The bytes of sound and pictures do
not say how many tokens they are, so only `prompt` is counted in advance.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from proxy.bodies import ENGINE_FIELDS, FETCHED_FIELDS, LONGEST_SESSION
from proxy.endpoints import Route
from proxy.errors import RequestError
from proxy.meter import BYTES_PER_TOKEN
from proxy.multipart import Form

if TYPE_CHECKING:
    from proxy.openai import RequestBody

_INCLUDE: Final = "stream_include_usage"
_CONTINUOUS: Final = "stream_continuous_usage_stats"
"""vLLM's `stream_options`, as fields of a form."""
_ASK_USAGE: Final = {_INCLUDE: "true", _CONTINUOUS: "true"}

_CONTENT_TYPE: Final = re.compile(rb"(?:\A|\n)content-type: ([^\r\n]*+)\r\n")


def content_type(forward: bytes) -> bytes:
    """The value of `Content-Type` among the field lines of a request that go on; empty: there is none."""
    match = _CONTENT_TYPE.search(forward)
    return b"" if match is None else match[1]


def read_fields(route: Route, body: RequestBody, form: Form, *, media_urls: bool) -> None:
    """Read a form into `body`. Raises RequestError."""
    body.form = form
    body.must_rewrite = True
    if route.streams:
        body.stream = form.flag("stream")
    body.asks_usage = route.path.startswith("/v1/audio/")
    if body.asks_usage:
        body.include_usage = form.flag(_INCLUDE)
        body.every_event = form.flag(_CONTINUOUS) and body.include_usage
        if not body.stream and (body.include_usage or form.flag(_CONTINUOUS)):
            raise RequestError("invalid_value", f"{_INCLUDE} needs stream=true", _INCLUDE)
    prompt = form.text("prompt")
    if prompt:
        body.prompt_tokens = -(-len(prompt.encode()) // BYTES_PER_TOKEN)
    body.session = (form.text("user") or "")[:LONGEST_SESSION]
    if not media_urls:
        _refuse_fetched(form)


def _refuse_fetched(form: Form) -> None:
    """An engine that fetches URLs for a client is a way into its network: only files and data: URLs pass."""
    for name, begin in form.beginnings():
        plain = name.partition("[")[0]
        fetched = plain in FETCHED_FIELDS or plain == "url" or plain.endswith("_url")
        if fetched and begin[:5].lower() != b"data:":
            raise RequestError("media_url", "media must be sent as a file, or inline as a data: URL", name)


def form_for_backend(body: RequestBody, form: Form, *, model: str, continuous: bool) -> bytes:
    """The upload as one backend shall see it. `continuous`: the backend knows vLLM's fields for usage."""
    fields = {"model": model} if model != body.model else {}
    if body.stream and body.asks_usage and continuous:
        fields.update(_ASK_USAGE)
    without = ENGINE_FIELDS.intersection(form.names)
    return form.changed(fields, without) if fields or without else body.raw
