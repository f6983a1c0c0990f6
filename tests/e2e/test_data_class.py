"""What may not leave, does not leave, whatever fails: one property over random fleets on real sockets.

Every backend keeps every byte that it ever received. A request carries a canary; a backend at a site that may not
see the request's class of data must never have received any of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.access.keys import create_key
from proxy.access.pepper import load_pepper
from proxy.config import Config
from proxy.database import open_database
from proxy.serve import Service
from tests.e2e import backends as b
from tests.e2e.backends import Backend, Behaviour, answers, dead_port, status
from tests.e2e.proxy_fixtures import Proxy, chat
from tests.e2e.proxy_fixtures import settings as configuration

pytestmark = pytest.mark.e2e

CLASSES = ["public", "internal", "restricted"]
FAULTS: list[Behaviour] = [
    answers(2),
    answers(2),
    b.resets_before_head,
    b.resets_after_head,
    b.resets_midstream,
    b.closes_behind,
    b.garbage,
    b.error_event_first,
    b.stalls_after_head,
    status(500),
    status(503, b"{}", b"retry-after: 1"),
    status(429),
    status(401),
]
POLICIES = ["local-first", "nearest-site", "sticky-sessions"]

site = st.fixed_dictionaries(
    {
        "classes": st.one_of(st.none(), st.lists(st.sampled_from(CLASSES), unique=True)),
        "slots": st.integers(1, 2),
        "script": st.lists(st.sampled_from(FAULTS), max_size=6),
        "dead": st.sampled_from([False, False, False, True]),
    }
)
request = st.tuples(st.sampled_from(CLASSES), st.booleans(), st.sampled_from(["s1", "s2", ""]))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A state directory with one key for each class: (directory, header line by class)."""
    state = tmp_path_factory.mktemp("keys")
    engine = open_database(state)
    made = {
        name: create_key(engine, load_pepper(state), tenant=f"tenant-{name}", data_class=name)[0]
        for name in CLASSES
    }
    yield state, {name: f"authorization: Bearer {key}" for name, key in made.items()}
    engine.dispose()


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    sites=st.lists(site, min_size=2, max_size=4),
    requests=st.lists(request, min_size=1, max_size=10),
    policy=st.sampled_from(POLICIES),
)
def test_no_byte_of_a_request_reaches_a_site_that_may_not_see_it(
    sites: list[dict[str, Any]],
    requests: list[tuple[str, bool, str]],
    policy: str,
    keys: tuple[Path, dict[str, str]],
) -> None:
    uvloop.run(play(sites, requests, policy, *keys))


async def play(
    sites: list[dict[str, Any]],
    requests: list[tuple[str, bool, str]],
    policy: str,
    state: Path,
    lines: dict[str, str],
) -> None:
    backends = [Backend.of(*found["script"], then=answers(1)) for found in sites]
    sections = []
    for number, (found, backend) in enumerate(zip(sites, backends, strict=True)):
        await backend.start()
        url = f"http://127.0.0.1:{dead_port()}" if found["dead"] else backend.url
        name = "local" if number == 0 else f"site{number}"
        sections.append({"url": url, "site": name, "slots": found["slots"]})
    classes = {
        section["site"]: {} if found["classes"] is None else {"data_classes": found["classes"]}
        for section, found in zip(sections, sites, strict=True)
    }
    document = configuration(
        state,
        *sections,
        sites=classes,
        policy=policy,
        retries={"attempts": 4},
        timeouts={"first_token": "100ms", "answer": "100ms", "between_tokens": "100ms", "total": "500ms"},
    )
    service = Service(Config.model_validate(document))
    await service.start()
    try:
        proxy = Proxy(service, state)
        await asyncio.gather(
            *[
                ask(proxy, lines[name], f"canary-{number}-{name}", stream, session)
                for number, (name, stream, session) in enumerate(requests)
            ]
        )
        await proxy.idle()
        proxy.close()
    finally:
        await service.stop()
        for backend in backends:
            await backend.stop()
    for number, (found, backend) in enumerate(zip(sites, backends, strict=True)):
        allowed = found["classes"] or ()
        if found["classes"] is None:
            allowed = CLASSES if number == 0 else ["public"]
        for name in CLASSES:
            seen = f"-{name}".encode() in backend.raw
            assert not seen or name in allowed, f"{name} reached {sections[number]} {found}"
    for record in service.runtime.observer.recent:
        row = record.row
        if row.outcome == "rejected" and row.code == "data_class":
            assert row.attempts == 0


async def ask(proxy: Proxy, key: str, canary: str, stream: bool, session: str) -> None:
    fields: dict[str, Any] = {"user": session} if session else {}
    client = await proxy.connect()
    messages = [{"role": "user", "content": canary}]
    await client.send(chat(None, key, f"traceparent: {canary}", stream=stream, messages=messages, **fields))
    answer = await client.answer()
    assert answer.status, "no answer"
    client.reset()
