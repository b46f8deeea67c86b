"""Running code: E2B's own stream of lines, in order and nothing held back, and what it means when it breaks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from executions.backends import wire
from executions.backends.base import Event
from executions.errors import (
    BackendError,
    BackendUnavailable,
    ContextUnknown,
    RunTimedOut,
    SandboxLost,
    SandboxMissing,
    Unsupported,
)

LINE_LIMIT_BYTES = 96 << 20
NEVER_FORWARDED = "no healthy upstream"  # Envoy's words where it had nobody to send a request to
QUIET_SECONDS = 15  # E2B says something every five: after so long somebody asks whether it is still there
Alive = Callable[[], Awaitable[None]]


async def execute(
    send: Callable[[], Awaitable[Any]], timeout_seconds: float, alive: Alive
) -> AsyncGenerator[Event, None]:
    """The events of one POST /execute, which `send` sends; closing it closes the connection, by which E2B interrupts the code.

    `alive` raises SandboxLost or BackendError where the sandbox is not to be reached.
    """
    import httpx

    ends = time.monotonic() + timeout_seconds
    try:
        response = await _patiently(send(), ends, alive)
        try:
            if not response.is_success:
                async with asyncio.timeout(ends - time.monotonic()):
                    raise refusal(response.status_code, (await response.aread()).decode(errors="replace"))
            async with aclosing(lines(response, ends, alive)) as said:
                async for line in said:
                    if event := wire.said(line):
                        yield Event(*event)
        finally:
            await response.aclose()
    except (TimeoutError, httpx.TimeoutException):
        raise RunTimedOut(f"The code ran longer than {timeout_seconds:g} s and was stopped.") from None
    except (httpx.ConnectError, httpx.ConnectTimeout):
        raise BackendUnavailable("The sandbox could not be connected to.", nothing_sent=True) from None
    except httpx.HTTPError as e:
        await alive()
        raise BackendError(f"The connection to the sandbox broke: {type(e).__name__}") from None


async def _patiently(work: Awaitable[Any], ends: float, alive: Alive) -> Any:
    """What the work gives. TimeoutError at `ends`; whatever `alive` raises while the other side is silent."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            left = ends - time.monotonic()
            done, _ = await asyncio.wait({task}, timeout=max(0, min(left, QUIET_SECONDS)))
            if done:
                return task.result()
            if left <= QUIET_SECONDS:
                raise TimeoutError
            await alive()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def lines(response: Any, ends: float, alive: Alive) -> AsyncGenerator[Any, None]:
    """The JSON lines of a stream. TimeoutError at `ends`, SandboxLost for what is not a line of JSON."""
    held = bytearray()
    pieces = response.aiter_bytes()
    while True:
        piece = await _patiently(anext(pieces, b""), ends, alive)
        if not piece:
            return
        held += piece
        if len(held) > LINE_LIMIT_BYTES:
            raise SandboxLost("The sandbox sent an endless line.")
        if b"\n" not in piece:
            continue
        *whole, rest = held.split(b"\n")
        held = bytearray(rest)
        for line in whole:
            try:
                yield json.loads(line)
            except ValueError:
                raise SandboxLost("The sandbox sent what is not JSON.") from None


def refusal(status: int, text: str) -> BackendError:
    """What an answer other than 200 to /execute means."""
    match status:
        case 400 | 422:
            return Unsupported(text[:300])
        case 404:
            return ContextUnknown(text[:300])
        case 502 if "was not found" in text:
            return SandboxMissing()
        case 503 if NEVER_FORWARDED in text:
            return BackendUnavailable(f"E2B answered 503: {text[:300]}", nothing_sent=True)
    return BackendError(f"E2B answered {status}: {text[:300]}")
