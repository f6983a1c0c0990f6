"""What vLLM's answers look like, byte for byte where a proxy may care, and the words that fill them.

Shapes after vLLM 0.32: compact JSON; in a stream one event is one HTTP chunk; `usage` comes after `choices`, in
every event when running usage was asked for; the last token's event also has the finish reason.
"""

from __future__ import annotations

import orjson

MODEL = "bench"

_VOCABULARY = """
tide gate harbour water level river mouth sluice basin quay moon spring neap ebb flood current lock weir
pump channel estuary marsh delta dike polder canal barge ferry buoy anchor mast hull keel rudder sail
rope winch crane dock pier jetty beacon lamp fog bell chart compass depth sound reef shoal bar sand silt
clay stone brick oak iron steel hinge bolt seal valve gauge meter ledger clerk watch shift night dawn
noon dusk storm calm wind wave swell surge crest trough foam spray salt brine gull heron eel salmon crab
mussel kelp cod
"""
WORDS = tuple(f" {word}" for word in _VOCABULARY.split())
_WORD_BYTES = tuple(word.encode() for word in WORDS)


def word(seed: int, position: int) -> bytes:
    """The token at a position of the answer to a request with this seed."""
    return _WORD_BYTES[(seed + position) % len(_WORD_BYTES)]


def answer_text(seed: int, tokens: int) -> str:
    """The whole answer to a request with this seed."""
    return "".join(WORDS[(seed + position) % len(WORDS)] for position in range(tokens))


ROLE = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
ROLE_END = b',"prompt_token_ids":null,"prompt_text":null'
TOKEN = b'{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":null,"token_ids":null}]'
LAST_TOKEN = (
    b'{"index":0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":"length","stop_reason":null,'
    b'"token_ids":null}]'
)
FINGERPRINT = b',"system_fingerprint":"vllm-bench"'
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
"""The last event and the end of the message."""

STREAM_FIELDS = b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def event_head(answer_id: str, created: int) -> bytes:
    """How each event of one stream begins, up to its choices."""
    return b'{"id":"%b","object":"chat.completion.chunk","created":%d,"model":"%b","choices":[' % (
        answer_id.encode(),
        created,
        MODEL.encode(),
    )


def chunk(head: bytes, choice: bytes, usage: bytes = b"", end: bytes = b"") -> bytes:
    """One event as one HTTP chunk; `choice` brings the closing bracket of the choices."""
    event = b"data: %b%b%b%b}\n\n" % (head, choice, usage, end)
    return b"%x\r\n%b\r\n" % (len(event), event)


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    """The usage member of an event, its leading comma included."""
    return (
        b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,"completion_tokens_details":null}'
        % (prompt_tokens, prompt_tokens + completion_tokens, completion_tokens)
    )


_COMPLETION = (
    b'{"id":"%b","object":"chat.completion","created":%d,"model":"%b","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"%b","refusal":null,"annotations":null,"audio":null,"function_call":null,'
    b'"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}],'
    b'"service_tier":null,"system_fingerprint":"vllm-bench","usage":{"prompt_tokens":%d,"total_tokens":%d,'
    b'"completion_tokens":%d,"prompt_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,'
    b'"kv_transfer_params":null}'
)


def completion(answer_id: str, created: int, seed: int, prompt_tokens: int, tokens: int) -> bytes:
    """The body of an answer that is not streamed."""
    return _COMPLETION % (
        answer_id.encode(),
        created,
        MODEL.encode(),
        answer_text(seed, tokens).encode(),
        prompt_tokens,
        prompt_tokens + tokens,
        tokens,
    )


MODELS = orjson.dumps(
    {
        "object": "list",
        "data": [
            {"id": MODEL, "object": "model", "created": 1, "owned_by": "vllm", "max_model_len": 1_000_000}
        ],
    }
)


def metrics(running: int, prompt_tokens: int, generation_tokens: int) -> bytes:
    """The figures of `/metrics` that routers read, under vLLM's names; this engine never queues."""
    rows = (
        ("vllm:num_requests_running", "gauge", running),
        ("vllm:num_requests_waiting", "gauge", 0),
        ("vllm:kv_cache_usage_perc", "gauge", 0),
        ("vllm:prompt_tokens_total", "counter", prompt_tokens),
        ("vllm:generation_tokens_total", "counter", generation_tokens),
    )
    labels = f'{{engine="0",model_name="{MODEL}"}}'
    return "".join(
        f"# TYPE {name} {kind}\n{name}{labels} {float(value)}\n" for name, kind, value in rows
    ).encode()
