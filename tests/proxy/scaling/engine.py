"""A command to launch: it calls the test that it was started, and the call ends when the process does.

    engine.py HOME [--listen HOST PORT] [--say TEXT] [--exit CODE] [--stubborn] [--polite] [--family]

`HOME`: port of the test. `--stubborn` ignores SIGTERM; `--polite` calls that it got it, and ends with code 0.
`--family` starts a child, and one in a session of its own, without our environment; each calls too.
"""

import argparse
import json
import os
import signal
import socket
import sys


def call(port: int, who: str) -> socket.socket:
    line = socket.create_connection(("127.0.0.1", port))
    environment = {name: value for name, value in os.environ.items() if name.startswith(("TIDEGATE", "X_"))}
    said = {"who": who, "pid": os.getpid(), "arguments": sys.argv[1:], "environment": environment}
    line.sendall(json.dumps(said).encode() + b"\n")
    return line


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=int)
    parser.add_argument("--listen", nargs=2)
    parser.add_argument("--say")
    parser.add_argument("--exit", type=int)
    parser.add_argument("--who", default="engine", help=argparse.SUPPRESS)
    parser.add_argument("--stubborn", action="store_true")
    parser.add_argument("--polite", action="store_true")
    parser.add_argument("--family", action="store_true")
    given = parser.parse_args()
    kept: list[socket.socket] = []
    if given.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    who = given.who
    for member in ("child", "stranger") if given.family else ():
        if os.fork() == 0:
            who = member
            if member == "stranger":
                os.setsid()
                command = [sys.executable, "-I", "-S", __file__, str(given.home), "--who", who]
                os.execve(sys.executable, command, {})
            break
    line = call(given.home, who)
    if given.polite:

        def leave(*_: object) -> None:
            line.sendall(b'"asked"\n')
            sys.exit(0)

        signal.signal(signal.SIGTERM, leave)
    if given.say:
        print(given.say, flush=True)
    if given.listen and who == "engine":
        kept.append(socket.create_server((given.listen[0], int(given.listen[1]))))
        line.sendall(b'"listens"\n')
    line.recv(1)  # the test says when, or is gone itself
    sys.exit(given.exit)


main()
