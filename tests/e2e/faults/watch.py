"""Asks an admin port over and over how it is, and says how long each answer took.

`/healthz` is answered by the loop that serves clients: its waits are the loop's. A process of its own, so that what
the test does meanwhile is not taken for the proxy's delay.
"""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
import time


class Watch:
    """`with Watch(proxy.admin) as watch: ...`; `watch.waits` afterwards."""

    def __init__(self, admin: str, pause_s: float = 0.002) -> None:
        self._command = [sys.executable, "-m", __name__, admin.removeprefix("http://"), str(pause_s)]
        self.waits: list[float] = []
        """Seconds."""

    def __enter__(self) -> Watch:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"watching\n"
        return self

    def __exit__(self, *_: object) -> None:
        said, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0
        self.waits = json.loads(said)


def main() -> None:
    address, pause_s = sys.argv[1], float(sys.argv[2])
    connection = http.client.HTTPConnection(address, timeout=30)
    waits: list[float] = []
    while not select.select([sys.stdin], [], [], pause_s)[0]:  # until it is closed
        asked = time.monotonic()
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        waits.append(time.monotonic() - asked)
        if len(waits) == 1:
            print("watching", flush=True)
    print(json.dumps(waits))


if __name__ == "__main__":
    main()
