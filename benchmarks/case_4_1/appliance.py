"""Fits the appliance to the paper's local times, and writes `appliance.yaml` beside this file.

    python -m benchmarks.case_4_1.appliance

Three figures of the engine are found so that the simulated means are the paper's, each from the time that
depends on it most: a step (alpha) from `LOW` users, a token of context (gamma) from 60, a prompt token (delta)
from 100, where prompts are computed again and again. Each by bisection, in turn, until they hold together; it
takes a minute or two.

Set beforehand: `KV_TOKENS`, room for 60 reports of 1,120 tokens, so that 60 fit as they are on the way and 100
do not; beta as in `sim/derive.py`; vLLM's defaults. "Over 300 s" is taken as 320.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from benchmarks.case_4_1.report import BLOCK_TOKENS
from benchmarks.case_4_1.simulated import local_only
from benchmarks.case_4_1.sites import APPLIANCE
from policies.profile import Limits, Origin, Profile, Source, Step
from sim.profile import dump_profile, engine_settings

LOW: Final = 3
TARGETS: Final = {LOW: 42.0, 60: 72.0, 100: 320.0}
"""Seconds a report, by users."""
KV_TOKENS: Final = 60 * 1120
REPORTS: Final = 4
SEEDS: Final = (1, 2)
SWEEPS: Final = 3
HALVINGS: Final = 10

SEARCHED: Final = (
    ("delta_us", 100, 300.0, 1500.0),
    ("gamma_us", 60, 0.02, 0.6),
    ("alpha_us", LOW, 40_000.0, 60_000.0),
)
"""(figure, users whose time it is found from, bounds)."""


def appliance_with(alpha_us: float, gamma_us: float, delta_us: float) -> Profile:
    """The profile with these three."""
    fitted = "fitted in the simulator to 42 s a report at low load, 72 s with 60 at once and 320 s with 100"
    paper = "white paper, case 4.1 (2025), local only; benchmarks/case_4_1/appliance.py"
    return Profile(
        name="appliance-4-1",
        card="appliance",
        model="report-writer",
        step=Step(
            alpha_us=round(alpha_us, 1),
            beta_us=45.0,
            gamma_us=round(gamma_us, 4),
            delta_us=round(delta_us, 1),
            source=Source(origin=Origin.DERIVED, text=f"{fitted}: {paper}"),
        ),
        limits=Limits(
            kv_tokens=KV_TOKENS,
            max_model_len=5000,
            source=Source(
                origin=Origin.DERIVED,
                text="KV cache: set to 60 reports of 1,120 tokens, so that 60 fit and 100 do not; vLLM's defaults",
            ),
        ),
    )


def fit(progress: Callable[[], None] = lambda: None) -> Profile:
    """`progress` hears of each of the `SWEEPS * len(SEARCHED) * HALVINGS` steps."""
    found = {name: (low + high) / 2 for name, _, low, high in SEARCHED}
    for _ in range(SWEEPS):
        for name, users, low, high in SEARCHED:
            for _ in range(HALVINGS):
                found[name] = (low + high) / 2
                if mean_s(appliance_with(**found), users) < TARGETS[users]:
                    low = found[name]
                else:
                    high = found[name]
                progress()
    return appliance_with(**found)


def mean_s(profile: Profile, users: int) -> float:
    """Seconds a report takes at the appliance alone, over the seeds."""
    engine = engine_settings(profile, BLOCK_TOKENS)
    return sum(local_only(engine, users, REPORTS, seed).mean_s for seed in SEEDS) / len(SEEDS)


def main() -> None:
    """The command."""
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("fitting", total=SWEEPS * len(SEARCHED) * HALVINGS)
        profile = fit(lambda: bar.advance(task))
    APPLIANCE.write_text(dump_profile(profile), encoding="utf-8")
    for users, target in TARGETS.items():
        print(f"{users:3} users: {mean_s(profile, users):.1f} s a report, wanted {target:.0f}")


if __name__ == "__main__":
    main()
