"""Profiles say what the white paper measured, where every figure comes from, and nothing that nobody knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from policies.profile import Origin
from policies.yamlfile import FileProblems
from sim import derive
from sim.closed_loop import closed_loop, most_users
from sim.derive import CELLS, OUTPUT, PROMPT, TOKENS_PER_S, Cell, bandwidth_for, name_of, profile_of
from sim.profile import dump_profile, engine_settings, load_profile, profile_names

MODELS = {"32b": "r1_distill_qwen_32b", "70b": "r1_distill_llama_70b"}


def tables(shared: Path) -> Any:
    return YAML(typ="safe").load(shared / "data" / "seed_tables.yaml")


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_the_simulated_maximum_is_that_of_table_3_2(cell: Cell) -> None:
    engine = engine_settings(load_profile(name_of(cell)))
    most = most_users(engine, PROMPT, OUTPUT, tokens_per_s=TOKENS_PER_S)
    assert abs(most - cell.most) <= 1
    assert bool(most) == bool(cell.most)


def test_the_profiles_are_those_that_are_derived() -> None:
    assert profile_names() == sorted(map(name_of, CELLS))
    for cell in CELLS[:: len(CELLS) // 4]:
        bandwidth = bandwidth_for(cell)
        assert load_profile(name_of(cell)) == profile_of(cell, bandwidth)
        assert derive.written_bandwidths()[cell] == pytest.approx(bandwidth, rel=1e-4)


def test_a_check_writes_nothing_and_names_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [cell for cell in CELLS if cell.card == "L40"]
    monkeypatch.setattr(derive, "CELLS", cells)
    monkeypatch.setattr(derive, "PROFILES", tmp_path)
    assert derive.main(["--check"]) == 1
    assert not list(tmp_path.iterdir())
    names = ", ".join(sorted(f"{name_of(cell)}.yaml" for cell in cells))
    assert capsys.readouterr().err == f"not as `python -m sim.derive` writes them: {names}\n"
    assert derive.main([]) == 0
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert [load_profile(tmp_path / name) for name in sorted(written)] == [
        load_profile(name_of(cell)) for cell in sorted(cells, key=name_of)
    ]
    table = capsys.readouterr().out
    assert derive.main(["--check"]) == 0
    assert capsys.readouterr() == (table, "")
    wrong = tmp_path / "l40-2-32b.yaml"
    wrong.write_text(written[wrong.name].replace("alpha_us: ", "alpha_us: 1"), encoding="utf-8")
    (tmp_path / "z.yaml").write_text("", encoding="utf-8")
    assert derive.main(["--check"]) == 1
    assert capsys.readouterr().err.endswith(": l40-2-32b.yaml, z.yaml\n")
    assert wrong.read_text() != written[wrong.name]


def test_a_cell_is_predicted_from_the_others_alone() -> None:
    bandwidths = derive.written_bandwidths()
    cells = {cell: bandwidths[cell] for cell in CELLS if cell.card == "H20"}
    left_out = next(iter(cells))
    for one in derive.predictions(cells):
        assert abs(one.simulated - one.cell.most) <= 1
    others = [cell for cell in cells if cell != left_out]
    guess = derive.predicted(left_out, others, cells)
    assert derive.predicted(left_out, others, {**cells, left_out: 1.0}) == guess
    assert next(derive.predictions(cells)).predicted == guess


@pytest.mark.parametrize("name", profile_names())
def test_every_figure_has_its_source_and_no_price_is_invented(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.step.source.origin is Origin.DERIVED
    assert "table 3-2" in profile.step.source.text
    assert profile.limits.source.text
    for priced in (profile.price, profile.power):
        assert priced is None or priced.source.origin in (Origin.MEASURED, Origin.PUBLISHED)


def test_a_profile_survives_being_written(tmp_path: Path) -> None:
    profile = load_profile("h20-8-32b")
    file = tmp_path / "mine.yaml"
    file.write_text(dump_profile(profile), encoding="utf-8")
    assert load_profile(file) == load_profile(str(file)) == profile


def test_what_is_wrong_with_a_profile_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no profile is named 'h200'; there are a-4-32b, .*v100-4-32b"
    ):
        load_profile("h200")
    file = tmp_path / "mine.yaml"
    text = dump_profile(load_profile("h20-8-32b"))
    file.write_text(text.replace("delta_us: ", "delta_us: -"), encoding="utf-8")
    with pytest.raises(FileProblems, match="delta_us"):
        load_profile(file)


@pytest.mark.shared
def test_the_cells_are_those_of_the_paper(shared: Path) -> None:
    rows = tables(shared)["table_3_2_max_concurrency"]["rows"]
    paper = {
        f"{row['card'].lower()}-{row['cards']}-{short}": row[key]
        for row in rows
        for short, key in MODELS.items()
        if row[key] is not None
    }
    assert {name_of(cell): cell.most for cell in CELLS} == paper


@pytest.mark.shared
def test_table_3_3_comes_out(shared: Path) -> None:
    """Its TTFT is that of 32 requests which start at once."""
    table = tables(shared)["table_3_3_latency_sla"]
    users, sla = table["concurrency"], table["sla"]
    ttft, tpot = set(), set()
    for cell in CELLS:
        if cell.model.short != "32b":
            continue
        figures = closed_loop(engine_settings(load_profile(name_of(cell))), users, PROMPT, OUTPUT)
        name = f"{cell.card}-{cell.cards}"
        if figures.ttft_mean < sla["mean_ttft_s"]["below"]:
            ttft.add(name)
        if figures.tpot_mean * 1e3 < sla["mean_tpot_ms"]["below"]:
            tpot.add(name)
    everybody = {f"{cell.card}-{cell.cards}" for cell in CELLS if cell.model.short == "32b"}
    assert ttft == set(table["ttft_satisfied"])
    assert tpot == everybody - set(table["tpot_not_satisfied"])
    assert ttft & tpot == set(table["both_satisfied"])
