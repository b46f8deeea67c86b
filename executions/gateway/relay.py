"""One HTTP/1.1 exchange between an ASGI server and a byte stream: both bodies are streamed, neither is held.

The other end of the stream is a sandbox: nothing that it sends is trusted to be well formed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

PIECE_BYTES = 64 * 1024
HOP = {  # headers of one connection, and those that only address the sandbox (RFC 9110, 7.6.1)
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"host", b"expect", b"x-api-key", b"cookie", b"set-cookie",
}  # fmt: skip
BROKEN = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError)


class BrokenOff(Exception):
    """The sandbox's side ended before its answer did; `begun` where the client has seen a part of it."""

    def __init__(self, begun: bool) -> None:
        super().__init__(begun)
        self.begun = begun


async def relay(
    scope: Any, target: bytes, receive: Any, send: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Send the request, answer with what comes back; leaves when the client does. Raises BrokenOff."""
    refused = asyncio.Event()
    asking = asyncio.create_task(_ask(scope, target, receive, writer, refused))
    answering = asyncio.create_task(_answer(scope["method"], send, reader, refused))
    try:
        await asyncio.wait({asking, answering}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()
    finally:
        for task in (asking, answering):
            task.cancel()
        await asyncio.gather(asking, answering, return_exceptions=True)
        writer.transport.abort()  # close() would wait for a sandbox that does not read


async def _ask(scope: Any, target: bytes, receive: Any, writer: asyncio.StreamWriter, refused: asyncio.Event) -> None:
    """Pass the request on; returns when the client has gone. What is left of a refused request is thrown away."""
    lines = [b"%b %b HTTP/1.1" % (scope["method"].encode(), target), b"host: sandbox", b"connection: close"]
    lines += [b"%b: %b" % header for header in scope["headers"] if header[0] not in HOP]
    chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])
    if chunked:
        lines.append(b"transfer-encoding: chunked")
    heard = True
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        piece, more = message.get("body", b""), message.get("more_body", False)
        if heard and not refused.is_set():
            try:
                if piece:
                    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                if chunked and not more:
                    writer.write(b"0\r\n\r\n")
                await writer.drain()
            except OSError:
                heard = False


async def _answer(method: str, send: Any, reader: asyncio.StreamReader, refused: asyncio.Event) -> None:
    begun = False
    try:
        status, headers = await _head(reader)
        while status < 200:
            status, headers = await _head(reader)
        if status >= 400:
            refused.set()
        kept = [header for header in headers if header[0] not in HOP]
        await send({"type": "http.response.start", "status": status, "headers": kept})
        begun = True
        if method != "HEAD" and status not in (204, 304):
            async for piece in _pieces(dict(headers), reader):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    except BROKEN:
        raise BrokenOff(begun) from None


async def _head(reader: asyncio.StreamReader) -> tuple[int, list[tuple[bytes, bytes]]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
    _, status, *_ = first.split(b" ", 2)
    parted = (line.partition(b":") for line in lines)
    headers = [(name.strip().lower(), value.strip()) for name, _, value in parted]
    return int(status), headers


async def _pieces(headers: dict[bytes, bytes], reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body as it comes. ValueError or IncompleteReadError where it breaks off."""
    if headers.get(b"transfer-encoding"):
        while size := _size(await reader.readuntil(b"\r\n")):
            async for piece in _exactly(reader, size):
                yield piece
            await reader.readexactly(2)
        return
    length = headers.get(b"content-length")
    if length is None:
        while piece := await reader.read(PIECE_BYTES):
            yield piece
    elif length.isdigit():
        async for piece in _exactly(reader, int(length)):
            yield piece
    else:
        raise ValueError(length)


def _size(line: bytes) -> int:
    size = int(line.split(b";")[0], 16)
    if size < 0:
        raise ValueError(line)
    return size


async def _exactly(reader: asyncio.StreamReader, left: int) -> AsyncIterator[bytes]:
    while left:
        piece = await reader.read(min(left, PIECE_BYTES))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece
