"""The HTTP face of the emulator: vLLM's endpoints over any `sim.generation.Engine`.

What a gateway can trip over is done as vLLM does it: a stream's status and headers go out before the prefill,
the role comes with the first token, 401 is `{"error": "Unauthorized"}` (a string) and guards only /v1, /v2,
/inference and /cohere, an unknown path is `{"detail": "Not Found"}`, answers carry the first served model name
whatever alias was asked for, and a client that leaves frees its slot at once.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple
from uuid import uuid4

import orjson
from aiohttp import web

from sim import tokens
from sim.answers import Answer, Channel, Wish, composing, json_text
from sim.completion import Completion
from sim.faults import Fault, Faults
from sim.generation import Engine, SequencePlan
from sim.json_instance import Schema, UnsupportedSchemaError, minimal_instance
from sim.media_api import MediaApi
from sim.messages_api import MessagesApi
from sim.openai_request import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestError,
    TokenizeRequest,
    bad_value,
    own_error,
    parse,
)
from sim.openai_shapes import ChatShapes, CompletionShapes, Head, Shapes
from sim.pooling_api import PoolingApi
from sim.prefix_hashes import prefix_hashes
from sim.realtime_api import RealtimeApi
from sim.responses_api import ResponsesApi
from sim.vllm_metrics import CONTENT_TYPE, VllmMetrics

log = logging.getLogger("tidegate")

VLLM_VERSION = "0.32.0"
REASONING_SUFFIX = "-reasoning"
"""Models whose names end in it reason before they answer."""

MOST_CHOICES = 128
LARGEST_BODY = 64 * 1024 * 1024

_GUARDED = ("/v1", "/v2", "/inference", "/cohere")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class FaceSettings:
    """What the face needs to know."""

    models: tuple[str, ...]
    """Served names; the first one is what answers say."""
    max_model_len: int
    """Longest prompt plus answer, tokens."""
    api_keys: tuple[str, ...] = ()
    """Accepted keys; none: everybody is let in."""
    seed: int = 0
    rtt_s: float = 0.0
    """Added before every reply, as a network round trip would."""
    prefix_unit_tokens: int = 0
    """Tokens of one block of the prefix cache; 0: there is none."""
    prompt_tokens_details: bool = False
    """vLLM's `--enable-prompt-tokens-details`: usage says how much of a prompt was in the prefix cache."""
    max_num_queued_reqs: int | None = None
    """vLLM's `--max-num-queued-reqs`: sequences running and waiting at most, others are refused; None: no limit."""
    pooling: bool = False
    """It serves a pooling model: embeddings and scores, no text."""
    media: bool = False
    """It serves sound and pictures, no text."""
    control: bool = False
    """Whether `/emulator/fault` is there, which no vLLM has."""


class Planned(NamedTuple):
    """A chat that is understood."""

    pieces: list[str]
    """Its prompt."""
    answers: list[Answer]
    plans: list[SequencePlan]


