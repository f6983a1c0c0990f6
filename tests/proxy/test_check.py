from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
from typer.testing import CliRunner, Result

from policies.files import library_names, library_policy
from proxy.access.keys import create_key
from proxy.access.pepper import load_pepper
from proxy.build import load_policy, make_backends
from proxy.cli import app
from proxy.config import load_config
from proxy.database import open_database

CONFIG = """\
listen: 127.0.0.1:18480
backends:
  - {name: appliance, url: "http://127.0.0.1:8000", slots: 24}
  - name: nj-1
    url: https://nj.example:8443
    site: nanjing
    models: [m-1, m-2]
    price: {input: 0.27, output: "1.10", cached_input: 0.027, currency: CNY}
    prices: {m-2: {input: 2, output: 3, currency: CNY}}
sites:
  nanjing: {data_classes: [public, internal]}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


def reported(*arguments: str) -> Any:
    return json.loads(check(*arguments, "--json").stdout)


# Which file


def test_without_a_file_it_is_the_configuration_of_this_folder(folder: Path) -> None:
    found = check()
    assert found.exit_code == 2
    assert found.stderr == (
        "tidegate: there is no tidegate.yaml here: name a file, as in `tidegate check FILE`\n"
    )
    (folder / "tidegate.yaml").write_text(CONFIG)
    found = check()
    assert found.exit_code == 0
    assert found.stdout.startswith(
        "tidegate.yaml: 2 backends. API on 127.0.0.1:18480, admin on 127.0.0.1:8081."
    )
    (folder / "other.yaml").write_text(CONFIG)
    assert reported("--config", "other.yaml")["file"] == "other.yaml"


def test_what_cannot_be_read_is_told_in_words(folder: Path) -> None:
    found = check("nowhere.yaml")
    assert (found.exit_code, found.stderr) == (1, "nowhere.yaml: no such file or directory\n")
    (folder / "binary.yaml").write_bytes(b"\xff")
    assert check("binary.yaml").stderr == "binary.yaml: the file is not UTF-8 text\n"


# A configuration


def test_a_configuration_is_read_back(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG)
    text = check().stdout
    for said in (
        f"Keys and ledger in {folder}/tidegate-data, money in CNY. Policy: local-first of the library.",
        "  appliance at site local, http://127.0.0.1:8000\n"
        "    24 slots; whatever models it serves; may see all data classes\n"
        "    no price: its usage counts as unpriced\n",
        "  nj-1 at site nanjing, https://nj.example:8443\n"
        "    as many slots as its engine says (until then 32); m-1, m-2; may see data class internal, public\n"
        "    per million tokens 0.27 CNY in (0.027 if cached), 1.10 CNY out\n"
        "    model m-2: per million tokens 2 CNY in, 3 CNY out\n",
        "\nlocal-first: 1 rule, for every request.\n",
    ):
        assert said in text


STANDBYS = """\
backends:
  - name: a
    url: http://127.0.0.1:8000
    models: [m]
    site: nanjing
    standby: {sleep: {}, cost_per_hour: 10}
sites: {nanjing: {}}
currency: CNY
scaling:
  mode: confirm
  budgets: {month: 2000, sites: {nanjing: 800}}
"""


def test_standbys_are_told_of_with_their_money(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(STANDBYS)
    text = check().stdout
    for said in (
        "\n    standby: runs when it is needed, by `sleep`; 10 CNY an hour\n",
        "\nStandbys are started when somebody has approved it.\n"
        "A month costs at most, in CNY: 2000 at all remote sites, 800 at nanjing.\n",
    ):
        assert said in text


TEMPLATES = """\
templates:
  rush: {model: m, sites: [nanjing]}
  night: {model: m, cards: [H20]}
