"""The configuration file: one YAML document, checked whole, with defaults for everything but backends.

Every field's description says its unit and what it does; `tidegate schema` and `docs/configuration.md` are made
from them. Unknown keys are errors that name file, line and column.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from policies.siteschema import NAME, Name, SiteName, SiteSection
from policies.units import BadValueError, Duration, Size
from policies.yamlfile import FileModel, FileProblems, Problem, read_yaml
from proxy import prices
from proxy.config_sections import HealthConfig, HedgingConfig, LimitsConfig, Probing, Retries, Timeouts
from proxy.config_values import (
    Address,
    DecimalText,
    FieldName,
    HostName,
    NetworkText,
    Url,
    Variable,
    Zone,
    is_nearby,
)
from proxy.masking import without_secrets
from proxy.scaling.sections import ScalingConfig, StandbySection

DEFAULT_CURRENCY = "USD"
DEFAULT_FILE = Path("tidegate.yaml")
"""What the commands read when they are told nothing else."""


class Price(FileModel):
    """Per million tokens, as decimals; money is counted exactly."""

    input: DecimalText = Field(description="Price of a million prompt tokens.")
    output: DecimalText = Field(description="Price of a million tokens of the answer.")
    cached_input: DecimalText | None = Field(
        None, description="Price of a million prompt tokens served from a prefix cache. Default: as `input`."
    )
    currency: str | None = Field(
        None,
        description="ISO code. Default: the `currency` at the top, else `USD`. All prices of one configuration "
        "share one currency.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_decimal_comma(cls, value: Any) -> Any:
        """In `{input: 1,20, output: 2}` YAML takes the 20 for a key."""
        before: tuple[str, Any] = ("", None)
        for key, given in value.items() if isinstance(value, dict) else ():
            if key.isascii() and key.isdigit() and given is None:
                meant = f"{before[0]}: {before[1]}.{key}" if type(before[1]) is int else None
                raise BadValueError("decimals stand behind a point, not a comma", meant, at=(key,))
            before = key, given
        return value

    @model_validator(mode="after")
    def _check(self) -> Price:
        currency = DEFAULT_CURRENCY if self.currency is None else self.currency
        try:
            prices.Price.parse(self.input, self.output, currency, self.cached_input)
        except ValueError as error:
            name, _, message = str(error).partition(": ")
            written = getattr(self, name)
            meant = written.replace(",", ".") if re.fullmatch("[0-9]+,[0-9]+", written) else None
            raise BadValueError(message, meant, at=(name,)) from None
        return self


class Tls(FileModel):
    """How a backend's certificate is checked."""

    ca_file: Path | None = Field(
        None, description="PEM file of the authorities to trust. Default: the system's."
    )
    server_name: str | None = Field(
        None, description="Name the certificate must carry. Default: the URL's host."
    )
    certificate: Path | None = Field(
        None, description="Client certificate chain (PEM), for backends that ask."
    )
    key: Path | None = Field(None, description="Private key of the client certificate (PEM).")


class CertificateConfig(FileModel):
    """One certificate for clients."""

    certificate: Path = Field(description="Certificate chain (PEM), the host's own first.")
    key: Path = Field(description="Its private key (PEM), without a password.")
    names: list[HostName] = Field(
        default_factory=list,
        description="Names that it is shown for; `*.example.com` stands for one label. Default: those that it "
        "carries.",
    )


