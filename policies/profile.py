"""Profiles: what one vLLM on certain cards is able to do, as a YAML file.

A profile is what calibration and measurement write, and what simulator, emulator, `tidegate plan` and
`slots: auto` read. Every figure in it says where it comes from; what is not known is left out and never
made up.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from policies.yamlfile import FileModel, read_yaml

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
    GIVEN = "given"
    """By whoever runs a command, on their word alone."""


class Source(FileModel):
    """Where figures come from, and whose they are."""

    origin: Origin
    text: Annotated[str, Field(min_length=1)]
    """In words: who measured or published what, when; or from what it was derived, and how."""


class Step(FileModel):
    """What a step of the engine takes, microseconds (`sim/engine.py`)."""

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


class Capacity(FileModel):
    """How many users at once are served within a service level: what `slots: auto` goes by."""

    users: Annotated[int, Field(ge=0)]
    """0: not even one."""
    prompt_tokens: Annotated[int, Field(ge=1)]
    output_tokens: Annotated[int, Field(ge=1)]
    tokens_per_s: Positive | None = None
    """Output tokens a second and user, at least; None, as in the next two: nothing is promised."""
    ttft_s: Positive | None = None
    """Mean TTFT, at most."""
    tpot_s: Positive | None = None
    """Mean TPOT, at most."""
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
    capacity: Capacity | None = None
    """None: nobody has looked."""


def read_profile(text: str, name: str) -> Profile:
    """A profile from the text of the file `name`. Raises FileProblems, which says what is wrong where."""
    return read_yaml(text, name, Profile)
