"""What a template gives each fresh sandbox: its files, then its start command, before anybody else may use it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from . import places
from .files import resolved
from .http import Refused
from .processes import descendants, fork_guest, kill

START_SECONDS = 30
SHOWN_BYTES = 1500  # of what a failing command said


async def begin(agent: Any) -> None:
    """Write the files and run the command as a guest; what it leaves running stays. OSError with the reason."""
    for name, text in agent.plan["files"].items():
        try:
            path = Path(resolved(name))
        except Refused:
            raise OSError(f"the template's file {name!r} has no ordinary path") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if command := agent.plan["start_command"]:
        await _run(agent, command)


async def _run(agent: Any, command: str) -> None:
    environment = agent.environment()
    said = os.open(
        f"{places.tmp}/.start", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600
    )  # a pipe could fill up with nobody reading
    os.unlink(f"{places.tmp}/.start")

    def become() -> None:
        null = os.open("/dev/null", os.O_RDONLY)
        for standard, descriptor in enumerate((null, said, said)):
            os.dup2(descriptor, standard)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.chdir(places.home)
        os.execve("/bin/bash", ["/bin/bash", "-l", "-c", command], environment)

    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    try:
        pid = fork_guest(agent.plan, agent.rules, become)
        agent.reaper.watch(pid, ended.set_result)
        try:
            status = await asyncio.wait_for(asyncio.shield(ended), START_SECONDS)
        except TimeoutError:
            kill(descendants(pid) | {pid})
            raise OSError(f"the template's start command ran longer than {START_SECONDS} s") from None
        if status:
            tail = os.pread(said, SHOWN_BYTES, max(0, os.fstat(said).st_size - SHOWN_BYTES)).decode("utf-8", "replace")
            code = os.waitstatus_to_exitcode(status)
            raise OSError(f"the template's start command ended with {code}: {tail.strip()}")
    finally:
        os.close(said)