class Face:
    """Serves requests from one engine."""

    def __init__(self, settings: FaceSettings, engine: Engine, metrics: VllmMetrics, faults: Faults) -> None:
        self.settings = settings
        self._engine = engine
        self._metrics = metrics
        self._faults = faults
        self._in_flight = 0
        """Requests for answers."""
        self._sequences = 0
        """Running and waiting."""
        self._started = int(time.time())
        self._fingerprint = f"vllm-{VLLM_VERSION}-{zlib.crc32(f'fingerprint {settings.seed}'.encode()):08x}"
        self._keys = [key.encode() for key in settings.api_keys]

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[self._around])
        app.on_response_prepare.append(_set_headers)
        for path, get in (
            ("/health", self._health),
            ("/ping", self._health),
            ("/version", self._version),
            ("/load", self._load),
            ("/metrics", self._metrics_page),
            ("/v1/models", self._models),
        ):
            app.router.add_get(path, get, allow_head=False)
        for path, post in (
            ("/ping", self._health),
            ("/tokenize", self._tokenize),
            ("/detokenize", self._detokenize),
        ):
            app.router.add_post(path, post)
        if self.settings.pooling:
            PoolingApi(self).add_routes(app)
        elif self.settings.media:
            MediaApi(self).add_routes(app)
            RealtimeApi(self).add_routes(app)
        else:
            app.router.add_post("/v1/chat/completions", self._chat)
            app.router.add_post("/v1/chat/completions/render", self._render)
            app.router.add_post("/v1/completions", self._completions)
            ResponsesApi(self).add_routes(app)
            MessagesApi(self).add_routes(app)
        if self.settings.control:
            app.router.add_get("/emulator/fault", self._show_faults, allow_head=False)
            app.router.add_post("/emulator/fault", self._order_fault)
            app.router.add_delete("/emulator/fault", self._take_back_faults)
        return app

    def restart(self, metrics: VllmMetrics) -> None:
        """Be a process that has just started, and counts anew."""
        self._metrics = metrics
        self._started = int(time.time())

    # Every request

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.settings.rtt_s:
            await asyncio.sleep(self.settings.rtt_s)
        if self._keys and request.path.startswith(_GUARDED) and not self._authorized(request):
            return _json({"error": "Unauthorized"}, 401)
        working = request.method == "POST" and request.path.startswith("/v1/")
        self._in_flight += working
        try:
            return await handler(request)
        except RequestError as error:
            return _refusal(error)
        except web.HTTPException as error:
            response = _json({"detail": error.reason}, error.status)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
            return response
        except ConnectionError:
            raise  # the client has left
        except Exception:
            log.exception("%s %s has failed", request.method, request.path)
            return _refusal(own_error())
        finally:
            self._in_flight -= working

    def _authorized(self, request: web.Request) -> bool:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        given = key.encode(errors="surrogateescape")
        # Compare with every key, so that timing does not tell which one was near.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def check_model(self, model: str | None) -> None:
        names = self.settings.models
        if model is not None and model not in names:
            message = f"The model `{model}` does not exist. Valid aliases: {', '.join(names)}."
            raise RequestError(404, "NotFoundError", message, "model")

    # Small endpoints

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if self._faults.healthy else 503)

    async def _version(self, request: web.Request) -> web.StreamResponse:
        return _json({"version": VLLM_VERSION})

    async def _load(self, request: web.Request) -> web.StreamResponse:
        return _json({"server_load": self._in_flight})

    async def _metrics_page(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=self._metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, request: web.Request) -> web.StreamResponse:
        rows = [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "vllm",
                "root": self.settings.models[0],
                "parent": None,
                "max_model_len": self.settings.max_model_len,
                "permission": [
                    {
                        "id": f"modelperm-{uuid4().hex[:16]}",
                        "object": "model_permission",
                        "created": self._started,
                        "allow_create_engine": False,
                        "allow_sampling": True,
                        "allow_logprobs": True,
                        "allow_search_indices": False,
                        "allow_view": True,
                        "allow_fine_tuning": False,
                        "organization": "*",
                        "group": None,
                        "is_blocking": False,
                    }
                ],
            }
            for name in self.settings.models
        ]
        return _json({"object": "list", "data": rows})

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        body = parse(TokenizeRequest, await request.read())
        self.check_model(body.model)
        pieces = body.pieces()
        return _json(
            {
                "count": len(pieces),
                "max_model_len": self.settings.max_model_len,
                "tokens": tokens.encode(pieces),
                "token_strs": pieces if body.return_token_strs else None,
            }
        )

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        body = parse(DetokenizeRequest, await request.read())
        self.check_model(body.model)
        return _json({"prompt": tokens.decode(body.tokens)})

    # Faults to order

    async def _show_faults(self, request: web.Request) -> web.StreamResponse:
        return _json([fault.model_dump(mode="json", exclude_unset=True) for fault in self._faults.active])

    async def _order_fault(self, request: web.Request) -> web.StreamResponse:
        self._faults.order(parse(Fault, await request.read()))
        return await self._show_faults(request)

    async def _take_back_faults(self, request: web.Request) -> web.StreamResponse:
        self._faults.take_back()
        return await self._show_faults(request)

    # Completions

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = parse(ChatRequest, await request.read())
        self.check_model(body.model)
        planned = await self.plan_chat(body)
        shapes = ChatShapes(
            self._head(request, body, "chatcmpl", len(planned.pieces)),
            planned.answers,
            [f"chatcmpl-tool-{uuid4().hex[:16]}" for _ in planned.answers],
            forced_any_tool=body.tool_choice == "required",
        )
        return await self.serve(request, self._completion(body, shapes, planned.plans))

    async def _render(self, request: web.Request) -> web.StreamResponse:
        """The prompt in tokens, refused as it would be for an answer: some routers ask before they choose."""
        body = parse(ChatRequest, await request.read())
        self.check_model(body.model)
        pieces = body.pieces()
        self._wish(body, len(pieces))
        rendered = {
            "request_id": body.request_id or uuid4().hex,
            "token_ids": [tokens.short_id(piece) for piece in pieces],
            "sampling_params": {"max_tokens": body.limit, "temperature": body.temperature},
            "model": body.model,
            "stream": bool(body.stream),
            "cache_salt": body.cache_salt,
        }
        return _json(rendered)

    async def plan_chat(self, body: ChatRequest) -> Planned:
        """What is said to a conversation. Raises RequestError."""
        pieces = body.pieces()
        tool = body.forced_tool()
        wish = self._wish(body, len(pieces))
        if tool is not None:
            arguments = _instance(tool.parameters or {"type": "object"}, "tools")
            wish = replace(wish, tool=tool.name, json_text=json_text(arguments))
        if (body.model or self.settings.models[0]).endswith(REASONING_SUFFIX):
            wish = replace(wish, reasoning=True)
        answers = await self._answers(body, [(wish, "".join(pieces))])
        return Planned(pieces, answers, [self._plan(body, pieces, answer, wish.room) for answer in answers])

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = parse(CompletionRequest, await request.read())
        self.check_model(body.model)
        prompts = body.prompts()
        pieces = [tokens.split(prompt) for prompt in prompts]
        counts = [len(prompt) for prompt in pieces]
        wishes = [self._wish(body, count) for count in counts]
        by_choice = [position for position in range(len(prompts)) for _ in range(body.choices)]
        answers = await self._answers(body, zip(wishes, prompts, strict=True))
        shapes = CompletionShapes(
            self._head(request, body, "cmpl", sum(counts)),
            answers,
            [counts[position] for position in by_choice],
            [prompts[position] if body.echo else "" for position in by_choice],
        )
        plans = [
            self._plan(body, pieces[position], answer, wishes[position].room)
            for position, answer in zip(by_choice, answers, strict=True)
        ]
        return await self.serve(request, self._completion(body, shapes, plans))

    def _wish(self, body: ChatRequest | CompletionRequest, prompt_tokens: int) -> Wish:
        longest = self.settings.max_model_len
        body.check_values(body.limit, longest)
        if body.choices > MOST_CHOICES:
            raise bad_value("n", body.n, f"n must be at most {MOST_CHOICES}, got {body.n}.")
        beginning = f"This model's maximum context length is {longest} tokens. However, "
        if prompt_tokens >= longest:
            counted = min(prompt_tokens, longest + 1)  # vLLM stops counting there
            message = (
                f"{beginning}your prompt contains at least {counted} input tokens, which exceeds this limit "
                "even without any output tokens. Please reduce the length of the input prompt."
            )
            raise bad_value("input_tokens", counted, message)
        if body.limit is not None and prompt_tokens + body.limit > longest:
            message = (
                f"{beginning}you requested {body.limit} output tokens and your prompt contains at least "
                f"{prompt_tokens} input tokens, for a total of at least {prompt_tokens + body.limit} tokens. "
                "Please reduce the length of the input prompt or the number of requested output tokens."
            )
            raise bad_value("input_tokens", prompt_tokens, message)
        room = body.limit or longest - prompt_tokens
        if body.min_tokens > room:
            message = f"min_tokens must be less than or equal to max_tokens={room}, got {body.min_tokens}."
            raise RequestError(400, "BadRequestError", message, None)
        text = None
        if body.response_format is not None and body.response_format.type != "text":
            described = body.response_format.json_schema
            schema = described.schema_ if described is not None else None
            text = json_text(_instance(schema or {"type": "object"}, "response_format"))
        return Wish(
            room=room,
            least=body.min_tokens,
            ignore_eos=body.ignore_eos,
            stop=body.stops(),
            keep_stop=body.include_stop_str_in_output,
            json_text=text,
        )

    async def _answers(
        self, body: ChatRequest | CompletionRequest, asked: Iterable[tuple[Wish, str]]
    ) -> list[Answer]:
        """All choices for each prompt; the loop does what else is due between two of them."""
        answers: list[Answer] = []
        for wish, prompt in asked:
            seed = f"{self.settings.seed}/{body.seed}/{zlib.crc32(prompt.encode())}"
            for index in range(body.choices):
                if answers:
                    await asyncio.sleep(0)
                answers.append(await _composed(wish, f"{seed}/{index}"))
        return answers

    def _plan(
        self, body: ChatRequest | CompletionRequest, pieces: list[str], answer: Answer, room: int
    ) -> SequencePlan:
        hashes: tuple[int, ...] = ()
        if self.settings.prefix_unit_tokens:
            # The next turn of a conversation begins with this one's answer, as the chat template puts it.
            said = [tokens.MESSAGE_END if where is Channel.END else text for where, text in answer.tokens]
            hashes = prefix_hashes([*pieces, *said], self.settings.prefix_unit_tokens, body.cache_salt or "")
        return SequencePlan(len(pieces), len(answer.tokens), room, answer.finish_reason, hashes)

    def _completion(
        self, body: ChatRequest | CompletionRequest, shapes: Shapes, plans: list[SequencePlan]
    ) -> Completion:
        return Completion(
            shapes,
            plans,
            stream=bool(body.stream),
            usage=bool(body.stream_options and body.stream_options.include_usage),
            cacheable=self.cacheable(plans),
        )

    def cacheable(self, plans: list[SequencePlan]) -> int:
        """Tokens of the last prompt that fill blocks of the prefix cache."""
        unit = self.settings.prefix_unit_tokens
        return plans[-1].prompt_tokens // unit * unit if unit else 0

    def _head(
        self, request: web.Request, body: ChatRequest | CompletionRequest, kind: str, prompt_tokens: int
    ) -> Head:
        # Bytes of a header are Latin-1 to vLLM, whatever they were meant to be.
        given = request.headers.get("X-Request-Id", "").encode(errors="surrogateescape").decode("latin-1")
        name = given or body.request_id or uuid4().hex[:16]
        options = body.stream_options
        return Head(
            id=f"{kind}-{name}",
            created=int(time.time()),
            model=self.settings.models[0],
            fingerprint=self._fingerprint,
            prompt_tokens=prompt_tokens,
            include_usage=bool(options and options.include_usage),
            continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
            prompt_tokens_details=self.settings.prompt_tokens_details,
        )

    async def compute(self, plans: Sequence[SequencePlan]) -> None:
        """Return when the engine has done what nobody watches token by token."""
        async with aclosing(self.generate(plans)) as steps:
            async for _ in steps:
                pass

    async def generate(self, plans: Sequence[SequencePlan]) -> AsyncGenerator[list[tuple[int, int]], None]:
        """The engine's steps; whoever leaves early closes it."""
        with self._admitted(len(plans)):
            generation = self._engine.submit(plans)
            try:
                async for step in generation:
                    yield step
            finally:
                self._engine.cancel(generation)

    async def serve(self, request: web.Request, completion: Completion) -> web.StreamResponse:
        """Have the engine do it, and answer."""
        with self._admitted(len(completion.plans)):
            return await completion.serve(request, self._engine, self._faults.draw())

    @contextmanager
    def _admitted(self, sequences: int) -> Iterator[None]:
        """Count a completion as long as it takes. Raises RequestError (503) if the queue is full."""
        most = self.settings.max_num_queued_reqs
        if most is not None and self._sequences + sequences > most:
            self._metrics.rejected()
            message = f"{self._sequences} requests are running or waiting, at most {most} may."
            raise RequestError(503, "ServiceUnavailableError", message, None)
        self._sequences += sequences
        try:
            yield
        finally:
            self._sequences -= sequences


async def _composed(wish: Wish, seed: str) -> Answer:
    """An answer; a long one in pieces, between which the loop does what else is due."""
    steps = composing(wish, seed)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            answer: Answer = done.value
            return answer
        await asyncio.sleep(0)


def _instance(schema: Schema, param: str) -> object:
    try:
        return minimal_instance(schema)
    except UnsupportedSchemaError as error:
        message = f"The JSON schema cannot be honoured: {error}."
        raise RequestError(400, "BadRequestError", message, param) from error


def _refusal(error: RequestError) -> web.Response:
    return web.Response(status=error.status, body=error.body(), content_type="application/json")


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


async def _set_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "tidegate-emulator"
    response.headers["Vary"] = "Origin"
