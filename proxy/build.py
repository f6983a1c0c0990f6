"""From a configuration to the objects that run: backends, endpoints, probe targets, prices, rules."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import TypeVar

from policies.adaptive import AdaptiveSlots
from policies.filechecks import KnownKeys
from policies.files import CompiledPolicy, KnownNames, library_policy, read_policy
from policies.health import Health
from policies.profile import read_profile
from policies.state import NOT_ASKED, Backend
from policies.units import BadValueError
from policies.yamlfile import FileProblems, parse_yaml
from probes.base import Target, Timing
from probes.host import HostTarget
from probes.resolver import Resolver
from proxy.certificate_dates import BackendCertificate, backend_certificate, end_of
from proxy.certificates import Certificate, load_certificates, load_chain, not_for_tls, unreadable
from proxy.config import DEFAULT_FILE, BackendConfig, Config, SiteConfig, Tls, backend_key, is_policy_file
from proxy.config import Price as PriceConfig
from proxy.config_values import is_loopback, split_address
from proxy.masking import without_secrets
from proxy.places import unusable_places
from proxy.prices import Price, Prices
from proxy.scaling.offers import unworkable
from proxy.scaling.providers import check_standby
from proxy.upstream import Endpoint

log = logging.getLogger("tidegate")

DEFAULT_SLOTS = 32
"""Until the engine has said how much it can do."""
T = TypeVar("T")


class ConfigError(Exception):
    """The configuration cannot be used; the message says what is wrong, for the person who wrote it."""


def refused_without_keys(address: str, path: Path | None, state: Path | None) -> str:
    """What to say of a proxy that others can reach at `address` and nobody needs a key for; empty: they cannot.

    `path` and `state`: what it is started with.
    """
    host, _ = split_address(address)
    if is_loopback(host):
        return ""
    return (
        f"without keys the proxy listens on loopback only, not on {address}: "
        f"make one first with `{first_key(path, state)}`"
    )


def first_key(path: Path | None, state: Path | None) -> str:
    """The command that makes a key for a proxy that was started with this `--config` or `--state`."""
    where = ""
    if state is not None:
        where = f" --state {shlex.quote(str(state))}"
    elif path is not None and path != DEFAULT_FILE:
        where = f" --config {shlex.quote(str(path))}"
    return f"tidegate keys create --tenant NAME{where}"


@dataclass(slots=True)
class Built:
    """What one configuration amounts to. A reload builds it anew and swaps it in whole."""

    config: Config
    backends: list[Backend]
    endpoints: dict[str, Endpoint]
    targets: list[Target]
    prices: Prices
    policy: CompiledPolicy
    health: Health
    hosts: list[HostTarget]
    certificates: tuple[Certificate, ...] = ()
    """What clients are shown; empty: they speak plain HTTP."""
    backend_certificates: tuple[BackendCertificate, ...] = ()
    """What backends are shown, and the authorities that they are checked by."""


def build(
    config: Config,
    loop: asyncio.AbstractEventLoop,
    seed: int,
    before: Built | None = None,
    resolver: Resolver | None = None,
    path: Path | None = None,
) -> Built:
    """Make everything, or raise ConfigError and leave all as it was. `path`: of the configuration, for messages.

    Without a `resolver` the system is asked for each connection.

    With `before`, a backend at the same address keeps its counts, averages and connections.
    """
    at: tuple[str | int, ...] = ()
    """What is being read, in the configuration."""
    try:
        for problem in unusable_places(config, None if before is None else before.config):
            raise problem
        for problem in unworkable(config):
            raise problem
        certificates = load_certificates(config.tls)
        backends, configured, endpoints, targets, changes = [], [], {}, [], []
        dated: list[BackendCertificate] = []
        contexts: dict[Path | None, ssl.SSLContext] = {}
        for number, section in enumerate(config.backends):
            at = ("backends", number)
            site = config.sites.get(section.site) or SiteConfig()
            key, slots = backend_key(section), slots_of(section)
            for problem in check_standby(section, config.state, config.scaling.scheduler):
                raise problem
            # First, so that what changes between the two is seen by the next reload.
            tls_files = _tls_files(section.tls)
            at = ("backends", number, "tls")
            tls = tls_context(section, contexts)
            fresh = _backend(section, site, slots)
            configured.append(fresh)
            old = _same_place(section, before)
            if old is None:
                backends.append(fresh)
            else:
                backends.append(old)
                changes.append((old, fresh, section, slots))
            endpoints[section.name] = _endpoint(section, key, tls, tls_files, config, loop, resolver)
            dates = backend_certificates(section)
            dated += dates
            targets.append(_target(section, slots, key, tls, dates))
        at = ()
        prices_now = prices(config)
        # The present backends still stand where the old configuration had them.
        policy = load_policy(config, configured, seed)
        if before is not None and before.policy.text_hash == policy.text_hash:
            policy = replace(policy, rules=before.policy.rules)  # spill flags, turns and bookings go on
    except BadValueError as error:
        raise ConfigError(_placed(error, (*at, *error.at), path)) from None
    except (ValueError, OSError, FileProblems) as error:
        raise ConfigError(str(error)) from None
    slots_before = {} if before is None else {target.name: target.slots for target in before.targets}
    for old, fresh, section, slots in changes:
        _update(old, fresh, section, slots, slots_before[section.name])
    return Built(
        config,
        backends,
        endpoints,
        targets,
        prices_now,
        policy,
        health(config),
        hosts_of(config),
        certificates,
        tuple(dated),
    )


def _placed(error: BadValueError, at: tuple[str | int, ...], path: Path | None) -> str:
    """What is wrong, with line and column if that can be: the file may have changed since it was read."""
    if path is None or not at:
        return str(error)
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError, FileProblems):
        return str(error)
    return str(without_secrets(document.failed([document.problem(at, error.message)])))


def make_backends(config: Config) -> list[Backend]:
    """The backends as configured, nothing measured and no profile read yet."""
    return [
        _backend(section, config.sites.get(section.site) or SiteConfig(), None) for section in config.backends
    ]


def slots_of(section: BackendConfig) -> int | None:
    """Slots by the configuration or the profile that it names; None: the engine will say.

    Raises FileProblems, and BadValueError for a profile that cannot be read or has no capacity.
    """
    if section.slots != "auto":
        return section.slots
    profile = section.profile
    if profile is None:
        return None
    file = Path(os.path.normpath(profile))  # without the `..` of a path beside the configuration
    if not profile.exists() and file.suffix not in (".yaml", ".yml"):
        raise BadValueError(
            f"backend {section.name}: {file}: no such file or directory; here a profile is a file, as "
            "`tidegate bench --profile` writes it, and no name as for `tidegate plan`",
            at=("profile",),
        )
    try:
        text = _with_file(section, "profile", file, lambda: profile.read_text("utf-8"))
    except UnicodeDecodeError:
        raise BadValueError(f"backend {section.name}: {file}: not UTF-8 text", at=("profile",)) from None
    capacity = read_profile(text, str(file)).capacity
    if capacity is not None and capacity.users:
        return capacity.users
    why = (
        "does not say how many users an SLA allows: give `slots`, or measure with one (`tidegate bench --profile` "
        "with --ttft, --tpot or --tokens-per-s; `tidegate calibrate` keeps it from files of `bench --json`)"
        if capacity is None
        else "serves nobody inside its SLA: give `slots`, or measure again with another SLA (`bench --profile`)"
    )
    raise BadValueError(
        f"backend {section.name}: {file} {why}",
        at=("profile",),
    )


def load_policy(config: Config, backends: list[Backend], seed: int) -> CompiledPolicy:
    """The policy file that the configuration names. Raises FileProblems, ValueError or OSError."""
    return read_policy(policy_text(config.policy), config.policy, known_names(config, backends), seed)


def policy_text(name: str) -> str:
    """What a policy file says, or one of the library. Raises ValueError or OSError."""
    return Path(name).read_text(encoding="utf-8") if is_policy_file(name) else library_policy(name)


def known_names(config: Config, backends: list[Backend], keys: KnownKeys | None = None) -> KnownNames:
    """What policy files may name."""
    operators = frozenset(site.operator for site in config.sites.values())
    return KnownNames(backends, frozenset(config.sites), operators, keys)


def timing(config: Config) -> Timing:
    """The probes' clockwork."""
    probing = config.probing
    return Timing(
        interval_s=probing.interval,
        retry_s=min(1.0, probing.interval),
        timeout_s=probing.timeout,
        up=probing.up,
        down=probing.down,
        generate_s=inf if probing.generate is None else probing.generate,
    )


