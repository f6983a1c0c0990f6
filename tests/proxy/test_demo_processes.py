"""The demo as a process with its children."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys

import psutil
import pytest

from proxy.demo_fleet import FLEET
from proxy.demo_traffic import MEAN_ANSWER_TOKENS, rush_hour

pytestmark = pytest.mark.e2e


async def demo_process(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.proxy.demo_with_fakes", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


async def read_greeting(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readuntil(b"Ctrl-C ends everything.\n")).decode()


async def test_a_rush_hour_spills_and_ends_with_a_summary() -> None:
    process = await demo_process("--traffic", "2")
    out, complaint = await process.communicate()
    text = out.decode()
    assert (process.returncode, complaint) == (0, b"")
    found = re.search(r"of (\d+) requests \d+ % local, \d+ % spilled.*, 0 turned away, 0 failed", text)
    assert found is not None
    assert int(found[1]) == len(rush_hour(2, FLEET[0].capacity(MEAN_ANSWER_TOKENS), 0))
    assert "appliance" in text.split("Ctrl-C ends everything.")[1].splitlines()[2]


async def test_what_it_prints_works_as_printed_and_ctrl_c_ends_all() -> None:
    process = await demo_process()
    text = await read_greeting(process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 4
    curl = text[text.index("curl -N") : text.index("\n\nor from Python")]
    script = text[text.index("<<'END'") : text.index("\nEND\n") + 5]
    command = next(line for line in text.splitlines() if line.endswith("<<'END'")).removesuffix("<<'END'")
    said = []
    for snippet in (f"{curl} -s", command + script):
        shell = await asyncio.create_subprocess_shell(snippet, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, complaint = await shell.communicate()
        assert (shell.returncode, complaint) == (0, b"")
        said.append(out.decode())
    assert said[0].endswith("data: [DONE]\n\n")
    assert len(said[1].split()) > 5
    process.send_signal(signal.SIGINT)
    _, complaint = await process.communicate()
    assert (process.returncode, complaint) == (0, b"")
    assert not any(child.is_running() for child in children)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed process")
async def test_children_do_not_outlive_a_demo_that_is_killed() -> None:
    process = await demo_process("--idle")
    await read_greeting(process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 4
    process.kill()
    await process.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=20)
    assert alive == []


async def test_a_process_that_ends_in_mid_demo_ends_the_demo() -> None:
    process = await demo_process("--idle")
    await read_greeting(process)
    children = psutil.Process(process.pid).children()
    victim = next(child for child in children if "tests.proxy.fake_proxy" in child.cmdline())
    victim.kill()
    _, complaint = await process.communicate()
    assert process.returncode == 1
    assert b"tidegate demo: proxy ended with code -9" in complaint
    assert not any(child.is_running() for child in children)
