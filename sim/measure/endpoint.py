"""The client: light, so that what it measures is the server. A request's body is made before its time begins."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families

from sim.measure.level import RequestRecord
from sim.measure.wire import Answer, Api, message_of

IDLE_S = 4.0
"""How long an idle connection is kept: uvicorn closes its own after 5 seconds."""


TRIES: Final = 4
"""Of a request without which nothing can be measured."""
PAUSE_S: Final = 0.5
"""Before the second try; twice as long before each further one."""
LONGEST_PAUSE_S: Final = 30.0
"""Whatever Retry-After says."""


class MeasureError(Exception):
    """Nothing can be measured; the text is for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says of itself. None: it does not say."""

    version: str | None = None
    max_model_len: int | None = None
    kv_tokens: int | None = None
    """Size of its KV cache, tokens, of all its engines."""
    prefix_cache: bool | None = None


class Endpoint:
    """One model of a server that speaks OpenAI's API. An asynchronous context manager."""

    def __init__(
        self, url: str, *, model: str = "", key: str = "", api: Api = Api.CHAT, timeout_s: float = 300.0
    ) -> None:
        """`url`: with or without `/v1`. `model`: empty takes the first. `timeout_s`: longest wait for a byte."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.api = api
        self.exact_length = True
        """Whether it takes vLLM's `ignore_eos` and `min_tokens`."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=timeout_s),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self._session.close()

    def body(self, text: str, output_tokens: int) -> bytes:
        """A request for exactly so many tokens, as far as the server can be asked for them."""
        fields = {
            "model": self.model,
            **self.api.prompt(text),
            "max_tokens": output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.exact_length:
            fields |= {"ignore_eos": True, "min_tokens": output_tokens}
        return orjson.dumps(fields)

    async def ask(self, body: bytes, began_at: float = 0.0) -> RequestRecord:
        """Send a request and read its answer; whatever goes wrong is in the record. `began_at`: by perf_counter."""
        answer, sent_at = await self._send(body)
        return RequestRecord.of(answer, sent_at, began_at)

    async def _send(self, body: bytes) -> tuple[Answer, float]:
        """-> its answer, and when it was asked for."""
        answer = Answer()
        sent_at = time.perf_counter()
        try:
            async with self._session.post(self.url + self.api.path, data=body) as response:
                if response.status != 200:
                    answer.retry_after = response.headers.get("Retry-After", "")
                    answer.error = await _refusal(response)
                elif response.content_type != "text/event-stream":
                    answer.error = f"the answer is no stream but {response.content_type}"
                else:
                    async for data in response.content.iter_any():
                        answer.feed(data, time.perf_counter())
                    answer.close()
        except TimeoutError:
            answer.error = "timeout"
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, ConnectionError):
            answer.error = "the connection was cut" if answer.first_at is None else "the stream was cut"
        except aiohttp.ClientConnectorError as error:
            answer.error = f"cannot connect: {error.os_error.strerror or error.os_error}"
        except aiohttp.ClientError as error:
            answer.error = message_of(str(error) or type(error).__name__)
        return answer, sent_at

    async def _insist(self, body: bytes) -> Answer:
        """Ask a few times, unless the server finds fault with the request itself."""
        for tried in range(1, TRIES + 1):
            answer, _ = await self._send(body)
            if not answer.error or tried == TRIES or not _may_pass(answer.error):
                break
            await asyncio.sleep(pause_s(tried, answer.retry_after))
        return answer

    async def prepare(self) -> Facts:
        """Find the model and what the server takes. Raises MeasureError: it cannot be measured."""
        row = await self._model_row()
        probe = await self._insist(self.body("Hello", 2))
        if probe.error.startswith(("status 400", "status 422")):
            self.exact_length = False
            probe = await self._insist(self.body("Hello", 2))
        if probe.error:
            raise MeasureError(f"{self.url}{self.api.path}: {probe.error}")
        version = await self._get("/version")
        length = row.get("max_model_len")
        return _facts(
            str(version["version"]) if isinstance(version, dict) and "version" in version else None,
            length if isinstance(length, int) else None,
            await self._page("/metrics"),
        )

    async def tokenize(self, text: str) -> int | None:
        """Tokens of a prompt as the server's own tokenizer counts them; None: it has no /tokenize."""
        body = orjson.dumps({"model": self.model, **self.api.prompt(text)})
        try:
            async with self._session.post(f"{self.url}/tokenize", data=body) as response:
                count = orjson.loads(await response.read())["count"] if response.status == 200 else None
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
            return None
        return count if isinstance(count, int) else None

    async def reported(self, text: str) -> int:
        """Tokens of a prompt as a request reports them. Raises MeasureError."""
        answer = await self._insist(self.body(text, 1))
        if answer.error or answer.prompt_tokens is None:
            raise MeasureError(f"{self.url}{self.api.path}: {answer.error}")
        return answer.prompt_tokens

    async def _model_row(self) -> dict[str, Any]:
        """What /v1/models says of the model, which is the first one where none was named."""
        found = await self._get("/v1/models")
        rows = found.get("data") if isinstance(found, dict) else None
        known = {row["id"]: row for row in rows or () if isinstance(row, dict) and "id" in row}
        if not self.model:
            if not known:
                raise MeasureError(
                    f"{self.url}/v1/models names no model: name one with --model, and a --key if it needs one"
                )
            self.model = next(iter(known))
        row: dict[str, Any] = known.get(self.model, {})
        return row

    async def _get(self, path: str) -> object:
        try:
            return orjson.loads(await self._page(path))
        except ValueError:
            return None

    async def _page(self, path: str) -> str:
        """Empty: there is none."""
        try:
            async with self._session.get(self.url + path) as response:
                return await response.text() if response.status == 200 else ""
        except aiohttp.ClientConnectorError as error:
            raise MeasureError(
                f"cannot connect to {self.url}: {error.os_error.strerror or error.os_error}"
            ) from None
        except aiohttp.InvalidURL:
            raise MeasureError(f"{self.url} is no URL: write http://HOST:PORT") from None
        except (aiohttp.ClientError, OSError, ValueError):
            return ""


