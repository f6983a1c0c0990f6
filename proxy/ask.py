"""Asking a running proxy on its admin port, for the commands that need one."""

from __future__ import annotations

import http.client
import json
import ssl
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.units import BadValueError
from probes.base import certificate_reason
from proxy.certificate_dates import first_der

if TYPE_CHECKING:
    from proxy.config import Config

DEFAULT_STATE = Path("tidegate-data")
PORTS_FILE = "ports.json"
"""In its state directory a running proxy writes its real ports."""
DEFAULT_ADMIN = "127.0.0.1:8081"
CLIENTS_ERROR = "x-tidegate-clients-error"
"""Field of an answer of the admin port that is the error a client would get."""


@dataclass(frozen=True, slots=True)
class AdminPort:
    """Where a command has found an admin port by itself, and what that shows."""

    address: str
    """HOST:PORT, with `https://` in front where it speaks that."""
    state: Path
    """Of the proxy: there it says which certificates it shows."""
    files: tuple[Path, ...] = ()
    """The certificates that its configuration names."""

    def fingerprints(self) -> frozenset[str]:
        """Of the certificates that are trusted, as they stand now. Their names and dates do not matter: an address
        of this machine is in few certificates, and whoever looks after one that has expired has to get in."""
        found = _written(self.state).get("certificates")
        known = {str(each) for each in found} if isinstance(found, list) else set()
        for file in self.files:
            try:
                der = first_der(file)
            except OSError:
                continue  # what is running may have told
            if der is not None:
                known.add(sha256(der).hexdigest())
        return frozenset(known)

    def __str__(self) -> str:
        return self.address


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
    address = _written(state).get("admin")
    return None if address is None else str(address)


def _written(state: Path) -> dict[str, Any]:
    """What a running proxy wrote there; empty: none does."""
    try:
        written = json.loads((state / PORTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


def ask(port: AdminPort | str, path: str, body: bytes | None = None, method: str = "") -> dict[str, Any]:
    """What an admin port answers to `GET path`, or to a `POST` of `body`, unless `method` says another.

    Raises AskError; ClientsError for an error of the API in answer to a body.

    The certificate of one that was found has to be among those it is known to show. Of an address that was given
    (HOST:PORT, with `https://` in front) the system's authorities decide.
    """
    address = str(port)
    trusted = port.fingerprints() if isinstance(port, AdminPort) else frozenset()
    connection = _connection(address, pinned=bool(trusted))
    try:
        connection.connect()
        if trusted and isinstance(connection.sock, ssl.SSLSocket):
            shown = connection.sock.getpeercert(binary_form=True) or b""
            if sha256(shown).hexdigest() not in trusted:
                raise AskError(f"what answers at {address} shows another certificate than this proxy")
        if body is None:
            connection.request(method or "GET", path)
        else:
            connection.request(method or "POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    except ssl.SSLCertVerificationError as error:
        raise AskError(
            f"the certificate at {address} was refused: {certificate_reason(error)}; name the host as its "
            "certificate does (--admin https://NAME:PORT), and its authority in SSL_CERT_FILE; or, on the machine "
            "of the proxy, leave --admin out"
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


def _connection(address: str, *, pinned: bool) -> http.client.HTTPConnection:
    """`pinned`: what its certificate says is not looked at, but which one it is."""
    if not address.startswith("https://"):
        return http.client.HTTPConnection(address, timeout=5)
    context = ssl.create_default_context()
    if pinned:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(address.removeprefix("https://"), timeout=5, context=context)
