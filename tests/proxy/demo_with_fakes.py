"""The demo with a stand-in for the proxy, on free ports, over backends that are twenty times faster or do nothing.

python -m tests.proxy.demo_with_fakes [--idle] [--traffic SECONDS]
"""

from __future__ import annotations

import sys

from proxy.demo import run_demo
from proxy.demo_fleet import DemoSettings


def python(code: str) -> tuple[str, ...]:
    """A command that runs code."""
    return (sys.executable, "-c", code)


EMULATE = (sys.executable, "-m", "sim.emulate", "--speed", "20")
LISTENING = python(
    "import time; print('listening on http://127.0.0.1:9 as demo', flush=True); time.sleep(99)"
)
SERVE = (sys.executable, "-m", "tests.proxy.fake_proxy")

if __name__ == "__main__":
    traffic = "--traffic" in sys.argv
    sys.exit(
        run_demo(
            DemoSettings(
                port=0,
                admin_port=0,
                traffic=traffic,
                duration_s=float(sys.argv[-1]) if traffic else 60.0,
                emulate=LISTENING if "--idle" in sys.argv else EMULATE,
                serve=SERVE,
            )
        )
    )