def pause_s(tried: int, retry_after: str) -> float:
    """Seconds before the next try. `retry_after`: that header; a date, or anything else, is as none."""
    pause = float(PAUSE_S * 2 ** (tried - 1))
    if retry_after.isascii() and retry_after.isdigit():
        pause = float(retry_after)
    return min(pause, LONGEST_PAUSE_S)


def _may_pass(error: str) -> bool:
    """Whether another try may succeed: not after a status that finds fault with the request, or a long silence."""
    return error != "timeout" and (
        not error.startswith("status 4") or error.startswith(("status 408", "status 429"))
    )


async def _refusal(response: aiohttp.ClientResponse) -> str:
    data = await response.read()
    try:
        said = message_of(orjson.loads(data))
    except ValueError:
        said = message_of(data.decode(errors="replace")) or response.reason or ""
    return f"status {response.status}: {said}"


def _facts(version: str | None, max_model_len: int | None, metrics: str) -> Facts:
    """With `vllm:cache_config_info`, a row for each engine of a vLLM."""
    try:
        rows = [
            sample.labels
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
            if sample.name == "vllm:cache_config_info"
        ]
        sizes = [
            int(float(row.get("kv_cache_size_tokens") or int(row["num_gpu_blocks"]) * int(row["block_size"])))
            for row in rows
        ]
    except (ValueError, LookupError):
        return Facts(version, max_model_len)
    prefix = {row.get("enable_prefix_caching") for row in rows}
    return Facts(
        version,
        max_model_len,
        kv_tokens=sum(sizes) or None,
        prefix_cache=None if not prefix & {"True", "False"} else "True" in prefix,
    )
