"""`tidegate plan` names resources that meet what is asked, the cheapest first, and is honest where none do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from policies.profile import Origin, Power, Price, Profile, Source
from sim.closed_loop import closed_loop, most_users, worst_figures
from sim.engine import EngineSettings, StepCost
from sim.plan import MOST_CONCURRENCY, MOST_USERS, Demand, plan
from sim.plan_command import plan as command
from sim.profile import dump_profile, engine_settings, load_profile, profile_names

ALL = [load_profile(name) for name in profile_names()]
H20 = load_profile("h20-8-32b")
SOURCE = Source(origin=Origin.PUBLISHED, text="a test")
ENGINE = EngineSettings(StepCost(10_000.0, 100.0, 0.05, 50.0), max_num_seqs=64)


def priced(name: str, per_hour: float | None, currency: str = "USD") -> Profile:
    price = None if per_hour is None else Price(per_hour=per_hour, currency=currency, source=SOURCE)
    return load_profile(name).model_copy(update={"price": price})


def limited(**limits: int) -> Profile:
    """H20 with other limits."""
    return H20.model_copy(update={"limits": H20.limits.model_copy(update=limits)})


# Closed loops


def test_a_closed_loop_has_as_many_at_once_as_it_has_users() -> None:
    one = closed_loop(ENGINE, 1, 100, 11)
    prefill, step = 10_000 + 50 * 100, 10_000 + 100 + 0.05 * 105
    assert one.ttft_mean == pytest.approx(prefill / 1e6, rel=1e-3)
    assert one.tpot_mean == pytest.approx(step / 1e6, rel=1e-3)
    assert one.tokens_per_s == pytest.approx(11 / (prefill + 10 * step) * 1e6, rel=1e-3)
    twice = closed_loop(ENGINE, 1, 100, 11, rounds=2)
    assert twice.total_mean == pytest.approx(one.total_mean, rel=1e-3)
    delayed = closed_loop(ENGINE, 1, 100, 11, overhead_us=5_000)
    assert delayed.ttft_mean == pytest.approx(one.ttft_mean + 0.005, rel=1e-3)


def test_throughput_after_warm_rounds_is_that_of_these_rounds() -> None:
    later = closed_loop(ENGINE, 64, 200, 20, rounds=12, warm_rounds=4)
    assert later.tokens_per_s == pytest.approx(64 * 20 / later.total_mean)
    assert later.tokens_per_s == pytest.approx(
        closed_loop(ENGINE, 64, 200, 20, rounds=40).tokens_per_s, rel=0.05
    )


@pytest.mark.parametrize("prompt_tokens", [100, 1000, 2048])
@pytest.mark.parametrize("users", [1, 8, 40, 64])
def test_the_worst_figures_hold_at_the_beginning_and_much_later(users: int, prompt_tokens: int) -> None:
    worst = worst_figures(ENGINE, users, prompt_tokens, 100)
    loops = [
        closed_loop(ENGINE, users, prompt_tokens, 100),
        closed_loop(ENGINE, users, prompt_tokens, 100, rounds=24, warm_rounds=12, cool_rounds=1),
    ]
    for figures in loops:
        assert figures.ttft_mean <= worst.ttft_mean * 1.05
        assert figures.tpot_mean <= worst.tpot_mean * 1.05
        assert figures.tokens_per_s >= worst.tokens_per_s * 0.95


def test_users_who_stop_are_not_in_the_means() -> None:
    """Their last answers have the engine more and more for themselves."""
    loop = (engine_settings(H20), 32, 2048, 128)
    steady = closed_loop(*loop, rounds=60, warm_rounds=30, cool_rounds=5).tpot_mean
    assert closed_loop(*loop, rounds=4, warm_rounds=1, cool_rounds=1).tpot_mean == pytest.approx(
        steady, rel=0.01
    )
    assert closed_loop(*loop, rounds=4, warm_rounds=1).tpot_mean < 0.9 * steady


def test_the_most_users_are_the_last_that_meet_the_level() -> None:
    most = most_users(ENGINE, 200, 100, tokens_per_s=40.0)
    assert closed_loop(ENGINE, most, 200, 100).tokens_per_s_per_user >= 40.0
    assert closed_loop(ENGINE, most + 1, 200, 100).tokens_per_s_per_user < 40.0
    assert most_users(ENGINE, 200, 100, tokens_per_s=1000.0) == 0
    assert most_users(ENGINE, 200, 100, tokens_per_s=1.0, limit=10) == 10
    assert most_users(ENGINE, 200, 100, limit=10) == 10


def test_the_most_users_over_all_rounds_are_fewer() -> None:
    most = most_users(ENGINE, 1000, 100, tpot_s=0.02, all_rounds=True)
    assert worst_figures(ENGINE, most, 1000, 100).tpot_mean <= 0.02
    assert worst_figures(ENGINE, most + 1, 1000, 100).tpot_mean > 0.02
    assert 0 < most < most_users(ENGINE, 1000, 100, tpot_s=0.02)


# Plans


@pytest.mark.parametrize("concurrency", [1, 32, 150])
def test_every_option_meets_the_demand_and_no_smaller_number_would(concurrency: int) -> None:
    demand = Demand(concurrency, ttft_s=3.0, tpot_s=0.08, model="32b")
    found = plan(demand, ALL)
    assert found.options
    for option in found.options:
        assert option.figures.ttft_mean <= 3.0
        assert option.figures.tpot_mean <= 0.08
        assert option.figures.users * option.copies >= concurrency
        assert option.most == option.slots * option.copies
        assert option.margin == pytest.approx(option.most / concurrency - 1)
        assert option.margin >= 0
        assert option.shortfall <= 1
        if option.copies > 1:
            assert option.slots * (option.copies - 1) < concurrency
    names = {option.profile.name for option in [*found.options, *found.nearest]}
    assert names == {name for name in profile_names() if name.endswith("32b")}


@pytest.mark.parametrize(("prompt_tokens", "tpot_s"), [(1024, 0.030), (2048, 0.045)])
def test_what_one_wave_alone_would_keep_is_not_promised(prompt_tokens: int, tpot_s: float) -> None:
    """In later rounds, answers share their steps with the prompts of others."""
    loop = (engine_settings(H20), 32, prompt_tokens, 128)
    assert closed_loop(*loop).tpot_mean < tpot_s < closed_loop(*loop, rounds=12, warm_rounds=4).tpot_mean
    (option,) = plan(Demand(32, prompt_tokens, 128, tpot_s=tpot_s), [H20]).options
    assert option.slots < 32
    assert option.copies > 1
    (option,) = plan(Demand(32, prompt_tokens, 128, tpot_s=1.0), [H20]).options
    assert option.figures == worst_figures(*loop)


def test_margin_and_slots_are_not_cut_off_by_what_is_asked_for() -> None:
    (option,) = plan(Demand(1, tokens_per_s=15.0), [H20]).options
    assert abs(option.slots - 250) <= 2
    assert not option.at_least
    assert option.margin == option.slots - 1


@pytest.mark.parametrize(("concurrency", "copies"), [(1, 1), (3000, 3), (MOST_CONCURRENCY, 977)])
def test_a_number_that_was_not_looked_beyond_is_marked(concurrency: int, copies: int) -> None:
    """And no engine is simulated with more, however many are asked for."""
    (option,) = plan(Demand(concurrency), [H20]).options
    assert option.at_least
    assert option.slots == MOST_USERS >= option.figures.users
    assert option.copies == copies


def test_as_many_copies_as_it_takes_are_an_option() -> None:
    """One with many small engines may be the cheapest."""
    profiles = [priced("l40-2-32b", 1.6), priced("h20-8-32b", 15.2)]
    first, second = plan(Demand(5000, tokens_per_s=15.0), profiles).options
    assert (first.profile.name, second.profile.name) == ("h20-8-32b", "l40-2-32b")
    assert second.slots * (second.copies - 1) < 5000 <= second.slots * second.copies
    assert second.copies > 64
    assert second.per_hour == pytest.approx(1.6 * second.copies)


def test_more_users_than_anybody_has_are_refused() -> None:
    with pytest.raises(ValueError, match="concurrency must be at most 1,000,000"):
        Demand(MOST_CONCURRENCY + 1)


def test_the_cheapest_is_first_and_an_unknown_price_last() -> None:
    demand = Demand(16, ttft_s=5.0, tpot_s=0.1)
    found = plan(demand, [priced("d-8-32b", 9.0), priced("c-4-32b", None), priced("h20-8-32b", 5.0)])
    assert [option.profile.name for option in found.options] == ["h20-8-32b", "d-8-32b", "c-4-32b"]
    cheapest, *_, unknown = found.options
    assert cheapest.per_million_tokens == pytest.approx(5.0 / (cheapest.tokens_per_s * 3600) * 1e6)
    assert unknown.per_hour is unknown.per_million_tokens is None
    with pytest.raises(ValueError, match="CNY and USD cannot be compared"):
        plan(demand, [priced("d-8-32b", 9.0), priced("h20-8-32b", 60.0, "CNY")])
    assert plan(Demand(1, model="32B"), [priced("d-8-32b", 9.0), priced("h20-8-70b", 60.0, "CNY")]).options


def test_carbon_follows_from_power_and_grid() -> None:
    power = Power(watts=3200.0, source=SOURCE)
    profile = H20.model_copy(update={"power": power})
    (option,) = plan(Demand(8, carbon_gco2_kwh=500.0), [profile]).options
    assert option.gco2_per_hour == pytest.approx(1600.0)
    assert plan(Demand(8), [profile]).options[0].gco2_per_hour is None


def test_none_says_what_is_nearest() -> None:
    found = plan(Demand(32, ttft_s=0.01), ALL)
    assert not found.options
    distances = [option.shortfall for option in found.nearest]
    assert distances == sorted(distances)
    assert distances[0] > 1


@pytest.mark.parametrize("concurrency", [32, 200])
def test_the_distance_is_that_of_engines_with_one_user_each(concurrency: int) -> None:
    (option,) = plan(Demand(concurrency, ttft_s=0.01), [H20]).nearest
    assert option.figures == worst_figures(engine_settings(H20), 1, 1024, 1024)
    assert option.shortfall == pytest.approx(option.figures.ttft_mean / 0.01)
    assert option.copies == concurrency
    assert option.missed == {"ttft_s"}
    assert option.slots == 0
    assert option.margin == -1


def test_what_does_not_fit_is_left_out_with_the_reason() -> None:
    found = plan(Demand(1, prompt_tokens=4000, output_tokens=2000, model="32b"), ALL)
    assert not found.options
    assert not found.nearest
    assert {one.profile.model for one in found.left_out} == {H20.model}
    reason = "prompt and output are 6000 tokens, more than max_model_len, 5000"
    assert {one.reason for one in found.left_out} == {reason}


def test_a_small_kv_cache_leaves_out_its_profile_alone() -> None:
    small = limited(kv_tokens=1024)
    found = plan(Demand(1, 1000, 100), [small, H20])
    assert [option.profile for option in found.options] == [H20]
    reason = "prompt and output are 1100 tokens, more than its KV cache holds, 1024"
    assert found.left_out == [(small, reason)]
    for kv_tokens in range(1080, 1110):  # the engine itself is the judge; it does not keep the last token
        profile = limited(kv_tokens=kv_tokens)
        try:
            closed_loop(engine_settings(profile), 1, 1000, 89)
        except ValueError:
            assert plan(Demand(1, 1000, 89), [profile]).left_out
        else:
            assert plan(Demand(1, 1000, 89), [profile]).options


def test_an_impossible_profile_is_named() -> None:
    with pytest.raises(ValueError, match="profile h20-8-32b: max_num_batched_tokens must be at least"):
        plan(Demand(1), [limited(max_num_batched_tokens=100)])


# The command


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner(env={"COLUMNS": "40"}).invoke(app, arguments)


def test_the_command() -> None:
    result = run(
        "--model", "32B", "--concurrency", "32", "--ttft", "2", "--tpot", "0.1", "--price", "h20=1.9"
    )
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[1].startswith("h20-8-32b")
    assert "15.20 USD" in lines[1]
    assert "unknown" in lines[-2]
    assert lines[-1].startswith("price unknown: nobody has published")
    result = run("--model", "32B", "--concurrency", "32", "--price", "H20=10CNY", "--json")
    found = json.loads(result.output)
    rows = found["options"]
    assert rows[0]["currency"] == "CNY"
    assert rows[0]["source"]["origin"] == "derived"
    assert rows[0]["price_source"] == {"origin": "given", "text": "--price H20=10CNY"}
    assert rows[0]["power_source"] is rows[-1]["price_source"] is None
    assert found["left_out"] == []
    result = run("--model", "32B", "--concurrency", "32", "--ttft", "0.001")
    assert result.exit_code == 1
    assert "Nothing meets this. Nearest (! misses the service level):" in result.output
    _, head, row, *_ = result.output.splitlines()
    assert row.split()[head.replace("TTFT s", "TTFT").split().index("TTFT") + 2].endswith("!")
    assert row.count("!") == 1


def test_no_service_level_is_told() -> None:
    asked = ("--profile", "h20-8-32b", "--concurrency", "1")
    assert run(*asked).output.startswith("no service level was given, so any speed will do: --ttft,")
    assert "no service level" not in run(*asked, "--tokens-per-s", "1").output


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = run("--concurrency", "1", "--profile", str(tmp_path / "no.yaml"))
    assert result.exit_code == 2
    assert result.stderr == f"tidegate: {tmp_path}/no.yaml: no such file or directory\n"


def test_slots_of_a_backend_are_shown() -> None:
    asked = ("--profile", "h20-8-32b", "--concurrency", "600", "--tokens-per-s", "15")
    (option,) = plan(Demand(600, tokens_per_s=15.0), [H20]).options
    head, row, _ = run(*asked).output.splitlines()
    cells = dict(zip(head.split(), row.replace("3 x h20", "h20").split(), strict=False))
    assert cells["slots"] == str(option.slots)
    (found,) = json.loads(run(*asked, "--json").output)["options"]
    assert found["slots"] * found["copies"] == found["most_users"] == option.most
    assert found["at_least"] is False


def test_what_was_not_looked_beyond_is_shown_so() -> None:
    asked = ("--profile", "h20-8-32b", "--concurrency", "1")
    _, _, row, _ = run(*asked).output.splitlines()
    assert f">={MOST_USERS}" in row
    assert f">=+{MOST_USERS - 1}00%" in row
    assert json.loads(run(*asked, "--json").output)["options"][0]["at_least"] is True


def test_profiles_that_are_left_out_are_shown_with_the_reason(tmp_path: Path) -> None:
    result = run("--model", "32b", "--concurrency", "1", "--prompt-tokens", "5000")
    assert result.exit_code == 1
    assert "Nearest" not in result.output
    said = " ".join(result.output.split())
    assert said.startswith("Nothing meets this. left out: a-4-32b, a-8-32b, ")
    assert said.endswith("v100-4-32b: prompt and output are 6024 tokens, more than max_model_len, 5000")
    small = limited(kv_tokens=1024).model_copy(update={"name": "small"})
    (tmp_path / "small.yaml").write_text(dump_profile(small), encoding="utf-8")
    asked = ("--profile", str(tmp_path / "small.yaml"), "--profile", "h20-8-32b", "--concurrency", "1")
    result = run(*asked, "--json")
    assert result.exit_code == 0
    reason = "prompt and output are 2048 tokens, more than its KV cache holds, 1024"
    assert json.loads(result.output)["left_out"] == [{"profile": "small", "reason": reason}]


def test_carbon_without_power_is_said_to_be_unknown() -> None:
    one = ("--profile", "h20-8-32b", "--concurrency", "1", "--tokens-per-s", "30")
    both = (*one, "--profile", "d-2-32b")
    assert "carbon" not in run(*both).output
    result = run(*both, "--carbon", "500")
    assert "gCO2e/h" not in result.output
    assert "carbon unknown: no profile says what its cards draw; --watts CARD=NUMBER" in result.output
    result = run(*both, "--carbon", "500", "--watts", "h20=400")
    assert "carbon unknown: some profiles do not say" in result.output
    row = next(line for line in result.output.splitlines() if line.startswith("h20-8-32b"))
    assert row.split()[-2:] == ["3200", "1600"]
    assert "carbon unknown" not in run(*one, "--carbon", "500", "--watts", "H20=400").output
    (found,) = json.loads(run(*one, "--watts", "H20=400", "--json").output)["options"]
    assert found["watts"] == 3200
    assert found["power_source"] == {"origin": "given", "text": "--watts H20=400"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "7B"), "no profile is of a model like '7B'"),
        (
            ("--price", "H20"),
            "--price is CARD=NUMBER, or CARD=NUMBER and a currency: H20=2.50, H20=18CNY; not",
        ),
        *(
            (("--price", f"H20={amount}"), f"--price is CARD=NUMBER, or CARD=NUMBER and a currency: {form}")
            for amount in (
                "18EURO",
                "18cny",
                "18 CNY",
                "nan",
                "inf",
                "-1",
                "1e3",
                "+1",
                "",
                "1.",
                "9" * 400,
                "１",
            )
            for form in [f"H20=2.50, H20=18CNY; not 'H20={amount}'"]
        ),
        (("--price", "=1"), "--price is CARD=NUMBER"),
        (
            ("--price", "H20=1", "--price", "h20=2"),
            "--price is given twice for H20: --price H20=1, --price h20=2",
        ),
        (
            ("--price", "X=1"),
            "--price X=1: no profile has the card 'X'; there are A, B, C, D, E, H20, L40, V100",
        ),
        (("--watts", "H20=400W"), "--watts is CARD=NUMBER, as in H20=400; not 'H20=400W'"),
        (("--watts", "H20=400CNY"), "--watts is CARD=NUMBER, as in H20=400; not 'H20=400CNY'"),
        (("--watts", "X=1"), "--watts X=1: no profile has the card 'X'"),
        (("--watts", "H20=1", "--watts", "H20=1"), "--watts is given twice for H20"),
        (("--concurrency", "999999999"), "--concurrency must be at most 1,000,000"),
        (("--profile", "h200"), "no profile is named 'h200'"),
        (("--ttft", "0"), "tidegate: --ttft must be above zero"),
        (("--tpot", "nan"), "--tpot must be above zero"),
        (("--tokens-per-s", "inf"), "--tokens-per-s must be zero or more"),
        (("--carbon", "inf"), "--carbon must be zero or more"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[str, ...], said: str) -> None:
    result = run("--concurrency", "1", *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
