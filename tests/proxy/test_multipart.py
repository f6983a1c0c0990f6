"""Uploads: what is a form, what is refused since two parsers may read it in two ways, and what goes on."""

from __future__ import annotations

import re
from email.message import Message
from email.parser import BytesParser
from email.policy import compat32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import RequestError
from proxy.forms import content_type
from proxy.multipart import MOST_PART_HEAD, MOST_PARTS, MOST_TEXT, Form
from proxy.openai import RequestBody, body_for_backend, read_form
from tests.proxy.uploads import BOUNDARY, FORM_TYPE, SOUND, field, file, form, upload

MARK = b"--" + BOUNDARY


def read(raw: bytes, endpoint: str = "transcriptions", **options: bool) -> RequestBody:
    return read_form(endpoint, raw, FORM_TYPE, **options)


def sent(body: RequestBody, *, model: str = "m", continuous: bool = True) -> Form:
    return Form(body_for_backend(body, model=model, continuous=continuous), FORM_TYPE)


# The type


@pytest.mark.parametrize(
    "value",
    [
        b"multipart/form-data; boundary=----x1",
        b"Multipart/Form-Data;boundary=----x1",
        b'multipart/form-data; charset=UTF-8; boundary="----x1"',
        b"multipart/form-data ; boundary=----x1 ",
    ],
)
def test_a_boundary_is_found(value: bytes) -> None:
    assert Form(form(field("model", "m")), value).text("model") == "m"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"application/json",
        b"multipart/mixed; boundary=----x1",
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=----x1; boundary=----x1",
        b'multipart/form-data; boundary=----x1; Boundary="other"',
        b"multipart/form-data; boundary*=utf-8''----x1",
        b"multipart/form-data; boundary*0=----; boundary*1=x1",
        b'multipart/form-data; boundary="----x1',
        b'multipart/form-data; boundary="----\\x1"',
        b"multipart/form-data; boundary=----x1; charset=utf-16",
        b"multipart/form-data; boundary=----x1, multipart/form-data; boundary=y",
        b"multipart/form-data; boundary=" + b"x" * 71,
        b"multipart/form-data; boundary=----x1 y",
    ],
)
def test_a_type_without_one_clear_boundary_is_refused(value: bytes) -> None:
    with pytest.raises(RequestError, match="multipart/form-data") as refused:
        Form(form(field("model", "m")), value)
    assert refused.value.status == 415


def test_the_type_is_the_clients_own_field() -> None:
    assert content_type(b"accept: x\r\ncontent-type: a/b; c=d\r\n") == b"a/b; c=d"
    assert content_type(b"content-type: a/b\r\nuser-agent: content-type: x\r\n") == b"a/b"
    assert content_type(b"x-content-type: a/b\r\n") == content_type(b"") == b""


# The body

GOOD = form(file("file"), field("model", "m"))
ODD = {
    "a preamble": b"hello\r\n" + GOOD,
    "an empty line in front": b"\r\n" + GOOD,
    "an epilogue": GOOD + b"more",
    "two ends": GOOD + MARK + b"--\r\n",
    "a part behind the end": GOOD + form(field("model", "other")),
    "no end": GOOD[: -len(MARK) - 4],
    "an end that is cut": GOOD[:-3],
    "nothing": b"",
    "no part but an end": form(),
    "another boundary": form(field("model", "m"), boundary=b"y"),
    "lines that end in LF": GOOD.replace(b"\r\n", b"\n"),
    "a boundary behind LF": form(field("model", b"m\n" + MARK + b"\r\n" + field("model", "x"))),
    "a boundary behind CR": form(field("model", b"m\r" + MARK + b"\r\n" + field("model", "x"))),
    "a boundary with a tail": form(field("model", b"m\r\n" + MARK + b"y\r\n" + field("model", "x"))),
    "a boundary with blanks": form(field("model", b"m\r\n" + MARK + b" \r\n" + field("model", "x"))),
    "a longer boundary in a part": form(field("model", "m"), field("a", b"x\r\n" + MARK + b"-y")),
    "no head": form(b"\r\nm"),
    "a head without end": form(b'Content-Disposition: form-data; name="model"'),
    "no content": form(b'Content-Disposition: form-data; name="model"\r\n'),
    "a folded head": form(b'Content-Disposition: form-data;\r\n name="model"\r\n\r\nm'),
    "a head that is too long": form(field("model", "m", b"x: " + b"y" * MOST_PART_HEAD)),
    "no disposition": form(b"Content-Type: text/plain\r\n\r\nm"),
    "two dispositions": form(field("model", "m", b'Content-Disposition: form-data; name="file"')),
    "another disposition": form(b'Content-Disposition: attachment; name="model"\r\n\r\nm'),
    "no name": form(b"Content-Disposition: form-data\r\n\r\nm"),
    "two names": form(b'Content-Disposition: form-data; name="a"; name="model"\r\n\r\nm'),
    "an extended name": form(b"Content-Disposition: form-data; name*=utf-8''model\r\n\r\nm"),
    "an escaped name": form(b'Content-Disposition: form-data; name="mo\\del"\r\n\r\nm'),
    "a percent-encoded name": form(b'Content-Disposition: form-data; name="%6dodel"\r\n\r\nm'),
    "an escaped quote": form(b'Content-Disposition: form-data; filename="a\\"; name="model"\r\n\r\nm'),
    "another charset for all": form(field("_charset_", "utf-16"), field("model", "m")),
    "two types": form(field("model", "m", b"Content-Type: text/plain", b"content-type: text/html")),
    "parts in a part": form(
        field("model", "m"), field("a", "", b"Content-Type: multipart/mixed; boundary=y")
    ),
    "an encoded part": form(field("model", "bQ==", b"Content-Transfer-Encoding: base64")),
    "too many parts": form(*[field("a", "")] * (MOST_PARTS + 1)),
}


