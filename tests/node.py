"""A real node of the local runtime for tests, as an operator starts it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executions.backends import local
from tests import servers


@dataclass
class RunningNode:
    run_dir: Path
    process: subprocess.Popen[bytes]
    backend: local.LocalBackend


@contextmanager
def running_node(
    python: Path,
    *,
    ready: bool = True,
    forks_limit: int = 0,
    floor: str = "namespaces",
    interpreter: str = sys.executable,
    **popen,
) -> Iterator[RunningNode]:
    """A node with one template, `default`. RuntimeError when it does not become ready within a minute."""
    with tempfile.TemporaryDirectory(prefix="sandgate-node-") as folder:
        run_dir = Path(folder) / "run"
        os.chmod(folder, 0o755)
        popen.setdefault("preexec_fn", servers.die_with_parent)
        if "user" in popen:
            os.chown(folder, popen["user"], popen["group"])
        command = [interpreter, *local.command(run_dir, {"default": str(python)})[1:]]
        command += ["--forks-limit", str(forks_limit)] if forks_limit else []
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **popen)
        backend = local.LocalBackend("local", {"RUN_DIR": str(run_dir), "FLOOR": floor})
        try:
            if ready:
                wait_ready(process, run_dir)
            yield RunningNode(run_dir, process, backend)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode == -signal.SIGKILL:
                _tidy(run_dir)


def _tidy(run_dir: Path) -> None:
    """Let a successor remove the control groups of a node that was killed."""
    successor = subprocess.Popen(local.command(run_dir, {}), stdin=subprocess.DEVNULL)
    while not ask(run_dir, op="check") and successor.poll() is None:
        time.sleep(0.01)
    successor.terminate()
    successor.wait(10)


def wait_ready(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Return when every template is ready. RuntimeError when one is broken, or after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)  # a template warms up; there is nothing to wait on from outside
        states = {name: template["state"] for name, template in ask(run_dir, op="check").get("templates", {}).items()}
        if states and set(states.values()) == {"ready"}:
            return
        if "broken" in states.values():
            raise RuntimeError(f"a template is broken: {ask(run_dir, op='check')}")
    raise RuntimeError("the node did not become ready")


def ask(run_dir: Path, **request: Any) -> dict[str, Any]:
    """One request to a node; {} while it does not listen."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            folder = os.open(run_dir, os.O_PATH)  # its path may be longer than a socket's address
        except OSError:
            return {}
        try:
            connection.connect(f"/proc/self/fd/{folder}/node.sock")
        except OSError:
            return {}
        finally:
            os.close(folder)
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as replies:
            return json.loads(replies.readline() or "{}")


def listening(node: RunningNode) -> None:
    """Return when the node answers, whatever its templates do."""
    while not ask(node.run_dir, op="check"):
        assert node.process.poll() is None
        time.sleep(0.01)


def connected_socket(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection
