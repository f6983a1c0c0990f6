"""What `tidegate leaderboard` and `tidegate tune` have in common: their cluster, their traffic, their errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.command_errors import error_text, fail

if TYPE_CHECKING:
    from sim.cluster_file import ClusterFile
    from sim.traffic import Traffic


@contextmanager
def readable_errors() -> Iterator[None]:
    """What a person can mend, without a traceback."""
    from policies.yamlfile import FileProblems

    try:
        yield
    except (OSError, FileProblems, ValueError, RuntimeError) as error:
        fail(error_text(error))


def cluster_and_traffic(
    cluster: Path,
    trace: Path,
    form: str | None,
    start: str,
    duration: str | None,
    loop: str,
    users: int | None,
    speeds: tuple[float, ...],
    seeds: int,
) -> tuple[ClusterFile, Traffic]:
    """What the options of `leaderboard` and `tune` mean. Raises what `readable_errors` knows."""
    from sim.cluster_file import read_cluster
    from sim.traffic import Loop, read_traffic

    if loop not in list(Loop):
        fail(f"--loop is {', '.join(Loop)}, not {loop!r}")
    if users is not None and loop == Loop.OPEN:
        fail("--users ask in a closed loop: leave --loop open out")
    if users is not None and speeds != (1.0,):
        fail("with --users the load is how many they are: leave --speed out")
    found = read_cluster(cluster)
    traffic = read_traffic(trace, form, _seconds("--start", start), _seconds("--duration", duration))
    return found, replace(
        traffic,
        resamples=seeds > 1,
        loop=Loop.CLOSED if users is not None else Loop(loop),
        users=users or 0,
        ttft_s=found.sla.ttft,
        tpot_s=found.sla.tpot,
    )


def _seconds(option: str, text: str | None) -> Any:
    from policies.units import BadValueError, parse_duration

    try:
        return None if text is None else parse_duration(text)
    except BadValueError as error:
        hint = f"; did you mean {error.suggestion}?" if error.suggestion else ""
        fail(f"{option}: {error.message}{hint}")