def health(config: Config) -> Health:
    """How carefully backends are taken out and back in."""
    return Health(config.health.slow_start, config.health.panic, config.health.most_ejected)


def hosts_of(config: Config) -> list[HostTarget]:
    """The exporters to ask, by site."""
    return [
        HostTarget(name, site.host.dcgm, site.host.node)
        for name, site in config.sites.items()
        if site.host.dcgm is not None or site.host.node is not None
    ]


def _backend(section: BackendConfig, site: SiteConfig, slots: int | None) -> Backend:
    price = section.price
    asks = section.models == "auto"
    return Backend(
        section.name,
        section.site,
        slots or DEFAULT_SLOTS,
        section.weight,
        frozenset() if asks else frozenset(section.models),
        NOT_ASKED if asks else "",
        asks,
        {**site.labels, **section.labels},
        site.operator,
        site.location,
        site.accepts(section.site),
        bandwidth=float(section.bandwidth or 125_000_000),
        price_input=float(price.input) if price else None,
        price_output=float(price.output) if price else None,
        carbon_gco2_kwh=site.carbon_gco2_kwh,
        adaptive=AdaptiveSlots.of(section.name) if section.adaptive else None,
        asleep=section.standby is not None,
    )


def _update(
    old: Backend, fresh: Backend, section: BackendConfig, slots: int | None, slots_before: int | None
) -> None:
    """Take over what the configuration says; what was measured, counted and learnt stays."""
    if slots is not None:
        old.full_slots = slots
    elif slots_before is not None:
        old.full_slots = DEFAULT_SLOTS  # as at a start: the engine has not been asked yet
    if section.models != "auto":
        old.models = frozenset(section.models)
        old.models_unknown, old.models_awaited = "", False
    if section.standby is None:
        old.asleep = old.draining = (
            False  # from now on it is taken to run; of one that is new, its manager says
        )
    if (old.adaptive is None) != (fresh.adaptive is None):
        old.adaptive = fresh.adaptive
    for name in (
        "site",
        "weight",
        "labels",
        "operator",
        "location",
        "data_classes",
        "bandwidth",
        "price_input",
        "price_output",
        "carbon_gco2_kwh",
    ):
        setattr(old, name, getattr(fresh, name))


