"""From a configuration to providers, and what is refused on the way with its line."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from policies.units import BadValueError
from proxy.build import ConfigError, build
from proxy.check import check_file
from proxy.config import BackendConfig, load_config
from proxy.scaling import providers
from proxy.scaling.command import CommandProvider
from proxy.scaling.process import ProcessProvider
from proxy.scaling.providers import check_standby, facts_of, provider_of
from proxy.scaling.scheduler import SchedulerProvider
from proxy.scaling.seams import provided
from proxy.scaling.sections import SchedulerPlatform
from proxy.scaling.sleep import SleepProvider
from proxy.scaling.webhook import WebhookProvider

FILE = """\
state: data
backends:
  - name: a
    url: http://127.0.0.1:8001
    models: [m]
    standby:
      process:
        command: [./serve.sh, "{prot}"]
        directory: .
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tidegate.yaml"
    path.write_text(FILE)
    return path


def test_check_and_start_refuse_what_cannot_work_and_name_the_field(file: Path) -> None:
    report = check_file(file, None)
    assert not report.ok
    assert [(problem.line, problem.path) for _, problem in report.problems] == [
        (8, "backends[0].standby.process.command[0]"),
        (8, "backends[0].standby.process.command[1]"),
    ]
    missing, placeholder = (problem for _, problem in report.problems)
    assert missing.message == f"there is no file {file.parent / 'serve.sh'}"
    assert placeholder.suggestion == "{port}"
    loop = asyncio.new_event_loop()
    with pytest.raises(ConfigError, match=r"tidegate.yaml:8:.*there is no file"):
        build(load_config(file), loop, 1, path=file)
    loop.close()


def test_what_can_work_is_not_refused(file: Path) -> None:
    file.write_text(FILE.replace("prot", "port"))
    script = file.with_name("serve.sh")
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert check_file(file, None).ok
    config = load_config(file)
    assert not list(check_standby(config.backends[0], config.state))
    assert not (file.parent / "data").exists()


def test_paths_are_relative_to_the_file(file: Path) -> None:
    (section,) = load_config(file).backends
    assert section.standby is not None
    process = section.standby.process
    assert process is not None
    assert process.command == [str(file.parent / "serve.sh"), "{prot}"]
    assert process.directory == file.parent
    file.write_text(
        FILE.replace('command: [./serve.sh, "{prot}"]', "vllm: {model: ./m, executable: bin/vllm}")
    )
    (section,) = load_config(file).backends
    assert section.standby is not None
    assert section.standby.process is not None
    recipe = section.standby.process.vllm
    assert recipe is not None
    assert (recipe.model, recipe.executable) == (str(file.parent / "m"), str(file.parent / "bin/vllm"))
    file.write_text(FILE.replace('command: [./serve.sh, "{prot}"]', "vllm: {model: org/m}"))
    (section,) = load_config(file).backends
    assert section.standby is not None
    assert section.standby.process is not None
    assert section.standby.process.vllm is not None
    assert section.standby.process.vllm.model == "org/m"
    assert section.standby.process.vllm.executable == "vllm"


def backend(**standby: object) -> BackendConfig:
    fields = {"name": "a", "url": "http://127.0.0.1:1", "models": ["m"], "standby": standby}
    return BackendConfig.model_validate(fields)


def test_each_kind_has_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = provider_of(backend(process={"command": ["true"]}), tmp_path, key="k")
    assert isinstance(made, ProcessProvider)
    assert isinstance(provider_of(backend(sleep={}), tmp_path), SleepProvider)
    assert isinstance(provider_of(backend(command={"command": ["true"]}), tmp_path), CommandProvider)
    assert isinstance(provider_of(backend(webhook={"url": "http://h.test"}), tmp_path), WebhookProvider)
    platform = SchedulerPlatform.model_validate({"url": "http://h.test", "secret_env": "HOOK"})
    monkeypatch.setenv("HOOK", "a-secret-of-16-b")
    placed = provider_of(backend(scheduler={"placement": "p"}), tmp_path, platform=platform)
    assert isinstance(placed, SchedulerProvider)
    facts = facts_of(backend(sleep={}), tmp_path, "k")
    assert (facts.key, facts.models, facts.directory) == ("k", ("m",), tmp_path / "standbys")
    assert "'k'" not in repr(facts)


def test_a_kind_that_is_not_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "CLASSES", {})
    section = backend(sleep={})
    (problem,) = check_standby(section, tmp_path)
    assert (problem.at, "sleep" in problem.message) == (("standby", "sleep"), True)
    with pytest.raises(BadValueError):
        provider_of(section, tmp_path)


def test_a_backend_without_standby_is_none(tmp_path: Path) -> None:
    plain = BackendConfig.model_validate({"name": "a", "url": "http://127.0.0.1:1"})
    assert not list(check_standby(plain, tmp_path))


def test_one_with_another_image_is_another() -> None:
    one, other = (backend(command={"command": ["true"]}, image=image) for image in ("a", "b"))
    assert provided(one) == provided(one.model_copy())
    assert provided(one) != provided(other)
