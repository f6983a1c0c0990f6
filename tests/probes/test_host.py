"""Pages of exporters as figures, and the watch over them on real sockets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.host import HOST_FIGURES
from policies.state import Backend, Fleet
from probes.host import HOST_S, CpuSeconds, HostTarget, parse_dcgm, parse_node
from probes.runner import Prober
from proxy.tasks import Tasks
from tests.probes.fake import Clock, FakeBackend

DCGM = b"""# HELP DCGM_FI_DEV_GPU_UTIL GPU utilization (in %).
# TYPE DCGM_FI_DEV_GPU_UTIL gauge
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-1",modelName="NVIDIA L20"} 80
DCGM_FI_DEV_GPU_UTIL{gpu="1",UUID="GPU-2",modelName="NVIDIA L20"} 100
DCGM_FI_DEV_FB_USED{gpu="0"} 30000
DCGM_FI_DEV_FB_FREE{gpu="0"} 10000
DCGM_FI_DEV_FB_USED{gpu="1"} 20000
DCGM_FI_DEV_FB_FREE{gpu="1"} 20000
DCGM_FI_DEV_GPU_TEMP{gpu="0"} 61
DCGM_FI_DEV_GPU_TEMP{gpu="1"} 70
DCGM_FI_DEV_POWER_USAGE{gpu="0"} 210.5
DCGM_FI_DEV_POWER_USAGE{gpu="1"} 189.5
DCGM_FI_DEV_GPU_TEMPERATURE{gpu="1"} 700
"""


def node(idle: float, busy: float) -> bytes:
    return f"""node_cpu_seconds_total{{cpu="0",mode="idle"}} {idle}
node_cpu_seconds_total{{cpu="0",mode="iowait"}} 0
node_cpu_seconds_total{{cpu="0",mode="user"}} {busy}
node_memory_MemTotal_bytes 1.6e+10
node_memory_MemAvailable_bytes 4e+09
node_memory_MemFree_bytes 1e+09
""".encode()


def test_all_gpus_of_a_host_make_one_figure() -> None:
    assert parse_dcgm(DCGM) == {
        "gpu_utilisation": 0.9,
        "gpu_memory": 0.625,
        "gpu_temperature": 70.0,
        "gpu_power": 400.0,
    }


def test_the_use_of_processors_is_that_since_the_last_page() -> None:
    figures, seconds = parse_node(node(100.0, 50.0), None)
    assert (figures, seconds) == ({"memory": 0.75}, CpuSeconds(100.0, 150.0))
    figures, seconds = parse_node(node(103.0, 51.0), seconds)
    assert figures == {"cpu": 0.25, "memory": 0.75}
    figures, seconds = parse_node(node(1.0, 1.0), seconds)
    assert (figures, seconds) == ({"memory": 0.75}, CpuSeconds(1.0, 2.0)), "it was started again"


@pytest.mark.parametrize(
    "line",
    [
        b"DCGM_FI_DEV_GPU_UTIL NaN",
        b'DCGM_FI_DEV_GPU_UTIL{gpu="0"} -1',
        b'DCGM_FI_DEV_GPU_UTIL{gpu="0} 1',
        b"DCGM_FI_DEV_GPU_UTIL 1e99",
        b" DCGM_FI_DEV_GPU_UTIL 50",
        b"DCGM_FI_DEV_FB_USED 0\nDCGM_FI_DEV_FB_FREE 0",
    ],
)
def test_what_makes_no_sense_is_left_out(line: bytes) -> None:
    assert parse_dcgm(line + b"\n") == {}


@given(st.binary(max_size=300), st.sampled_from([DCGM, node(3.0, 1.0)]), st.integers(0, 900))
def test_any_page_gives_known_figures_in_their_range(noise: bytes, page: bytes, at: int) -> None:
    page = page[:at] + noise + page[at:]
    figures = parse_dcgm(page) | parse_node(page, CpuSeconds(1.0, 2.0))[0]
    assert figures.keys() <= HOST_FIGURES.keys()
    for name, value in figures.items():
        assert 0.0 <= value <= (1.0 if name not in ("gpu_temperature", "gpu_power") else 1e17)


async def test_figures_reach_the_backends_of_the_site_and_heal_after_a_failure() -> None:
    clock, tasks = Clock(), Tasks()
    fleet = Fleet([Backend("a", "here"), Backend("b", "there")])
    async with FakeBackend(metrics=DCGM) as dcgm, FakeBackend(metrics=node(100.0, 50.0)) as exporter:
        target = HostTarget("here", dcgm.url, exporter.url + "/metrics")
        prober = Prober((), fleet, spawn=tasks.spawn, clock=clock, hosts=[target])

        async def later(seconds: float) -> int:
            clock.now += seconds
            rounds = prober.step(clock.now)
            await asyncio.gather(*rounds)
            return len(rounds)

        assert await later(0.0) == 1
        assert fleet["a"].host == parse_dcgm(DCGM) | {"memory": 0.75}
        assert (fleet["a"].host_at, fleet["b"].host) == (1000.0, {})
        assert await later(HOST_S - 0.1) == 0
        exporter.metrics = node(103.0, 51.0)
        assert await later(0.1) == 1
        assert fleet["a"].host["cpu"] == 0.25
        assert prober.hosts()["here"] == {**fleet["a"].host, "age_s": 0.0, "reasons": {}}

        dcgm.metrics, exporter.metrics = 503, b"nothing"
        await later(HOST_S)
        assert prober.hosts()["here"]["age_s"] == HOST_S
        assert prober.hosts()["here"]["reasons"] == {
            "dcgm": "GET /metrics: 503",
            "node": "none of its figures on the page",
        }
        assert fleet["a"].host_at == 1000.0 + HOST_S, "they grow stale"
        dcgm.metrics = DCGM
        await later(HOST_S)
        assert (fleet["a"].host_at, fleet["a"].host) == (clock.now, parse_dcgm(DCGM))
        assert list(prober.hosts()["here"]["reasons"]) == ["node"]

        prober.replace((), [replace(target, node=None)])
        assert prober.hosts()["here"] == {"age_s": None, "reasons": {}}
        prober.replace(())
        assert (await later(HOST_S), prober.hosts()) == (0, {})
        await prober.close()
        await tasks.cancel_all()
