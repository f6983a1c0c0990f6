"""What a cluster file says of standbys and of scaling, in the words of the configuration."""

from __future__ import annotations

from math import inf
from typing import Annotated, Any

from pydantic import Field, model_validator

from policies.scaling import ScalingSettings
from policies.siteschema import SiteName
from policies.units import BadValueError, Duration, Fraction
from policies.yamlfile import FileModel


class StandbySection(FileModel):
    """How long a backend takes to start, and what it costs. Who starts it does not matter here."""

    process: Any = None
    sleep: Any = None
    command: Any = None
    webhook: Any = None
    scheduler: Any = None
    """Providers, as a configuration has them: ignored."""
    cost_per_hour: Annotated[float, Field(ge=0)] | None = None
    """While it runs. Default: unknown."""
    prepare: Annotated[Duration, Field(ge=0)] = 0.0
    """Until what must be there first is there, before anything is paid."""
    cold_start: Annotated[Duration, Field(gt=0)] = 180.0
    """From then to its first answer."""
    stop: Annotated[Duration, Field(ge=0)] = 10.0
    """From the order to stop until nothing is paid any more."""
    drain: Annotated[Duration, Field(ge=0)] = 300.0
    min_on: Annotated[Duration, Field(ge=0)] = 300.0
    min_off: Annotated[Duration, Field(ge=0)] = 60.0


class ObjectiveSection(FileModel):
    """What means are to keep."""

    ttft: Annotated[Duration, Field(gt=0)] | None = None
    tpot: Annotated[Duration, Field(gt=0)] | None = None


class ScalingSection(FileModel):
    """When standbys start and stop."""

    up: Annotated[Fraction, Field(gt=0)] = 0.8
    down: Annotated[Fraction, Field(ge=0)] = 0.4
    least_use: Annotated[Fraction, Field(ge=0, lt=1)] = 0.02
    settle: Annotated[Duration, Field(ge=0)] = 300.0
    most_at_once: Annotated[int, Field(ge=1)] = 1
    forecast: Annotated[Fraction, Field(ge=0, lt=1)] = 0.95
    """Of the forecast's errors that its margin covers; 0: nothing is forecast."""
    most: dict[SiteName, int] = Field(default_factory=dict)
    """Standbys of a site that may run at once."""
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)

    @model_validator(mode="after")
    def _check(self) -> ScalingSection:
        if self.down >= self.up:
            raise BadValueError("down must be below up", at=("down",))
        return self

    @property
    def settings(self) -> ScalingSettings:
        return ScalingSettings(
            up=self.up,
            down=self.down,
            least_use=self.least_use,
            settle_s=self.settle,
            most_at_once=self.most_at_once,
            quantile=self.forecast,
            most=dict(self.most),
            ttft_objective_s=self.objective.ttft or inf,
            tpot_objective_s=self.objective.tpot or inf,
        )
