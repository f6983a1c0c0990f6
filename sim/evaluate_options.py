"""What `tidegate leaderboard`, `tune` and `simulate` have in common: cluster, traffic, policies, errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sim.command_errors import error_text, fail

if TYPE_CHECKING:
    from policies.files import KnownNames
    from sim.cluster_file import ClusterFile
    from sim.evaluate import PolicyText
    from sim.traffic import Traffic


@contextmanager
def readable_errors() -> Iterator[None]:
    """What a person can mend, without a traceback."""
    from policies.yamlfile import FileProblems

    try:
        yield
    except typer.Exit:
        raise  # what is wrong has been said; it is a RuntimeError, too
    except (OSError, FileProblems, ValueError, RuntimeError) as error:
        fail(error_text(error))


def policies_of(asked: list[str]) -> list[PolicyText]:
    """Those that `--policy` names. Raises OSError and ValueError."""
    from sim.evaluate import named_policy

    if twice := next((name for name in asked if asked.count(name) > 1), None):
        fail(f"--policy {twice} is given twice")
    return [named_policy(name) for name in asked]


def show_warnings(policies: Iterable[PolicyText], known: KnownNames) -> None:
    """Compile each once, and say what of it means nothing on these backends. Raises FileProblems."""
    from policies.files import read_policy

    for policy in policies:
        for warning in read_policy(policy.text, policy.name, known).warnings:
            typer.echo(f"{policy.name}:{warning.line}:{warning.column}: {warning.message}", err=True)


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
    from policies.units import BadValueError, typed_duration

    try:
        return None if text is None else typed_duration(text)
    except BadValueError as error:
        hint = f"; did you mean {error.suggestion}?" if error.suggestion else ""
        fail(f"{option}: {error.message}{hint}")
