"""A real vLLM on the CPU: what calibration foretells of it, and whether `tidegate bench` measures it as vLLM does.

    python -m benchmarks.real_vllm
    python -m benchmarks.real_vllm --repeats 2 --no-result

SmolLM2-135M on one core (`make vllm`). Two questions:

* *Foretelling.* The levels 1, 2, 4, 8 and 12 are measured, all of them in each repeat, so that a change of the
  machine's mood meets all. The step's coefficients are fitted to the means of 1, 2 and 8 users by
  `sim.calibrate.calibrate_sweep`, and foretell 4 and 12. Promised: within 10 % of the mean of the repeats or
  between the lowest and the highest of them.
* *Measuring.* `tidegate bench` and vLLM's own `vllm bench serve`, now the one first and now the other, with the
  same lengths and users. Promised: means within 5 %, or each mean between the lowest and the highest of the
  other's repeats.

A processor without bfloat16 computes in float32 here: it would emulate the other, slowly, and by another law for
one sequence than for two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.processes import Services, StartError, free_port
from benchmarks.summary import facts_line, print_table, write_result

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".vllm" / "bin" / "python"
MODEL = ROOT / ".vllm" / "models" / "smollm2"
KV_BYTES = 256 * 1024 * 1024
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
FITTED = (1, 2, 8)
FORETOLD = (4, 12)
USERS = 4
"""Of the comparison with vLLM's own tool."""
PROMPT, OUTPUT = 128, 48
ROUNDS = 3
"""Requests of each user in one repeat."""
WITHIN, WITHIN_TOOL = 0.10, 0.05
METRICS = ("ttft_s", "tpot_s")
VLLM_BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main;"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as P;"
    "p = P(); add_cli_args(p); main(p.parse_args())"
)


def number_format() -> str:
    """What this processor computes in."""
    flags = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def start_vllm(services: Services) -> str:
    """-> its URL, once it answers. Raises StartError."""
    port = free_port()
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)]
    command += ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "2048", "--dtype", number_format(), "--enforce-eager"]
    command += ["--distributed-executor-backend", "uni", "--kv-cache-memory-bytes", str(KV_BYTES)]
    service = services.start("vllm", command, environment=ENVIRONMENT)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            return url
        except (urllib.error.URLError, OSError):
            if service.process.poll() is not None:
                break
            time.sleep(0.5)
    raise StartError(f"vLLM did not start:\n{service.log_tail()}")


def ours(url: str, users: tuple[int, ...], seed: int) -> dict[int, dict[str, float]]:
    """What `tidegate bench` measures: by users, means in seconds and output tokens a second."""
    from sim.measure.sweep import Plan, measure
    from sim.measure.wire import Api

    found: dict[int, dict[str, float]] = {}
    for count in users:  # so many requests for each user at every level
        plan = Plan((count,), PROMPT, OUTPUT, requests=ROUNDS * count, seed=seed * 1000 + count)
        report = asyncio.run(measure(url, {"api": Api.COMPLETIONS}, plan))
        (level,) = report.series[0].levels
        if level.failed or level.ttft_s is None or level.tpot_s is None:
            raise StartError(f"{level.failed} requests failed: {level.errors}")
        found[count] = {
            "ttft_s": level.ttft_s.mean,
            "tpot_s": level.tpot_s.mean,
            "tokens_per_s": level.output_tokens_per_s,
        }
    return found


def vllms(services: Services, url: str, seed: int) -> dict[str, float]:
    """The same by vLLM's own tool."""
    file = services.folder / f"bench-{seed}.json"
    command = [str(PYTHON), "-c", VLLM_BENCH, "--backend", "openai", "--base-url", url, "--model", "smollm2"]
    command += ["--tokenizer", str(MODEL), "--dataset-name", "random", "--ignore-eos", "--seed", str(seed)]
    command += ["--random-input-len", str(PROMPT), "--random-output-len", str(OUTPUT)]
    command += ["--max-concurrency", str(USERS), "--num-prompts", str(ROUNDS * USERS)]
    command += ["--save-result", "--result-filename", str(file), "--disable-tqdm"]
    services.run(
        "vllm-bench",
        ["env", *(f"{key}={value}" for key, value in ENVIRONMENT.items()), *command],
        timeout_s=600,
    )
    report = json.loads(file.read_text())
    return {
        "ttft_s": report["mean_ttft_ms"] / 1000,
        "tpot_s": report["mean_tpot_ms"] / 1000,
        "tokens_per_s": report["output_throughput"],
    }


