"""The command: what it prints and writes, and how it fails."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from aiohttp import web
from typer.testing import CliRunner, Result

from sim.calibrate import Search
from sim.measure import command, connections, fit
from sim.measure.command import bench
from sim.measure.endpoint import Facts
from sim.measure.level import Level
from sim.measure.prompts import Prefix
from sim.measure.sweep import Plan, Report, Series
from sim.measure.wire import Api
from sim.profile import load_profile
from tests.sim.emulated import client
from tests.sim.measure.fake_server import DONE, record, serving, stream, token, usage

APP = typer.Typer()
APP.command()(bench)
SMALL = ("--prompt-tokens", "32", "--output-tokens", "5", "--requests", "4")


def run(*words: str) -> Result:
    return CliRunner().invoke(APP, [*words])


async def against(emulated: dict[str, object], *words: str) -> Result:
    """The command in a thread of its own, against an emulated vLLM."""
    async with client(**emulated) as http:
        return await asyncio.to_thread(run, http.server.url, *words)


async def test_a_sweep_is_shown_and_written(tmp_path: Path) -> None:
    json_file, profile = tmp_path / "out.json", tmp_path / "out.yaml"
    files = ("--json", str(json_file), "--profile", str(profile), "--card", "none")
    result = await against(
        {"speed": 5.0}, "--concurrency", "1,2,4", "--both", "--tokens-per-s", "1", *SMALL, *files
    )
    assert result.exit_code == 0, result.output
    assert "cold prefix, 32 prompt tokens, 5 output tokens" in result.stdout
    assert "warm prefix, 32 prompt tokens, 5 output tokens" in result.stdout
    assert "SLA, at least 1 tokens/s for each user: 4 users or more" in result.stdout
    assert "`slots: auto` takes 4 from it (4 or more: no level was too many)" in " ".join(
        result.stderr.split()
    )
    written = json.loads(json_file.read_text())
    assert [len(series["levels"]) for series in written["series"]] == [3, 3]
    for level in written["series"][0]["levels"]:
        assert len(level["requests"]) == level["completed"] == 4
        assert {request["output_tokens"] for request in level["requests"]} == {5}
    assert load_profile(profile).limits.kv_tokens == 8 * 8192
    assert load_profile(profile).card == "none"


async def test_a_key_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    words = ("--concurrency", "1", "--key", "very-secret", "--json", str(file), *SMALL)
    result = await against({"api_keys": ("very-secret",)}, *words)
    assert result.exit_code == 0, result.output
    assert "very-secret" not in file.read_text() + result.output


@pytest.mark.parametrize(("failing", "code"), [(2, 0), (1, 1)])
async def test_failures_are_shown(failing: int, code: int) -> None:
    """Every second request of the level fails, or every one."""
    asked = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        words = len((await request.json())["messages"][0]["content"].split())
        if words == 32:
            asked += 1
            if asked % failing == 0:
                return web.json_response({"error": {"message": "broken"}}, status=500)
        return await stream(request, token("a"), token("b"), usage(words, 5), DONE)

    async with serving(answer, v1__models={"data": [{"id": "m"}]}) as url:
        result = await asyncio.to_thread(run, url, "--concurrency", "1", *SMALL)
    assert result.exit_code == code, result.output
    assert f"{4 // failing} failed: status 500: broken" in result.stdout
    assert ("every request failed" in result.stderr) is (code == 1)


@pytest.mark.parametrize("reporting", [True, False])
async def test_what_the_cache_held_is_shown_for_cold_and_warm(reporting: bool) -> None:
    words = ("--concurrency", "2", "--both", "--prompt-tokens", "256", "--output-tokens", "2")
    result = await against({"prompt_tokens_details": reporting}, *words)
    assert result.exit_code == 0, result.output
    cold, warm = [line for line in result.stdout.splitlines() if line.startswith("prefix cache: ")]
    if reporting:
        assert cold == "prefix cache: 0 % of the prompt tokens were found in it"
        assert int(warm.split()[2]) > 80
    else:
        assert cold == warm
        assert "does not report" in cold


@pytest.mark.parametrize(("failing", "code"), [(1, 0), (2, 1)])
async def test_warming_requests_that_fail_are_shown(failing: int, code: int) -> None:
    """One of the two, or both."""
    left = failing

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal left
        body = await request.json()
        words = len(body["messages"][0]["content"].split())
        if words == 32 and body["max_tokens"] == 1 and left:
            left -= 1
            return web.json_response({"error": {"message": "not yet"}}, status=503)
        return await stream(request, token("a"), token("b"), usage(words, 5), DONE)

    async with serving(answer, v1__models={"data": [{"id": "m"}]}) as url:
        result = await asyncio.to_thread(run, url, "--concurrency", "1,2", "--warm-prefix", *SMALL)
    assert result.exit_code == code, result.output
    assert (
        result.stdout.count("its prompts may be cold, the warming request failed: status 503: not yet")
        == failing
    )
    assert ("every warming request failed" in result.stderr) is (code == 1)


def test_users_that_do_not_fit_are_refused_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (1024, 1024))
    result = run("http://127.0.0.1:9", "--concurrency", "1,1000")
    assert result.exit_code == 1
    assert "tidegate: 1000 users need 1064 open files, and 1024 are allowed here" in result.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:18000", "localhost", "ftp://x", ""])
def test_an_address_without_a_scheme_is_told_what_to_begin_with(url: str) -> None:
    result = run(url)
    assert result.exit_code == 2
    assert f"tidegate: {url!r} is no address of a server: begin it with http://" in result.stderr


def test_a_server_that_is_not_there_is_one_line() -> None:
    result = run("http://127.0.0.1:9", "--concurrency", "1", *SMALL)
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1].startswith("tidegate: cannot connect to http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--concurrency", "1,x"), "--concurrency is a list of numbers"),
        (("--concurrency", "0"), "concurrency is one user or more"),
        (("--concurrency", "1,8", "--requests", "7"), "7 requests are too few for 8 users"),
        (("--search",), "a search needs an SLA"),
        (("--json", "/nowhere/out.json"), "there is no such folder"),
        (("--profile", "out.yaml", "--warm-prefix"), "--profile needs a cold prefix"),
        (("--profile", "out.yaml", "--concurrency", "1,2"), "--profile needs three levels at least"),
        (("--profile", "out.yaml", "--concurrency", "2,2,2"), "--profile needs three levels at least"),
        (("--profile", "out.yaml", "--output-tokens", "1"), "--profile needs answers of two tokens"),
        (("--plots", "/nowhere/plots"), "/nowhere/plots: there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(words: tuple[str, ...], message: str) -> None:
    result = run("http://127.0.0.1:9", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


async def test_doubts_about_a_profile_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "POOR", -1.0)
    monkeypatch.setattr(fit, "SEARCH", Search(1, 12, overhead=True))
    file = tmp_path / "out.yaml"
    words = ("--concurrency", "1,2,3", *SMALL, "--profile", str(file), "--max-num-seqs", "8")
    result = await against({"speed": 20.0}, *words)
    assert result.exit_code == 0, result.output
    assert "the fit is poor" in result.stderr
    assert load_profile(file).limits.max_num_seqs == 8


def interrupted(*levels: Level) -> Report:
    plan = Plan((1, 2, 4), 100, 10)
    series = [Series(Prefix.COLD, list(levels))]
    return Report("http://x", "m", Api.CHAT, True, Facts(), plan, series=series, interrupted=True)


def test_ctrl_c_before_a_level_is_whole_leaves_files_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.json"
    file.write_text("of yesterday")
    torn = Level.of(1, [record()], 1.0, interrupted=True)
    for report in (interrupted(), interrupted(torn)):
        monkeypatch.setattr(command, "_measured", lambda *_, report=report: report)
        result = run("http://127.0.0.1:9", "--concurrency", "1", *SMALL, "--json", str(file))
        assert result.exit_code == 130
        assert file.read_text() == "of yesterday"
        assert f"interrupted before a level was measured to its end: {file} not written" in result.stderr
    monkeypatch.setattr(command, "_measured", lambda *_: interrupted(Level.of(1, [record()], 1.0), torn))
    result = run("http://127.0.0.1:9", "--concurrency", "1", *SMALL, "--json", str(file))
    assert result.exit_code == 130
    assert f"interrupted: {file} has 1 whole level\n" in result.stderr
    assert len(json.loads(file.read_text())["series"][0]["levels"]) == 2


def test_ctrl_c_while_a_profile_is_fitted_says_what_fits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    report = replace(interrupted(Level.of(1, [record()], 1.0)), interrupted=False)
    monkeypatch.setattr(command, "_measured", lambda *_: report)
    monkeypatch.setattr(fit, "to_profile", stopped)
    file, profile = tmp_path / "out.json", tmp_path / "out.yaml"
    words = ("--json", str(file), "--profile", str(profile), "--card", "H20")
    result = run("http://127.0.0.1:9", "--concurrency", "1,2,4", "--output-tokens", "10", *words)
    assert result.exit_code == 130
    assert f"tidegate calibrate {file} --card H20 --model m -o {profile}" in result.stderr
    assert file.exists()
    assert not profile.exists()
