"""Figures: four files, each a PNG."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.measure.endpoint import Facts
from sim.measure.level import Level
from sim.measure.plots import write_plots
from sim.measure.prompts import Prefix
from sim.measure.sweep import Plan, Report, Series
from sim.measure.verdict import Sla
from sim.measure.wire import Api
from tests.sim.measure.fake_server import record


def test_four_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="NOT RUN: matplotlib is absent; `make test` installs it")
    levels = [
        Level.of(1, [record()], 1.0),
        Level.of(2, [record(tokens=1)], 1.0),
        Level.of(4, [record(error="no")], 1.0),
    ]
    report = Report("http://x", "m", Api.CHAT, True, Facts(), Plan((1, 2, 4), sla=Sla(tokens_per_s=20.0)))
    report.series = [Series(Prefix.COLD, levels), Series(Prefix.WARM, levels)]
    written = write_plots(report, tmp_path / "new")
    assert sorted(path.name for path in written) == [
        "throughput.png",
        "throughput_per_user.png",
        "tpot.png",
        "ttft.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