@pytest.mark.parametrize("raw", ODD.values(), ids=ODD)
def test_what_may_be_read_in_two_ways_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        Form(raw, FORM_TYPE)
    assert (refused.value.code, refused.value.status) == ("invalid_form", 400)


USUAL = {
    "no CRLF at the end": GOOD[:-2],
    "an empty file": form(file("file", b""), field("model", "m")),
    "a file with boundaries inside of lines": form(
        file("file", b"x" + MARK + b"--\r\n"), field("model", "m")
    ),
    "blanks": form(b'content-disposition:form-data ;  name="model" \r\n\r\nm'),
    "a name as a token": form(b"Content-Disposition: form-data; name=model\r\n\r\nm"),
    "a type": form(field("model", "m", b"Content-Type: text/plain; charset=utf-8")),
    "a length": form(field("model", "m", b"Content-Length: 1")),
    "an encoding that is none": form(field("model", "m", b"Content-Transfer-Encoding: 8bit")),
    "a file name in Chinese": form(file("file", filename="录音.wav"), field("model", "m")),
    "a file name of Windows": form(file("file", filename="C:\\tide.wav"), field("model", "m")),
    "a list": form(field("model", "m"), field("a[]", "x"), field("a[]", "y")),
}


@pytest.mark.parametrize("raw", USUAL.values(), ids=USUAL)
def test_what_clients_send_is_read(raw: bytes) -> None:
    assert Form(raw, FORM_TYPE).text("model") == "m"


def test_a_field_that_is_read_stands_once() -> None:
    for name in ("model", "stream", "prompt"):
        fields = {"model": "m", name: "true"}
        raw = form(*(field(n, v) for n, v in fields.items()), field(name, "false"))
        with pytest.raises(RequestError, match="stands twice") as refused:
            read(raw)
        assert (refused.value.code, refused.value.param) == ("duplicate_key", name)


@pytest.mark.parametrize(
    "part",
    [
        file("model", b"m"),
        field("model", b"\xff"),
        field("model", "m", b"Content-Type: text/plain; charset=utf-16"),
        field("model", "m", b"Content-Type: application/json"),
        field("model", ""),
        field("model", "m" * 257),
        field("model", "m" * (MOST_TEXT + 1)),
    ],
)
def test_a_field_that_is_read_is_text(part: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        read(form(part))
    assert (refused.value.code, refused.value.param) == ("invalid_value", "model")


def test_a_model_is_needed() -> None:
    with pytest.raises(RequestError, match="you must provide a model") as refused:
        read(form(file("file")))
    assert refused.value.code == "missing_field"


CONTENT = st.binary(max_size=64).filter(lambda content: MARK not in content)
TEXTS = st.dictionaries(
    st.from_regex(re.compile(r"[a-z_]{1,8}(\[\])?", re.ASCII), fullmatch=True).filter(
        lambda name: name not in ("model", "_charset_")
    ),
    CONTENT,
    max_size=5,
)


@given(TEXTS, CONTENT, st.text(st.characters(codec="utf-8"), max_size=20))
def test_a_changed_form_has_what_it_had_but_for_the_change(
    fields: dict[str, bytes], sound: bytes, model: str
) -> None:
    parts = [field(name, content) for name, content in fields.items()]
    read_ = Form(form(file("file", sound), field("model", "m"), *parts), FORM_TYPE)
    assert read_.names == ["file", "model", *fields]
    again = Form(read_.changed({"model": model}, without=["absent"]), FORM_TYPE)
    assert again.text("model") == model
    assert again.raw.startswith(form(file("file", sound), *parts)[: -len(MARK) - 4])
    gone = Form(read_.changed({}, without=["model", *fields]), FORM_TYPE)  # the file stays
    assert gone.raw == form(file("file", sound))


@given(TEXTS, CONTENT)
def test_a_form_is_the_same_with_another_boundary(fields: dict[str, bytes], sound: bytes) -> None:
    parts = [file("file", sound), *(field(name, content) for name, content in fields.items())]
    if any(b"--other" in part for part in parts):
        return
    one = Form(form(*parts), FORM_TYPE).content()
    assert one == Form(form(*parts, boundary=b"other"), b"multipart/form-data; boundary=other").content()
    assert one != Form(form(*parts, field("more", "")), FORM_TYPE).content()


SNIPPETS = (
    *(b"\r\n", b"\n", b"\r", b"--", b'"', b"\\", b";", b"=", b" ", b"\0", b":", b"name=", b"filename="),
    *(MARK, b"\r\n" + MARK, b"\r\n" + MARK + b"--", field("model", "x"), b"Content-Type: multipart/mixed"),
)
EDITS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 4), st.sampled_from(SNIPPETS)), min_size=1, max_size=4
)


