"""Asking a running proxy on its admin port, for the commands that need one."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.units import BadValueError
from probes.base import certificate_reason

if TYPE_CHECKING:
    from proxy.config import Config

DEFAULT_STATE = Path("tidegate-data")
PORTS_FILE = "ports.json"
"""In its state directory a running proxy writes its real ports."""
DEFAULT_ADMIN = "127.0.0.1:8081"
CLIENTS_ERROR = "x-tidegate-clients-error"
"""Field of an answer of the admin port that is the error a client would get."""


class AskError(Exception):
    """No proxy can be asked, or it does not know; the message is for the person at the terminal."""


class NobodyError(AskError):
    """Nobody answers there."""


class ClientsError(AskError):
    """A client would have got this error of the API in place of an answer."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        error = body["error"]
        code = error.get("code") or error["type"]
        where = f" ({error['param']})" if error.get("param") else ""
        super().__init__(f"a client would get {status} {code}{where}: {error.get('message')}")
        self.body = body


def admin_address(admin: str | None, state: Path | None, config: Config | None) -> str:
    """The admin port: `admin` itself, else that of the proxy on `state`, else the configured one.

    HOST:PORT, with `https://` in front where it speaks that.

    A running proxy writes its real ports into its state directory. Raises AskError: `admin` is no address, or
    no proxy runs on `state`.
    """
    if admin is not None:
        return _given(admin, state)
    if state is not None:
        written = written_admin(state)
        if written is None:
            raise AskError(f"no proxy is running on {state}: it would have left ports.json there")
        return written
    if config is None:
        return written_admin(DEFAULT_STATE) or DEFAULT_ADMIN
    written = written_admin(config.state)
    if written is None and config.admin.endswith(":0"):
        raise NobodyError(f"no proxy is running on {config.state}: it would have left ports.json there")
    return written or ("https://" if config.admin_tls else "") + config.admin


def _given(admin: str, state: Path | None) -> str:
    from proxy.config_values import split_address

    if state is not None:
        raise AskError("give --admin or --state, not both: each says which proxy to ask")
    address = admin.removeprefix("http://").rstrip("/")
    try:
        split_address(address.removeprefix("https://"))
    except BadValueError as error:
        hint = f" (did you mean {error.suggestion}?)" if error.suggestion else ""
        raise AskError(f"--admin: {error.message}{hint}") from None
    return address


def written_admin(state: Path) -> str | None:
    """The admin port that a running proxy wrote into its state directory."""
    try:
        return str(json.loads((state / PORTS_FILE).read_text(encoding="utf-8"))["admin"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def ask(address: str, path: str, body: bytes | None = None) -> dict[str, Any]:
    """What the admin port at HOST:PORT answers to `GET path`, or to a `POST` of `body`. Raises AskError;
    ClientsError for an error of the API in answer to a body.

    `address` may begin with `https://`: the certificate is checked by the system's authorities.
    """
    connection: http.client.HTTPConnection
    if address.startswith("https://"):
        connection = http.client.HTTPSConnection(address.removeprefix("https://"), timeout=5)
    else:
        connection = http.client.HTTPConnection(address, timeout=5)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    except ssl.SSLCertVerificationError as error:
        raise AskError(
            f"the certificate at {address} was refused: {certificate_reason(error)}; name the host as its "
            "certificate does (--admin https://NAME:PORT), and its authority in SSL_CERT_FILE"
        ) from None
    except OSError as error:
        reason = (error.strerror or "no answer within 5 s").lower()
        raise NobodyError(f"no proxy answers at {address}: {reason}") from None
    except (ValueError, http.client.HTTPException):
        raise AskError(f"what answers at {address} is not the admin port of tidegate") from None
    finally:
        connection.close()
    if response.status == 200 and isinstance(answer, dict):
        return answer
    refusal = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(refusal, dict) and response.headers.get(CLIENTS_ERROR):
        raise ClientsError(response.status, answer)
    if not isinstance(refusal, dict) or "code" in refusal:  # errors of the API have a code
        raise AskError(f"what answers at {address} is not the admin port of tidegate")
    raise AskError(str(refusal.get("message")))
