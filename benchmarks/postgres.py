"""A real PostgreSQL for tests and benchmarks, from the server programs that Debian and Ubuntu install."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

DEBIAN = Path("/usr/lib/postgresql")
USER = "tidegate"
UNPRIVILEGED = ("postgres", "nobody")
"""Who runs it if we are root, which PostgreSQL refuses: the first that there is."""
SETTINGS = {"max_connections": "100", "shared_buffers": "32MB", "lc_messages": "C"}


def server_programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`, of the newest version; None: none is installed."""
    found = [path.parent for path in DEBIAN.glob("*/bin/initdb")]
    if found:
        return max(found, key=lambda path: float(path.parent.name))
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


class PostgresServer:
    """One server in a temporary folder, on a Unix socket and on a free port of 127.0.0.1.

    Everybody on this machine may connect without a password, except as the role `guarded`.
    """

    def __init__(self, programs: Path, *, durable: bool = False, **settings: str) -> None:
        """`durable`: whether it syncs what it commits; a server that only its own process can crash need not."""
        self._programs = programs
        self._user = _unprivileged_user()
        # Not pytest's folder: the path of a Unix socket has room for 107 characters, and others may not enter.
        self.folder = Path(tempfile.mkdtemp(prefix="tidegate-pg-", dir=None if durable else _memory()))
        self.port = _free_port()
        self._databases = 0
        if self._user:
            shutil.chown(self.folder, self._user)
        self._run(
            "initdb", "--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C", f"--username={USER}"
        )
        access = self.folder / "data" / "pg_hba.conf"
        access.write_text(
            f"host all guarded 127.0.0.1/32 scram-sha-256\n{access.read_text()}"  # the first line that fits
        )
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            listening = {
                "listen_addresses": "127.0.0.1",
                "port": str(self.port),
                "unix_socket_directories": str(self.folder),
                "fsync": "on" if durable else "off",
            }
            for name, value in (SETTINGS | listening | settings).items():
                file.write(f"{name} = '{value}'\n")

    def __enter__(self) -> PostgresServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        self._run("pg_ctl", "--wait", f"--log={self.folder / 'log'}", "start")

    def stop(self, mode: str = "fast") -> None:
        """`fast`: connections are closed; `immediate`: as if it had crashed."""
        self._run("pg_ctl", "--wait", f"--mode={mode}", "stop")

    def start_if_stopped(self) -> None:
        """After a test that may have stopped it."""
        if not self._runs():
            self.start()

    def restart(self) -> None:
        """Stop it, if it runs, and start it with the settings that it has now."""
        if self._runs():
            self.stop()
        self.start()

    def _runs(self) -> bool:
        return (self.folder / "data" / "postmaster.pid").exists()

    def use_tls(self, key: bytes, certificate: bytes) -> None:
        """From the next start on, with this key and certificate (PEM)."""
        for name, content in (("server.key", key), ("server.crt", certificate)):
            path = self.folder / "data" / name
            path.write_bytes(content)
            path.chmod(0o600)
            if self._user:
                shutil.chown(path, self._user)
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write("ssl = on\n")

    def remove(self) -> None:
        """Stop it, if it runs, and leave nothing."""
        try:
            if self._runs():
                self.stop("immediate")
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def create(self, template: str = "template0", encoding: str = "UTF8") -> str:
        """Make a database. Returns its name."""
        self._databases += 1
        name = f"test{self._databases}"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template} ENCODING {encoding}")
        return name

    def url(self, database: str, user: str = USER, **parameters: str) -> str:
        """Of a database, over the Unix socket."""
        query = "&".join(
            f"{name}={value}" for name, value in ({"host": str(self.folder)} | parameters).items()
        )
        return f"postgresql://{user}@/{database}?port={self.port}&{query}"

    def tcp_url(self, database: str, user: str = USER, **parameters: str) -> str:
        """Of a database, over TCP; `user` may have a password behind a colon."""
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}{'?' if query else ''}{query}"

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement, as the superuser and outside of any transaction. -> its rows."""
        import psycopg

        with psycopg.connect(
            host=str(self.folder), port=self.port, user=USER, dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *arguments: str) -> None:
        identity: dict[str, Any] = {}
        if self._user:
            group = pwd.getpwnam(self._user).pw_gid
            identity = {"user": self._user, "group": group, "extra_groups": []}
        with (self.folder / "output").open("w+b") as output:  # no pipe: the server would keep it open
            done = subprocess.run(
                [self._programs / program, f"--pgdata={self.folder / 'data'}", *arguments],
                cwd=self.folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=60,
                **identity,
            )
            output.seek(0)
            if done.returncode:
                raise RuntimeError(f"{program} failed: {output.read().decode(errors='replace')}")


def _memory() -> str | None:
    """A folder in memory, if the system has one: nothing here must outlive it."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _environment() -> Mapping[str, str]:
    """Without the caller's `PG…`, which would say where else to connect."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def _unprivileged_user() -> str:
    """Empty: we are not root."""
    if os.geteuid() != 0:
        return ""
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(user for user in UNPRIVILEGED if user in known)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