class BackendConfig(FileModel):
    """One OpenAI-compatible endpoint."""

    name: Name = Field(description="How files, headers, logs and metrics call it.")
    url: Url = Field(
        description="Where it answers, without `/v1`: `http://127.0.0.1:8000`, or `unix:/run/vllm.sock`."
    )
    site: SiteName = Field(
        "local",
        description="Where it stands: `local`, or a name from `sites`. Public addresses must say it.",
    )
    slots: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Requests it serves at once inside its SLA. `auto`: what its profile says, else what the "
        "engine reports, else 32.",
    )
    adaptive: bool = Field(
        False, description="Take fewer than `slots` while its times to the first token say that it queues."
    )
    profile: Path | None = Field(
        None, description="What was measured of it: a file of `tidegate bench --profile`."
    )
    weight: float = Field(1.0, ge=0, description="Share of traffic for the policies that use weights.")
    models: Literal["auto"] | Annotated[list[str], Field(min_length=1)] = Field(
        "auto", description="Models it serves: `auto` asks it, a list limits it to those."
    )
    engine: Literal["vllm", "openai"] = Field(
        "vllm",
        description="What it understands: `vllm` (running usage, cache salt) or `openai` (the plain API).",
    )
    api_key_env: Variable | None = Field(
        None, description="Environment variable with the key that this backend wants."
    )
    api_key_file: Path | None = Field(
        None, description="File with that key, when it is not in the environment."
    )
    price: Price | None = Field(
        None, description="What its tokens cost. Without one, usage counts as unpriced."
    )
    prices: dict[str, Price] = Field(
        default_factory=dict, description="Prices of single models, by model name."
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Marks that policy rules match on.")
    bandwidth: Size | None = Field(
        None, gt=0, description="Bytes per second towards it, for `shortest-path`. Default: 125 MB."
    )
    tls: Tls = Field(default_factory=Tls, description="For https backends.")
    standby: StandbySection | None = Field(
        None, description="It need not run: how it is started when traffic needs it, and stopped."
    )

    @model_validator(mode="after")
    def _check(self) -> BackendConfig:
        if self.standby is not None and self.models == "auto":
            raise BadValueError(
                f"'{self.name}' cannot be asked for its models before it runs: list them here", at=("models",)
            )
        if self.api_key_env is not None and self.api_key_file is not None:
            raise BadValueError("give api_key_env or api_key_file, not both", at=("api_key_file",))
        if (self.tls.certificate is None) != (self.tls.key is None):
            raise BadValueError("a client certificate needs both certificate and key", at=("tls",))
        return self


class HostConfig(FileModel):
    """Exporters that tell how a site's machine is."""

    dcgm: Url | None = Field(
        None, description="NVIDIA's DCGM exporter, without `/metrics`: `http://10.0.0.5:9400`."
    )
    node: Url | None = Field(
        None, description="Prometheus' node exporter, without `/metrics`: `http://10.0.0.5:9100`."
    )


class SiteConfig(SiteSection):
    """A place where backends stand."""

    host: HostConfig = Field(default_factory=HostConfig, description="Where its machine tells how it is.")


class Config(FileModel):
    """The configuration file."""

    listen: Address = Field("127.0.0.1:8080", description="Where the OpenAI API is served.")
    admin: Address = Field(
        "127.0.0.1:8081", description="Where health, metrics and state are served. Keep it inside."
    )
    tls: list[CertificateConfig] = Field(
        default_factory=list,
        description="Certificates for clients: with one or more, `listen` speaks HTTPS only.",
    )
    admin_tls: bool = Field(False, description="Speak HTTPS on `admin` too, with the same certificates.")
    proxy_protocol: list[NetworkText] = Field(
        default_factory=list,
        description="Networks of load balancers that begin each connection with a PROXY header (version 1 or 2).",
    )
    trusted_proxies: list[NetworkText] = Field(
        default_factory=list,
        description="Networks of proxies in front whose word on the client's address is taken.",
    )
    forwarded_field: Literal["x-forwarded-for", "forwarded"] = Field(
        "x-forwarded-for", description="The header field in which they say it. The other one is never read."
    )
    state: Path = Field(Path("tidegate-data"), description="Directory of journal, ledger and keys.")
    database: str | None = Field(
        None, description="URL of the ledger: `postgresql://…`. Default: an SQLite file in `state`."
    )
    policy: str = Field("local-first", description="A policy of the library, or a policy file.")
    backends: list[BackendConfig] = Field(
        description="The endpoints to serve from: one or more, unless `scaling.scheduler` places them."
    )
    sites: dict[SiteName, SiteConfig] = Field(
        default_factory=dict, description="The places backends stand at."
    )
    aliases: dict[str, str] = Field(
        default_factory=dict, description="Further names of models: `gpt-4: qwen3-32b`."
    )
    currency: str | None = Field(None, description="Currency of the ledger. Default: that of the prices.")
    budget_zone: Zone = Field(
        "UTC", description="Time zone by whose calendar months budgets run: `Asia/Shanghai`."
    )
    durability: Literal["normal", "strict"] = Field(
        "normal",
        description="`strict` sends nothing to a backend before the journal has reached the disk.",
    )
    log: str = Field("-", description="Request log: `-` is standard output, `off`, or a file.")
    forward_headers: list[FieldName] = Field(
        default_factory=list,
        description="Client header fields that go on to backends besides accept, content-type, user-agent, "
        "traceparent and tracestate.",
    )
    media_urls: bool = Field(
        False, description="Let engines fetch the URLs of images and the like. A way into their network."
    )
    resolve: Duration = Field(5.0, ge=1, description="How often the names of backends are looked up again.")
    recent: int = Field(1000, ge=0, description="Decision records kept in memory for `tidegate explain`.")
    seed: int | None = Field(None, description="Seed of random policies. Default: a new one at every start.")
    timeouts: Timeouts = Field(default_factory=Timeouts, description="Deadlines.")
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="Sizes and counts.")
    retries: Retries = Field(default_factory=Retries, description="Attempts on other backends.")
    hedging: HedgingConfig = Field(
        default_factory=HedgingConfig, description="Second attempts for late first tokens."
    )
    probing: Probing = Field(default_factory=Probing, description="Health checks and engine figures.")
    health: HealthConfig = Field(
        default_factory=HealthConfig, description="Coming back slowly, and how many are out at most."
    )
    scaling: ScalingConfig = Field(
        default_factory=ScalingConfig, description="When standbys start and stop, and within which money."
    )

    @model_validator(mode="after")
    def _check(self) -> Config:
        if not self.backends and self.scaling.scheduler is None:
            raise BadValueError("needs at least 1 entry", at=("backends",))
        seen: set[str] = set()
        for number, backend in enumerate(self.backends):
            if backend.name in seen:
                raise BadValueError(
                    f"two backends are called '{backend.name}'", at=("backends", number, "name")
                )
            seen.add(backend.name)
            if backend.standby is not None and not self.probing.enabled:
                raise BadValueError(
                    "without probes nobody sees a standby answer: leave `probing.enabled` out",
                    at=("backends", number, "standby"),
                )
            if backend.standby is not None and backend.standby.scheduler and self.scaling.scheduler is None:
                raise BadValueError(
                    "a placement of which platform? Give `scaling.scheduler` too",
                    at=("backends", number, "standby", "scheduler"),
                )
            if backend.models == "auto" and not self.probing.enabled:
                raise BadValueError(
                    f"without probes nobody asks backend '{backend.name}' for its models: list them here, "
                    "or leave `probing.enabled` out",
                    at=("backends", number, "models"),
                )
            host = urlsplit(backend.url).hostname or ""
            if "site" not in backend.model_fields_set and not is_nearby(host):
                # `local` may see every class of data: nobody becomes it by saying nothing.
                raise BadValueError(
                    f"backend '{backend.name}' is at {host}: say where that is (`site: NAME`, or `site: local`)",
                    at=("backends", number),
                )
        if self.admin == self.listen and not self.listen.endswith(":0"):
            raise BadValueError("`listen` and `admin` are the same address", at=("admin",))
        if self.admin_tls and not self.tls:
            raise BadValueError("HTTPS needs a certificate: give `tls` too", at=("admin_tls",))
        for alias, model in self.aliases.items():
            if model in self.aliases:
                raise BadValueError(f"'{model}' is itself an alias", at=("aliases", alias))
        if self.hedging.after != "off" and not self.retries.idempotent:
            raise BadValueError(
                "hedging sends a request twice, which `retries.idempotent: false` forbids: leave one out",
                at=("hedging", "after"),
            )
        self._check_currencies()
        return self

    def _check_currencies(self) -> None:
        ours = self.ledger_currency
        for at, price in self._prices():
            if price.currency is not None:
                at, other, why = (*at, "currency"), price.currency, ""
            else:
                other, why = self.currency or DEFAULT_CURRENCY, ", which a price without a currency is in"
            if other != ours:
                raise BadValueError(
                    f"one ledger has one currency: it is {ours}, and here {other}{why}", at=at
                )

    def _prices(self) -> Iterator[tuple[tuple[str | int, ...], Price]]:
        """Each with its path in the file."""
        for number, backend in enumerate(self.backends):
            if backend.price is not None:
                yield ("backends", number, "price"), backend.price
            for model, price in backend.prices.items():
                yield ("backends", number, "prices", model), price

    @property
    def ledger_currency(self) -> str:
        """The one currency of this configuration."""
        named = (price.currency for _, price in self._prices() if price.currency)
        return self.currency or next(named, DEFAULT_CURRENCY)


