"""Signed messages, in both directions, by the Standard Webhooks specification 1.0 (standardwebhooks.com).

Three header fields: `webhook-id` names the message and stays the same when it is sent again, `webhook-timestamp`
is the Unix time of this sending, `webhook-signature` is `v1,` and the HMAC-SHA256 of `ID.TIMESTAMP.BODY` in
base64. Several signatures, divided by blanks, say the same with several secrets, so that a secret can be replaced
without a moment in which one side has the wrong one.

The specification signs no method and no path, since its webhooks have one URL. Where a message has no body, we
sign `METHOD PATH` in its place, and bodies name what they are about: a signed message fits one route only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from typing import Final

from policies.units import BadValueError

ID: Final = "webhook-id"
TIMESTAMP: Final = "webhook-timestamp"
SIGNATURE: Final = "webhook-signature"
TOLERANCE_S: Final = 300.0
"""A message that was signed longer ago, or later than now by more, is not taken."""
LEAST_SECRET_BYTES: Final = 16
MOST_SIGNATURES: Final = 8
"""In one message."""

_PREFIX: Final = "whsec_"
_MESSAGE_ID: Final = re.compile(r"[A-Za-z0-9_:.-]{1,128}")
_SECONDS: Final = re.compile(r"[0-9]{1,12}", re.ASCII)


class SignatureError(Exception):
    """A message is not signed as it should be; the message says how, and nothing of any secret."""


def secrets_of(variable: str, at: tuple[str | int, ...] = ()) -> tuple[bytes, ...]:
    """The secrets in an environment variable, divided by blanks: the first signs, any verifies.

    `whsec_` and base64, as the specification writes them, or text. Raises BadValueError with the path `at`.
    """
    shown = variable if variable.isupper() else "the variable that secret_env names"
    words = os.environ.get(variable, "").split()
    if not words:
        raise BadValueError(f"{shown} is not set in the environment", at=at)
    found = []
    for word in words:
        secret = word.encode()
        if word.startswith(_PREFIX):
            try:
                secret = base64.b64decode(word.removeprefix(_PREFIX), validate=True)
            except (binascii.Error, ValueError):
                raise BadValueError(f"{shown}: what stands behind whsec_ is not base64", at=at) from None
        if len(secret) < LEAST_SECRET_BYTES:
            raise BadValueError(
                f"{shown}: a secret has {LEAST_SECRET_BYTES} bytes or more: `openssl rand -base64 32`", at=at
            )
        found.append(secret)
    return tuple(found)


def sign(secret: bytes, id: str, timestamp: int, body: bytes) -> str:
    """One signature of a message: `v1,...`."""
    digest = hmac.new(secret, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def signed(secrets: Sequence[bytes], id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The header fields of a message, with a signature of each secret."""
    signatures = " ".join(sign(secret, id, timestamp, body) for secret in secrets)
    return {ID: id, TIMESTAMP: str(timestamp), SIGNATURE: signatures}


def what_is_signed(method: str, path: str, body: bytes) -> bytes:
    """The body, or in its place method and path (with its query)."""
    return body or f"{method} {path}".encode()


def verify(secrets: Sequence[bytes], headers: Mapping[str, str], body: bytes, now: float) -> str:
    """The id of a message that one of the secrets signed within `TOLERANCE_S` of `now`, Unix time.

    `headers`: names in small letters, or a mapping that does not care. Raises SignatureError.
    """
    id, stamp, given = (headers.get(name, "") for name in (ID, TIMESTAMP, SIGNATURE))
    for name, value in ((ID, id), (TIMESTAMP, stamp), (SIGNATURE, given)):
        if not value:
            raise SignatureError(f"the header field {name} is missing")
    if _MESSAGE_ID.fullmatch(id) is None:
        raise SignatureError(f"{ID}: at most 128 letters, digits and any of '_:.-'")
    if _SECONDS.fullmatch(stamp) is None:
        raise SignatureError(f"{TIMESTAMP}: whole seconds of Unix time")
    signatures = [
        word.encode("utf-8", "surrogateescape")
        for word in given.split(" ", MOST_SIGNATURES)[:MOST_SIGNATURES]
    ]
    good = False
    for secret in secrets:
        wanted = sign(secret, id, int(stamp), body).encode()
        for signature in signatures:
            good |= hmac.compare_digest(wanted, signature)
    if not good:
        raise SignatureError("no signature of it is right: wrong secret, or it was changed on its way")
    off_s = now - int(stamp)
    if abs(off_s) > TOLERANCE_S:
        how = "old" if off_s > 0 else "from the future"
        raise SignatureError(
            f"it is {how} by {abs(off_s):.0f} s: sign each sending anew, and set both clocks"
        )
    return id