"""


def test_templates_that_cannot_work_are_refused_with_their_field(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(STANDBYS)
    (folder / "tidegate-data").mkdir()
    file = folder / "tidegate-data" / "templates.yaml"
    file.write_text(TEMPLATES)
    said = (
        "3:28: templates.night.cards: none of them fits; the nearest is 'a', which has no card that is known"
    )
    found = check()
    assert found.exit_code == 1
    assert found.stderr.startswith(f"{file}:{said}, and not H20")
    (problem,) = reported()["problems"]
    assert (problem["file"], problem["path"]) == (str(file), "templates.night.cards")
    assert check(str(file)).stderr == found.stderr
    assert reported(str(file))["kind"] == "templates"
    file.write_text(TEMPLATES.replace("H20", "H100").replace("  night", "# night"))
    assert f"\nTemplates in {file}: rush.\n" in check().stdout
    assert check(str(file)).stdout == f"{file}: rush\n"
    file.write_bytes(b"\xff")
    assert check().stderr.startswith(f"{file}:1:1: the file is not UTF-8 text")


def test_templates_may_wait_for_what_a_platform_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATFORM_SECRET", "a-secret-of-16-bytes")
    platform = "  scheduler: {url: 'http://127.0.0.1:9', secret_env: PLATFORM_SECRET}\n"
    (folder / "tidegate.yaml").write_text(STANDBYS + platform)
    (folder / "tidegate-data").mkdir()
    (folder / "tidegate-data" / "templates.yaml").write_text(TEMPLATES)
    found = check()
    assert found.exit_code == 0
    assert f"warning: {folder}/tidegate-data/templates.yaml:3:28: templates.night.cards: none" in found.stdout


def test_templates_without_a_configuration_are_read_at_least(folder: Path) -> None:
    (folder / "templates.yaml").write_text(TEMPLATES)
    assert check("templates.yaml").stdout.startswith("templates.yaml: rush, night; without a configuration")
    (folder / "templates.yaml").write_text(TEMPLATES.replace("cards", "card"))
    assert "templates.yaml:3:21: templates.night.card" in check("templates.yaml").stderr


PROFILE = """\
name: appliance
card: L40
model: m-1
step: {alpha_us: 50000, beta_us: 45, gamma_us: 0.2, delta_us: 260, source: {origin: derived, text: a test}}
limits: {source: {origin: derived, text: a test}}
"""
CAPACITY = (
    "capacity: {users: 17, prompt_tokens: 9, output_tokens: 9, source: {origin: measured, text: a test}}\n"
)


def test_slots_are_those_of_a_profile_unless_they_are_given(folder: Path) -> None:
    (folder / "a.yaml").write_text(PROFILE + CAPACITY)
    (folder / "tidegate.yaml").write_text(CONFIG.replace("slots: 24", "slots: auto, profile: a.yaml"))
    assert f"    17 slots, as {folder}/a.yaml says; " in check().stdout
    (folder / "tidegate.yaml").write_text(CONFIG.replace("slots: 24", "profile: a.yaml"))
    assert f"    17 slots, as {folder}/a.yaml says; " in check().stdout
    (folder / "tidegate.yaml").write_text(CONFIG.replace("slots: 24", "slots: 3, profile: a.yaml"))
    assert "    3 slots; " in check().stdout


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        (None, "a.yaml: no such file or directory"),
        (b"\xff", "a.yaml: not UTF-8 text"),
        (
            PROFILE.encode(),
            "a.yaml does not say how many users an SLA allows: give `slots`, or measure with one",
        ),
        (
            (PROFILE + CAPACITY.replace("17", "0")).encode(),
            "a.yaml serves nobody inside its SLA: give `slots`",
        ),
        ((PROFILE + CAPACITY.replace("17", "-1")).encode(), "a.yaml:6:"),
    ],
)
def test_a_profile_that_says_no_slots_is_a_mistake(folder: Path, profile: bytes | None, said: str) -> None:
    if profile is not None:
        (folder / "a.yaml").write_bytes(profile)
    (folder / "tidegate.yaml").write_text(CONFIG.replace("slots: 24", "profile: a.yaml"))
    found = check()
    assert found.exit_code == 1
    assert said in found.stderr


def test_a_profile_is_a_file_and_its_path_is_plain(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG.replace("slots: 24", "profile: h20-8-32b"))
    found = check()
    assert found.exit_code == 1
    assert f"{folder}/h20-8-32b: no such file or directory; here a profile is a file" in found.stderr
    (folder / "tidegate.yaml").write_text(CONFIG.replace("slots: 24", "profile: sub/../a.yaml"))
    assert f"{folder}/a.yaml: no such file or directory" in check().stderr


def test_no_password_is_read_back(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG + "database: postgresql://tide:s3cret@db/ledger\n")
    text = check().stdout
    assert "Keys and ledger in postgresql://tide:***@db/ledger, money in CNY." in text
    (folder / "tidegate.yaml").write_text(CONFIG + "database: {url: 'postgresql://tide:s3cret@db/ledger'}\n")
    assert "s3cret" not in check().stderr + check("--json").stdout


def test_what_is_written_for_nothing_is_warned_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NJ_KEY", raising=False)
    text = CONFIG.replace("site: nanjing", "site: nanjng\n    api_key_env: NJ_KEY")
    (folder / "tidegate.yaml").write_text(text + "  suzhou: {}\n")
    found = check()
    assert found.exit_code == 0
    assert found.stdout.splitlines()[:3] == [
        "warning: tidegate.yaml:7:18: backends[1].api_key_env: backend nj-1: NJ_KEY is not set in the environment",
        "warning: tidegate.yaml:12:3: sites.nanjing: no backend stands at site 'nanjing'; "
        "there is one at 'nanjng', which is not among the sites",
        "warning: tidegate.yaml:13:3: sites.suzhou: no backend stands at site 'suzhou'",
    ]
    assert [(warning["file"], warning["line"]) for warning in reported()["warnings"]] == [
        ("tidegate.yaml", 7),
        ("tidegate.yaml", 12),
        ("tidegate.yaml", 13),
    ]


@pytest.mark.parametrize(
    ("tls", "column", "said"),
    [
        ("{ca_file: nowhere.pem}", 20, "ca_file: backend b: {folder}/nowhere.pem: no such file or directory"),
        ("{ca_file: wrong.pem}", 20, "ca_file: backend b: {folder}/wrong.pem: cannot be used for TLS ("),
        ("{certificate: wrong.pem, key: nowhere.pem}", 40, "key: backend b: {folder}/nowhere.pem: no such"),
        ("{certificate: nowhere.pem, key: wrong.pem}", 24, "certificate: backend b: {folder}/nowhere.pem: "),
    ],
)
def test_files_for_tls_that_cannot_be_used_are_pointed_at(
    folder: Path, tls: str, column: int, said: str
) -> None:
    (folder / "wrong.pem").write_text("no certificate")
    backend = f'  - {{name: b, url: "https://b", site: b,\n    tls: {tls}}}\n'
    (folder / "tidegate.yaml").write_text(CONFIG.replace("sites:\n", f"{backend}sites:\n"))
    found = check()
    assert found.exit_code == 1
    place = f"tidegate.yaml:11:{column}: backends[2].tls."
    assert found.stderr.startswith(place + said.format(folder=folder))


def test_certificates_for_clients_are_tried_and_their_end_is_warned_of(folder: Path) -> None:
    made = trustme.CA().issue_cert("a.example", not_after=datetime(2020, 1, 1))
    (folder / "a.pem").write_bytes(made.cert_chain_pems[0].bytes())
    (folder / "a.key").write_bytes(made.private_key_pem.bytes())
    (folder / "tidegate.yaml").write_text(CONFIG + "tls:\n  - {certificate: a.pem, key: a.key}\n")
    (warning,) = reported()["warnings"]
    assert (warning["line"], warning["column"], warning["path"]) == (13, 19, "tls[0].certificate")
    assert warning["message"] == f"certificate {folder}/a.pem has expired: clients refuse it"
    (folder / "a.key").write_text("no key")
    found = check()
    assert found.exit_code == 1
    assert (
        f"tidegate.yaml:13:19: tls[0].certificate: {folder}/a.pem: cannot be used for TLS (" in found.stderr
    )


def test_the_end_of_a_certificate_for_a_backend_is_warned_of(folder: Path) -> None:
    authority = trustme.CA()
    made = authority.issue_cert("tidegate", not_after=datetime(2020, 1, 1))
    authority.cert_pem.write_to_path("ca.pem")
    (folder / "a.pem").write_bytes(made.cert_chain_pems[0].bytes())
    (folder / "a.key").write_bytes(made.private_key_pem.bytes())
    tls = "tls: {ca_file: ca.pem, certificate: a.pem, key: a.key}"
    (folder / "tidegate.yaml").write_text(CONFIG.replace("site: nanjing\n", f"site: nanjing\n    {tls}\n"))
    (warning,) = reported()["warnings"]
    assert (warning["line"], warning["path"]) == (7, "backends[1].tls.certificate")
    assert warning["message"] == f"backend nj-1: our certificate {folder}/a.pem has expired: it refuses us"


def test_models_that_nobody_serves_are_warned_of(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(
        """\
