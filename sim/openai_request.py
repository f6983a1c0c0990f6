"""Request bodies of the emulated server, and the errors vLLM 0.32 answers them with.

The models name only the fields that change what the emulator does; vLLM accepts and the emulator ignores the
others. Types are checked as pydantic checks them in vLLM, values as vLLM's sampling parameters do.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar, cast

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sim import tokens
from sim.json_instance import Schema


class RequestError(Exception):
    """A request that is answered with an error, in vLLM's shape."""

    def __init__(self, status: int, kind: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param

    def body(self) -> bytes:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return orjson.dumps(self._fields())

    def event(self) -> bytes:
        """The same as an event of a stream, with the spaces that vLLM puts there."""
        return f"data: {json.dumps(self._fields())}\n\n".encode()

    def _fields(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}


def bad_value(param: str, value: object, message: str) -> RequestError:
    """400 for a field of the right type and a wrong value."""
    return RequestError(400, "BadRequestError", f"{message} (parameter={param}, value={value})", param)


def engine_error() -> RequestError:
    """What a vLLM says whose engine has died."""
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    return RequestError(500, "InternalServerError", message, None)


def own_error() -> RequestError:
    """What is said when the emulator itself is at fault."""
    return RequestError(500, "InternalServerError", "The emulator has failed: see its log.", None)


TokenId = Annotated[int, Field(ge=0)]


class RequestBase(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class JsonSchemaFormat(BaseModel):
    """`response_format.json_schema`."""

    name: str
    schema_: Schema | None = Field(default=None, alias="schema")


class ResponseFormat(BaseModel):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class FunctionDefinition(BaseModel):
    """What a tool is."""

    name: str
    parameters: Schema | None = None


class Tool(BaseModel):
    """One entry of `tools`."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(BaseModel):
    """The function that a named tool choice asks for."""

    name: str


class NamedToolChoice(BaseModel):
    """`tool_choice` that names a function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class Message(BaseModel):
    """One entry of `messages`."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    def text(self) -> str:
        """The text of all its parts."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.get("type") != "text":
                message = f"{part.get('type')} content is not supported by this text-only model."
                raise RequestError(400, "BadRequestError", message, "messages")
        return "\n".join(str(part.get("text", "")) for part in self.content)


class _Generate(RequestBase):
    """What both kinds of completion share."""

    n: int | None = 1
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    include_stop_str_in_output: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    response_format: ResponseFormat | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    request_id: str = ""

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Generate:
        if self.stream_options is not None and not self.stream:
            raise ValueError("Stream options can only be defined when `stream=True`.")
        return self

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return 1 if self.n is None else self.n

    def stops(self) -> tuple[str, ...]:
        """The stop strings, without empty ones."""
        listed = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in listed if stop)

    def check_values(self, max_tokens: int | None, max_model_len: int) -> None:
        """Raise RequestError for a value that vLLM refuses."""
        if self.choices < 1:
            raise bad_value("n", self.n, f"n must be at least 1, got {self.n}.")
        if self.temperature is not None and self.temperature < 0:
            raise bad_value(
                "temperature", self.temperature, f"temperature must be non-negative, got {self.temperature}."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise bad_value("top_p", self.top_p, f"top_p must be in (0, 1], got {self.top_p}.")
        if self.min_tokens < 0:
            message = f"min_tokens must be greater than or equal to 0, got {self.min_tokens}."
            raise RequestError(400, "BadRequestError", message, None)
        if max_tokens is None:
            return
        if max_tokens < 1:
            raise bad_value("max_tokens", max_tokens, f"max_tokens must be at least 1, got {max_tokens}.")
        if max_tokens > max_model_len:
            message = (
                f"max_tokens={max_tokens} cannot be greater than max_model_len={max_model_len}. "
                "Please request fewer output tokens."
            )
            raise bad_value("max_tokens", max_tokens, message)


class ChatRequest(_Generate):
    """Body of POST /v1/chat/completions."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens an answer may have, if the client said so."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def pieces(self) -> list[str]:
        """The prompt, tokenized with the chat template."""
        return tokens.chat_pieces((message.role, message.text()) for message in self.messages)

    def forced_tool(self) -> FunctionDefinition | None:
        """The function that the answer has to call."""
        if self.tool_choice in (None, "none", "auto"):
            return None
        if not self.tools:
            message = "When using `tool_choice`, `tools` must be set."
            raise RequestError(400, "BadRequestError", message, "tool_choice")
        if not isinstance(self.tool_choice, NamedToolChoice):
            return self.tools[0].function
        wanted = self.tool_choice.function.name
        for tool in self.tools:
            if tool.function.name == wanted:
                return tool.function
        message = "The tool specified in `tool_choice` does not match any of the specified `tools`"
        raise RequestError(400, "BadRequestError", message, "tool_choice")


class CompletionRequest(_Generate):
    """Body of POST /v1/completions."""

    n: int = 1
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: int | None = 16
    echo: bool | None = False

    @property
    def limit(self) -> int | None:
        """The most tokens an answer may have, if the client said so."""
        return self.max_tokens

    def prompts(self) -> list[str]:
        """The prompts as text; a body may carry several. Raises RequestError (400) if one is empty."""
        one = isinstance(self.prompt, str) or all(isinstance(item, int) for item in self.prompt)
        prompts = cast("list[str | list[int]]", [self.prompt] if one else self.prompt)
        if not all(prompts):
            raise RequestError(400, "BadRequestError", "The prompt must not be empty.", "prompt")
        return [item if isinstance(item, str) else tokens.decode(item) for item in prompts]


class TokenizeRequest(RequestBase):
    """Body of POST /tokenize: a prompt or a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either `prompt` or `messages` is required")
        return self

    def pieces(self) -> list[str]:
        """What is to be tokenized, in pieces."""
        if self.messages is None:
            return tokens.split(self.prompt or "")
        return tokens.chat_pieces((message.role, message.text()) for message in self.messages)


class DetokenizeRequest(RequestBase):
    """Body of POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0, le=2**63 - 1)]]


AnyBody = TypeVar("AnyBody", bound=BaseModel)


def parse(kind: type[AnyBody], data: bytes) -> AnyBody:
    """A validated body. Raises RequestError (400)."""
    try:
        values = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        position, reason = _where_json_breaks(data, error)
        where = f"body.{position}"
        problem = {"type": "json_invalid", "loc": where, "msg": "JSON decode error", "input": {}}
        raise _invalid([problem | {"ctx": {"error": reason}}]) from error
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = []
        for entry in error.errors(include_url=False, include_context=False):
            where = ".".join(["body", *(str(part) for part in entry["loc"])])
            problems.append(
                {"type": entry["type"], "loc": where, "msg": entry["msg"], "input": entry["input"]}
            )
        raise _invalid(problems) from error


def _where_json_breaks(data: bytes, error: orjson.JSONDecodeError) -> tuple[int, str]:
    """Position and reason, as Python's own parser, which vLLM uses, puts it.

    Raises RequestError for what is no text or too deep for that parser.
    """
    try:
        json.loads(data)
    except json.JSONDecodeError as precise:
        return precise.pos, precise.msg
    except (ValueError, RecursionError) as broken:  # bytes that are not UTF-8, or nested without end
        message = "There was an error parsing the body"
        raise RequestError(400, "Bad Request", message, None) from broken
    return error.pos, error.msg


def _invalid(problems: list[dict[str, Any]]) -> RequestError:
    lines = [f"{len(problems)} validation error{'s' if len(problems) > 1 else ''}:"]
    for problem in problems:
        value = problem["input"]
        if isinstance(value, dict | list):
            problem["input"] = f"<{type(value).__name__} of {len(value)} items>"
        lines.append(f"  {problem}")
    return RequestError(400, "Bad Request", "\n".join(lines), str(problems[0]["loc"]))
