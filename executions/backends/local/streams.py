"""What a sandbox streams: lines of JSON from its interpreter, envelopes of Connect from its daemon."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from executions.backends.local import http
from executions.errors import BackendError, SandboxLost

LINE_LIMIT = 96 << 20
ENVELOPE_LIMIT = 16 << 20


class Deadline:
    """When waiting ends: at a time, or at once when somebody says so."""

    def __init__(self, seconds: float) -> None:
        self.at = asyncio.get_running_loop().time() + seconds
        self._waiting: asyncio.Timeout | None = None

    def waiting(self) -> asyncio.Timeout:
        """A block that raises TimeoutError at the end."""
        self._waiting = asyncio.timeout_at(self.at)
        return self._waiting

    def now(self) -> None:
        self.at = asyncio.get_running_loop().time()
        if self._waiting is not None:
            with suppress(RuntimeError):  # that wait is over
                self._waiting.reschedule(self.at)


async def lines(answer: http.Answer, deadline: Deadline) -> AsyncIterator[dict[str, Any]]:
    """The NDJSON lines of an answer. TimeoutError at the deadline, SandboxLost for what is not a line of JSON."""
    held = bytearray()
    pieces = answer.pieces()
    while True:
        async with deadline.waiting():
            piece = await anext(pieces, b"")
        if not piece:
            return
        held += piece
        if len(held) > LINE_LIMIT:
            raise SandboxLost("The sandbox sent an endless line.")
        if b"\n" not in piece:
            continue
        *lines, rest = held.split(b"\n")
        held = bytearray(rest)
        for line in lines:
            if isinstance(parsed := _parsed(line), dict):
                yield parsed


def _parsed(data: bytes | bytearray) -> Any:
    """SandboxLost for what is not JSON, or nested so deeply that nobody can read it."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise SandboxLost("The sandbox sent what is not JSON.") from problem


async def envelopes(answer: http.Answer, deadline: Deadline) -> AsyncIterator[dict[str, Any]]:
    """The messages of a Connect stream. BackendError where the request was refused, TimeoutError at the deadline."""
    if answer.status != 200:
        raise BackendError((await answer.whole()).decode("utf-8", "replace"))
    held = bytearray()
    pieces = answer.pieces()
    while True:
        async with deadline.waiting():
            piece = await anext(pieces, b"")
        if not piece:
            return
        held += piece
        while len(held) >= 5:
            size = struct.unpack(">I", held[1:5])[0]
            if size > ENVELOPE_LIMIT:
                raise SandboxLost("The sandbox sent an endless message.")
            if len(held) < 5 + size:
                break
            if isinstance(message := _parsed(held[5 : 5 + size]), dict):
                yield message
            del held[: 5 + size]
