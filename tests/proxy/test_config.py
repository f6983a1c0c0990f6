"""The configuration file: what it may say, where what it may not say is pointed at, and what its defaults are."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from policies.units import BadValueError
from policies.yamlfile import FileProblems
from proxy.build import build
from proxy.config import (
    BackendConfig,
    Config,
    backend_key,
    config_from_flags,
    is_policy_file,
    load_config,
    override,
)
from proxy.config_values import is_loopback, split_address
from proxy.http1 import NEVER_FORWARDED, RequestGrammar

ONE = "backends:\n  - {name: a, url: 'http://a:8000'}\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "tidegate.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def problem(path: Path) -> tuple[int, int, str, str]:
    """Line, column, place and message of the only problem of a file."""
    with pytest.raises(FileProblems) as caught:
        load_config(path)
    (found,) = caught.value.problems
    assert str(path) in str(caught.value)
    return (
        found.line,
        found.column,
        found.path,
        found.message + (f" -> {found.suggestion}" if found.suggestion else ""),
    )


# Whole files


def test_a_backend_is_enough(write: Any) -> None:
    config = load_config(write(ONE))
    (backend,) = config.backends
    assert (backend.name, backend.url, backend.site, backend.slots, backend.models) == (
        "a",
        "http://a:8000",
        "local",
        "auto",
        "auto",
    )
    assert (config.listen, config.admin, config.policy) == ("127.0.0.1:8080", "127.0.0.1:8081", "local-first")
    assert config.timeouts.backend_idle < 5, "uvicorn closes idle connections after 5 s"
    assert config.ledger_currency == "USD"


def test_quantities_have_units(write: Any) -> None:
    config = load_config(write(ONE + "timeouts: {head: 500ms, total: 1h30m}\nlimits: {body: 16MiB}\n"))
    assert (config.timeouts.head, config.timeouts.total, config.limits.body) == (0.5, 5400.0, 16 * 2**20)


def test_paths_are_relative_to_the_file(write: Any, tmp_path: Path) -> None:
    text = (
        "backends:\n  - {name: a, url: 'https://a', api_key_file: keys/a, tls: {ca_file: ca.pem, server_name: x}}\n"
        "state: data\nlog: requests.log\npolicy: ./own.yaml\n"
    )
    config = load_config(write(text))
    (backend,) = config.backends
    assert backend.api_key_file == tmp_path / "keys" / "a"
    assert (backend.tls.ca_file, backend.tls.server_name) == (tmp_path / "ca.pem", "x")
    assert (config.state, config.log) == (tmp_path / "data", str(tmp_path / "requests.log"))
    assert config.policy == str(tmp_path / "own.yaml")
    plain = load_config(write(ONE + "state: /var/lib/t\nlog: 'off'\npolicy: round-robin\n"))
    assert (plain.state, plain.log, plain.policy) == (Path("/var/lib/t"), "off", "round-robin")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("backends: []\n", (1, 11, "backends", "needs at least 1 entry")),
        ("backendz: []\n" + ONE, (1, 1, "backendz", "unknown key")),
        (ONE + "timeouts: {haed: 5s}\n", (3, 12, "timeouts.haed", "-> head")),
        (ONE + "timeouts: {head: soon}\n", (3, 18, "timeouts.head", "expected a duration")),
        (ONE + "timeouts: {head: 0s}\n", (3, 18, "timeouts.head", "more than 0")),
        (ONE + "limits: {body: 10}\n", (3, 16, "limits.body", "1024")),
        (ONE + "probing: {interval: 1s, timeout: 2s}\n", (3, 34, "probing.timeout", "shorter than interval")),
        (ONE + "retries: {attempts: 0}\n", (3, 21, "retries.attempts", "at least 1")),
        (
            ONE + "  - {name: a, url: 'http://b'}\n",
            (3, 12, "backends[1].name", "two backends are called 'a'"),
        ),
        (ONE + "  - {name: 'a b', url: 'http://b'}\n", (3, 12, "backends[1].name", "letters, digits")),
        (ONE + "  - {name: b}\n", (3, 5, "backends[1].url", "")),
        (ONE + "aliases: {x: y, y: m}\n", (3, 14, "aliases.x", "'y' is itself an alias")),
        (ONE + "aliases: {x: x}\n", (3, 14, "aliases.x", "'x' is itself an alias")),
        (ONE + "probing: {enabled: false}\n", (2, 5, "backends[0].models", "list them here")),
        (ONE + "budget_zone: Asia/Shanghia\n", (3, 14, "budget_zone", "-> Asia/Shanghai")),
        (ONE + "budget_zone: America\n", (3, 14, "budget_zone", "no time zone is called 'America'")),
        (ONE + "budget_zone: ../passwd\n", (3, 14, "budget_zone", "no time zone is called")),
        (ONE + "sites: {remote: {}}\n", (3, 9, "sites.remote", "call this one something else")),
        (ONE + "sites: {'*': {}}\n", (3, 9, "sites.*", "letters, digits")),
        (
            ONE + "sites: {nj: {data_classes: [public, Internal]}}\n",
            (3, 37, "sites.nj.data_classes[1]", "-> internal"),
        ),
        (
            ONE + "sites: {nj: {data_classes: ['a b']}}\n",
            (3, 29, "sites.nj.data_classes[0]", "no key can have"),
        ),
        (ONE + "listen: '8080'\n", (3, 9, "listen", "HOST:PORT")),
        (ONE + "listen: 18480\n", (3, 9, "listen", "HOST:PORT, got 18480 -> 127.0.0.1:18480")),
        (ONE + "admin: ':18481'\n", (3, 8, "admin", "-> 127.0.0.1:18481")),
        (ONE + "listen: 99999\n", (3, 9, "listen", "HOST:PORT, got 99999")),
        (ONE + "listen: true\n", (3, 9, "listen", "expected text, got true")),
        (ONE + "listen: 'a:99999'\n", (3, 9, "listen", "between 0 and 65535")),
        (ONE + "listen: 'a:²'\n", (3, 9, "listen", "HOST:PORT")),
        (ONE + "listen: ':80'\n", (3, 9, "listen", "needs a host")),
        (ONE + "listen: 'a:80'\nadmin: 'a:80'\n", (4, 8, "admin", "are the same address")),
        (ONE + "  - {name: b, url: 'http://b:99999'}\n", (3, 20, "backends[1].url", "out of range")),
        (ONE + "durability: sync\n", (3, 13, "durability", "strict")),
        (ONE + "currency: EUR\n  # x\nbackends: []\n", (5, 1, "backends", "")),
    ],
)
def test_problems_are_pointed_at(write: Any, text: str, expected: tuple[int, int, str, str]) -> None:
    line, column, place, message = problem(write(text))
    assert (line, column, place) == expected[:3]
    assert expected[3] in message


def test_a_file_that_is_no_text(write: Any) -> None:
    assert problem(write(ONE.encode() + b"# \xff\n")) == (3, 1, "", "the file is not UTF-8 text")
    with pytest.raises(OSError, match="No such file"):
        load_config(Path("nowhere.yaml"))


# Backends


def backend(text: str) -> str:
    return "sites: {nj: {}}\nbackends:\n  - {name: a, " + text + "}\n"


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://a", "http://a"),
        ("http://a/", "http://a"),
        ("HTTPS://A:8443/x/", "https://A:8443/x"),
        ("http://10.0.0.1:8000", "http://10.0.0.1:8000"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://a_b.internal/v1beta", "http://a_b.internal/v1beta"),
    ],
)
def test_urls(write: Any, url: str, kept: str) -> None:
    (section,) = load_config(write(backend(f"url: '{url}'"))).backends
    assert section.url == kept


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("a:8000", "begins with http"),
        ("ftp://a", "begins with http"),
        ("http://", "begins with http"),
        ("http:///x", "begins with http"),
        ("http://a:0", "port 0"),
        ("http://a:99999", "not a URL"),
        ("http://a:x", "not a URL"),
        ("http://[::1", "not a URL"),
        ("http://user@a", "no user"),
        ("http://user:key@a", "no user"),
        ("http://a?x=y", "no user, query or fragment"),
        ("http://a/?", "no user, query or fragment"),
        ("http://a/#x", "no user, query or fragment"),
        ("http://a/v1", "without /v1: requests bring it along -> http://a"),
        ("https://a:1/x/v1/", "-> https://a:1/x"),
        ("http://a/v1/chat/completions", "without /v1/chat/completions: requests bring it along -> http://a"),
        ("http://a/x/chat/completions/", "without /chat/completions: requests bring it along -> http://a/x"),
        ("http://a/v1/completions", "-> http://a"),
        ("http://a/v1/models", "-> http://a"),
        ("http://a/tokenize", "-> http://a"),
        ("http://a b", "printable ASCII"),
        ("http://a/x y", "printable ASCII"),
        ("http://a/x\\ty", "printable ASCII"),
        ("http://ä", "printable ASCII"),
        ("http://a\\\\b", "printable ASCII"),
    ],
)
def test_what_is_no_url_of_a_backend(write: Any, url: str, message: str) -> None:
    line, _, place, found = problem(write(backend(f'url: "{url}"')))
    assert (line, place) == (3, "backends[0].url")
    assert message in found


@pytest.mark.parametrize(
    "host",
    [
        *(
            "169.254.169.254",
            "169.254.0.23",
            "[fe80::1]",
            "[fd00:ec2::254]",
            "[fd00:ec2:0:0:0:0:0:254]",
            "0xa9fea9fe",
        ),
        *(
            "[::ffff:169.254.169.254]",
            "2852039166",
            "169.254.43518",
            "0251.0376.0251.0376",
            "metadata",
            "100.100.100.200",
        ),
        *("metadata.google.internal", "Metadata.Google.Internal.", "169.254.169.254.", "[::ffff:a9fe:a9fe]"),
    ],
)
def test_metadata_services_are_never_backends(write: Any, host: str) -> None:
    assert "metadata or link-local" in problem(write(backend(f"url: 'http://{host}:80/'")))[3]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("site: 'a b'", "backends[0].site", "letters, digits"),
        ("slots: 0", "backends[0].slots", "at least 1"),
        ("slots: many", "backends[0].slots", "'auto' or"),
        ("weight: -1", "backends[0].weight", "at least 0"),
        ("weight: .inf", "backends[0].weight", "expected a number"),
        ("models: []", "backends[0].models", "at least 1"),
        ("models: m", "backends[0].models", "'auto' or a list"),
        ("engine: tgi", "backends[0].engine", "vllm"),
        ("site: remote", "backends[0].site", "every site but `local`"),
        ("api_key_env: sk-live-1", "backends[0].api_key_env", "no name of an environment variable"),
        ("api_key_env: A, api_key_file: b", "backends[0].api_key_file", "not both"),
        ("tls: {certificate: a}", "backends[0].tls", "both certificate and key"),
        ("price: {input: x, output: 1}", "backends[0].price.input", "not a decimal number"),
        ("price: {input: 1, output: true}", "backends[0].price.output", "not a decimal number"),
        ("price: {input: 1, output: 1, cached_input: -1}", "backends[0].price.cached_input", "between 0 and"),
        ("price: {input: 1, output: 1e9}", "backends[0].price.output", "between 0 and"),
        ("prices: {m: {input: 1, output: 1, currency: ''}}", "backends[0].prices.m.currency", "needs one"),
        ("price: {input: 1}", "backends[0].price.output", ""),
        (
            "price: {input: 1, output: 1}, prices: {m: {input: 1, output: 1, currency: CNY}}",
            "backends[0].price",
            "one ledger has one currency: it is CNY, and here USD, which a price without a currency is in",
        ),
        (
            "price: {input: 1, output: 1, currency: CNY}, prices: {m: {input: 1, output: 1}}",
            "backends[0].prices.m",
            "it is CNY, and here USD, which a price without a currency is in",
        ),
        (
            "price: {input: 1,20, output: 2}",
            "backends[0].price.20",
            "behind a point, not a comma -> input: 1.20",
        ),
        ("prices: {m: {20, input: 1, output: 2}}", "backends[0].prices.m.20", "not a comma"),
        ("price: {input: '1,20', output: 2}", "backends[0].price.input", "not a decimal number -> 1.20"),
        ("bandwidth: 0", "backends[0].bandwidth", "more than 0"),
    ],
)
def test_problems_of_a_backend(write: Any, text: str, place: str, message: str) -> None:
    _, _, found_place, found = problem(write(backend("url: 'http://a', " + text)))
    assert found_place == place
    assert message in found


def test_a_site_need_not_be_described(write: Any) -> None:
    (section,) = load_config(write(ONE.replace("'}", "', site: moon}"))).backends
    assert section.site == "moon"


def test_prices_are_kept_as_written(write: Any) -> None:
    text = (
        "url: 'http://a', price: {input: 0.10, output: 1e-7, currency: CNY}, "
        "prices: {m: {input: '2', output: 3, currency: CNY}}"
    )
    config = load_config(write(backend(text)))
    price = config.backends[0].price
    assert price is not None
    assert (price.input, price.output, config.ledger_currency) == ("0.1", "1e-07", "CNY")


async def test_a_price_without_a_currency_is_in_that_of_the_file(write: Any) -> None:
    text = backend("url: 'http://a', price: {input: 1, output: 1}")
    config = load_config(write(text + "currency: CNY\n"))
    built = build(config, asyncio.get_running_loop(), 0)
    assert (config.ledger_currency, built.prices.cost("a", "m", 1, 0, 0)) == ("CNY", (1000, "CNY"))
    assert load_config(write(text)).ledger_currency == "USD"
    other = text.replace("output: 1", "output: 1, currency: EUR")
    line, column, place, message = problem(write(other + "currency: CNY\n"))
    assert (line, place) == (3, "backends[0].price.currency")
    assert other.splitlines()[2][column - 1 :].startswith("EUR")
    assert message == "one ledger has one currency: it is CNY, and here EUR"


@pytest.mark.parametrize("location", ["[91, 0]", "[0, 181]", "[-91, 0]", "[0]", "[1, 2, 3]"])
def test_locations(write: Any, location: str) -> None:
    assert problem(write(ONE + f"sites: {{nj: {{location: {location}}}}}\n"))[2].startswith(
        "sites.nj.location"
    )
    assert load_config(write(ONE + "sites: {nj: {location: [-90, 180]}}\n")).sites["nj"].location == (
        -90,
        180,
    )


# Fields that go on


@pytest.mark.parametrize("name", sorted(name.decode() for name in NEVER_FORWARDED))
def test_fields_that_stay_here(write: Any, name: str) -> None:
    for written in (name, name.title()):
        assert "cannot be passed on" in problem(write(ONE + f"forward_headers: [X-Own, {written}]\n"))[3]


@pytest.mark.parametrize("name", ["", "a b", "a:b", "Ä", "x\\n"])
def test_what_is_no_field(write: Any, name: str) -> None:
    assert "not the name of a header field" in problem(write(ONE + f'forward_headers: ["{name}"]\n'))[3]


@given(
    st.text(max_size=12)
    | st.sampled_from(["Content_Length", "content-length", "x-own", "Cookie", "transfer_encoding"])
)
def test_whatever_may_be_forwarded_the_grammar_forwards(name: str) -> None:
    try:
        config = Config.model_validate(
            {"backends": [{"name": "a", "url": "http://a"}], "forward_headers": [name]}
        )
    except ValidationError:
        return
    head = RequestGrammar(forward=tuple(config.forward_headers)).parse(
        b"GET / HTTP/1.1\r\nHost: a\r\n" + name.encode() + b": v\r\n\r\n"
    )
    assert isinstance(head, tuple)
    assert head[0].forward == name.lower().encode() + b": v\r\n"


# Addresses


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("[::1]:0", ("::1", 0)),
        ("localhost:80", ("localhost", 80)),
        (":80", ("", 80)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "a", "a:", "a:b", "a:-1", "a:٣", "a:1.5", "a: 80"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(BadValueError):
        split_address(address)


def test_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "localhost"]))
    assert not any(
        map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com", ""])
    )


# Without a file


def test_flags() -> None:
    config = config_from_flags(["http://127.0.0.1:8000"], ["nj=https://nj.example"], listen="127.0.0.1:0")
    assert [(b.name, b.url, b.site) for b in config.backends] == [
        ("local", "http://127.0.0.1:8000", "local"),
        ("nj", "https://nj.example", "nj"),
    ]
    assert (list(config.sites), config.listen) == (["nj"], "127.0.0.1:0")
    several = config_from_flags(["http://a", "b=http://b", "http://c"], [])
    assert [(b.name, b.url) for b in several.backends] == [
        ("local-1", "http://a"),
        ("b", "http://b"),
        ("local-3", "http://c"),
    ]


def test_bad_flags() -> None:
    with pytest.raises(BadValueError, match="NAME=URL"):
        config_from_flags([], ["https://nj.example"])
    for local, remote in ((["a:8000"], []), ([], ["nj=nj.example"]), ([], []), ([], ["n j=http://a"])):
        with pytest.raises(ValidationError):
            config_from_flags(local, remote)


def test_settings_from_elsewhere_are_checked() -> None:
    config = config_from_flags(["http://a"], [])
    changed = override(config, {"listen": "127.0.0.1:0"})
    assert (changed.listen, changed.backends) == ("127.0.0.1:0", config.backends)
    with pytest.raises(ValidationError):
        override(config, {"listen": "nowhere"})


def test_what_is_a_policy_file() -> None:
    assert all(map(is_policy_file, ["a.yaml", "a.yml", "./a", "/a/b"]))
    assert not any(map(is_policy_file, ["local-first", "a"]))


# Keys of backends


def section(**fields: Any) -> BackendConfig:
    return BackendConfig(name="a", url="http://a", **fields)


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(" sk-file\n")
    monkeypatch.setenv("A_KEY", " sk-env ")
    assert backend_key(section()) is None
    assert backend_key(section(api_key_file=file)) == "sk-file"
    assert backend_key(section(api_key_env="A_KEY")) == "sk-env"


@pytest.mark.parametrize("value", ["", " \n", "a b", "a\nb", "ä", "a\x00b"])
def test_bad_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    file = tmp_path / "key"
    file.write_text(value)
    with pytest.raises(BadValueError, match="backend a"):
        backend_key(section(api_key_file=file))
    if "\x00" not in value:
        monkeypatch.setenv("A_KEY", value)
        with pytest.raises(BadValueError, match="backend a"):
            backend_key(section(api_key_env="A_KEY"))


def test_a_key_in_the_place_of_its_variable_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some keys could be names of variables."""
    monkeypatch.delenv("hf_abcDEF", raising=False)
    with pytest.raises(BadValueError) as caught:
        backend_key(section(api_key_env="hf_abcDEF"))
    assert (
        caught.value.message == "backend a: the variable that api_key_env names is not set in the environment"
    )