def _same_place(section: BackendConfig, before: Built | None) -> Backend | None:
    if before is None:
        return None
    for old_section, backend in zip(before.config.backends, before.backends, strict=True):
        if (old_section.name, old_section.url) == (section.name, section.url):
            return backend
    return None


def _endpoint(
    section: BackendConfig,
    key: str | None,
    tls: ssl.SSLContext | None,
    tls_files: bytes,
    config: Config,
    loop: asyncio.AbstractEventLoop,
    resolver: Resolver | None,
) -> Endpoint:
    is_vllm = section.engine == "vllm"
    return Endpoint(
        section.name,
        section.url,
        loop,
        key=key,
        idle_s=config.timeouts.backend_idle,
        tls=tls,
        tls_files=tls_files,
        server_name=section.tls.server_name,
        continuous_usage=is_vllm,
        cache_salt=is_vllm,
        resolver=resolver,
        age_s=config.timeouts.connection,
        most_requests=config.limits.requests,
    )


def _target(
    section: BackendConfig,
    slots: int | None,
    key: str | None,
    tls: ssl.SSLContext | None,
    dates: tuple[BackendCertificate, ...],
) -> Target:
    return Target(
        section.name,
        section.url,
        None if section.models == "auto" else frozenset(section.models),
        slots,
        {} if key is None else {"Authorization": f"Bearer {key}"},
        tls,
        section.tls.server_name,
        end_of(dates, "certificate"),
        end_of(dates, "ca_file"),
    )


def tls_context(
    section: BackendConfig, shared: dict[Path | None, ssl.SSLContext] | None = None
) -> ssl.SSLContext | None:
    """How a backend's certificate is checked; None: its URL is plain http.

    `shared`: contexts by their authorities, for backends that we show no certificate to: making one takes long.
    Raises BadValueError naming the backend and, within `tls`, the key of the file that cannot be used.
    """
    if not section.url.startswith("https:"):
        return None
    tls = section.tls
    if shared is not None and tls.certificate is None and tls.ca_file in shared:
        return shared[tls.ca_file]
    context = _with_file(
        section, "ca_file", tls.ca_file, lambda: ssl.create_default_context(cafile=tls.ca_file)
    )
    if tls.certificate is not None and tls.key is not None:
        certificate, key = tls.certificate, tls.key
        if missing := unreadable(certificate, key):
            at = "key" if certificate not in missing else "certificate"
            raise BadValueError(f"backend {section.name}: {'; '.join(missing.values())}", at=(at,))
        _with_file(section, "certificate", certificate, lambda: load_chain(context, certificate, key))
    elif shared is not None:
        shared[tls.ca_file] = context
    return context


def backend_certificates(section: BackendConfig) -> tuple[BackendCertificate, ...]:
    """The dates of what stands in the `tls` of a backend, as far as they can be read."""
    if not section.url.startswith("https:"):
        return ()
    found = []
    for key, file in (("certificate", section.tls.certificate), ("ca_file", section.tls.ca_file)):
        if file is not None:
            found.append(
                _with_file(section, key, file, partial(backend_certificate, section.name, key, file))
            )
    return tuple(dated for dated in found if dated is not None)


def _tls_files(section: Tls) -> bytes:
    """Changes with what stands in the files of a section."""
    digest = hashlib.sha256()
    for name in _tls_file_names(section):
        try:
            digest.update(Path(name).read_bytes())
        except OSError:
            pass  # `tls_context` says so
    return digest.digest()


def _tls_file_names(section: Tls) -> list[str]:
    return [str(name) for name in (section.ca_file, section.certificate, section.key) if name is not None]


def files_of(config: Config) -> list[Path]:
    """The files that a configuration names and that are read with it."""
    files = [config.policy] if is_policy_file(config.policy) else []
    for shown in config.tls:
        files += [str(shown.certificate), str(shown.key)]
    for section in config.backends:
        files += _tls_file_names(section.tls)
        files += [str(file) for file in (section.api_key_file, section.profile) if file is not None]
    if config.scaling.images is not None:
        files.append(str(config.scaling.images))
    return [Path(file) for file in files]


def _with_file(section: BackendConfig, name: str, file: Path | None, use: Callable[[], T]) -> T:
    """`use()`, with its errors as a BadValueError at the key `name`."""
    try:
        return use()
    except ssl.SSLError as error:
        if file is None:
            raise
        raise BadValueError(f"backend {section.name}: {file}: {not_for_tls(error)}", at=(name,)) from None
    except OSError as error:
        if file is None:
            raise
        reason = (error.strerror or "cannot be read").lower()
        raise BadValueError(f"backend {section.name}: {file}: {reason}", at=(name,)) from error


def prices(config: Config) -> Prices:
    """What each model costs at each backend."""
    found: dict[str, dict[str, Price]] = {}
    for section in config.backends:
        by_model = {model: _price(price, config) for model, price in section.prices.items()}
        if section.price is not None:
            by_model["*"] = _price(section.price, config)
        if by_model:
            found[section.name] = by_model
    return Prices(found, config.ledger_currency)


def _price(price: PriceConfig, config: Config) -> Price:
    return Price.parse(price.input, price.output, config.ledger_currency, price.cached_input)


def warn_of(built: Built) -> None:
    """Say what is odd in a policy file (what is in the library is as it should be), and which certificates end."""
    wall = time.time()
    ends = [certificate.warning(wall) for certificate in built.certificates]
    ends += [certificate.warning(wall) for certificate in built.backend_certificates]
    for warning in filter(None, ends):
        log.warning("%s", warning)
    for found in built.policy.warnings if is_policy_file(built.config.policy) else ():
        log.warning("policy %s:%s: %s: %s", built.policy.name, found.line, found.path, found.message)
