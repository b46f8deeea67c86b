"""A real node of the local runtime for tests, as an operator starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asgiref.sync import async_to_sync

from executions.backends import local
from tests import servers


@dataclass
class RunningNode:
    run_dir: Path
    process: subprocess.Popen[bytes]
    backend: local.LocalBackend


@contextmanager
def running_node(python: Path, *, ready: bool = True, **popen) -> Iterator[RunningNode]:
    """A node with one template, `default`. RuntimeError when it does not become ready within a minute."""
    with tempfile.TemporaryDirectory(prefix="sandgate-node-") as folder:
        run_dir = Path(folder) / "run"
        os.chmod(folder, 0o755)
        popen.setdefault("preexec_fn", servers.die_with_parent)
        process = subprocess.Popen(local.command(run_dir, {"default": str(python)}), stdin=subprocess.DEVNULL, **popen)
        backend = local.LocalBackend("local", {"RUN_DIR": str(run_dir)})
        try:
            if ready:
                _wait(process, backend)
            yield RunningNode(run_dir, process, backend)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], backend: local.LocalBackend) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        check = async_to_sync(backend.check)()
        if check.ok:
            return
        if "broken" in check.detail:
            raise RuntimeError(check.detail)
        time.sleep(0.05)  # a template warms up; there is nothing to wait on from outside
    raise RuntimeError("the node did not become ready")


def connected_socket(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection
