"""The house: who imports whom, how large a file is, what starts, what a start loads."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

MAY_IMPORT = {
    "policies": set[str](),
    "probes": {"policies"},
    "proxy": {"policies", "probes"},
    "sim": {"policies", "probes"},
    "benchmarks": {"policies", "probes", "proxy", "sim"},
    "tests": {"policies", "probes", "proxy", "sim", "benchmarks"},
}
"""Room to the rooms it may import, besides itself."""

IMPURE = {
    "aiohttp", "asyncio", "concurrent", "datetime", "http", "io", "logging", "multiprocessing", "os", "pathlib",
    "requests", "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess",
    "sys", "tempfile", "threading", "time", "urllib", "uuid",
}  # fmt: skip
"""What nothing that decides may import: I/O, clocks, threads, randomness that nobody handed in."""

STARTS_WITH = {
    "aiohappyeyeballs", "aiohttp", "aiosignal", "annotated_types", "attr", "frozenlist", "idna", "multidict",
    "orjson", "prometheus_client", "propcache", "pydantic", "pydantic_core", "ruamel", "sqlalchemy",
    "typing_extensions", "typing_inspection", "uvloop", "yarl",
}  # fmt: skip
"""What `tidegate serve` loads, besides the standard library and the three rooms it is made of."""

LONG_LINES = 500
LONG_FILES = {
    "proxy/exchange.py": "one request's life: its states are changed in one place",
    "proxy/http1.py": "one grammar, of requests and responses",
    "sim/engine.py": "one state machine: every count in it moves with every other",
}
"""Files above 500 lines, and why they are one."""

TESTED_BY = {
    "proxy/admin/plans.py": "tests/proxy/scaling/test_planning.py",
    "proxy/cli_plans.py": "tests/proxy/scaling/test_planning.py",
    "proxy/scaling/notices.py": "tests/proxy/scaling/test_planning.py",
    "proxy/scaling/offers.py": "tests/proxy/scaling/test_planning.py",
    "proxy/scaling/planwords.py": "tests/proxy/scaling/test_planning.py",
    "proxy/scaling/spending.py": "tests/proxy/scaling/test_budgets.py",
    "policies/candidates.py": "tests/policies/test_rules.py",
    "policies/eventlog.py": "tests/sim/test_replay.py",
    "policies/filechecks.py": "tests/policies/test_files.py",
    "policies/fileschema.py": "tests/policies/test_files.py",
    "policies/guarded.py": "tests/policies/test_rules.py",
    "policies/refusals.py": "tests/policies/test_valve.py",
    "policies/mistakes.py": "tests/policies/test_files.py",
    "policies/picks.py": "tests/policies/test_files.py",
    "policies/profile.py": "tests/sim/test_profiles.py",
    "policies/rendezvous.py": "tests/policies/test_prefix.py",
    "policies/routing.py": "tests/policies/test_rules.py",
    "policies/rule.py": "tests/policies/test_rules.py",
    "policies/siteschema.py": "tests/proxy/test_config.py",
    "policies/units.py": "tests/policies/test_files.py",
    "policies/values.py": "tests/policies/test_base.py",
    "policies/waiting.py": "tests/policies/test_standby_holds.py",
    "policies/weights.py": "tests/policies/test_files.py",
    "policies/yamlproblems.py": "tests/policies/test_yamlfile.py",
    "proxy/capacity_report.py": "tests/e2e/test_standby.py",
    "proxy/probing.py": "tests/e2e/test_standby.py",
    "proxy/migrations/versions/revision_0003.py": "tests/proxy/test_database.py",
    "proxy/scaling/decisions.py": "tests/proxy/scaling/test_manager.py",
    "proxy/scaling/seams.py": "tests/proxy/scaling/test_manager.py",
    "proxy/scaling/service.py": "tests/e2e/test_standby.py",
    "proxy/scaling/shown.py": "tests/e2e/test_standby.py",
    "proxy/scaling/journal.py": "tests/proxy/scaling/test_manager.py",
    "proxy/admin/standbys.py": "tests/e2e/test_standby.py",
    "proxy/cli_standby.py": "tests/e2e/test_standby.py",
    "proxy/scaling/hours.py": "tests/proxy/scaling/test_hours.py",
    "proxy/access/key_watch.py": "tests/e2e/test_keys_and_limits.py",
    "proxy/config_sections.py": "tests/proxy/test_config.py",
    "proxy/past.py": "tests/sim/test_simulate.py",
    "proxy/pool.py": "tests/proxy/test_upstream.py",
    "proxy/scaling/wake.py": "tests/proxy/test_held_for_standby.py",
    "proxy/proxied_server.py": "tests/e2e/test_client_address.py",
    "proxy/upkeep.py": "tests/e2e/test_reload_and_stop.py",
    "proxy/waiting.py": "tests/proxy/test_postgres.py",
    "proxy/answers.py": "tests/proxy/test_exchange.py",
    "proxy/build.py": "tests/proxy/test_exchange.py",
    "proxy/changes.py": "tests/proxy/test_reload.py",
    "proxy/check.py": "tests/e2e/test_docs_run.py",
    "proxy/cli.py": "tests/e2e/test_docs_run.py",
    "proxy/cli_common.py": "tests/e2e/test_docs_run.py",
    "proxy/cli_keys.py": "tests/e2e/test_docs_run.py",
    "proxy/cli_upgrade.py": "tests/e2e/test_upgrade.py",
    "proxy/config.py": "tests/test_docs.py",
    "proxy/config_values.py": "tests/proxy/test_config.py",
    "proxy/dialects.py": "tests/proxy/test_endpoints.py",
    "proxy/demo_fleet.py": "tests/proxy/test_demo.py",
    "proxy/demo_traffic.py": "tests/proxy/test_demo.py",
    "proxy/demo_view.py": "tests/proxy/test_demo.py",
    "proxy/errors.py": "tests/test_docs.py",
    "proxy/facts.py": "tests/proxy/test_exchange.py",
    "proxy/forms.py": "tests/proxy/test_multipart.py",
    "proxy/explain.py": "tests/e2e/test_docs_run.py",
    "proxy/linewriter.py": "tests/proxy/test_requestlog.py",
    "proxy/meter.py": "tests/proxy/test_exchange.py",
    "proxy/meters.py": "tests/proxy/test_endpoints.py",
    "proxy/metrics.py": "tests/test_docs.py",
    "proxy/migrations/env.py": "tests/proxy/test_database.py",
    "proxy/migrations/versions/revision_0001.py": "tests/proxy/test_database.py",
    "proxy/migrations/versions/revision_0002.py": "tests/proxy/test_database.py",
    "proxy/observe.py": "tests/proxy/test_exchange.py",
    "proxy/open_files.py": "tests/e2e/test_reload_and_stop.py",
    "proxy/openai.py": "tests/proxy/test_exchange.py",
    "proxy/process.py": "tests/proxy/test_reload.py",
    "proxy/readable.py": "tests/e2e/test_docs_run.py",
    "proxy/replay.py": "tests/proxy/test_journal.py",
    "proxy/runtime.py": "tests/proxy/test_exchange.py",
    "proxy/scaling/facts.py": "tests/proxy/scaling/test_providers.py",
    "proxy/scaling/sections.py": "tests/proxy/scaling/test_providers.py",
    "proxy/admin/platform.py": "tests/proxy/scaling/test_platform.py",
    "proxy/scaling/overlay.py": "tests/proxy/scaling/test_platform.py",
    "proxy/scaling/provider.py": "tests/proxy/scaling/test_webhook.py",
    "proxy/scaling/statusbody.py": "tests/proxy/scaling/test_webhook.py",
    "proxy/stopping.py": "tests/e2e/test_reload_and_stop.py",
    "proxy/sse.py": "tests/proxy/test_exchange.py",
    "proxy/tables.py": "tests/proxy/test_database.py",
    "proxy/tasks.py": "tests/probes/test_runner.py",
    "proxy/upstream.py": "tests/proxy/test_exchange.py",
    "proxy/watched.py": "tests/proxy/test_reload.py",
    "sim/autoscale_command.py": "tests/sim/test_autoscale.py",
    "sim/autoscale_plot.py": "tests/sim/test_autoscale.py",
    "sim/standby_file.py": "tests/sim/test_autoscale.py",
    "sim/arrival_process.py": "tests/sim/test_generator.py",
    "sim/calibrate_command.py": "tests/sim/test_calibrate.py",
    "sim/closed_loop.py": "tests/sim/test_plan.py",
    "sim/completion.py": "tests/sim/test_openai_server.py",
    "sim/derive.py": "tests/sim/test_profiles.py",
    "sim/evaluate_options.py": "tests/sim/test_leaderboard.py",
    "sim/ledger_speed.py": "tests/sim/test_from_ledger.py",
    "sim/fleet.py": "tests/sim/test_emulate.py",
    "sim/generation.py": "tests/sim/test_realtime.py",
    "sim/generator_spec.py": "tests/sim/test_generator.py",
    "sim/leaderboard_command.py": "tests/sim/test_leaderboard.py",
    "sim/leaderboard_plots.py": "tests/sim/test_leaderboard.py",
    "sim/leaderboard_table.py": "tests/sim/test_leaderboard.py",
    "sim/kv_cache.py": "tests/sim/test_engine.py",
    "sim/members.py": "tests/sim/test_cluster.py",
    "sim/media_api.py": "tests/sim/test_media.py",
    "sim/messages_api.py": "tests/sim/test_apis.py",
    "sim/pooling_api.py": "tests/sim/test_apis.py",
    "sim/realtime_api.py": "tests/sim/test_media.py",
    "sim/responses_api.py": "tests/sim/test_apis.py",
    "sim/openai_request.py": "tests/sim/test_openai_server.py",
    "sim/openai_shapes.py": "tests/sim/test_openai_server.py",
    "sim/plan_command.py": "tests/sim/test_plan.py",
    "sim/profile.py": "tests/sim/test_profiles.py",
    "sim/record_forms.py": "tests/sim/test_replay_damage.py",
    "sim/recording.py": "tests/sim/test_replay_damage.py",
    "sim/reference.py": "tests/sim/test_engine.py",
    "sim/replay_command.py": "tests/e2e/test_replay.py",
    "sim/router.py": "tests/sim/test_cluster.py",
    "sim/simulate_command.py": "tests/sim/test_simulate.py",
    "sim/streams.py": "tests/sim/test_generator.py",
    "sim/traces/forms.py": "tests/sim/test_traces.py",
    "sim/traces/lines.py": "tests/sim/test_traces.py",
    "sim/traces/servegen.py": "tests/sim/test_traces_servegen.py",
    "sim/tune_command.py": "tests/sim/test_tune.py",
    "sim/trips.py": "tests/sim/test_cluster.py",
    "sim/vllm_metrics.py": "tests/sim/test_openai_server.py",
    "sim/workload.py": "tests/sim/test_traces.py",
    "sim/workload_plot.py": "tests/sim/test_workload_command.py",
    "sim/workload_summary.py": "tests/sim/test_workload_command.py",
}
"""Files without a test of their own name, and the test that is theirs."""


def rooms() -> list[str]:
    return sorted(MAY_IMPORT)


def sources(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions and for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are absolute"
            yield node.lineno, node.module or ""


# Arrows


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_only_what_stands_below_it(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room}
    wrong = [
        f"{name_of(path)}:{line} imports {module}"
        for path in sources(room)
        for line, module in imported(path)
        if (top := module.partition(".")[0]) in MAY_IMPORT and top not in allowed
    ]
    assert not wrong
    assert sources(room)


def test_only_the_command_line_reaches_into_the_simulator() -> None:
    naming = [name_of(path) for path in sources("proxy") if '"sim.' in path.read_text(encoding="utf-8")]
    assert naming == ["proxy/cli.py"]


def test_what_decides_does_no_io_and_reads_no_clock() -> None:
    wrong = [
        f"{name_of(path)}:{line} imports {module}"
        for path in sources("policies")
        for line, module in imported(path)
        if module.partition(".")[0] in IMPURE
    ]
    assert not wrong


def test_what_decides_draws_no_randomness_of_its_own() -> None:
    """`Random` may be imported, to be handed in; the module's functions are one generator for everybody."""
    for path in sources("policies"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "random":
                assert [alias.name for alias in node.names] == ["Random"], name_of(path)
            elif isinstance(node, ast.Import):
                assert "random" not in [alias.name for alias in node.names], name_of(path)


# Sizes and tests


def test_files_have_one_duty() -> None:
    long = {
        name_of(path)
        for room in ("policies", "probes", "proxy", "sim", "benchmarks")
        for path in sources(room)
        if len(path.read_text(encoding="utf-8").splitlines()) > LONG_LINES
    }
    assert long <= set(LONG_FILES), "above 500 lines: two files, or a reason in LONG_FILES"
    assert set(LONG_FILES) <= long, "not that long any more: take it off LONG_FILES"


def test_every_file_has_its_test() -> None:
    without = []
    for room in ("policies", "probes", "proxy", "sim"):
        for path in sources(room):
            named = ROOT / "tests" / path.relative_to(ROOT).parent
            if path.name == "__init__.py" or any(named.glob(f"test_{path.stem}*.py")):
                continue
            if not (ROOT / TESTED_BY.get(name_of(path), "-")).is_file():
                without.append(name_of(path))
    assert not without, "a test of its name, or the name of its test in TESTED_BY"
    assert all((ROOT / name).is_file() for name in TESTED_BY), "gone: take it off TESTED_BY"


# What is installed, and what it loads


def run(*command: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def loaded_by_serve() -> set[str]:
    """Top-level modules, besides those of Python itself."""
    code = "import json, sys, proxy.serve; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(run(sys.executable, "-c", code).stdout)
    tops = {module.partition(".")[0] for module in modules if not module.startswith("_")}
    return tops - set(sys.stdlib_module_names) - {"cython_runtime"}


def test_serve_loads_what_it_needs_and_no_more() -> None:
    assert loaded_by_serve() - {"proxy", "policies", "probes"} <= STARTS_WITH


def test_nothing_but_the_rooms_is_installed() -> None:
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [
        "proxy",
        "policies",
        "probes",
        "sim",
    ]


def test_the_command_and_the_module_are_one() -> None:
    assert PROJECT["project"]["scripts"] == {"tidegate": "proxy.cli:main"}
    by_command = run(str(Path(sys.executable).with_name("tidegate")), "--version")
    by_module = run(sys.executable, "-m", "proxy.cli", "--version")
    assert by_command.stdout == by_module.stdout == f"{PROJECT['project']['version']}\n"
    assert by_command.returncode == by_module.returncode == 0


def test_serve_loads_no_simulator_and_no_command_line() -> None:
    assert not loaded_by_serve() & {
        "sim",
        "benchmarks",
        "tests",
        "typer",
        "alembic",
        "numpy",
        "torch",
        "matplotlib",
    }


def test_a_foreign_package_called_proxy_is_refused(tmp_path: Path) -> None:
    """PyPI's `proxy.py` brings a package `proxy` too; installed into the same place it overwrites ours."""
    shutil.copytree(ROOT / "proxy", tmp_path / "proxy", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "proxy" / "__init__.py").write_text('"""Somebody else\'s."""\n')
    done = run(sys.executable, "-m", "proxy.cli", "--version", folder=tmp_path)
    assert done.returncode == 2
    assert "another package called 'proxy'" in done.stderr
