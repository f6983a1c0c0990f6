"""Single values of the configuration file and what they may be: URLs, addresses, header fields. Names are in
`policies/siteschema.py`.

What is wrong with one is said in a BadValueError, in the words of the file.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from datetime import UTC, tzinfo
from typing import Annotated
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

from policies.units import BadValueError
from policies.yamlproblems import closest
from proxy.client_address import Network
from proxy.http1 import NEVER_FORWARDED

_NOT_IN_URLS = re.compile(r"""[^!-~]|["<>\\^`{|}]""")
_API_PATH = re.compile(
    r"(?:/v1/(?:completions|embeddings|models|responses)|(?:/v1)?/chat/completions|/v1|/(?:de)?tokenize)\Z"
)
"""Paths that documentation of engines shows behind the address."""
MAX_SOCKET_PATH = 107
"""Bytes; the system has 108, with the zero at the end."""
METADATA_NAMES = frozenset(
    {"metadata.google.internal", "metadata", "metadata.tencentyun.com", "instance-data"}
)
METADATA_ADDRESSES = frozenset(
    ipaddress.ip_address(address)
    for address in ("100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")
)
"""Cloud metadata services besides the link-local ones: never a backend, whoever asks."""


def _check_url(value: str) -> str:
    if value.startswith("unix:"):
        return _check_socket(value)
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise BadValueError(f"not a URL ({str(error).lower()}): '{value[:80]}'") from None
    if _NOT_IN_URLS.search(value):
        raise BadValueError(f"a URL holds printable ASCII only, without blanks and quotes: '{value[:80]}'")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadValueError(
            f"a URL begins with http:// or https:// and names a host, or is unix:/PATH, got '{value[:80]}'"
        )
    if parts.username is not None or "?" in value or "#" in value:
        raise BadValueError("a backend's URL has no user, query or fragment; keys go into api_key_env")
    if port == 0:
        raise BadValueError("port 0 cannot be connected to")
    if is_metadata(parts.hostname):
        raise BadValueError(f"{parts.hostname} is a metadata or link-local address, never a backend")
    value = parts.scheme + value[len(parts.scheme) :].rstrip("/")
    if found := _API_PATH.search(value):
        raise BadValueError(
            f"a backend's URL goes without {found[0]}: requests bring it along", value[: found.start()]
        )
    return value


def _check_socket(value: str) -> str:
    path = value.removeprefix("unix:")
    if _NOT_IN_URLS.search(value) or "?" in value or "#" in value or not path.startswith("/"):
        raise BadValueError(
            f"a Unix socket is unix:/run/vllm.sock, an absolute path of printable ASCII, got '{value[:80]}'"
        )
    if path.startswith("//"):
        raise BadValueError("a Unix socket is written with one slash", "unix:/" + path.lstrip("/"))
    if len(path) > MAX_SOCKET_PATH:
        raise BadValueError(f"the path of a Unix socket has at most {MAX_SOCKET_PATH} bytes")
    return value


def is_metadata(host: str) -> bool:
    """Whether a host is a metadata service, however its address is written."""
    name = host.rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(name))  # 0xa9fea9fe, 169.254.43518 and the like
        except (OSError, UnicodeError):
            return name in METADATA_NAMES
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_link_local or address in METADATA_ADDRESSES


def _check_address(value: str) -> str:
    host, port = split_address(value)
    if not 0 <= port <= 65535:
        raise BadValueError(f"a port is between 0 and 65535, got {port}")
    if not host:
        raise BadValueError("an address needs a host; 0.0.0.0 means every IPv4 interface", _with_host(value))
    return value


def _with_host(port: str) -> str | None:
    """A whole address, of a port that stands alone."""
    number = port.removeprefix(":")
    alone = number.isascii() and number.isdigit() and int(number[:6]) <= 65535
    return f"127.0.0.1:{number}" if alone else None


def _check_type_of_address(value: object) -> object:
    """In YAML a port alone is a number."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise BadValueError(f"an address is HOST:PORT, got {value}", _with_host(str(value)))
    return value


def split_address(value: str) -> tuple[str, int]:
    """`127.0.0.1:8080` or `[::1]:8080` -> host and port. BadValueError otherwise."""
    host, colon, port = value.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit():
        raise BadValueError(f"an address is HOST:PORT, got '{value[:60]}'", _with_host(value))
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_nearby(host: str) -> bool:
    """Whether an address can be taken for one of the own network: private, or a name without a public domain."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith(
            (".local", ".internal", ".lan", ".home.arpa", ".localhost", ".test")
        )


def _check_forwarded(value: str) -> str:
    if re.fullmatch(r"[!#$%&'*+.^`|~0-9A-Za-z-]{1,64}", value) is None:
        raise BadValueError(f"not the name of a header field: '{value[:40]}'")
    if value.lower().encode() in NEVER_FORWARDED:
        raise BadValueError(f"{value} is the proxy's own business and cannot be passed on")
    return value


def _check_host_name(value: str) -> str:
    label = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62})"
    if re.fullmatch(rf"(?:\*\.)?{label}(?:\.{label})*", value) is None or len(value) > 253:
        raise BadValueError(f"not the name of a host, as api.example.com or *.example.com: '{value[:80]}'")
    return value


def _network(value: object) -> Network:
    """`10.0.0.0/8`, or an address alone."""
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    try:
        return ipaddress.ip_network(value if isinstance(value, str) else "")
    except ValueError:
        pass
    try:
        meant = str(ipaddress.ip_network(str(value), strict=False))
    except ValueError:
        meant = None
    raise BadValueError(
        f"a network is 10.0.0.0/8, 2001:db8::/32 or an address, got '{str(value)[:60]}'", meant
    )


def time_zone(name: str) -> tzinfo:
    """The time zone with an IANA name. Raises BadValueError: this machine knows none of that name."""
    if name == "UTC":
        return UTC  # also where no database of time zones is installed
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # the latter two: of what is no name, such as a folder's
        meant = closest(name, available_timezones(), cutoff=0.8)
        raise BadValueError(
            f"no time zone is called '{name[:40]}' here, as Asia/Shanghai is", meant
        ) from None


def _check_zone(value: str) -> str:
    time_zone(value)
    return value


def _check_variable(value: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) is None:  # a key pasted here must not be shown
        raise BadValueError(
            "this is no name of an environment variable (letters, digits and '_'); the key itself goes into that "
            "variable, or into a file that api_key_file names"
        )
    return value


Zone = Annotated[str, AfterValidator(_check_zone)]
Variable = Annotated[str, AfterValidator(_check_variable)]
HostName = Annotated[str, AfterValidator(_check_host_name)]
NetworkText = Annotated[
    Network, BeforeValidator(_network), PlainSerializer(str), WithJsonSchema({"type": "string"})
]
FieldName = Annotated[str, AfterValidator(_check_forwarded)]
Url = Annotated[str, AfterValidator(_check_url)]
Address = Annotated[str, BeforeValidator(_check_type_of_address), AfterValidator(_check_address)]
DecimalText = Annotated[
    str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)
]
