"""The documentation is complete and true: tables, links, commands, examples."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import cast, get_args

import pytest
from prometheus_client.core import CounterMetricFamily
from pydantic import BaseModel

from policies.files import library_names
from proxy import records
from proxy.admin.http import admin_app, state
from proxy.config import Config, load_config
from proxy.config_sections import Timeouts
from proxy.endpoints import TABLE
from proxy.errors import STATUS, RequestError
from proxy.metrics import Metrics
from proxy.observe import Observer
from proxy.requestlog import RequestLog
from tests import doc_tables
from tests.commands import Command, commands
from tests.pages import ROOT, Page, first_codes, page, pages, rows
from tests.proxy.fakes import FakeClient, World, answer_body, whole

PAGES = pages()
COMMANDS = {command.name: command for command in commands()}
EXAMPLE = ROOT / "examples" / "tidegate.yaml"
UNIT = (ROOT / "deploy" / "tidegate.service").read_text(encoding="utf-8")
HELP = {"--help", "-h", "--version", "--install-completion", "--show-completion"}

each_page = pytest.mark.parametrize("one", PAGES, ids=repr)
each_command = pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)


# What is made from the program


@each_page
def test_tables_from_the_code_are_those_of_the_code(one: Page) -> None:
    assert doc_tables.renewed(one.text) == one.text, "`python -m tests.doc_tables` writes them anew"


def test_every_table_from_the_code_is_on_its_page() -> None:
    wanted = {
        "README": {"policies"},
        "policies": {"guide files", "guide policies"},
        "configuration": {f"keys {name}" for name in doc_tables.SECTIONS} | {"options serve"},
        "commands": {f"options {name}" for name in COMMANDS},
        "operations": {"metrics"},
        "architecture": {"states"},
        "simulator": {"predictions"},
    }
    for name, tables in wanted.items():
        assert set(doc_tables.tables(page(name).text)) == tables, name


def test_every_section_of_the_configuration_has_a_table() -> None:
    assert _models(Config) == set(doc_tables.SECTIONS.values())


def _models(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            hint = waiting.pop()
            if isinstance(hint, type) and issubclass(hint, BaseModel):
                found |= _models(hint)
            waiting += get_args(hint)
    return found


# README


def test_readme_starts_a_user_in_a_minute() -> None:
    lines = page("README").text.splitlines()
    assert len([line for line in lines if not line.startswith("| `")]) <= 112, "besides a row for each policy"
    assert "    make run" in lines[:10]


def test_readme_names_the_ready_policy_files() -> None:
    assert set(library_names()) <= set(re.findall(r"`([a-z-]+)`", page("README").section("Policies")))


def test_every_page_is_in_the_index() -> None:
    index = set(Page(ROOT / "docs" / "README.md").links)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - index == {"README.md"}
    assert "docs/README.md" in page("README").links


# Links


@each_page
def test_links_lead_somewhere(one: Page) -> None:
    for link in one.links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (one.path.parent / name).resolve() if name else one.path
        assert target.exists(), f"{one!r}: {link}"
        if anchor:
            assert anchor in Page(target).anchors, f"{one!r}: {link}"


# Commands


@each_page
def test_commands_and_options_that_are_shown_exist(one: Page) -> None:
    for words in one.commands():
        _check_words(words, f"{one!r}: tidegate {shlex.join(words)}")


def _check_words(words: list[str], where: str) -> None:
    plain = [word for word in words if re.fullmatch(r"[a-z]+", word)][:2]
    if not words or words[0] in HELP or not re.fullmatch(r"[a-z]+", words[0]):
        return  # a placeholder, as in `tidegate COMMAND --help`
    command = COMMANDS.get(" ".join(plain)) or COMMANDS.get(words[0])
    if command is None:
        assert words == ["keys"], where
        return
    options = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert options <= command.names | HELP, where


@each_command
def test_help_shows_an_example_that_could_be_typed(command: Command) -> None:
    shown = re.search(r"Example: tidegate (.*)", command.help.replace("\n", " "))
    assert shown is not None
    words = shlex.split(re.split(r"[|>]", shown[1])[0])
    assert words[: len(command.name.split())] == command.name.split()
    _check_words(words, shown[0])


@each_command
def test_every_option_says_what_it_means(command: Command) -> None:
    for option in command.options:
        assert re.match(r"[A-Z`].*[.]$|[a-z].*[.]$", option.help), option


def test_the_service_starts_a_command_that_exists_and_waits_for_its_drain() -> None:
    start = re.search(r"^ExecStart=/opt/tidegate/.venv/bin/tidegate (.*)$", UNIT, re.M)
    assert start is not None
    _check_words(shlex.split(start[1]), start[0])
    stop = re.search(r"^TimeoutStopSec=(\d+)s$", UNIT, re.M)
    assert stop is not None
    assert float(stop[1]) >= Timeouts().drain + 15


# Configuration


def test_the_shortest_configuration_is_one(tmp_path: Path) -> None:
    (text,) = [block.text for block in page("configuration").blocks if block.file == "tidegate.yaml"]
    (tmp_path / "tidegate.yaml").write_text(text)
    loaded = load_config(tmp_path / "tidegate.yaml")
    assert [backend.site for backend in loaded.backends] == ["local", "nanjing"]


def test_the_full_configuration_has_every_key_and_shows_the_defaults() -> None:
    loaded, text = load_config(EXAMPLE), EXAMPLE.read_text(encoding="utf-8")
    for model in doc_tables.SECTIONS.values():
        for key in model.model_fields:
            assert re.search(rf"(?:^|[\s{{]){key}:", text), f"{model.__name__}.{key}"
    for name in ("timeouts", "limits", "retries", "probing"):
        assert getattr(loaded, name) == Config.model_fields[name].get_default(call_default_factory=True), name
    rest = ("listen", "admin", "policy", "budget_zone", "durability", "log", "recent", "media_urls")
    for name in (*rest, "forward_headers"):
        assert getattr(loaded, name) == Config.model_fields[name].get_default(call_default_factory=True), name


def test_examples_of_configurations_are_right(tmp_path: Path) -> None:
    """Every block of YAML that is a piece of a configuration, with a backend where it has none."""
    count = 0
    for one in PAGES:
        for block in one.blocks:
            other = "rules:" in block.text or "clients:" in block.text or "fleet" in block.marks
            if block.language != "yaml" or other:
                continue
            backend = (
                "" if "backends:" in block.text else "\nbackends: [{name: a, url: 'http://127.0.0.1:1'}]\n"
            )
            file = tmp_path / "tidegate.yaml"
            file.write_text(block.text + backend)
            load_config(file)
            count += 1
    assert count > 3


def test_every_library_file_is_ready_to_copy() -> None:
    assert sorted(path.stem for path in (ROOT / "policies" / "library").glob("*.yaml")) == library_names()


# API


def test_every_error_has_its_status_and_its_meaning() -> None:
    table = {row[0].strip("`"): (int(row[1]), row[2]) for row in rows(page("api").section("Errors"))}
    assert {code: status for code, (status, _) in table.items()} == STATUS
    assert all(meaning for _, meaning in table.values())


def test_every_endpoint_is_listed() -> None:
    served = {path for route in TABLE for path in (route.path, *route.aliases)}
    served |= {"/v1/models", "/v1/models/{id}"}
    assert set(first_codes(page("api").section("Endpoints"))) == served


def test_headers_of_an_answer_are_listed() -> None:
    world = World("a")
    asked = world.start(stream=False)
    world.connects("a").data_received(whole(200, answer_body()))
    sent = {name for name in cast("FakeClient", asked.client).read().fields if name.startswith("x-")}
    listed = first_codes(page("api").section("Response headers"))
    assert {name for name in listed if name.startswith("x-") and "ratelimit" not in name} == sent


# Operations


def test_every_path_of_the_admin_port_is_listed() -> None:
    app = admin_app(World("a").runtime, 0.0)
    served = {resource.canonical for resource in app.router.resources()}
    assert set(first_codes(page("operations").section("Is it well?"))) == served


def test_every_key_of_state_is_listed() -> None:
    world = World("a")
    shown = state(world.runtime, 0.0)
    top, backend = page("operations").section("`/state`").split("Each backend:")
    assert set(first_codes(top)) == set(shown)
    assert set(first_codes(backend)) == set(shown["backends"][0])
    for name in ("queue", "requests", "tokens", "ledger", "connections"):
        said = " ".join(row[1] for row in rows(top) if name in row[0])
        assert not [key for key in shown[name] if f"`{key}`" not in said], name


def test_every_field_of_the_request_log_is_listed(tmp_path: Path) -> None:
    log = RequestLog.to(str(tmp_path / "log"))
    assert log is not None
    log.write(("id", records.Row("op")))
    Observer(0, log).rejected(RequestError("not_found", "no such path"), "127.0.0.1", None, "id")
    log.close()
    ended, refused = map(json.loads, (tmp_path / "log").read_text().splitlines())
    table, shorter = re.split(r"has\s+a\s+shorter\s+line:", page("operations").section("The request log"))
    assert set(first_codes(table)) == set(ended)
    assert set(re.findall(r"`(\w+)`", shorter)) == set(refused)


def test_metrics_that_are_named_exist() -> None:
    known = set()
    for family in Metrics(World("a").runtime).collect():
        known.add(f"{family.name}_total" if isinstance(family, CounterMetricFamily) else family.name)
    for one in PAGES:
        named = set(re.findall(r"\btidegate_[a-z_]+|\bgen_ai_server_[a-z_]+", one.text))
        assert named <= known, one


def test_every_outcome_is_explained() -> None:
    assert set(first_codes(page("metering").text.partition("| outcome |")[2].partition("\n\n")[0])) == set(
        records.OUTCOMES
    )
