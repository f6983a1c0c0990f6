"""Clusters to simulate as a YAML file, in the words of the configuration where it has them.

model: qwen3-32b
sla: {ttft: 2s, tpot: 100ms}
backends:
  - {name: appliance, profile: l40-2-32b}
  - {name: nanjing, site: nanjing, profile: h20-4-32b, count: 2, rtt: 30ms, price: {input: 0.3, output: 1.2}}
sites:
  nanjing: {location: [32.06, 118.79], carbon_gco2_kwh: 520}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from policies.adaptive import AdaptiveSlots
from policies.files import KnownNames
from policies.match import LOCAL
from policies.profile import Profile
from policies.siteschema import NAME, Name, SiteName, SiteSection
from policies.state import Backend
from policies.units import BadValueError, Duration, Size
from policies.yamlfile import FileModel, FileProblems, Problem, parse_yaml
from policies.yamlproblems import closest
from sim.members import Member
from sim.profile import load_profile, profile_names, with_max_model_len
from sim.standby_file import ScalingSection, StandbySection

PricePerMillion = Annotated[float, Field(ge=0, le=1_000_000)]


CONFIGURATION = (
    "this is a configuration of the proxy; a cluster has `model`, `sla` and the profile of each backend, as "
    "examples/cluster.yaml. On the backends of a configuration, `tidegate simulate --trace` compares policies"
)
"""What is said of such a file, instead of each key that it has and lacks."""


class PriceSection(FileModel):
    """Per million tokens, as in the configuration."""

    input: PricePerMillion
    output: PricePerMillion
    cached_input: PricePerMillion | None = None
    """Of a prompt's tokens that the prefix cache has. Default: as `input`."""
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"


class BackendSection(FileModel):
    """One backend, or `count` of them that are alike."""

    name: Name
    """How policies call it; of several, `NAME-1`, `NAME-2` and so on."""
    profile: str
    """What its cards are able to do: a name of `sim/profiles/`, or a file beside this one."""
    site: SiteName = LOCAL
    """Where it stands: `local`, or a name from `sites`."""
    count: Annotated[int, Field(ge=1, le=1000)] = 1
    slots: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Requests that it serves at once inside its SLA. `auto`: as its profile says."""
    adaptive: bool = False
    """Take fewer of them while its times to the first token say that it queues."""
    rtt: Annotated[Duration, Field(le=60)] = 0.0
    """Network round trip from the router."""
    context: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt plus answer, tokens. Default: as its profile says."""
    prefix_cache: bool | None = None
    """Whether its engine has one. Default: as its profile says."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Share of traffic for the policies that use weights."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Marks that policy rules match on."""
    bandwidth: Annotated[Size, Field(gt=0)] | None = None
    """Bytes per second towards it, for `shortest-path`. Default: 125 MB."""
    price: PriceSection | None = None
    """What its tokens cost. Without it, its cost is unknown."""
    watts: Annotated[float, Field(ge=0)] | None = None
    """What its cards draw under load. Default: as its profile says."""
    standby: StandbySection | None = None
    """It runs only when it is started, where a simulation starts any; elsewhere it always runs."""


class Sla(FileModel):
    """What a request has to keep to count as goodput."""

    ttft: Annotated[Duration, Field(gt=0)]
    """Time from its arrival to its first token, at most."""
    tpot: Annotated[Duration, Field(gt=0)]
    """Mean time per token after the first, at most."""


class ClusterSection(FileModel):
    """The file."""

    model: Name
    """What all backends serve. Every request asks for it, whatever the trace says."""
    sla: Sla
    backends: Annotated[list[BackendSection], Field(min_length=1)]
    sites: dict[SiteName, SiteSection] = Field(default_factory=dict)
    """The places backends stand at, as in the configuration."""
    scaling: ScalingSection = Field(default_factory=ScalingSection)
    """When those with a `standby` section start and stop."""

    @model_validator(mode="after")
    def _fits_together(self) -> ClusterSection:
        names: set[str] = set()
        currency = ""
        for index, backend in enumerate(self.backends):
            at = ("backends", index)
            for name in _names(backend):
                if name in names:
                    raise BadValueError(f"two backends are called '{name}'", at=(*at, "name"))
                if NAME.fullmatch(name) is None:
                    raise BadValueError(f"'{name}' is longer than 64 letters", at=(*at, "name"))
                names.add(name)
            if backend.site != LOCAL and backend.site not in self.sites:
                raise BadValueError(
                    f"no site is called '{backend.site}': say where it is under `sites`, or `{backend.site}: {{}}`",
                    closest(backend.site, (LOCAL, *self.sites)),
                    at=(*at, "site"),
                )
            if backend.price is not None:
                currency = currency or backend.price.currency
                if backend.price.currency != currency:
                    raise BadValueError(
                        f"one cluster has one currency: it is {currency}, and here {backend.price.currency}",
                        at=(*at, "price"),
                    )
        return self