backends:
  - name: a
    url: http://a
    models: [qwen3-32b]
    price: {input: 1, output: 1}
    tls: {server_name: b}
    prices:
      qwen3-23b: {input: 1, output: 1}
      gpt-4: {input: 1, output: 1}
aliases: {gpt-4: qwen3-32b, gpt-5: qwen3-8b}
"""
    )
    assert check().stdout.splitlines()[:4] == [
        "warning: tidegate.yaml:8:7: backends[0].prices.qwen3-23b: backend a does not list model 'qwen3-23b': "
        "nothing ever costs this (did you mean 'qwen3-32b'?)",
        "warning: tidegate.yaml:9:7: backends[0].prices.gpt-4: backend a does not list model 'gpt-4': "
        "nothing ever costs this (did you mean 'qwen3-32b'?)",
        "warning: tidegate.yaml:10:36: aliases.gpt-5: no backend lists model 'qwen3-8b' "
        "(did you mean 'qwen3-32b'?)",
        "warning: tidegate.yaml:6:5: backends[0].tls: backend a is asked over plain http: `tls` says nothing",
    ]
    text = (folder / "tidegate.yaml").read_text()
    (folder / "tidegate.yaml").write_text(
        text.replace("models: [qwen3-32b]", "models: auto").replace("tls:", "# ")
    )
    assert "warning: tidegate.yaml" not in check().stdout, "whoever is asked may serve them all"


def test_two_backends_at_one_url_are_warned_of(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG.replace("https://nj.example:8443", "http://127.0.0.1:8000/"))
    assert check().stdout.splitlines()[0] == (
        "warning: tidegate.yaml:5:10: backends[1].url: backend appliance has this URL too: two names for one "
        "engine, whose slots count twice"
    )


def test_an_open_proxy_without_keys_is_told_as_serve_would(folder: Path) -> None:
    text = CONFIG.replace("127.0.0.1:18480", "0.0.0.0:8080")
    (folder / "tidegate.yaml").write_text(text)
    refusal = (
        "without keys the proxy listens on loopback only, not on 0.0.0.0:8080: make one first with "
        "`tidegate keys create --tenant NAME"
    )
    found = check()
    assert (found.exit_code, found.stdout.splitlines()[0]) == (
        0,
        f"warning: tidegate.yaml:1:9: listen: whether there are keys cannot be seen from here: {refusal}`",
    )
    assert not (folder / "tidegate-data").exists(), "a check leaves nothing behind"
    engine = open_database(folder / "tidegate-data")
    found = check()
    assert (found.exit_code, found.stderr.splitlines()[0]) == (1, f"tidegate.yaml:1:9: listen: {refusal}`")
    (folder / "other file.yaml").write_text(text)
    assert f"{refusal} --config 'other file.yaml'`" in check("other file.yaml").stderr
    create_key(engine, load_pepper(folder / "tidegate-data"), tenant="acme")
    engine.dispose()
    found = check()
    assert found.exit_code == 0
    assert "keys" not in found.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (
            "locl-first",
            "policy: no policy in the library is called 'locl-first' (did you mean 'local-first'?)",
        ),
        ("night.yaml", "policy: {folder}/night.yaml: no such file or directory"),
        ("binary.yaml", "policy: {folder}/binary.yaml: the file is not UTF-8 text"),
    ],
)
def test_a_policy_that_cannot_be_had_is_pointed_at(folder: Path, policy: str, said: str) -> None:
    (folder / "binary.yaml").write_bytes(b"\xff")
    (folder / "tidegate.yaml").write_text(CONFIG + f"policy: {policy}\n")
    found = check()
    assert found.exit_code == 1
    assert found.stderr.splitlines()[0] == f"tidegate.yaml:12:9: {said.format(folder=folder)}"


def test_mistakes_in_its_policy_file_are_told_with_that_file(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG + "policy: night.yaml\n")
    (folder / "night.yaml").write_text("rules:\n  - {name: all, sites: [mars]}\n")
    (problem,) = reported()["problems"]
    assert (problem["file"], problem["line"], problem["column"]) == (str(folder / "night.yaml"), 2, 25)


# A policy file


@pytest.mark.parametrize(
    ("policy", "said"), [("sites: [mars]", "but site mars"), ("sties: [mars]", "unknown key")]
)
def test_a_policy_file_is_checked_also_beside_a_broken_configuration(
    folder: Path, policy: str, said: str
) -> None:
    (folder / "tidegate.yaml").write_text("bakends: []\n")
    (folder / "night.yaml").write_text(f"rules:\n  - {{name: all, {policy}}}\n")
    found = check("night.yaml")
    assert found.exit_code == 1
    first, _, rest = found.stderr.partition(
        "\n\ntidegate.yaml cannot be used, so names of sites and backends"
    )
    assert "night.yaml" in first
    assert said in first
    assert "tidegate.yaml:1:1: bakends: unknown key" in rest
    report = reported("night.yaml")
    assert (report["file"], report["kind"], report["ok"]) == ("night.yaml", "policy", False)
    assert "tidegate.yaml" in [problem["file"] for problem in report["problems"]]


def test_a_configuration_that_is_not_there_is_said_beside_the_policy(folder: Path) -> None:
    (folder / "night.yaml").write_text("rules:\n  - {name: all}\n")
    found = check("night.yaml", "--config", "nowhere.yaml")
    assert found.exit_code == 1
    assert found.stderr.endswith("nowhere.yaml: no such file or directory\n")


def test_names_of_backends_in_parameters_are_checked(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG)
    (folder / "night.yaml").write_text(
        "rules:\n  - name: all\n    pick: {policy: weighted-qps, max_qps: {aplliance: 5, nj-1: 3}}\n"
    )
    found = check("night.yaml")
    assert found.exit_code == 1
    assert found.stderr.splitlines()[0] == (
        "night.yaml:3:44: rules[0].pick.max_qps.aplliance: unknown backend 'aplliance' "
        "(did you mean 'appliance'?)"
    )
    (problem,) = reported("night.yaml")["problems"]
    assert (problem["line"], problem["column"], problem["suggestion"]) == (3, 44, "appliance")


def test_a_secret_in_a_policy_file_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("rules: [{name: all, api_key: sk-verysecret}]\n")
    for result in (check(str(file)), check(str(file), "--json")):
        assert result.exit_code == 1
        assert "sk-verysecret" not in result.output


# What is on


def test_what_is_on_is_read_back_and_nothing_of_what_is_off(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG)
    words = ("adaptive", "Hedging", "Probes ask", "Heartbeats", "machine of site")
    text = check().stdout
    assert not any(word in text for word in words)
    on = CONFIG.replace("slots: 24", "slots: 24, adaptive: true").replace(
        "internal]}", 'internal], host: {node: "http://10.0.0.5:9100"}}'
    )
    on += "hedging: {after: p95}\nprobing: {generate: 5s}\ntimeouts: {heartbeat: 15s}\n"
    (folder / "tidegate.yaml").write_text(on)
    text = check().stdout
    for said in (
        "24 slots, fewer while it would only queue more (adaptive); ",
        "Hedging: a stream without its first token after 95 % had theirs is sent once more, 0.05 of all at most.",
        "Probes ask a backend for one token that has given clients none for 5 s.",
        "Heartbeats: a stream that waits for its first token gets a comment every 15 s.",
        "The machine of site nanjing is watched: node http://10.0.0.5:9100.",
    ):
        assert said in text


def test_what_probes_for_a_token_cost_is_warned_of(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG + "probing: {generate: 5s}\n")
    (warning,) = reported()["warnings"]
    assert warning["path"] == "probing.generate"
    # 720 an hour, at the dearer of two prices: 10 tokens in at 2 and one out at 3, for a million of them
    assert warning["message"] == (
        "backend nj-1 has a price: while no client asks, its probes cost up to 0.0166 CNY an hour "
        "(720 tokens, each for a prompt of some 10)"
    )
    (folder / "tidegate.yaml").write_text(CONFIG + "probing: {generate: 5s, enabled: false}\n")
    assert "its probes cost" not in check().stdout


def test_standbys_that_can_never_start_are_warned_of(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(STANDBYS)
    assert reported()["warnings"] == []
    dear = STANDBYS.replace("cost_per_hour: 10}", "cost_per_hour: 900, cold_start: 20m}")
    (folder / "tidegate.yaml").write_text(dear)
    assert [(one["path"].rpartition(".")[2], one["message"]) for one in reported()["warnings"]] == [
        ("cost_per_hour", "backend a never starts: an hour costs more than the budget of site nanjing, 800"),
        ("cold_start", "backend a never starts: it would take longer than `start_timeout`"),
    ]


def test_names_that_no_key_has_are_warned_of(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG + "policy: own.yaml\n")
    rules = "rules: [{name: a, when: {tenant: vpi, labels: {knid: batch}}}, {name: b}]"
    (folder / "own.yaml").write_text(rules)

    def told() -> list[list[str]]:
        return [
            [one["message"] for one in reported(*file)["warnings"] if "no key" in one["message"]]
            for file in ((), ("own.yaml",))
        ]

    assert told() == [[], []]
    assert not (folder / "tidegate-data").exists(), "a check leaves nothing behind"
    engine, pepper = open_database(folder / "tidegate-data"), load_pepper(folder / "tidegate-data")
    assert told() == [[], []], "without keys, everybody is let in"
    create_key(engine, pepper, tenant="vip", labels={"kind": "batch"})
    assert told() == [["no key has tenant 'vpi'", "no key has a label 'knid'"]] * 2
    create_key(engine, pepper, tenant="vpi", labels={"knid": "batch"})
    assert told() == [[], []]
    engine.dispose()


def test_a_policy_of_ones_own_is_tried_wherever_it_is_named(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG + "policy: own.yaml\n")
    (folder / "own.yaml").write_text("rules: [{name: a, pick: 'tests.policies.test_trial:Fails'}]")
    for file in ((), ("own.yaml",)):
        found = [one["message"] for one in reported(*file)["warnings"] if "fails" in one["message"]]
        assert len(found) == 1
        assert "fails when it is tried: TypeError: no such thing" in found[0]
    config = load_config(folder / "tidegate.yaml")
    assert load_policy(config, make_backends(config), 0).warnings == [], "what serves has it said by the log"


@pytest.mark.parametrize("name", library_names())
def test_a_policy_of_the_library_is_checked_by_its_name(folder: Path, name: str) -> None:
    (folder / "tidegate.yaml").write_text('backends: [{name: a, url: "http://127.0.0.1:8000"}]')
    for configured in (True, False):
        found = check(name)
        assert (found.exit_code, found.stdout.splitlines()[0].partition(":")[0]) == (0, name)
        assert json.loads(check(name, "--json").stdout)["warnings"] == []
        if configured:
            (folder / "tidegate.yaml").unlink()


def test_a_file_comes_before_a_policy_of_the_library_and_neither_is_told(folder: Path) -> None:
    (folder / "local-first").write_text("rules: [{name: mine, pick: random}]")
    assert "1. mine" in check("local-first").stdout
    found = check("local-frist")
    assert (found.exit_code, found.stderr) == (
        1,
        "local-frist: no such file, and no policy in the library is called 'local-frist' "
        "(did you mean 'local-first'?)\n",
    )
    assert "no such file or directory" in check("local-first.yaml").stderr


def test_the_library_is_as_it_should_be(folder: Path) -> None:
    """Without a remote backend a tier of it is empty; in a file of one's own that is worth a word."""
    local = 'backends: [{name: a, url: "http://127.0.0.1:8000"}]\n'
    (folder / "tidegate.yaml").write_text(local)
    assert (check().exit_code, reported()["warnings"]) == (0, [])
    (folder / "own.yaml").write_text(library_policy("local-first"))
    (folder / "tidegate.yaml").write_text(local + "policy: own.yaml\n")
    assert any("no backend is in this tier now" in found["message"] for found in reported()["warnings"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("limits: {memory: 10MiB}", "limits.memory: must be at least 64MiB, got '10MiB'"),
        ("limits: {memory: 1000}", "limits.memory: must be at least 67108864, got 1000"),
        (
            "hedging: {after: p99}",
            "hedging.after: expected a duration such as 500ms, `p95` or `off`, got 'p99' (did you mean 'p95'?)",
        ),
        ("hedging: {after: 1 sec}", "`p95` or `off`, got '1 sec' (did you mean '1s'?)"),
    ],
)
def test_bounds_and_choices_are_told_in_the_words_of_the_file(folder: Path, line: str, said: str) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG + line + "\n")
    assert said in check().stderr


def test_a_missing_certificate_and_its_key_are_both_told_and_their_paths_shown(folder: Path) -> None:
    (folder / "tidegate.yaml").write_text(CONFIG + "tls:\n  - {certificate: a.pem, key: a.key}\n")
    missing = f"{folder}/a.pem: no such file or directory; {folder}/a.key: no such file or directory"
    assert check().stderr == (
        f"tidegate.yaml:13:19: tls[0].certificate: {missing}\n"
        "  13 |   - {certificate: a.pem, key: a.key}\n"
        "     |                   ^\n"
    )
    tls = "tls: {certificate: b.pem, key: b.key}"
    (folder / "tidegate.yaml").write_text(CONFIG.replace("site: nanjing\n", f"site: nanjing\n    {tls}\n"))
    missing = f"{folder}/b.pem: no such file or directory; {folder}/b.key: no such file or directory"
    assert f"tls.certificate: backend nj-1: {missing}" in check().stderr
