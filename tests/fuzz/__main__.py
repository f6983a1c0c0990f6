"""Looks for bytes that break a parser, with a fuzzer that is guided by coverage: Atheris, on libFuzzer.

    python -m tests.fuzz                                          # every target, 30 s each
    python -m tests.fuzz events meters --seconds 600
    python -m tests.fuzz meters --repeat build/fuzz/found/meters-crash-0a1b2c

Targets, their good inputs and their words are in `targets.py`. What has led to new paths is kept in
`build/fuzz/corpus`, and the next run goes on from there. Ends with status 1 if something was found: it is to be
mended, and made an ordinary test.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "fuzz"
SECONDS = 30
INSTRUMENTED = ["policies", "proxy"]
PROGRAM = ("-m", "tests.fuzz")
LIMITS = ("-timeout=20", "-rss_limit_mb=2048", "-max_len=4096", "-print_final_stats=1", "-verbosity=0")
"""One input may take 20 s and 2 GB: more is a defect too."""
_EXECUTED = re.compile(rb"stat::number_of_executed_units:\s+(\d+)")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. -> 1: something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the parsers.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"for each target; default {SECONDS}")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="run one target once, on this input")
    parser.add_argument("--here", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here is not None:
        _fuzz_here(options.targets[0], options.here)
    from tests.fuzz.targets import TARGETS

    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target is called {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    if options.repeat is not None:
        if len(options.targets) != 1:
            parser.error("--repeat takes one target")
        TARGETS[options.targets[0]].run(options.repeat.read_bytes())
        print("nothing is wrong with it")
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("NOT RUN: fuzzing needs Atheris, `pip install atheris` (Linux or macOS)")
        return int(os.environ.get("TIDEGATE_FORBID_SKIPS", "") not in ("", "0"))
    found = [name for name in options.targets or TARGETS if not fuzz(name, options.seconds)]
    return 1 if found else 0


def fuzz(name: str, seconds: int, folder: Path = FOLDER, program: Sequence[str] = PROGRAM) -> bool:
    """Fuzz one target in a process of its own; False: something was found, which is told.

    `program`: what Python runs there, with a command line as `main` takes.
    """
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    corpus, seeds, found = (folder / part for part in (f"corpus/{name}", f"seeds/{name}", "found"))
    for part in (corpus, seeds, found):
        part.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (seeds / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    dictionary = folder / f"{name}.dict"
    dictionary.write_text("".join(map(_dictionary_line, target.words)))
    print(f"{name}: {seconds} s ...", end=" ", flush=True)
    command = [sys.executable, *program, name, "--here", f"-max_total_time={seconds}", *LIMITS]
    command += [f"-dict={dictionary}", f"-artifact_prefix={found}/{name}-", str(corpus), str(seeds)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, check=False)
    executed = _EXECUTED.search(done.stdout)
    if done.returncode == 0 and executed is not None:
        print(f"{int(executed[1])} inputs, nothing found")
        return True
    print(f"FOUND, status {done.returncode}")
    print(done.stdout.decode(errors="replace")[-6000:])
    print(f"again: python -m tests.fuzz {name} --repeat {found}/{name}-...", flush=True)
    return False


def _dictionary_line(word: bytes) -> str:
    return '"{}"\n'.format("".join(f"\\x{byte:02x}" for byte in word))


def _fuzz_here(name: str, options: Sequence[str]) -> NoReturn:
    """Be the fuzzer. What is to be guided by must be imported under its eyes."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        import policies
        from tests.fuzz.targets import TARGETS
    resolve: Callable[[str], Any] = policies.resolve_name

    def ours(target: str) -> Any:
        """A policy file may name any class: none is imported because a fuzzer wrote its name."""
        if not target.startswith("policies."):
            raise ImportError(f"no module {target!r}")
        return resolve(target)

    policies.resolve_name = ours  # type: ignore[attr-defined]
    atheris.Setup([sys.argv[0], *options], TARGETS[name].run)
    atheris.Fuzz()
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
