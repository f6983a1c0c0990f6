"""Profiles: what one vLLM on certain cards is able to do, as a YAML file.

A profile is what calibration and measurement write, and what simulator, emulator and `tidegate plan` read.
Every figure in it says where it comes from; what is not known is left out and never made up.
"""

from __future__ import annotations

from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field

from policies.yamlfile import FileModel, read_yaml
from sim.engine import EngineSettings, StepCost

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Origin(StrEnum):
    """Where a figure comes from."""

    MEASURED = "measured"
    """On these cards with this model."""
    PUBLISHED = "published"
    """By others, who are named."""
    DERIVED = "derived"
    """Computed from other figures, in a way that is named."""


class Source(FileModel):
    """Where figures come from, and whose they are."""

    origin: Origin
    text: Annotated[str, Field(min_length=1)]
    """In words: who measured or published what, when; or from what it was derived, and how."""


class Step(FileModel):
    """What a step of the engine takes: `sim.engine.StepCost`, in microseconds."""

    alpha_us: Positive
    """A step, whatever is in it."""
    beta_us: NotNegative
    """Each decoding sequence."""
    gamma_us: NotNegative
    """Each token in the context of a decoding sequence."""
    delta_us: NotNegative
    """Each prompt token computed."""
    source: Source


class Limits(FileModel):
    """How the engine is set up, in vLLM's words."""

    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 2048
    max_num_seqs: Annotated[int, Field(ge=1)] = 256
    kv_tokens: Annotated[int, Field(ge=16)] | None = None
    """Tokens that its KV cache holds (vLLM logs it at start); left out: never full."""
    max_model_len: Annotated[int, Field(ge=1)] = 8192
    """Longest prompt plus answer, tokens."""
    prefix_cache: bool = True
    source: Source


class Price(FileModel):
    """What the cards of this profile cost while they run."""

    per_hour: NotNegative
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "USD"
    source: Source


class Power(FileModel):
    """What the cards of this profile draw under load."""

    watts: NotNegative
    source: Source


class Profile(FileModel):
    """One model on a number of cards of one kind, served by one vLLM."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    card: str
    """`H20`, `L40` ..., or what stands for it: `cpu`."""
    cards: Annotated[int, Field(ge=1)] = 1
    model: str
    precision: str = ""
    overhead_us: NotNegative = 0.0
    """From the arrival of a request at the server to its place in the engine's queue, and back,
    microseconds: HTTP and tokenising."""
    step: Step
    limits: Limits
    price: Price | None = None
    """None: unknown, which is not free."""
    power: Power | None = None

    def engine(self, prefix_unit_tokens: int = 0) -> EngineSettings:
        """The engine that it describes. `prefix_unit_tokens`: of the hashes in the workload, 0 for none."""
        step, limits = self.step, self.limits
        return EngineSettings(
            cost=StepCost(step.alpha_us, step.beta_us, step.gamma_us, step.delta_us),
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
            kv_tokens=limits.kv_tokens,
            prefix_unit_tokens=prefix_unit_tokens if limits.prefix_cache else 0,
        )


def load_profile(name: str | Path) -> Profile:
    """A profile by its name in `sim/profiles/`, or a file by its path.

    Raises FileProblems, which says what is wrong where, and OSError; FileNotFoundError lists the names
    there are.
    """
    text = str(name)
    if isinstance(name, Path) or text.endswith((".yaml", ".yml")):
        return read_yaml(Path(name).read_text(encoding="utf-8"), text, Profile)
    file = resources.files("sim").joinpath("profiles", f"{text}.yaml")
    if not file.is_file():
        known = ", ".join(profile_names())
        raise FileNotFoundError(f"no profile is named {text!r}; there are {known}; a path ends in .yaml")
    return read_yaml(file.read_text(encoding="utf-8"), f"{text}.yaml", Profile)


def profile_names() -> list[str]:
    """Names in `sim/profiles/`, sorted."""
    folder = resources.files("sim").joinpath("profiles")
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def dump_profile(profile: Profile) -> str:
    """The profile as a YAML file, its keys in the order of this module; `load_profile` reads it back."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 110
    out = StringIO()
    yaml.dump(profile.model_dump(mode="json", exclude_none=True), out)
    return out.getvalue()
