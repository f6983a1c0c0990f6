"""Uploads as clients send them."""

from __future__ import annotations

BOUNDARY = b"----x1"
FORM_TYPE = b"multipart/form-data; boundary=" + BOUNDARY
SOUND = bytes(range(256)) * 3


def field(name: str, value: bytes | str, *lines: bytes) -> bytes:
    """A part, without its boundary; `lines`: further header fields."""
    value = value.encode() if isinstance(value, str) else value
    head = b'Content-Disposition: form-data; name="%b"\r\n' % name.encode()
    return head + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + value


def file(name: str, content: bytes = SOUND, filename: str = "tide.wav") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'.encode()
    return disposition + b"Content-Type: audio/wav\r\n\r\n" + content


def form(*parts: bytes, boundary: bytes = BOUNDARY) -> bytes:
    body = b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts)
    return body + b"--%b--\r\n" % boundary


def upload(model: str = "m", **fields: str) -> bytes:
    """A file and text fields."""
    return form(file("file"), field("model", model), *(field(name, value) for name, value in fields.items()))
