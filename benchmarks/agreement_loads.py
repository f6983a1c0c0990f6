"""The loads of `benchmarks.agreement`: which requests meet which fleet, and what the simulator makes of it.

The proxy's own times (queue waits, probes, averages, sweeps) are seconds of the wall and can't be sped up. So at
speed s the simulator plays the fleet that the proxy then has before it: engines, round trips and arrivals s times
as fast, everything else as it is. Only what comes out is turned back into emulated time. Both sides then show a
proxy whose figures of engines are s times as old as they would be: TTFT under load grows with s, and scatters more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from benchmarks.open_loop import LEAST_PROMPT, MODEL
from policies.profile import Profile
from policies.units import Duration
from policies.yamlfile import FileModel, read_yaml
from sim.profile import load_profile, with_max_model_len
from sim.workload import Arrival, Workload

if TYPE_CHECKING:
    from policies.rules import RuleSet
    from policies.state import Backend
    from sim.engine import EngineSettings

SEED = 1
"""Of random policies, on both sides."""


class FleetMember(FileModel):
    """One backend."""

    name: str
    site: str = "local"
    profile: str
    """A name, or a file (`.yaml`) beside the one that says so."""
    slots: Annotated[int, Field(ge=1)]
    rtt: Annotated[Duration, Field(ge=0)] = 0.0
    """Network round trip, emulated time."""
    context: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt plus answer, tokens. Default: as its profile says."""
    prefix_cache: bool | None = None
    """Whether its engine has one. Default: as its profile says."""

    def load(self) -> Profile:
        """Its profile, with what is said here in place of what it says. Raises FileProblems and OSError."""
        profile = with_max_model_len(load_profile(self.profile), self.context)
        if self.prefix_cache is None:
            return profile
        limits = profile.limits.model_copy(update={"prefix_cache": self.prefix_cache})
        return profile.model_copy(update={"limits": limits})


class Load(FileModel):
    """One comparison."""

    name: str
    requests: Annotated[int, Field(ge=1)]
    """So many, from the beginning of the trace."""
    rate: Annotated[float, Field(gt=0)]
    """Requests in an emulated second: the trace is played as much faster or slower."""
    policy: str
    """A name from the library, a file (`.yaml`) beside the one that says so, or the text of one."""
    backends: Annotated[list[FleetMember], Field(min_length=1)]
    metrics: bool = True
    """Whether the proxy reads the engines' figures (`probing.metrics`). Without, little is left to chance."""


class Loads(FileModel):
    """The file."""

    loads: Annotated[list[Load], Field(min_length=1)]


def read_loads(path: Path) -> list[Load]:
    """The loads of a file, with profiles and policies found. Raises FileProblems and OSError."""
    loads = read_yaml(path.read_text(encoding="utf-8"), str(path), Loads).loads
    return [
        load.model_copy(
            update={
                "policy": _beside(path, load.policy),
                "backends": [
                    member.model_copy(update={"profile": _beside(path, member.profile)})
                    for member in load.backends
                ],
            }
        )
        for load in loads
    ]


def _beside(path: Path, name: str) -> str:
    return str((path.parent / name).resolve()) if name.endswith((".yaml", ".yml")) else name


def policy_text(load: Load) -> str:
    """The policy as it stands in a file. Raises OSError and ValueError."""
    from policies.files import library_policy

    if "\n" in load.policy:
        return load.policy
    if load.policy.endswith((".yaml", ".yml")):
        return Path(load.policy).read_text(encoding="utf-8")
    return library_policy(load.policy)


def arrivals(load: Load, trace: Workload, speed: float) -> Workload:
    """The requests of a load, in time of the wall. Raises ValueError: the trace is too short.

    Left out are those that a backend would refuse for their length, and what prompts have in common; prompts that
    are shorter than an empty chat are lengthened to that.
    """
    longest = min(member.load().limits.max_model_len for member in load.backends)
    fitting = (one for one in trace if one.prompt_tokens + one.output_tokens <= longest)
    taken = list(islice(fitting, load.requests))
    if len(taken) < load.requests:
        raise ValueError(f"load {load.name} wants {load.requests} requests, {trace.name} has {len(taken)}")
    start = taken[0].at
    span = (taken[-1].at - start) / 1e6
    scale = (len(taken) - 1) / span / load.rate / speed if span else 0.0
    return Workload(trace.name, [_shaped(one, round((one.at - start) * scale)) for one in taken])


def _shaped(one: Arrival, at: int) -> Arrival:
    return Arrival(at, max(one.prompt_tokens, LEAST_PROMPT), one.output_tokens)


@dataclass
class Outcome:
    """What one side made of a load; times are emulated seconds."""

    ttft_s: list[float] = field(default_factory=list)
    """Of each complete answer, in order of arrival."""
    total_s: list[float] = field(default_factory=list)
    """From a request to the end of its answer."""
    decisions: Counter[str] = field(default_factory=Counter)
    """Complete answers by backend, and others by why there was none."""
    seconds: float = 0.0
    """On the wall, from the first request to the last end."""
    tpot_s: list[float] = field(default_factory=list)
    """Of each complete answer: mean time per token after the first, 0 for one of a single token."""


def simulate(load: Load, workload: Workload, speed: float, seed: int = 0) -> Outcome:
    """Play requests (`arrivals`) in the simulator. Raises OSError, ValueError and FileProblems.

    `seed`: of the times at which the proxy probes; those of a real one are drawn anew every time.
    """
    from policies.state import Backend
    from sim.cluster import Cluster
    from sim.members import Member
    from sim.router import End

    members = [
        Member(
            Backend(
                member.name,
                site=member.site,
                slots=member.slots,
                models=frozenset({MODEL}),
                context_tokens={MODEL: profile.limits.max_model_len},
            ),
            _faster(profile, speed, workload.unit_tokens),
            rtt=round(member.rtt * 1e6 / speed),
            overhead=round(profile.overhead_us / speed),
        )
        for member, profile in ((member, member.load()) for member in load.backends)
    ]
    rules = _rules(load, [member.backend for member in members])
    result = Cluster(members, rules, limited=True, metrics=load.metrics, seed=seed).run(workload)
    outcome = Outcome()
    for trip in result.trips:
        if trip.end is End.OK:
            assert trip.ttft_s is not None
            outcome.ttft_s.append(trip.ttft_s * speed)
            outcome.total_s.append(trip.total_s * speed)
            outcome.tpot_s.append((trip.tpot_s or 0.0) * speed)
            outcome.decisions[trip.backend] += 1
        else:
            outcome.decisions[trip.reason] += 1
    outcome.seconds = max(trip.ended for trip in result.trips) - result.trips[0].arrived
    return outcome


def _faster(profile: Profile, speed: float, unit_tokens: int) -> EngineSettings:
    """The engine that the emulator has for a profile, at a speed. `unit_tokens`: of the workload's hashes."""
    from sim.emulator import EmulatorSettings

    settings = EmulatorSettings(profile=profile).engine()
    cost = settings.cost
    fast = replace(
        cost,
        alpha=cost.alpha / speed,
        beta=cost.beta / speed,
        gamma=cost.gamma / speed,
        delta=cost.delta / speed,
    )
    return replace(settings, cost=fast, prefix_unit_tokens=unit_tokens if profile.limits.prefix_cache else 0)


def _rules(load: Load, backends: list[Backend]) -> RuleSet:
    from policies.files import KnownNames, read_policy

    known = KnownNames(backends, frozenset(backend.site for backend in backends))
    return read_policy(policy_text(load), load.name, known, SEED).rules