def foretell(levels: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """What the fit to `FITTED` says of every level."""
    from policies.profile import Limits, Origin, Source
    from sim.calibrate import Search, calibrate_sweep, loop_times
    from sim.closed_loop import SECOND
    from sim.engine import EngineSettings
    from sim.timings import Level

    def level(users: int) -> Level:
        figures = levels[users]
        ttft, tpot = figures["ttft_s"] * SECOND, figures["tpot_s"] * SECOND
        return Level(users, PROMPT, OUTPUT, ttft, tpot, ROUNDS * users)

    limits = Limits(source=Source(origin=Origin.DERIVED, text="vLLM's defaults"))
    found = calibrate_sweep([level(users) for users in FITTED], limits, Search(overhead=True))
    settings = EngineSettings(
        found.cost, max_num_batched_tokens=limits.max_num_batched_tokens, max_num_seqs=limits.max_num_seqs
    )
    told = {}
    for users in levels:
        ttft, tpot, _ = loop_times(settings, level(users), found.overhead_us)
        told[users] = {"ttft_s": ttft / SECOND, "tpot_s": tpot / SECOND}
    return told


def main() -> int:
    """The command line; returns 1 with `--check` if a promise is not kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="fail unless all promises are kept")
    parser.add_argument("--no-result", action="store_true", help="write no file into benchmarks/results")
    options = parser.parse_args()
    if not MODEL.is_dir():
        print("there is no vLLM here: make vllm", file=sys.stderr)
        return 2
    users = tuple(sorted(FITTED + FORETOLD))
    repeats: list[dict[int, dict[str, float]]] = []
    tools: list[dict[str, dict[str, float]]] = []
    load = []
    with tempfile.TemporaryDirectory() as folder, Services(Path(folder), 0) as services:
        url = start_vllm(services)
        ours(url, (1, 8), 999)  # warm
        for repeat in range(options.repeats):
            print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr)
            repeats.append(ours(url, users, repeat))
            pair: dict[str, dict[str, float]] = {}
            for tool in ("ours", "vllm") if repeat % 2 else ("vllm", "ours"):
                seed = 100 + repeat
                pair[tool] = (
                    ours(url, (USERS,), seed)[USERS] if tool == "ours" else vllms(services, url, seed)
                )
            tools.append(pair)
            load.append(os.getloadavg()[0])
    means = {
        count: {metric: mean(repeat[count][metric] for repeat in repeats) for metric in METRICS}
        for count in users
    }
    told = foretell(means)
    kept, rows, result = True, [], []
    for count in users:
        for metric in METRICS:
            values = [repeat[count][metric] for repeat in repeats]
            error = told[count][metric] / means[count][metric] - 1
            foretold = told[count][metric]
            good = abs(error) <= WITHIN or min(values) <= foretold <= max(values)
            kept &= good or count in FITTED
            rows.append(
                (
                    f"{count}{' (fitted)' if count in FITTED else ''}",
                    metric[:4].upper(),
                    f"{means[count][metric] * 1e3:.1f}",
                    f"{min(values) * 1e3:.1f}-{max(values) * 1e3:.1f}",
                    f"{told[count][metric] * 1e3:.1f}",
                    f"{error:+.1%}",
                )
            )
            result.append(
                {"users": count, "metric": metric, "measured": values, "foretold": told[count][metric]}
            )
    print_table(
        "Foretold by calibration, ms", ("users", "what", "mean", "repeats", "foretold", "error"), rows
    )
    rows = []
    for metric in (*METRICS, "tokens_per_s"):
        mine, theirs = ([tool[name][metric] for tool in tools] for name in ("ours", "vllm"))
        difference = mean(mine) / mean(theirs) - 1
        inside = all(min(a) <= mean(b) <= max(a) for a, b in ((mine, theirs), (theirs, mine)))
        kept &= abs(difference) <= WITHIN_TOOL or inside
        spans = (f"{mean(values):.4g} ({min(values):.4g}-{max(values):.4g})" for values in (mine, theirs))
        rows.append((metric, *spans, f"{difference:+.1%}"))
    print_table("tidegate bench and vllm bench serve", ("what", "ours", "vLLM's", "difference"), rows)
    print(f"\nload average {min(load):.1f} to {max(load):.1f}\n{facts_line()}")
    if not options.no_result:
        data: dict[str, Any] = {"dtype": number_format(), "levels": result, "tools": tools, "load": load}
        print(f"written to {write_result('real-vllm', data).name} in benchmarks/results")
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