def load_config(path: Path) -> Config:
    """Read a configuration file. Raises FileProblems, or OSError when it cannot be read.

    Relative paths in it are relative to its folder.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FileProblems(str(path), [Problem(line, 1, "", "the file is not UTF-8 text")]) from None
    try:
        config = read_yaml(text, str(path), Config)
    except FileProblems as error:
        raise without_secrets(error) from None
    return _resolve(config, path.resolve().parent)


def _resolve(config: Config, base: Path) -> Config:
    """Make relative paths absolute."""
    backends = []
    for backend in config.backends:
        files = {name: base / value for name, value in backend.tls if isinstance(value, Path)}
        update: dict[str, Any] = {"tls": backend.tls.model_copy(update=files)}
        for name in ("api_key_file", "profile"):
            if (file := getattr(backend, name)) is not None:
                update[name] = base / file
        if (standby := backend.standby) is not None and standby.command is not None:
            update["standby"] = standby.model_copy(update={"command": standby.command.resolved(base)})
        if backend.standby is not None and (process := backend.standby.process) is not None:
            update["standby"] = backend.standby.model_copy(update={"process": process.resolved(base)})
        backends.append(backend.model_copy(update=update))
    changes: dict[str, Any] = {"state": base / config.state, "backends": backends}
    changes["tls"] = [
        section.model_copy(update={"certificate": base / section.certificate, "key": base / section.key})
        for section in config.tls
    ]
    if config.log not in ("-", "off"):
        changes["log"] = str(base / config.log)
    if config.scaling.images is not None:
        changes["scaling"] = config.scaling.model_copy(update={"images": base / config.scaling.images})
    if is_policy_file(config.policy):
        changes["policy"] = str(base / config.policy)
    return config.model_copy(update=changes)


def is_policy_file(policy: str) -> bool:
    """Whether `policy` is a file rather than a name of the library."""
    return policy.endswith((".yaml", ".yml")) or "/" in policy


def config_from_flags(local: list[str], remote: list[str], **settings: Any) -> Config:
    """`--local URL` and `--remote name=URL` as a configuration."""
    backends: list[dict[str, Any]] = []
    for number, url in enumerate(local, 1):
        name, given, rest = url.partition("=")
        named = bool(given) and NAME.fullmatch(name) is not None
        backends.append(
            {
                "name": name if named else ("local" if len(local) == 1 else f"local-{number}"),
                "url": rest if named else url,
                "site": "local",
            }
        )
    for text in remote:
        name, given, url = text.partition("=")
        if not given:
            raise BadValueError(f"--remote takes NAME=URL, got '{text[:80]}'")
        backends.append({"name": name, "url": url, "site": name})
    sites: dict[str, Any] = {backend["site"]: {} for backend in backends if backend["site"] != "local"}
    return Config.model_validate({"backends": backends, "sites": sites, **settings})


def override(config: Config, settings: dict[str, Any]) -> Config:
    """A configuration with some of its values replaced, checked. Raises pydantic's ValidationError."""
    checked = Config.model_validate({**config.model_dump(exclude_unset=True), **settings})
    return config.model_copy(update={name: getattr(checked, name) for name in settings})


def backend_key(backend: BackendConfig) -> str | None:
    """The key a backend wants, from environment or file. BadValueError when it is named but not there."""
    if backend.api_key_env is not None:
        value = os.environ.get(backend.api_key_env, "").strip()
        if not value:
            # A key that was pasted here is shown to nobody, and some look like names: `hf_...`.
            name = backend.api_key_env
            shown = name if name.isupper() else "the variable that api_key_env names"
            raise BadValueError(f"backend {backend.name}: {shown} is not set in the environment")
    elif backend.api_key_file is not None:
        try:
            value = backend.api_key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            reason = (error.strerror or "cannot be read").lower()
            raise BadValueError(f"backend {backend.name}: {backend.api_key_file}: {reason}") from None
        except UnicodeDecodeError:
            raise BadValueError(f"backend {backend.name}: {backend.api_key_file} is not UTF-8 text") from None
        if not value:
            raise BadValueError(f"backend {backend.name}: {backend.api_key_file} is empty")
    else:
        return None
    if not value.isascii() or not value.isprintable() or " " in value:
        raise BadValueError(f"backend {backend.name}: its key holds characters that cannot stand in a header")
    return value
