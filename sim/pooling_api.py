"""The endpoints of a pooling model (`--runner pooling`): embeddings, scores, classes, in vLLM's shapes.

A vector follows from its text alone, so equal texts have equal vectors. A prompt takes the engine's time, as one
that is answered with a single token.
"""

from __future__ import annotations

import base64
import struct
import time
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import orjson
from aiohttp import web

from sim import tokens
from sim.generation import SequencePlan
from sim.openai_request import Message, RequestBase, RequestError, parse

if TYPE_CHECKING:
    from sim.openai_server import Face

DIMENSIONS = 32
LABELS = ("ebb", "flood")


class PoolingRequest(RequestBase):
    """Body of /v1/embeddings, /pooling and /classify."""

    input: str | list[int] | list[str] | list[list[int]] | None = None
    messages: list[Message] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def texts(self) -> list[str]:
        """The prompts. Raises RequestError (400)."""
        if self.messages is not None:
            return ["".join(tokens.chat_pieces((m.role, m.text()) for m in self.messages))]
        if self.input is None:
            raise RequestError(400, "Bad Request", "Either input or messages is required.", "body.input")
        if isinstance(self.input, str):
            return [self.input]
        if self.input and all(isinstance(item, int) for item in self.input):
            return [tokens.decode(self.input)]  # type: ignore[arg-type]
        return [item if isinstance(item, str) else tokens.decode(item) for item in self.input]  # type: ignore[arg-type]


class ScoreRequest(RequestBase):
    """Body of /score."""

    text_1: str | list[str]
    text_2: str | list[str]


class RerankRequest(RequestBase):
    """Body of /rerank."""

    query: str
    documents: list[str]
    top_n: int = 0


class PoolingApi:
    """The endpoints."""

    def __init__(self, face: Face) -> None:
        self._face = face

    def add_routes(self, app: web.Application) -> None:
        """Add the paths."""
        for path in ("/score", "/v1/score"):
            app.router.add_post(path, self._score)
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            app.router.add_post(path, self._rerank)
        app.router.add_post("/v1/embeddings", self._embed)
        app.router.add_post("/pooling", self._pool)
        app.router.add_post("/classify", self._classify)

    async def _compute(self, model: str | None, texts: list[str]) -> int:
        """Have the engine read the texts. -> their tokens."""
        self._face.check_model(model)
        longest = self._face.settings.max_model_len
        counts = [max(len(tokens.split(text)), 1) for text in texts]
        if max(counts, default=0) > longest:
            message = f"This model's maximum context length is {longest} tokens."
            raise RequestError(400, "BadRequestError", message, "input_tokens")
        await self._face.compute([SequencePlan(count, 1, 1, "stop") for count in counts])
        return sum(counts)

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        body = parse(PoolingRequest, await request.read())
        texts = body.texts()
        count = await self._compute(body.model, texts)
        rows = []
        for index, text in enumerate(texts):
            values: Any = vector(text, body.dimensions or DIMENSIONS)
            if body.encoding_format == "base64":
                values = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
            rows.append({"index": index, "object": "embedding", "embedding": values})
        return self._answer("embd", rows, count)

    async def _pool(self, request: web.Request) -> web.StreamResponse:
        body = parse(PoolingRequest, await request.read())
        texts = body.texts()
        count = await self._compute(body.model, texts)
        rows = [
            {"index": index, "object": "pooling", "data": [vector(text, DIMENSIONS)]}
            for index, text in enumerate(texts)
        ]
        return self._answer("pool", rows, count)

    async def _classify(self, request: web.Request) -> web.StreamResponse:
        body = parse(PoolingRequest, await request.read())
        texts = body.texts()
        count = await self._compute(body.model, texts)
        rows = []
        for index, text in enumerate(texts):
            first = _share(text)
            probabilities = [first, 1 - first]
            label = LABELS[probabilities.index(max(probabilities))]
            rows.append({"index": index, "label": label, "probs": probabilities, "num_classes": len(LABELS)})
        return self._answer("classify", rows, count)

    async def _score(self, request: web.Request) -> web.StreamResponse:
        body = parse(ScoreRequest, await request.read())
        left = [body.text_1] if isinstance(body.text_1, str) else body.text_1
        right = [body.text_2] if isinstance(body.text_2, str) else body.text_2
        if len(left) == 1:
            left = left * len(right)
        if len(left) != len(right):
            raise RequestError(400, "BadRequestError", "Input lengths must be either 1:1, 1:N or N:N", None)
        pairs = [one + other for one, other in zip(left, right, strict=True)]
        count = await self._compute(body.model, pairs)
        rows = [
            {"index": index, "object": "score", "score": _share(pair)} for index, pair in enumerate(pairs)
        ]
        return self._answer("embd", rows, count)

    async def _rerank(self, request: web.Request) -> web.StreamResponse:
        body = parse(RerankRequest, await request.read())
        count = await self._compute(body.model, [body.query + document for document in body.documents])
        results = [
            {
                "index": index,
                "document": {"text": document, "multi_modal": None},
                "relevance_score": _share(body.query + document),
            }
            for index, document in enumerate(body.documents)
        ]
        results.sort(key=lambda result: result["relevance_score"], reverse=True)  # type: ignore[arg-type, return-value]
        return _json(
            {
                "id": f"rerank-{uuid4().hex[:16]}",
                "model": self._face.settings.models[0],
                "usage": {"prompt_tokens": count, "total_tokens": count},
                "results": results[: body.top_n or None],
            }
        )

    def _answer(self, kind: str, rows: list[dict[str, Any]], count: int) -> web.Response:
        return _json(
            {
                "id": f"{kind}-{uuid4().hex[:16]}",
                "object": "list",
                "created": int(time.time()),
                "model": self._face.settings.models[0],
                "data": rows,
                "usage": {
                    "prompt_tokens": count,
                    "total_tokens": count,
                    "completion_tokens": 0,
                    "prompt_tokens_details": None,
                },
            }
        )


def vector(text: str, dimensions: int) -> list[float]:
    """The direction of a text, of length 1."""
    numbers: list[float] = []
    block = 0
    while len(numbers) < dimensions:
        digest = blake2b(text.encode(), digest_size=64, salt=block.to_bytes(8, "big")).digest()
        numbers += [byte / 127.5 - 1 for byte in digest]
        block += 1
    numbers = numbers[:dimensions]
    length = sum(number * number for number in numbers) ** 0.5
    return [number / length for number in numbers]


def _share(text: str) -> float:
    return blake2b(text.encode(), digest_size=1).digest()[0] / 255


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")
