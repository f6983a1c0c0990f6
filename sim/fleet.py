"""Fleets of emulated backends as a YAML file.

backends:
  - {port: 8001, profile: h20-qwen2.5-72b, models: [demo]}
  - {port: 8002, profile: mine.yaml, rtt_s: 0.03, faults: [{kind: die, seconds: 30}]}
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from policies.yamlfile import FileModel, read_yaml
from sim.faults import Fault
from sim.profile import load_profile

if TYPE_CHECKING:
    from sim.emulator import EmulatorSettings


class FleetBackend(FileModel):
    """One backend; what is left out is as for all."""

    port: Annotated[int, Field(ge=0, le=65535)]
    profile: str
    """A name, or a file beside this one."""
    models: Annotated[list[str], Field(min_length=1)] | None = None
    rtt_s: Annotated[float, Field(ge=0)] | None = None
    faults: list[Fault] | None = None


class Fleet(FileModel):
    """The file."""

    backends: Annotated[list[FleetBackend], Field(min_length=1)]


def read_fleet(path: Path, common: EmulatorSettings) -> list[EmulatorSettings]:
    """The backends of a file, each with `common` where it says nothing else.

    Raises FileProblems, which says what is wrong where, OSError and ValueError.
    """
    fleet = read_yaml(path.read_text(encoding="utf-8"), str(path), Fleet)
    return [
        replace(
            common,
            port=backend.port,
            profile=load_profile(_beside(path, backend.profile)),
            models=common.models if backend.models is None else tuple(backend.models),
            rtt_s=common.rtt_s if backend.rtt_s is None else backend.rtt_s,
            faults=common.faults if backend.faults is None else tuple(backend.faults),
        )
        for backend in fleet.backends
    ]


def _beside(path: Path, profile: str) -> str | Path:
    return path.parent / profile if profile.endswith((".yaml", ".yml")) else profile
