"""CPU time and memory of process trees against what they say themselves; nothing outlives a benchmark."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import Cores, Service, Services, StartError, cpu_seconds, free_port, memory_bytes

# Burns CPU itself, lets one child burn and end, keeps another alive that has burned; then tells all their times.
BURNING_TREE = """
import subprocess, sys, time
def burn(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until: pass
burning = "import sys, time\\nwhile time.process_time() < %f: pass\\nprint(time.process_time(), flush=True)\\n%s"
ended = subprocess.run([sys.executable, "-S", "-c", burning % (0.25, "")], stdout=subprocess.PIPE)
alive = subprocess.Popen([sys.executable, "-S", "-c", burning % (0.15, "sys.stdin.read()")],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
living = float(alive.stdout.readline())
burn(0.2)
print(time.process_time(), float(ended.stdout), living, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with Services(tmp_path) as running:
        yield running


def test_cpu_time_is_that_of_the_whole_tree(services: Services) -> None:
    # Stopped inside `read` until the test ends: what the tree said is all that it has used.
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", BURNING_TREE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = [float(word) for word in process.stdout.readline().split()]
        assert min(said) >= 0.15
        # Ended children count in steps of 10 ms, and printing a line costs a little.
        assert cpu_seconds(process.pid) == pytest.approx(sum(said), abs=0.05)
    finally:
        process.kill()
        process.communicate()


def test_cpu_time_of_a_process_that_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    with pytest.raises(ProcessLookupError):
        cpu_seconds(process.pid)


def test_memory_counts_children(services: Services) -> None:
    hold = "held = bytearray(b'x') * 30_000_000"
    child = f"import sys\n{hold}\nprint('ready', flush=True)\nsys.stdin.read()"
    code = (
        f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-S', '-c', {child!r}], "
        f"stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n{hold}\nchild.stdout.readline()\n"
        "print('ready', flush=True)\nsys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert 60_000_000 < memory_bytes(process.pid) < 120_000_000
    finally:
        process.kill()
        process.communicate()


STUBBORN_TREE = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def _start_stubborn(services: Services) -> tuple[Service, int]:
    service = services.start("stubborn", [sys.executable, "-S", "-c", STUBBORN_TREE], stdout=subprocess.PIPE)
    assert service.process.stdout is not None
    return service, int(service.process.stdout.readline())


def test_stopping_ends_processes_that_ignore_sigterm(tmp_path: Path) -> None:
    services = Services(tmp_path)
    service, child = _start_stubborn(services)
    services.stop(service, timeout_s=0.05)
    assert service.process.returncode == -signal.SIGKILL
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_leaving_on_an_error_ends_processes(tmp_path: Path) -> None:
    started: list[Service] = []

    def fail() -> None:
        with Services(tmp_path) as services:
            code = "import time; time.sleep(600)"
            started.append(services.start("sleeper", [sys.executable, "-S", "-c", code]))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert started[0].process.returncode == -signal.SIGTERM


def test_an_error_names_what_had_ended_before_it(tmp_path: Path) -> None:
    def fail() -> None:
        with Services(tmp_path) as services:
            services.start("short", [sys.executable, "-S", "-c", "raise SystemExit(3)"]).process.wait()
            raise StartError("no answer")

    with pytest.raises(StartError, match="no answer\nended by themselves or killed by others: short: 3"):
        fail()


def test_a_killed_service_is_dead_at_once(services: Services) -> None:
    service = services.start("sleeper", [sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    services.kill(service)
    assert service.process.returncode == -signal.SIGKILL


def test_a_command_runs_on_its_core_and_returns_what_it_prints(services: Services) -> None:
    core = Cores.of_machine().proxy
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    assert json.loads(
        services.run("affinity", [sys.executable, "-S", "-c", code], core=core, timeout_s=30)
    ) == [core]


def test_a_command_that_fails_says_why(services: Services) -> None:
    with pytest.raises(StartError, match="no such thing"):
        services.run(
            "failing", [sys.executable, "-S", "-c", "raise SystemExit('no such thing')"], timeout_s=30
        )
    with pytest.raises(StartError, match="not done after"):
        services.run("slow", [sys.executable, "-S", "-c", "import time; time.sleep(60)"], timeout_s=0.1)


def test_the_cores_of_a_machine() -> None:
    cores = Cores.of_machine()
    mine = os.sched_getaffinity(0)
    assert {cores.proxy, cores.backend, cores.load} <= mine
    assert cores.proxy != cores.backend or len(mine) == 1


def test_a_free_port_can_be_listened_on() -> None:
    assert 1024 < free_port() < 65536
