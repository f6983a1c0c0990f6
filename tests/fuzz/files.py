"""Laws of what is read from files, and of URLs: what is wrong there is said in the parser's own way."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from policies.base import BackendView
from policies.explain import explain_policy
from policies.files import KnownNames, library_names, library_policy, read_policy
from policies.fileschema import PolicyFile
from policies.units import BadValueError
from policies.yamlfile import FileModel, FileProblems, read_yaml
from proxy.config import Config, _resolve
from proxy.idempotency import IdempotencyKeys
from proxy.masking import without_secrets
from proxy.records import Values, to_head, to_values
from proxy.replay import replay
from proxy.responses import StoredResponse, StoredResponses
from proxy.segments import MAGIC, Damage, JournalError, frame, read_segment
from proxy.ssrf import PORTS, check_url, may_be_reached
from proxy.tasks import Tasks
from tests.fuzz.target import Target, words
from tests.proxy.rows import PRICES, a_row

ROOT = Path(__file__).parents[2]
KNOWN = KnownNames(
    [BackendView("appliance"), BackendView("nj", site="nanjing", labels={"card": "h20"})],
    sites=frozenset({"suzhou"}),
)


def _config(data: bytes) -> None:
    try:
        config = read_yaml(data.decode("utf-8", "replace"), "tidegate.yaml", Config)
    except FileProblems as error:
        _can_be_printed(without_secrets(error))
        return
    assert _resolve(config, Path("/")).state.is_absolute()
    config.model_dump(mode="json")


def _policies(data: bytes) -> None:
    try:
        compiled = read_policy(data.decode("utf-8", "replace"), "policy.yaml", KNOWN, seed=1)
    except FileProblems as error:
        _can_be_printed(error)
        return
    assert compiled.rules.rules[-1].matches_all
    assert explain_policy(compiled)


def _can_be_printed(error: FileProblems) -> None:
    assert error.problems
    for line in str(error).split("\n"):
        line.encode()
        assert line.isprintable()


def _urls(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    assert may_be_reached(text) in (True, False)
    try:
        checked = check_url(text)
    except BadValueError:
        return
    # Python's own reading of it is the same.
    parts = urlsplit(text)
    assert parts.scheme == checked.scheme
    assert parts.hostname == checked.host
    assert (parts.port or {"http": 80, "https": 443}[parts.scheme]) == checked.port
    assert checked.port in PORTS
    assert parts.geturl() == text
    assert {parts.username, parts.password, parts.query, parts.fragment} <= {None, ""}
    assert not checked.address or may_be_reached(checked.address)


def _journal(data: bytes) -> None:
    with _folder() as folder:
        path = folder / "00000001.journal"
        path.write_bytes(data)
        try:
            found = list(read_segment(path))
        except JournalError:
            assert data.startswith(MAGIC[:3])
        else:
            sizes = [item.length if isinstance(item, Damage) else len(frame(item)) for item in found]
            assert sum(sizes) == len(data.rstrip(b"\0"))
        path.write_bytes(frame(data))
        failure = ""
        try:
            replay(folder, _is_rows, PRICES)
        except JournalError as error:
            failure = str(error)
        assert path.exists() == failure.startswith(f"{path}: ")


def _is_rows(rows: list[Values]) -> None:
    for values in rows:
        assert isinstance(values[0], str)
        assert not any(isinstance(value, list | dict) for value in values)


def _state_files(data: bytes) -> None:
    with _folder() as folder:
        path = folder / "kept.jsonl"
        path.write_bytes(data)
        keys = IdempotencyKeys()
        keys.open(path, Tasks(), 0.0)
        again = IdempotencyKeys()
        again.open(path, Tasks(), 0.0)
        assert len(again) == len(keys)
        path.write_bytes(data)
        assert len(StoredResponses(path)) == len(StoredResponses(path))


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary one; in memory where that can be, since what is synced there costs nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="tidegate-fuzz-", dir=memory if memory.is_dir() else None
    ) as name:
        yield Path(name)


def _keys(schema: Any) -> Iterator[str]:
    """All names of fields in a JSON schema."""
    if isinstance(schema, dict):
        yield from schema.get("properties", ())
        for inner in schema.values():
            yield from _keys(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _keys(inner)


def _keys_of(model: type[FileModel]) -> tuple[bytes, ...]:
    return tuple(f"{name}: ".encode() for name in sorted(set(_keys(model.model_json_schema()))))


def _config_seeds() -> list[bytes]:
    """The example's sections, each with a backend to stand before."""
    text = (ROOT / "examples" / "tidegate.yaml").read_text(encoding="utf-8")
    plain = re.sub(r"(?m)\s*#.*$", "", text)
    sections = [section for section in re.split(r"(?m)^(?=[a-z])", plain) if section.strip()]
    backends = next(section for section in sections if section.startswith("backends:"))
    sites = next(section for section in sections if section.startswith("sites:"))
    one = "backends: [{name: a, url: 'http://127.0.0.1:8000'}]\n"
    seeds = [one + section for section in sections if not section.startswith("backends:")]
    return [seed.encode() for seed in [one, *seeds, backends + sites, f"{one}tls: [{{certificate: a}}]\n"]]


def _journal_seeds() -> list[bytes]:
    row = a_row(op="0192f0c3a1b2aabbccddee000")
    closed = orjson.dumps([[], [], [to_values(row)]])
    opened = orjson.dumps([[to_head(row)], [[row.op, "nanjing", 8, 5, 3, "reported"]], []])
    frames = [frame(closed), frame(opened)]
    return [closed, opened, *frames, b"".join(frames) + bytes(40), frames[0][:-3] + frames[1], b"[[],[],[]]"]


def _state_seeds() -> list[bytes]:
    with _folder() as folder:
        path = folder / "kept.jsonl"
        stored = StoredResponses(path)
        stored.add("resp_1", StoredResponse("a", "acme", "m", metered=False))
        stored.forget("resp_0")
        stored.write(stored.take_unwritten())
        return [
            path.read_bytes(),
            b'["resp_1"]\n',
            b'["acme","name","request","op",12.5,"running"]\n["acme","name","request","op",12.5,"free"]\n',
            b'["acme","name","request","op",12.5,"spent"]\n["half',
        ]


def _url_seeds() -> list[bytes]:
    return [
        b"http://example.com/v1",
        b"https://engine.example:8443/llm",
        b"http://[2606:2800:220:1::1]:8000/",
        b"http://[::ffff:10.1.2.3]",
        b"http://169.254.169.254/latest",
        b"http://0x7f.1/",
        b"http://2130706433",
        b"http://a@localhost/",
        b"64:ff9b:1:808:8:800::",
        b"fe80::1%eth0",
        b"127.0.0.1",
    ]


def _policy_seeds() -> list[bytes]:
    return [library_policy(name).encode() for name in library_names()] + [
        b"rules: [{name: a, pick: least-load}]",
        b"rules:\n  - name: a\n    when: {model: x*, time: 22:00-06:00, days: mon-fri}\n  - name: b\n",
    ]


TARGETS: Final[dict[str, Target]] = {
    "config": Target(_config, _config_seeds, (*words("yaml"), *_keys_of(Config))),
    "policies": Target(_policies, _policy_seeds, (*words("yaml"), *_keys_of(PolicyFile))),
    "urls": Target(_urls, _url_seeds, words("urls")),
    "journal": Target(_journal, _journal_seeds, words("journal", "json")),
    "state-files": Target(_state_files, _state_seeds, words("json")),
}
