"""What all tests share: no skip goes unseen where skips are forbidden, and the place of the shared data."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest

from tests.databases import new_database, postgres

__all__ = ["new_database", "postgres"]

FORBID_SKIPS = os.environ.get("TIDEGATE_FORBID_SKIPS", "") not in ("", "0")
"""A skipped test fails. Set where everything must be there: a check that was skipped has found nothing."""

SHARED = Path(__file__).parents[2] / "shared"

# A test on a busy machine is slow, not wrong. In CI the same examples run every time: a red build means the change.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with captures, vectors and scripts that are not part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"NOT RUN: {SHARED} is absent")
    return SHARED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests run side by side (`-n`), what shares costly fixtures stays in one process."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return shared_fixtures(nodeid)

    return Scheduling(config, log)


def shared_fixtures(test: str) -> str:
    """What runs in one process with a test: with a real vLLM, which takes long to start, all of that kind; with an
    end-to-end test nothing else; elsewhere all of its file.
    """
    if "real_vllm" in test:
        return "real vLLM"
    return test if test.startswith("tests/e2e/") else test.partition("::")[0]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _skip_is_failure((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _skip_is_failure((yield))


def _skip_is_failure(report: Report) -> Report:
    if FORBID_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        where: Any = report.longrepr
        reason = where[2] if isinstance(where, tuple) else str(where)
        report.outcome = "failed"
        report.longrepr = f"skips are forbidden here (TIDEGATE_FORBID_SKIPS): {reason}"
    return report
