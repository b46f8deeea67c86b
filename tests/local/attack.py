"""What an attack needs: a sandbox, code inside it, and a look at the host's side."""

from __future__ import annotations

import ast
import asyncio
import os
import secrets
import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from executions.backends.base import Handle, Limits, SandboxSpec
from executions.backends.local import LocalBackend


@asynccontextmanager
async def sandbox(backend: LocalBackend, *, env: dict[str, str] | None = None, **limits: int) -> AsyncIterator[Handle]:
    handle = await backend.create(
        SandboxSpec("a" + secrets.token_hex(8), "default", timeout_seconds=120, limits=Limits(**limits), env=env or {})
    )
    try:
        yield handle
    finally:
        await backend.kill(handle)


async def run(backend: LocalBackend, handle: Handle, code: str, timeout_seconds: float = 30) -> dict[str, Any]:
    """What a cell gave: the text of its value, what it printed, its error's name."""
    outcome: dict[str, Any] = {"value": None, "said": "", "error": None}
    async for event in backend.run_code(handle, code, timeout_seconds=timeout_seconds):
        if event.kind == "result" and event.data["main"]:
            outcome["value"] = event.data["mime"]["text/plain"]
        elif event.kind == "stdout":
            outcome["said"] += event.data["text"]
        elif event.kind == "error":
            outcome["error"] = event.data["name"]
            outcome["detail"] = event.data["value"]
    return outcome


async def value(backend: LocalBackend, handle: Handle, code: str) -> Any:
    """The cell's value as Python; fails with its error where there was one."""
    outcome = await run(backend, handle, code)
    assert outcome["error"] is None, outcome
    try:
        return ast.literal_eval(outcome["value"])
    except (ValueError, SyntaxError):  # a string comes without its quotes
        return outcome["value"]


def host_pids(marker: str) -> list[int]:
    """The host's processes that carry this marker in their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if marker.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


async def started(backend: LocalBackend, handle: Handle) -> tuple[str, int]:
    """Start a process in the sandbox that sleeps; its marker and its pid on the host."""
    marker = f"{secrets.randbelow(10**9) + 10**9}"
    await run(
        backend,
        handle,
        f"import subprocess\nsleeper = subprocess.Popen(['sleep', '{marker}'])",
    )
    for _ in range(100):
        if pids := host_pids(f"sleep\0{marker}"):
            return marker, pids[0]
        await asyncio.sleep(0.01)  # between fork and exec
    raise AssertionError("the process did not start")


def descendants(pid: int) -> int:
    """How many processes live below this one."""
    found = 0
    waiting = [pid]
    while waiting:
        try:
            below = [
                int(p)
                for task in Path(f"/proc/{waiting.pop()}/task").iterdir()
                for p in (task / "children").read_text().split()
            ]
        except OSError:
            continue
        waiting += below
        found += len(below)
    return found


def ended(pidfd: int, seconds: float = 5) -> bool:
    """Whether the process behind this descriptor ends in time."""
    return bool(select.select([pidfd], [], [], seconds)[0])
