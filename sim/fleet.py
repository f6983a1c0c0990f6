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

from policies.yamlfile import FileModel, parse_yaml
from sim.faults import Fault
from sim.profile import load_profile, with_max_model_len

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


def read_fleet(
    path: Path, common: EmulatorSettings, max_model_len: int | None = None
) -> list[EmulatorSettings]:
    """The backends of a file, each with `common` where it says nothing else.

    `max_model_len` replaces that of every profile. Raises FileProblems, which says what is wrong where, and
    OSError.
    """
    document = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    fleet = document.validate(Fleet)
    problems = []
    taken: dict[int, int] = {}
    for index, backend in enumerate(fleet.backends):
        first = taken.setdefault(backend.port, index)
        if backend.port and first != index:
            message = f"port {backend.port} is that of backends[{first}] already; 0 takes a free one"
            problems.append(document.problem(("backends", index, "port"), message))
    many = []
    for index, backend in enumerate(fleet.backends):
        profile = with_max_model_len(load_profile(_beside(path, backend.profile)), max_model_len)
        try:
            many.append(
                replace(
                    common,
                    port=backend.port,
                    profile=profile,
                    models=common.models if backend.models is None else tuple(backend.models),
                    rtt_s=common.rtt_s if backend.rtt_s is None else backend.rtt_s,
                    faults=common.faults if backend.faults is None else tuple(backend.faults),
                )
            )
        except ValueError as error:
            problems.append(document.problem(("backends", index), str(error)))
    if problems:
        raise document.failed(problems)
    return many


def _beside(path: Path, profile: str) -> str | Path:
    return path.parent / profile if profile.endswith((".yaml", ".yml")) else profile
