"""GET and POST /files: bytes in and out of the sandbox, streamed. All of it happens inside, as the guest's user."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from email.message import Message

from . import linux, places, walls
from .http import PIECE, Refused, Request


def _refused(status: int, message: str) -> Refused:
    return Refused(status, {"code": status, "message": message})


def resolved(path: str) -> str:
    """An absolute path; `~` and relative ones start at home. Refused for what is no ordinary path."""
    if not path or "\0" in path or len(path.encode()) > 4096:
        raise _refused(400, "the path is not valid")
    if path == "~" or path.startswith("~/"):
        path = places.home + path[1:]
    path = places.found(os.path.join(places.home, path))
    if ".." in path.split("/"):
        raise _refused(400, "the path must not contain '..'")
    path = os.path.normpath(path)
    if places.reduced and places.outside(path):
        raise _refused(403, f"path '{path}' is not the sandbox's own")
    return path


def _opened(path: str, flags: int) -> int:
    """Open a regular file; never waits for a FIFO's or device's other end."""
    flags |= os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = (
            os.open(path, flags, 0o644) if not places.reduced else linux.open_beneath(*places.split(path), flags, 0o644)
        )
    except FileNotFoundError:
        raise _refused(404, f"path '{path}' does not exist") from None
    except IsADirectoryError:
        raise _refused(400, f"path '{path}' is a directory") from None
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _refused(507, "not enough disk space") from None
        raise _refused(400, f"path '{path}': {os.strerror(problem.errno or 0)}") from None
    found = os.fstat(descriptor)
    kind = found.st_mode
    if not stat.S_ISREG(kind) or found.st_size == walls.ZEROS:
        os.close(descriptor)
        what = "is a directory" if stat.S_ISDIR(kind) else "is not a regular file"
        raise _refused(400, f"path '{path}' {what}")
    return descriptor


async def send(request: Request) -> None:
    path = resolved(request.query.get("path", ""))
    descriptor = _opened(path, os.O_RDONLY)
    with open(descriptor, "rb", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        request.begin(200, "application/octet-stream", size, vary="Accept-Encoding")
        while size:
            piece = file.read(min(size, PIECE))
            if not piece:
                raise ConnectionError("the file became shorter while it was read")
            size -= len(piece)  # a file that grows is served as it was
            request.writer.write(piece)
            await request.writer.drain()


async def receive(request: Request) -> None:
    content_type = request.headers.get("content-type", "")
    written: list[str] = []
    if content_type.startswith("multipart/form-data"):
        await _receive_parts(request, content_type, written)
    else:
        await _write(resolved(request.query.get("path", "")), request.body(), written)
    await request.answer(200, [{"name": os.path.basename(path), "path": path, "type": "file"} for path in written])


async def _write(path: str, pieces: AsyncIterator[bytes], written: list[str]) -> None:
    if path in written:
        raise _refused(400, f"path '{path}' is there twice")
    try:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    except RecursionError:
        raise _refused(400, "the path has too many folders") from None
    except OSError as problem:
        status = 507 if problem.errno == errno.ENOSPC else 400
        raise _refused(status, f"path '{os.path.dirname(path)}': {os.strerror(problem.errno or 0)}") from None
    descriptor = _opened(path, os.O_WRONLY | os.O_CREAT)
    with open(descriptor, "wb", buffering=0) as file:
        try:
            file.truncate(0)
            async for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise _refused(507, "not enough disk space") from None
    written.append(path)


async def _receive_parts(request: Request, content_type: str, written: list[str]) -> None:
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_param("boundary")
    if not isinstance(boundary, str) or not boundary:
        raise _refused(400, "the multipart boundary is missing")
    parts = _Parts(request.body(), b"\r\n--" + boundary.encode("latin-1"))
    only = request.query.get("path")
    async for headers in parts:
        disposition = Message()
        disposition["content-disposition"] = headers.get("content-disposition", "")
        if disposition.get_param("name", header="content-disposition") != "file":
            async for _ in parts.content():
                pass
            continue
        name = only or disposition.get_filename() or ""
        await _write(resolved(name), parts.content(), written)
    if not written:
        raise _refused(400, "no file in the request")


class _Parts:
    """A multipart body, part by part and piece by piece (RFC 7578)."""

    def __init__(self, pieces: AsyncIterator[bytes], delimiter: bytes) -> None:
        self._pieces, self._delimiter = pieces, delimiter
        self._held = bytearray(b"\r\n")  # the first delimiter has no line before it

    async def _more(self) -> None:
        try:
            self._held += await self._pieces.__anext__()
        except StopAsyncIteration:
            raise _refused(400, "the multipart body ends early") from None

    async def __aiter__(self) -> AsyncIterator[dict[str, str]]:
        async for _ in self.content():
            pass  # the preamble
        while True:
            while len(self._held) < 2:
                await self._more()
            if self._held.startswith(b"--"):
                return
            while (end := self._held.find(b"\r\n\r\n")) < 0:
                if len(self._held) > 16384:
                    raise _refused(400, "the headers of a part are too long")
                await self._more()
            lines = bytes(self._held[:end]).decode("utf-8", "replace").split("\r\n")
            del self._held[: end + 2]  # its blank line may begin the delimiter of an empty part
            yield {
                name.strip().lower(): value.strip()
                for name, _, value in (line.partition(":") for line in lines if line)
            }

    async def content(self) -> AsyncIterator[bytes]:
        """The current part's content, up to and without the next delimiter."""
        first = True
        while True:
            at = self._held.find(self._delimiter)
            keep = len(self._delimiter)
            if at >= 0 or len(self._held) > keep * 2:
                until = at if at >= 0 else len(self._held) - keep
                piece = bytes(self._held[:until])
                del self._held[:until]
                if first:
                    piece, first = piece[2:], False
                if piece:
                    yield piece
            if at >= 0:
                del self._held[:keep]
                return
            await self._more()
