"""HTTP/1.1 on asyncio streams, the part that the agent speaks: keep-alive, chunked both ways, streamed bodies."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

HEAD_LIMIT = 64 * 1024
BODY_LIMIT = 16 << 20  # of bodies that are read whole; files are streamed
PIECE = 256 * 1024
IDLE_SECONDS = 640


class Refused(Exception):
    """An answer other than the usual one: status, and text or a JSON object."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status, body)
        self.status, self.body = status, body


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    begun: bool = False  # an answer's head has been sent
    keep_alive: bool = True
    _body: AsyncIterator[bytes] | None = field(default=None, repr=False)

    def body(self) -> AsyncIterator[bytes]:
        """The body in pieces; once."""
        if self._body is None:
            self._body = self._pieces()
        return self._body

    async def _pieces(self) -> AsyncIterator[bytes]:
        if self.headers.get("expect", "").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while size := int((await self.reader.readline()).split(b";")[0], 16):
                while size:
                    piece = await self.reader.read(min(size, PIECE))
                    if not piece:
                        raise ConnectionError("the body ended early")
                    size -= len(piece)
                    yield piece
                await self.reader.readline()
            while (await self.reader.readline()).strip():
                pass
            return
        left = int(self.headers.get("content-length", 0))
        while left:
            piece = await self.reader.read(min(left, PIECE))
            if not piece:
                raise ConnectionError("the body ended early")
            left -= len(piece)
            yield piece

    async def whole(self) -> bytes:
        """The whole body. Refused (413) beyond the limit."""
        collected = bytearray()
        async for piece in self.body():
            collected += piece
            if len(collected) > BODY_LIMIT:
                raise Refused(413, f"The body is larger than {BODY_LIMIT} bytes")
        return bytes(collected)

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object. Refused (422) for anything else."""
        try:
            value = json.loads(await self.whole() or b"{}")
        except ValueError:
            raise Refused(422, "The body is not JSON") from None
        if not isinstance(value, dict):
            raise Refused(422, "The body is not a JSON object")
        return value

    def begin(self, status: int, content_type: str, length: int | None = None, **headers: str) -> None:
        """Send an answer's head; without a length, pieces follow through `send` and `end`."""
        self.begun = True
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        if status != 204:  # a body there would be taken for the next answer
            lines.append(f"content-type: {content_type}")
            lines.append("transfer-encoding: chunked" if length is None else f"content-length: {length}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    async def send(self, piece: bytes) -> None:
        if piece:
            self.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await self.writer.drain()

    async def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    async def answer(self, status: int, body: Any = None) -> None:
        """Send a whole answer: nothing, text, or a value as JSON."""
        content_type = "text/plain; charset=utf-8" if isinstance(body, str) else "application/json"
        data = b"" if body is None else body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.begin(status, content_type, len(data))
        self.writer.write(data)
        await self.writer.drain()

    async def gone(self) -> None:
        """Return when the client has closed the connection; only once the body is read."""
        if await self.reader.read(1):
            self.keep_alive = False  # a second request before the first answer: nobody needs that
            await asyncio.Event().wait()


Handler = Callable[[Request], Awaitable[None]]


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, version = first.split(" ", 2)
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
    }
    parts = urlsplit(target)
    request = Request(
        method, unquote(parts.path), dict(parse_qsl(parts.query, keep_blank_values=True)), headers, reader, writer
    )
    request.keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return request


async def serve(listener: Any, handler: Handler) -> asyncio.Server:
    """Answer requests on a listening unix socket with `handler`, which raises Refused or answers by itself."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await _read_request(reader, writer):
                await _handle(request, handler)
                if not request.keep_alive:
                    break
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    return await asyncio.start_unix_server(connected, sock=listener, limit=HEAD_LIMIT)


async def _handle(request: Request, handler: Handler) -> None:
    try:
        await handler(request)
    except Refused as refusal:
        status, body = refusal.status, refusal.body
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        status, body = 500, traceback.format_exc(limit=-3)
    else:
        status = body = None
    if status is not None:
        if request.begun:
            raise ConnectionError("failed in mid-answer")  # closing is the only way left to say so
        if request.headers.get("expect") and request._body is None:
            request.keep_alive = False  # it waits to hear whether it may send its body
        else:
            await _read_away(request)  # first: a client that still sends would not see an answer, only a broken pipe
        await request.answer(status, body)
        return
    await _read_away(request)  # an unread body would be taken for the next request


async def _read_away(request: Request) -> None:
    async for _ in request.body():
        pass
