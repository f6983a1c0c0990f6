"""A row of the ledger, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

from proxy.prices import Price, Prices
from proxy.records import OperationIds, Row

IDS = OperationIds()

PRICES = Prices({"nanjing": Price.parse("0.27", "1.10", "CNY", cached_input="0.027")})


def a_row(**changes: Any) -> Row:
    """A finished stream on a remote backend, with every field set to something that is not its default."""
    fields: dict[str, Any] = {
        "op": IDS.mint(),
        "instance": "abcd1234",
        "arrived": 1_700_000_000.25,
        "tenant": "acme",
        "key_id": "k1",
        "endpoint": "chat",
        "model": "small",
        "served_model": "SmolLM2",
        "data_class": "internal",
        "session": "5e55",
        "prefix": [1, 2**62],
        "stream": True,
        "status": 200,
        "outcome": "ok",
        "code": "",
        "backend": "nanjing",
        "site": "nj",
        "rule": "everything else",
        "policy": "weighted-qps",
        "reason": "weight 3 of 4",
        "propensity": 0.75,
        "candidates": [["appliance", 24, 1.0], ["nanjing", 3, 0.125]],
        "attempts": 2,
        "prompt_tokens": 800,
        "cached_tokens": 512,
        "completion_tokens": 128,
        "usage_source": "reported",
        "overhead_prompt_tokens": 7,
        "overhead_completion_tokens": 3,
        "max_tokens": 256,
        "expected_tokens": 200,
        "body_bytes": 1100,
        "queue_s": 0.5,
        "ttft_s": 0.25,
        "total_s": 2.5,
        "overhead_s": 0.000375,
        "cost_nano": 232_384,
        "currency": "CNY",
    }
    return Row(**(fields | changes))