def other_reading(raw: bytes) -> list[tuple[str, bytes]]:
    """(name, content) of each part, as Python's own parser of mail has them."""
    message = BytesParser(policy=compat32).parsebytes(b"Content-Type: " + FORM_TYPE + b"\r\n\r\n" + raw)
    parts = message.get_payload()
    assert isinstance(parts, list)
    found = []
    for part in parts:
        assert isinstance(part, Message)
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        found.append((str(part.get_param("name", header="content-disposition")), content))
    return found


@settings(max_examples=500)
@given(EDITS)
def test_what_is_accepted_another_parser_reads_alike(edits: list[tuple[int, int, bytes]]) -> None:
    raw = form(file("file", b"sound"), field("model", "m"), field("prompt", "sea"))
    for at, gone, snippet in edits:
        raw = raw[:at] + snippet + raw[at + gone :]
    try:
        read_ = Form(raw, FORM_TYPE)
    except RequestError:
        return
    found = other_reading(raw)
    assert read_.names == [name for name, _ in found]
    begun = {name: begin for name, begin in read_.beginnings() if b"\r" not in begin and b"\n" not in begin}
    assert all(
        dict(found)[name].startswith(begin) for name, begin in begun.items() if read_.names.count(name) == 1
    )


# What a decision and a backend get


def test_only_the_prompt_counts_as_one() -> None:
    assert read(upload()).prompt_tokens == 0
    assert read(upload(prompt="a tide comes in")).prompt_tokens == 4
    assert read(upload(user="me")).session == "me"


def test_an_alias_is_replaced_and_the_rest_stays() -> None:
    body = read(upload(model="alias", language="en"))
    got = sent(body)
    assert (got.text("model"), got.text("language")) == ("m", "en")
    assert SOUND in got.raw
    assert body_for_backend(read(upload()), model="m", continuous=True) == upload()


def test_fields_that_reach_into_the_engine_are_removed() -> None:
    got = sent(read(upload(vllm_xargs="{}", priority="1", cache_salt="x", kv_transfer_params="{}")))
    assert got.names == ["file", "model"]


def test_the_usage_of_a_transcript_is_asked_for() -> None:
    body = read(upload(stream="True"))
    assert body.stream
    assert not body.include_usage
    got = sent(body)
    assert got.flag("stream_include_usage")
    assert got.flag("stream_continuous_usage_stats")
    assert sent(body, continuous=False).names == ["file", "model", "stream"]
    asked = read(upload(stream="1", stream_include_usage="true", stream_continuous_usage_stats="false"))
    assert (asked.include_usage, asked.every_event) == (True, False)
    assert sent(asked).flag("stream_continuous_usage_stats")
    assert sent(read(upload(stream="true"), "image-edits")).names == ["file", "model", "stream"]


@pytest.mark.parametrize("fields", [{"stream": "maybe"}, {"stream": ""}, {"stream_include_usage": "true"}])
def test_a_flag_that_says_nothing_clear_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(RequestError) as refused:
        read(upload(**fields))
    assert refused.value.code == "invalid_value"


@pytest.mark.parametrize("name", [b'filename=""', b'filename*=""'])
def test_a_part_whose_file_name_is_empty_is_text_for_some_and_refused(name: bytes) -> None:
    part = b'Content-Disposition: form-data; name="url"; %b\r\n\r\nhttp://10.0.0.1/' % name
    with pytest.raises(RequestError, match="empty filename") as refused:
        read(form(field("model", "m"), part), "image-edits")
    assert refused.value.code == "invalid_form"


@pytest.mark.parametrize(
    "part",
    [
        field("url", "http://10.0.0.1/"),
        field("image[]", "https://x/y.png"),
        field("image[0]", "file:///etc/passwd"),
        field("mask", " http://x", b"Content-Type: application/octet-stream"),
        field("reference_url", "/etc/passwd"),
        b"Content-Disposition: form-data; name=\"file\"; filename*=utf-8''x\r\n\r\nhttp://x",
    ],
)
def test_what_an_engine_would_fetch_is_refused(part: bytes) -> None:
    raw = form(field("model", "m"), part)
    with pytest.raises(RequestError) as refused:
        read(raw, "image-edits")
    assert refused.value.code == "media_url"
    assert read(raw, "image-edits", media_urls=True).model == "m"


def test_data_urls_and_files_pass() -> None:
    parts = [field("model", "m"), field("image", "data:image/png;base64,AA=="), file("image", b"http://x")]
    assert read(form(*parts), "image-edits").model == "m"