def test_keys_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(BadValueError, match="A_KEY is not set"):
        backend_key(section(api_key_env="A_KEY"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for file in (tmp_path / "nowhere", tmp_path / "binary", tmp_path):
        with pytest.raises(BadValueError, match="backend a"):
            backend_key(section(api_key_file=file))


def test_an_error_never_shows_the_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-very secret")
    with pytest.raises(BadValueError) as caught:
        backend_key(section(api_key_file=file))
    assert "secret" not in str(caught.value)


def test_the_schema_is_json_and_describes_everything() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    for name, definition in [("Config", schema), *schema["$defs"].items()]:
        for field, description in definition.get("properties", {}).items():
            assert "description" in description, f"{name}.{field}"


@pytest.mark.parametrize("host", ["api.example.com", "8.8.8.8", "[2606:4700::1]"])
def test_a_public_address_is_not_local_by_saying_nothing(write: Any, host: str) -> None:
    text = "backends:\n  - {name: a, url: 'https://%s'%s}\n"
    found = problem(write(text % (host, "")))
    assert "site: NAME" in found[3]
    assert load_config(write(text % (host, ", site: local"))).backends[0].site == "local"
    assert config_from_flags([f"https://{host}"], []).backends[0].site == "local"


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "[fd00::1]", "localhost", "vllm", "gpu.lan"])
def test_an_address_of_the_own_network_may_say_nothing(write: Any, host: str) -> None:
    assert (
        load_config(write(f"backends: [{{name: a, url: 'http://{host}:8000'}}]\n")).backends[0].site
        == "local"
    )
