"""Names and sites, as the configuration and the simulator's cluster file both have them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from policies.fileschema import DATA_CLASS
from policies.match import LOCAL, REMOTE
from policies.units import BadValueError
from policies.yamlfile import FileModel

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _check_name(value: str) -> str:
    if NAME.fullmatch(value) is None:
        raise BadValueError(f"a name is made of letters, digits, '.', '_' and '-', got '{value[:40]}'")
    return value


def _check_site(value: str) -> str:
    if value == REMOTE:
        raise BadValueError(
            "in policy files 'remote' means every site but `local`: call this one something else"
        )
    return _check_name(value)


def _check_data_class(value: str) -> str:
    if DATA_CLASS.fullmatch(value) is None:
        meant = value.lower() if DATA_CLASS.fullmatch(value.lower()) else None
        raise BadValueError(
            f"no key can have data class '{value[:40]}': it is a word of small letters, digits, '_' and '-'",
            meant,
        )
    return value


Name = Annotated[str, AfterValidator(_check_name)]
SiteName = Annotated[str, AfterValidator(_check_site)]
DataClass = Annotated[str, AfterValidator(_check_data_class)]


class SiteSection(FileModel):
    """A place where backends stand."""

    operator: str = Field(
        "", description="Who runs it: residency asks who controls a machine, not only where."
    )
    location: tuple[float, float] | None = Field(None, description="Latitude and longitude, degrees.")
    carbon_gco2_kwh: float | None = Field(
        None, ge=0, description="Carbon intensity of its power, gCO2 per kWh."
    )
    data_classes: list[DataClass] | None = Field(
        None,
        description="Data classes it may see. Default: `[public]`; the site `local` may see all.",
    )
    labels: dict[str, str] = Field(default_factory=dict, description="Marks of every backend there.")

    @model_validator(mode="after")
    def _check(self) -> SiteSection:
        if self.location is not None:
            latitude, longitude = self.location
            if not (-90 <= latitude <= 90 and -180 <= longitude <= 180):
                raise BadValueError(
                    "latitude lies between -90 and 90, longitude between -180 and 180", at=("location",)
                )
        return self

    def accepts(self, site: str) -> frozenset[str] | None:
        """Data classes that backends at this site, which has this name, may see; None: all."""
        if self.data_classes is not None:
            return frozenset(self.data_classes)
        return None if site == LOCAL else frozenset({"public"})
