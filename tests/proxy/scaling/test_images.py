"""What runs a model on a card, and what is said where nothing does."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from policies.yamlfile import FileProblems
from proxy.cli import register
from proxy.config import BackendConfig
from proxy.scaling.images import (
    FIELDS,
    PROTOCOLS,
    TASKS,
    Entry,
    Images,
    Launch,
    Missing,
    Wanted,
    card_name,
    load_images,
    read_images,
    shipped_file,
)
from proxy.scaling.offers import offer

MODELS = ["qwen3-32b", "qwen3-8b", "llama-70b"]
CARDS = ["H20", "V100", "910B"]
model_patterns = st.lists(st.sampled_from([*MODELS, "qwen3-*", "*"]), min_size=1, max_size=2)
card_patterns = st.lists(st.sampled_from([*CARDS, "9*", "*"]), min_size=1, max_size=2)
entries = st.lists(
    st.builds(
        Entry,
        models=model_patterns,
        cards=card_patterns,
        tasks=st.lists(st.sampled_from(TASKS), min_size=1, max_size=2),
        protocols=st.lists(st.sampled_from(PROTOCOLS), min_size=1),
        image=st.uuids().map(str),
        source=st.just("made up"),
    ),
    max_size=6,
)
wanted = st.builds(
    Wanted,
    st.sampled_from(MODELS),
    st.sampled_from(CARDS),
    st.sampled_from(TASKS),
    st.sampled_from(PROTOCOLS),
)


def entry(image: str, **fields: list[str]) -> Entry:
    return Entry.model_validate({"image": image, "source": "made up", **fields})


def fits(one: Entry, asked: Wanted) -> bool:
    return isinstance(Images([one]).find(asked), Entry)


# Laws


@given(entries, wanted)
def test_what_is_found_fits_and_what_is_missing_does_not_exist(listed: list[Entry], asked: Wanted) -> None:
    found = Images(listed).find(asked)
    if isinstance(found, Missing):
        assert not any(fits(one, asked) for one in listed)
        assert (found.nearest is None) == (not listed)
    else:
        assert fits(found, asked)


@given(entries, wanted, st.sampled_from(FIELDS))
def test_the_most_specific_wins(listed: list[Entry], asked: Wanted, name: str) -> None:
    """One that names a field of what is asked, and is otherwise the same, goes before what was found."""
    found = Images(listed).find(asked)
    assume(isinstance(found, Entry))
    assert isinstance(found, Entry)
    key = f"{name}s"
    sharper = found.model_copy(update={key: [getattr(asked, name)], "image": "sharper"})
    again = Images([*listed, sharper]).find(asked)
    exact = getattr(asked, name) in getattr(found, key)
    assert again is (found if exact else sharper)


@given(entries, wanted)
def test_the_nearest_fits_once_what_differs_is_as_it_says(listed: list[Entry], asked: Wanted) -> None:
    found = Images(listed).find(asked)
    assume(isinstance(found, Missing) and found.nearest is not None)
    assert isinstance(found, Missing)
    assert found.nearest is not None
    literal = {name: patterns[0].replace("*", "") for name, patterns in found.differs.items()}
    changed = replace(asked, **literal)
    assert fits(found.nearest, changed)
    for name in found.differs:
        kept = replace(changed, **{name: getattr(asked, name)})
        assert not fits(found.nearest, kept), "every difference that is named keeps it from fitting"


@given(entries, wanted)
def test_nothing_that_does_not_fit_is_nearer_than_the_nearest(listed: list[Entry], asked: Wanted) -> None:
    weights = {"card": 8, "model": 4, "task": 2, "protocol": 1}

    def distance(one: Entry) -> int:
        alone = Images([one]).find(asked)
        return sum(weights[name] for name in alone.differs) if isinstance(alone, Missing) else 0

    found = Images(listed).find(asked)
    assume(isinstance(found, Missing) and found.nearest is not None)
    assert isinstance(found, Missing)
    assert found.nearest is not None
    assert distance(found.nearest) == min(map(distance, listed))


def test_of_equals_the_first_wins() -> None:
    first, second = entry("first"), entry("second")
    assert Images([first, second]).find(Wanted("m", "c")) is first


def test_a_model_weighs_more_than_a_card() -> None:
    by_model, by_card = entry("a", models=["qwen3-32b"]), entry("b", cards=["H20"])
    assert Images([by_card, by_model]).find(Wanted("qwen3-32b", "H20")) is by_model


@pytest.mark.parametrize("name", ["NVIDIA L40S", "l40s", "  L40S ", "nvidia-L40S", "Tesla L40S"])
def test_cards_are_compared_without_their_vendor(name: str) -> None:
    assert card_name(name) == "l40s"
    assert fits(entry("a", cards=["NVIDIA L40S"]), Wanted("m", name))


def test_places_are_filled_in() -> None:
    one = Entry(cards=["H20"], image="i", arguments=["{model}", "--tp={cards}", ":{port}"], source="s")
    assert Images([one]).launch(Wanted("Org/M", "h20"), 4, 9000) == Launch(
        "i", (), ("Org/M", "--tp=4", ":9000"), {}, "s"
    )


# Files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "images:\n  - {image: a, command: [b], source: s}",
            "2:13: images[0].image: give `image` or `command`",
        ),
        ("images:\n  - {image: a}", "images[0].source"),
        ("images:\n  - {image: a, source: s, arguments: ['{gpu}']}", "{gpu} is not known"),
        ("images:\n  - {image: a, source: s, tasks: [chat]}", "2:35: images[0].tasks[0]"),
        ("images:\n  - {image: a, source: s, card: [H20]}", "did you mean 'cards'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(text: str, said: str) -> None:
    with pytest.raises(FileProblems) as caught:
        read_images(text, "own.yaml")
    assert "own.yaml:2:" in str(caught.value)
    assert said in str(caught.value)


def test_a_file_of_ones_own_goes_first(tmp_path: Path) -> None:
    own = tmp_path / "images.yaml"
    own.write_text("images:\n  - {image: mine, cards: [H20, MLU370], source: our registry}\n")
    images = load_images(own)
    assert str(images.launch(Wanted("m", "MLU370"))) == "mine"
    assert str(images.launch(Wanted("m", "H20"))) == "mine"
    assert str(images.launch(Wanted("m", "A100"))).startswith("vllm/vllm-openai:")


# The shipped one


@pytest.mark.parametrize("card", ["H20", "L40", "L20", "A100", "V100", "cpu", "910B"])
def test_the_white_papers_cards_have_an_image(card: str) -> None:
    found = load_images().launch(Wanted("Qwen/Qwen3-32B", card), cards=2)
    assert isinstance(found, Launch)
    assert "Qwen/Qwen3-32B" in found.arguments
    assert ":v" in found.image, "a version, so that tomorrow's start is today's"
    assert "https://" in found.source


def test_volta_gets_the_last_image_that_runs_there() -> None:
    found = load_images().launch(Wanted("m", "V100"))
    assert isinstance(found, Launch)
    assert found.environment == {"VLLM_USE_V1": "0"}
    assert found.arguments[-2:] == ("--dtype", "half")


def test_what_is_missing_is_said_with_the_nearest() -> None:
    images = load_images()
    sound = images.launch(Wanted("whisper-large-v3", "H20", "transcribe"))
    assert str(sound) == (
        "there is no image for whisper-large-v3 on H20, transcribe, openai; the nearest is "
        "vllm/vllm-openai:v0.11.0, for task generate, embed, classify, score"
    )
    assert "vllm-ascend" in str(images.launch(Wanted("m", "910B9")))


def test_the_shipped_file_is_packed() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"deploy/images.yaml" = "proxy/scaling/images.yaml"' in project
    assert shipped_file().name == "images.yaml"
    listed = subprocess.run(
        ["git", "check-ignore", str(shipped_file())],
        capture_output=True,
        check=False,
        cwd=shipped_file().parent,
    )
    assert listed.returncode == 1, "it is part of the project"


@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        ({"webhook": {"url": "http://h"}, "card": "H20", "cards": 2}, ("8001", "2")),
        ({"webhook": {"url": "http://h"}}, None),
        ({"scheduler": {"placement": "p"}, "cards": 4}, ("8001", "4")),
        ({"process": {"command": ["serve"]}, "card": "H20"}, None),
    ],
)
def test_what_a_standby_is_started_with(section: dict[str, Any], arguments: tuple[str, str] | None) -> None:
    """At the port of its URL. A platform says the card by a label, and may have images of its own."""
    backend = {"name": "a", "url": "http://10.0.0.7:8001", "models": ["m"], "standby": section}
    labelled = BackendConfig.model_validate({**backend, "labels": {"card": "H20"}})
    launch = offer(labelled, load_images()).launch
    if arguments is None:
        assert launch is None
    else:
        assert isinstance(launch, Launch)
        assert launch.arguments == (
            "--model", "m", "--port", arguments[0], "--tensor-parallel-size", arguments[1],
        )  # fmt: skip


@pytest.mark.parametrize("labels", [{}, {"card": "P800"}])
def test_what_a_platform_starts_without_an_image_of_ours_is_its_own(labels: dict[str, str]) -> None:
    backend = {"name": "a", "url": "http://10.0.0.7:8001", "models": ["m"], "labels": labels}
    placement = BackendConfig.model_validate({**backend, "standby": {"scheduler": {"placement": "p"}}})
    generic = Images([entry("for all")]) if not labels else load_images()
    assert offer(placement, generic).launch is None


# The command

COMMAND = typer.Typer()
register(COMMAND, "images")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tidegate(*arguments: str) -> Result:
    return CliRunner().invoke(COMMAND, arguments)


def test_the_command_says_what_is_taken(folder: Path) -> None:
    said = tidegate("--model", "Qwen/Qwen3-32B", "--card", "Tesla V100", "--cards", "2").stdout
    assert said.startswith("vllm/vllm-openai:v0.8.5.post1\n")
    assert "--model Qwen/Qwen3-32B --port 8000 --tensor-parallel-size 2 --dtype half\n" in said
    assert "  environment  VLLM_USE_V1=0\n" in said
    found = json.loads(tidegate("--model", "m", "--card", "910b", "--json").stdout)["found"]
    assert found["arguments"][:3] == ["vllm", "serve", "m"]
    (folder / "own.yaml").write_text("images:\n  - {image: mine, cards: [V100], source: our registry}\n")
    (folder / "tidegate.yaml").write_text(
        "backends: [{name: a, url: 'http://a'}]\nscaling: {images: own.yaml}\n"
    )
    assert tidegate("--model", "m", "--card", "V100").stdout.startswith("mine\n")


def test_the_command_says_what_is_missing(folder: Path) -> None:
    found = tidegate("--model", "m", "--card", "H20", "--protocol", "anthropic")
    assert found.exit_code == 1
    assert "there is no image for m on H20, generate, anthropic; the nearest is" in found.stderr
    assert found.stderr.endswith("for protocol openai\n")
    for wrong in ("--task", "--protocol"):
        found = tidegate(wrong, "chat")
        assert (found.exit_code, found.stderr.startswith(f"tidegate: {wrong}: ")) == (2, True)


def test_the_command_lists_what_fits(folder: Path) -> None:
    assert tidegate().stdout.count("\n  ") == len(load_images().entries)
    assert "vllm-ascend" in tidegate("--card", "910B").stdout
    assert tidegate("--card", "MLU370").exit_code == 1
