"""Plans in words, for the log and for people at a terminal."""

from __future__ import annotations

from policies.plans import Forecast, Plan


def in_words(plan: Plan, currency: str) -> str:
    """`start nj-1 and nj-2 at nanjing, 2 × H20, 20.00 CNY an hour`."""
    resources = plan.resources
    said = [f"start {' and '.join(plan.standbys)} at {resources.site}"]
    if resources.card:
        said.append(f"{resources.count * resources.cards} × {resources.card}")
    cost = plan.cost_per_hour
    said.append("at a cost that is not known" if cost is None else f"{cost:,.2f} {currency} an hour")
    said.append(forecast_in_words(plan.forecast))
    waits = f" (it waits for {plan.waits_for})" if plan.waits_for else ""
    return ", ".join(filter(None, said)) + waits


def forecast_in_words(forecast: Forecast) -> str:
    """`first token in 0.40 s, 30 ms per token, 300 tokens/s, 10 at once`; what is not known is left out."""
    said = []
    if forecast.ttft_s is not None:
        said.append(f"first token in {forecast.ttft_s:.2f} s")
    if forecast.tpot_s is not None:
        said.append(f"{1000 * forecast.tpot_s:.0f} ms per token")
    if forecast.tokens_per_s is not None:
        said.append(f"{forecast.tokens_per_s:,.0f} tokens/s")
    if forecast.concurrency is not None:
        said.append(f"{forecast.concurrency} at once")
    return ", ".join(said)
