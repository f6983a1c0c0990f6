"""What a provider raises is told in words, and goes no further."""

from __future__ import annotations

import asyncio
import gc
import warnings

import pytest

from proxy.scaling.guarded import attempt
from proxy.scaling.provider import ProviderError


async def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "told"), [(ProviderError("no card"), "no card"), (ValueError("odd"), "ValueError('odd')")]
)
async def test_a_failure_is_told(error: Exception, told: str) -> None:
    failed: list[str] = []
    await attempt(lambda: fail(error), failed, "a")
    assert failed == [told]


async def test_what_is_cancelled_before_it_begins_leaves_nothing_behind() -> None:
    made: list[str] = []

    async def operation() -> None:
        made.append("begun")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(asyncio.CancelledError):  # as its task does it
            attempt(operation, [], "a").throw(asyncio.CancelledError())
        gc.collect()
    assert (made, [str(one.message) for one in told]) == ([], [])