class Placed(NamedTuple):
    """One backend of a cluster, nothing left out."""

    name: str
    section: BackendSection
    site: SiteSection
    profile: Profile
    """With the context and the prefix cache that the file gives it."""
    slots: int

    @property
    def watts(self) -> float | None:
        """What it draws under load; None: unknown."""
        if self.section.watts is not None:
            return self.section.watts
        return None if self.profile.power is None else self.profile.power.watts

    def backend(self, model: str) -> Backend:
        """As the router sees it, nothing measured yet."""
        section, site = self.section, self.site
        return Backend(
            self.name,
            section.site,
            self.slots,
            section.weight,
            frozenset({model}),
            labels={**site.labels, **section.labels},
            operator=site.operator,
            location=site.location,
            data_classes=site.accepts(section.site),
            context_tokens={model: self.profile.limits.max_model_len},
            bandwidth=float(section.bandwidth or 125_000_000),
            price_input=None if section.price is None else section.price.input,
            price_output=None if section.price is None else section.price.output,
            carbon_gco2_kwh=site.carbon_gco2_kwh,
            adaptive=AdaptiveSlots.of(self.name) if section.adaptive else None,
        )


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """A cluster as its file describes it; makes the members of any number of simulations."""

    name: str
    model: str
    sla: Sla
    backends: tuple[Placed, ...]
    sites: frozenset[str]
    scaling: ScalingSection = field(default_factory=ScalingSection)

    @property
    def currency(self) -> str:
        """Of its prices; empty: there are none."""
        prices = (one.section.price for one in self.backends)
        return next((price.currency for price in prices if price is not None), "")

    @property
    def known(self) -> KnownNames:
        """What policy files may name."""
        return KnownNames([one.backend(self.model) for one in self.backends], self.sites)

    def members(self, unit_tokens: int) -> list[Member]:
        """New members, nothing in them. `unit_tokens`: of the workload's hashes.

        Raises ValueError for units that no KV block divides.
        """
        return [
            Member.of(one.backend(self.model), one.profile, one.section.rtt, unit_tokens)
            for one in self.backends
        ]


def read_cluster(path: Path) -> ClusterFile:
    """The cluster that a file describes. Raises FileProblems, which says what is wrong where, and OSError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise FileProblems(str(path), [Problem(line, 1, "", "the file is not UTF-8 text")]) from None
    document = parse_yaml(text, str(path))
    if "sla" not in document.value and (at := _url(document.value.get("backends"))):
        raise document.failed([document.problem(at, CONFIGURATION, at_key=True)])
    file = document.validate(ClusterSection)
    problems: list[Problem] = []
    placed: list[Placed] = []
    for index, section in enumerate(file.backends):
        try:
            profile = _profile(section, path.parent)
            slots = _slots(section, profile)
        except BadValueError as error:
            problems.append(document.problem(("backends", index, *error.at), error.message, error.suggestion))
            continue
        site = file.sites.get(section.site) or SiteSection()
        placed += [Placed(name, section, site, profile, slots) for name in _names(section)]
    if problems:
        raise document.failed(problems)
    return ClusterFile(
        path.stem, file.model, file.sla, tuple(placed), frozenset({LOCAL, *file.sites}), file.scaling
    )


def _url(backends: object) -> tuple[str | int, ...]:
    """Where the first backend says what its URL is; empty: none does."""
    if not isinstance(backends, list):
        return ()
    places = (place for place, one in enumerate(backends) if isinstance(one, dict) and "url" in one)
    return next((("backends", place, "url") for place in places), ())


def _names(section: BackendSection) -> Iterator[str]:
    if section.count == 1:
        yield section.name
    else:
        yield from (f"{section.name}-{number}" for number in range(1, section.count + 1))


def _profile(section: BackendSection, folder: Path) -> Profile:
    """The profile that a backend names, as the file changes it. Raises BadValueError and FileProblems."""
    name = section.profile
    is_file = name.endswith((".yaml", ".yml")) or "/" in name
    if not is_file and name not in profile_names():
        message = f"no profile is called '{name}': `tidegate plan` lists them, and a file ends in .yaml"
        raise BadValueError(message, closest(name, profile_names()), at=("profile",))
    try:
        profile = load_profile(folder / name if is_file else name)
    except FileNotFoundError:
        raise BadValueError(f"{folder / name}: no such file", at=("profile",)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadValueError(f"{folder / name} cannot be read ({error})", at=("profile",)) from None
    profile = with_max_model_len(profile, section.context)
    limits = profile.limits
    if limits.kv_tokens is not None and limits.max_model_len > limits.kv_tokens:
        raise BadValueError(
            f"a context of {limits.max_model_len} tokens does not fit into the {limits.kv_tokens} of its KV cache",
            str(limits.kv_tokens),
            at=("context",),
        )
    if section.prefix_cache is not None:
        limits = limits.model_copy(update={"prefix_cache": section.prefix_cache})
    return profile.model_copy(update={"limits": limits})


def _slots(section: BackendSection, profile: Profile) -> int:
    """Raises BadValueError."""
    if section.slots != "auto":
        return section.slots
    if profile.capacity is None or not profile.capacity.users:
        raise BadValueError(
            f"profile {profile.name} does not say how many users it serves within an SLA: give `slots` as a number",
            at=("slots",),
        )
    return profile.capacity.users
