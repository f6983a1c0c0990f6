from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.case_4_1 import simulated
from benchmarks.case_4_1.__main__ import main
from benchmarks.case_4_1.appliance import TARGETS, appliance_with
from benchmarks.case_4_1.client import RunError, run
from benchmarks.case_4_1.figures import Figures, figures_of
from benchmarks.case_4_1.measured import MOST_SPEED, TOKENS_PER_S, configuration, speed_for
from benchmarks.case_4_1.plot import plot
from benchmarks.case_4_1.report import OUTPUT_TOKENS, PROMPT_TOKENS, SECTIONS, reports, workload
from benchmarks.case_4_1.simulated import appliance, local_only, never_full, with_tidegate
from benchmarks.case_4_1.sites import LOCAL, MODEL, REMOTE
from policies.rules import RuleSet
from proxy.config import Config
from proxy.config_sections import Probing
from sim.cluster import Cluster
from sim.emulator import EmulatorSettings, emulator
from sim.members import Member
from sim.tokens import chat_pieces
from tests.pages import ROOT


def test_a_report_is_a_conversation_that_has_the_tokens_it_says() -> None:
    for report in reports(user=59, count=3, seed=1):
        messages: list[tuple[str, str]] = []
        assert len(report.sections) == SECTIONS
        for section in report.sections:
            messages.append(("user", section.text))
            assert len(chat_pieces(messages)) == section.prompt_tokens
            messages.append(("assistant", " tide" * section.output_tokens))


def test_the_prompts_of_a_report_are_as_long_as_is_said() -> None:
    assert PROMPT_TOKENS == (320 + 1070) * SECTIONS / 2
    many = [report for user in range(1000) for report in reports(user, 4, seed=1)]
    prompts = [sum(section.prompt_tokens for section in report.sections) for report in many]
    assert abs(fmean(prompts) - PROMPT_TOKENS) < 5 * stdev(prompts) / len(prompts) ** 0.5
    said = f"{PROMPT_TOKENS:,} prompt tokens in all, {OUTPUT_TOKENS} of output"
    assert said in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_no_two_reports_begin_alike() -> None:
    many = [report for user in range(100) for report in reports(user, 4, seed=1)]
    beginnings = {report.sections[0].text[:6] for report in many}
    assert len(beginnings) == len(many)


def test_the_seed_makes_the_reports() -> None:
    assert reports(3, 2, seed=1) == reports(3, 2, seed=1)
    assert reports(3, 2, seed=1) != reports(3, 2, seed=2)


def test_prompts_of_a_report_share_what_was_before_and_those_of_two_share_nothing() -> None:
    arrivals = workload(users=2, count=2, seed=1).arrivals
    turns = [arrival for arrival in arrivals if arrival.session == "user-1"]
    first, second, *_ = turns
    assert second.hashes[: len(first.hashes)] == first.hashes
    assert second.prompt_tokens > first.prompt_tokens + first.output_tokens
    assert not set(turns[SECTIONS - 1].hashes) & set(turns[SECTIONS].hashes)


def test_figures_of_a_run() -> None:
    requests = [("appliance", 100, 80), ("appliance", 300, 200), ("nanjing", 100, 0), ("suzhou", 100, 0)]
    figures = figures_of(2, [10.0, 30.0], requests, preemptions=1)
    assert figures == Figures(2, 2, 20.0, 29.0, 0.5, 0.7, 0.5)


@pytest.mark.parametrize("users", sorted(TARGETS))
def test_the_appliance_alone_takes_what_the_paper_says(users: int) -> None:
    mean_s = local_only(appliance(), users, 4, seed=3).mean_s
    assert mean_s == pytest.approx(TARGETS[users], rel=0.05)
    assert users < 100 or mean_s > 300


def test_the_profile_is_what_the_fit_writes() -> None:
    profile = LOCAL.load()
    step = profile.step
    assert appliance_with(step.alpha_us, step.gamma_us, step.delta_us) == profile


def test_it_breaks_down_because_the_cache_is_full() -> None:
    broken, whole = (local_only(engine, 100, 2, 1) for engine in (appliance(), never_full(appliance())))
    assert broken.cached < 0.4 < 0.85 < whole.cached
    assert broken.preemptions > 0 == whole.preemptions
    assert broken.mean_s > 2.5 * whole.mean_s


@pytest.mark.parametrize(("users", "promised_s"), [(60, 45.0), (100, 50.0)])
def test_remote_sites_make_it_as_fast_as_promised(users: int, promised_s: float) -> None:
    figures = with_tidegate(users, 4, seed=4)
    assert figures.mean_s <= promised_s
    assert 0.5 < figures.away < 0.95


def test_a_run_is_as_fast_as_the_tokens_allow() -> None:
    speed = speed_for(100, 50.0)
    assert 100 * OUTPUT_TOKENS / (50.0 / speed) == pytest.approx(TOKENS_PER_S)
    assert speed_for(1, 42.0) == MOST_SPEED


def test_the_proxy_takes_the_configuration(tmp_path: Path) -> None:
    urls = {site.name: f"http://127.0.0.1:{port}" for port, site in enumerate((LOCAL, *REMOTE), 9001)}
    config = Config.model_validate(configuration(urls, (9100, 9101), speed=4.0, seed=1))
    assert config.timeouts.first_token == 30.0
    assert [backend.slots for backend in config.backends] == [20, 149, 160]
    assert config.probing == Probing()


def test_the_simulated_proxy_probes_as_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def cluster(members: list[Member], rules: RuleSet, **options: Any) -> Cluster:
        given.extend(options)
        return Cluster(members, rules, **options)

    monkeypatch.setattr(simulated, "Cluster", cluster)
    with_tidegate(2, 1, seed=1)
    assert given == ["seed"]


async def test_users_find_in_the_cache_what_their_reports_wrote() -> None:
    profile = LOCAL.load()
    settings = EmulatorSettings(
        models=(MODEL,), profile=profile, speed=2000, prompt_tokens_details=True, shutdown_timeout_s=0.1
    )
    done: list[None] = []
    async with emulator(settings) as server:
        seen = await run(server.url, 2, 1, 1, 2000, lambda: done.append(None))
    assert len(seen.report_s) == len(done) == 2
    assert len(seen.requests) == 2 * SECTIONS
    simulated = local_only(appliance(), 2, 1, 1)
    assert figures_of(2, seen.report_s, seen.requests, 0).cached == pytest.approx(simulated.cached, abs=0.01)


async def test_a_request_that_is_refused_ends_the_run() -> None:
    async with emulator(EmulatorSettings(models=("another",), speed=100)) as server:
        with pytest.raises(RunError, match="status 404"):
            await run(server.url, 1, 1, 1, 100)


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="NOT RUN: needs the extra `plot`")
    curve = [Figures(users, 4, 40.0 + users, 50.0 + users, 0.0, 0.9, 0.1) for users in (1, 60, 100)]
    path = tmp_path / "case.png"
    plot({"local only": curve, "never-full cache": curve, "Tidegate": curve}, {"Tidegate": curve}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.e2e
@pytest.mark.slow
def test_the_command_runs() -> None:
    app = Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["--quick", "--seeds", "1"])
    assert done.exit_code == 0, done.output
    assert "Tidegate, 8 users, seed 1" in done.output
