"""A Java context: the machine's JShell, driven by Cells.java in one virtual machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

from . import child

PROGRAM = Path(__file__).with_name("Cells.java")
FLAGS = (
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-XX:ReservedCodeCacheSize=64m",
    "-Dfile.encoding=UTF-8",
    "-Dstdout.encoding=UTF-8",
    "-Dstderr.encoding=UTF-8",
    "-Djava.awt.headless=true",
)


def missing() -> str:
    if shutil.which("jshell") and shutil.which("java"):
        return ""
    return "Java is not installed on this machine: apt-get install -y default-jdk-headless, then start the node again."


def _scoped(env: dict[str, str]) -> tuple[str, str]:
    """Java cannot change its environment: variables of a cell are system properties, as E2B has it."""
    do, undo = [], []
    for n, (name, value) in enumerate(env.items()):
        quoted = json.dumps(name)
        do.append(f"var __was{n} = System.setProperty({quoted}, {json.dumps(value)});")
        undo.append(
            f"if (__was{n} == null) System.clearProperty({quoted}); else System.setProperty({quoted}, __was{n});"
        )
    return "\n".join(do), "\n".join(undo)


def run(control: socket.socket, environment: dict[str, str], limits: dict[str, int]) -> None:
    """Run cells until the agent hangs up. The process is already a guest."""
    java = os.path.realpath(shutil.which("java") or "java")
    heap = f"-Xmx{max(64, limits['memory_mib'] // 2)}m"
    machine = child.Child([java, *FLAGS, heap, str(PROGRAM)], environment)
    child.run(control, machine, _scoped)
