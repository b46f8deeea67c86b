"""Running a command: the SDK's callbacks as a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Any

from executions.backends.base import Event
from executions.backends.e2b.account import Account, sdk
from executions.errors import BackendError, RunTimedOut

GRACE_SECONDS = 5  # beyond a deadline that the other side enforces


async def run(
    account: Account, sandbox: Any, command: str, *, timeout_seconds: float, **options: Any
) -> AsyncGenerator[Event, None]:
    """The events of one command, `exit` last. Closing it early kills the command."""
    ends = time.monotonic() + timeout_seconds + GRACE_SECONDS
    said: asyncio.Queue[Event | None] = asyncio.Queue(64)

    async def hear(kind: str, text: str) -> None:
        await said.put(Event(kind, {"text": text}))

    async def wait() -> int:
        try:
            return (await running.wait()).exit_code
        except sdk().CommandExitException as e:
            return e.exit_code
        finally:
            await said.put(None)

    with account.translated():
        running = await sandbox.commands.run(
            command,
            background=True,
            timeout=timeout_seconds,
            on_stdout=partial(hear, "stdout"),
            on_stderr=partial(hear, "stderr"),
            retain_output=False,
            **options,
        )
    waiting = asyncio.create_task(wait())
    try:
        while True:
            async with asyncio.timeout(ends - time.monotonic()):
                event = await said.get()
            if event is None:
                break
            yield event
        with account.translated():
            exit_code = await waiting
    except TimeoutError:
        raise RunTimedOut(f"The command ran longer than {timeout_seconds:g} s and was stopped.") from None
    except BackendError as e:
        if type(e) is BackendError and time.monotonic() >= ends - GRACE_SECONDS - 0.5:  # it enforced the deadline
            raise RunTimedOut(f"The command ran longer than {timeout_seconds:g} s and was stopped.") from None
        raise
    finally:
        if not waiting.done():
            await _abandon(running, waiting)
    yield Event("exit", {"exit_code": exit_code})


async def _abandon(running: Any, waiting: asyncio.Task) -> None:
    """Kill a command whose end nobody waits for any more."""
    with suppress(Exception):
        async with asyncio.timeout(GRACE_SECONDS):
            await running.kill()
    waiting.cancel()
    await running.disconnect()
