"""What must stand before the doors open. Each function puts one thing right, or ends with a sentence and its remedy."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor

from executions.backends.local import environment
from executions.errors import SandgateError

TEMPLATES = settings.DATA / "templates"
NEEDED_BYTES = 64 << 20
LOCK = 0x5A4D6761  # of PostgreSQL's advisory locks: making the tables and the first rows


def unable(sentence: str, remedy: str, code: int = 1) -> NoReturn:
    print(f"{sentence}\n  → {remedy}", file=sys.stderr)
    sys.exit(code)


def data_folder() -> None:
    """The data folder exists, is this user's, and has room."""
    data = settings.DATA
    try:
        data.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data) as probe:
            probe.write(b"\0" * 65536)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            unable(f"The disk is full: {data} takes no more.", f"df -h {data}   (then free some)")
        unable(
            f"The data folder {data} cannot be written ({e.strerror}).",
            f"sudo chown -R $(id -un) {data}   (or name another: export SANDGATE_DATA=/path)",
        )
    if shutil.disk_usage(data).free < NEEDED_BYTES:
        unable(f"The disk is full: less than {NEEDED_BYTES >> 20} MB are free in {data}.", f"df -h {data}")


def listening() -> socket.socket:
    """The product's address, bound but not yet served."""
    bind, port = settings.BIND, settings.PORT
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)  # also tells whether the port is taken, before anything is changed
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            unable(f"Port {port} on {bind} is taken by another program.", f"PORT={port + 1} make run")
        if e.errno == errno.EACCES:
            unable(f"Port {port} needs more rights than this user has.", "PORT=8000 make run")
        unable(f"{bind}:{port} cannot be listened on ({e.strerror}).", "SANDGATE_BIND=127.0.0.1 make run")
    return sock


def database() -> None:
    """The database can be reached and has exactly this release's tables."""
    name = connection.settings_dict["NAME"]
    try:
        reach()
        executor = MigrationExecutor(connection)
        newer = sorted(set(executor.loader.applied_migrations) - set(executor.loader.disk_migrations or {}))
        newer = [key for key in newer if key[0] == "executions"]
        if newer:
            unable(
                f"The database {name} was made by a newer release (it knows {newer[-1][1]}).",
                "git pull   (or name another database: export DATABASE_URL=…)",
            )
        if executor.migration_plan(executor.loader.graph.leaf_nodes()):
            with alone():
                call_command("migrate", verbosity=0, interactive=False)  # looks again at what there is to do
    except (DatabaseError, ImproperlyConfigured) as e:
        words = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if "full" in words:
            unable(f"The disk is full: the database {name} takes no more.", f"df -h {settings.DATA}")
        unable(
            f"The database {name} cannot be used: {words}",
            "see that it runs and that DATABASE_URL is right (unset DATABASE_URL: a file in the data folder)",
        )
    finally:
        connection.close()


@contextmanager
def alone() -> Iterator[None]:
    """Of several that start at once on one database, one is in here at a time."""
    if connection.vendor != "postgresql":
        with open(settings.DATA / "migrate.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        return
    with closing(connection.copy()) as lock, lock.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", [LOCK])  # a process that dies lets go of it, too
        try:
            yield
        finally:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [LOCK])


def reach() -> None:
    """Connect once past the pool, which would only say that it waited. Raises DatabaseError."""
    probe = connection.copy()
    if probe.vendor == "postgresql":
        options = {key: value for key, value in probe.settings_dict["OPTIONS"].items() if key != "pool"}
        probe.settings_dict = {**probe.settings_dict, "OPTIONS": {**options, "connect_timeout": 10}}
    probe.ensure_connection()
    probe.close()


def template_python() -> Path | None:
    """The interpreter that the default template's sandboxes fork from; None, and a word about it, without one."""
    if settings.TEMPLATE_PYTHON:
        python = Path(settings.TEMPLATE_PYTHON)
        if not os.access(python, os.X_OK):
            unable(
                f"SANDGATE_TEMPLATE_PYTHON names {python}, which cannot be executed.", "unset SANDGATE_TEMPLATE_PYTHON"
            )
        return python
    try:
        return environment.make(TEMPLATES, say=lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        sys.exit(130)
    except SandgateError as e:
        print(f"{e.detail}\n  → {e.remedy}\nGoing on without the local runtime.", file=sys.stderr)
        return None


def many_files() -> None:
    """Every stream is a file descriptor: as many as the system lets this user have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
