"""`tidegate plan` names resources that meet what is asked, the cheapest first, and is honest where none do."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner, Result

from policies.profile import Origin, Power, Price, Profile, Source
from sim.closed_loop import closed_loop, most_users
from sim.engine import EngineSettings, StepCost
from sim.plan import Demand, plan
from sim.plan_command import plan as command
from sim.profile import load_profile, profile_names

ALL = [load_profile(name) for name in profile_names()]
SOURCE = Source(origin=Origin.PUBLISHED, text="a test")
ENGINE = EngineSettings(StepCost(10_000.0, 100.0, 0.05, 50.0), max_num_seqs=64)


def priced(name: str, per_hour: float | None, currency: str = "USD") -> Profile:
    price = None if per_hour is None else Price(per_hour=per_hour, currency=currency, source=SOURCE)
    return load_profile(name).model_copy(update={"price": price})


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


def test_the_most_users_are_the_last_that_meet_the_level() -> None:
    most = most_users(ENGINE, 200, 100, tokens_per_s=40.0)
    assert closed_loop(ENGINE, most, 200, 100).tokens_per_s_per_user >= 40.0
    assert closed_loop(ENGINE, most + 1, 200, 100).tokens_per_s_per_user < 40.0
    assert most_users(ENGINE, 200, 100, tokens_per_s=1000.0) == 0
    assert most_users(ENGINE, 200, 100, limit=10) == 10


@pytest.mark.parametrize("concurrency", [1, 32, 150])
def test_every_option_meets_the_demand_and_no_smaller_number_would(concurrency: int) -> None:
    demand = Demand(concurrency, ttft_s=3.0, tpot_s=0.08, model="32b")
    found = plan(demand, ALL)
    assert found.options
    for option in found.options:
        assert option.figures.ttft_mean <= 3.0
        assert option.figures.tpot_mean <= 0.08
        assert option.figures.users * option.copies >= concurrency
        assert option.margin >= 0
        assert option.shortfall <= 1
        if option.copies > 1:
            assert option.most / option.copies * (option.copies - 1) < concurrency
    names = {option.profile.name for option in [*found.options, *found.nearest]}
    assert names == {name for name in profile_names() if name.endswith("32b")}


def test_the_cheapest_is_first_and_an_unknown_price_last() -> None:
    demand = Demand(16, ttft_s=5.0, tpot_s=0.1)
    found = plan(demand, [priced("d-8-32b", 9.0), priced("c-4-32b", None), priced("h20-8-32b", 5.0)])
    assert [option.profile.name for option in found.options] == ["h20-8-32b", "d-8-32b", "c-4-32b"]
    cheapest, *_, unknown = found.options
    assert cheapest.per_million_tokens == pytest.approx(5.0 / (cheapest.tokens_per_s * 3600) * 1e6)
    assert unknown.per_hour is unknown.per_million_tokens is None
    with pytest.raises(ValueError, match="CNY and USD cannot be compared"):
        plan(demand, [priced("d-8-32b", 9.0), priced("h20-8-32b", 60.0, "CNY")])


def test_carbon_follows_from_power_and_grid() -> None:
    power = Power(watts=3200.0, source=SOURCE)
    profile = load_profile("h20-8-32b").model_copy(update={"power": power})
    (option,) = plan(Demand(8, carbon_gco2_kwh=500.0), [profile]).options
    assert option.gco2_per_hour == pytest.approx(1600.0)
    assert plan(Demand(8), [profile]).options[0].gco2_per_hour is None


def test_none_says_what_is_nearest() -> None:
    found = plan(Demand(32, ttft_s=0.01), ALL)
    assert not found.options
    distances = [option.shortfall for option in found.nearest]
    assert distances == sorted(distances)
    assert distances[0] > 1


def test_what_does_not_fit_the_model_is_no_option() -> None:
    assert plan(Demand(1, prompt_tokens=4000, output_tokens=2000), ALL) == plan(Demand(1), [])


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, arguments)


def test_the_command() -> None:
    result = run(
        "--model", "32B", "--concurrency", "32", "--ttft", "2", "--tpot", "0.1", "--price", "h20=1.9"
    )
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[1].startswith("h20-8-32b")
    assert "15.20 USD" in lines[1]
    assert "unknown" in lines[-2]
    result = run("--model", "32B", "--concurrency", "32", "--price", "H20=10CNY", "--json")
    rows = json.loads(result.output)["options"]
    assert rows[0]["currency"] == "CNY"
    assert rows[0]["source"]["origin"] == "derived"
    result = run("--model", "32B", "--concurrency", "32", "--ttft", "0.001")
    assert result.exit_code == 1
    assert "Nothing meets this. Nearest:" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "7B"), "no profile is of a model like '7B'"),
        (("--price", "H20"), "a price is CARD=NUMBER"),
        (("--price", "X=1"), "no profile has the card 'x'"),
        (("--profile", "h200"), "no profile is named 'h200'"),
        (("--ttft", "0"), "ttft_s must be above zero"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[str, ...], said: str) -> None:
    result = run("--concurrency", "1", *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
