"""The local node as a child: it ends with its parent, even when that is killed, and is started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from pathlib import Path

import structlog
from django.conf import settings

log = structlog.get_logger(__name__)
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")  # never the product's keys and secrets


def argv(python: Path, *, die_with_parent: bool) -> list[str]:
    """The command of the node that makes its sandboxes from this interpreter's environment."""
    from executions.backends import local

    run_dir = settings.SANDBOXES["local"]["OPTIONS"]["RUN_DIR"]
    command = local.command(run_dir, {"default": str(python)})
    return [*command, "--die-with-parent"] if die_with_parent else command


def scrubbed() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


async def kept_running(command: list[str]) -> None:
    """Keep the node alive until cancelled; then end it within about a second."""
    pause = 1.0
    while True:
        started = time.monotonic()
        # a session of its own: Ctrl-C on the terminal reaches it through here, in order
        node = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, env=scrubbed(), start_new_session=True
        )
        try:
            code = await node.wait()
        except asyncio.CancelledError:
            await ended(node)
            raise
        pause = 1.0 if time.monotonic() - started > 60 else min(pause * 2, 30.0)
        log.error("The local node ended; it is started again", exit_code=code, pause_seconds=pause)
        await asyncio.sleep(pause)


async def ended(node: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        node.terminate()
        try:
            await asyncio.wait_for(node.wait(), 1)
        except TimeoutError:
            node.kill()
            await node.wait()


@contextlib.contextmanager
def beside(command: list[str]):
    """The node while this block lasts, for a synchronous parent."""
    node = subprocess.Popen(command, stdin=subprocess.PIPE, env=scrubbed(), start_new_session=True)
    try:
        yield node
    finally:
        node.terminate()
        try:
            node.wait(2)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
