"""/api/v1/sessions/{id}/files: streamed in and out, whole or in part; folders as archives. All of it happens inside the sandbox."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from django.conf import settings
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

from executions import operations
from executions.api.auth import caller_of
from executions.api.executions import answer, body_of
from executions.api.once import done_once
from executions.api.operation import BYTES, Many, operation
from executions.api.pages import known_query, listed
from executions.backends.base import FileInfo
from executions.downloads import wanted
from executions.errors import Invalid, TooLarge
from executions.hop import rows
from executions.operations import machines
from executions.serializers import FileShape, parse
from executions.serializers.machines import FileAct, WrittenShape

PIECE_BYTES = 256 * 1024
MACHINE = (402, 409, 410, 502, 503)
PATH: dict[str, Any] = {"type": "string", "maxLength": 4096, "description": "Inside the sandbox; relative: from home."}
TAR = {"type": "string", "enum": ["tar"]}


@operation(
    "Read a file, list a folder, or fetch a folder as a tar",
    gives={200: (BYTES, "application/x-tar", Many(FileShape)), 206: BYTES, 416: None},
    query={
        "path": PATH,
        "list": {"type": "string", "description": "1: the entries of the folder, as JSON."},
        "archive": TAR | {"description": "The files below the folder."},
    },
    headers={"Range": "bytes=…: a part of the file."},
    fails=MACHINE,
)
async def read(request: HttpRequest, session_id: str) -> HttpResponseBase:
    """HEAD tells its size: where an upload that was broken off goes on."""
    known_query(request, ("path", "list", "archive"))
    caller, path = await rows(caller_of, request), request.GET.get("path", "")
    where: dict[str, Any] = {"caller": caller, "session_id": session_id, "path": path or "/home/user"}
    if request.GET.get("list"):
        return listed(map(_shape, await operations.list_files(**where)))
    if kind := request.GET.get("archive"):
        _only_tar(kind)
        return _download(await machines.archive(**where), path.rstrip("/") + ".tar", "application/x-tar")
    where["path"] = path
    if request.method == "HEAD" or "Range" in request.headers:
        return await _part(request, where)
    return _download(await operations.get_file(**where), path)


async def _part(request: HttpRequest, where: dict[str, Any]) -> HttpResponseBase:
    info = await machines.stat_file(**where)
    tag = f'"{info.size_bytes}-{info.modified_at}"'
    part = wanted(request.headers, info.size_bytes, tag)
    if part == "none":
        return HttpResponse(status=416, headers={"Content-Range": f"bytes */{info.size_bytes}"})
    start, length = part if isinstance(part, tuple) else (0, info.size_bytes)
    if request.method == "HEAD":
        response: HttpResponseBase = HttpResponse(content_type=BYTES)
    else:
        response = _download(_cut(await operations.get_file(**where), start, length), where["path"])
        if isinstance(part, tuple):
            response.status_code = 206
            response["Content-Range"] = f"bytes {start}-{start + length - 1}/{info.size_bytes}"
    response["Content-Length"] = str(length)
    response["Accept-Ranges"], response["ETag"] = "bytes", tag
    return response


async def _cut(pieces: AsyncIterator[bytes], start: int, length: int) -> AsyncIterator[bytes]:
    async for piece in pieces:
        part = piece[start : start + length] if start < len(piece) else b""
        start, length = max(0, start - len(piece)), length - len(part)
        if part:
            yield part
        if not length:
            return


@operation(
    "Write a file, a part of one, or the files of a tar",
    body=BYTES,
    gives={200: WrittenShape, 201: WrittenShape},
    query={
        "path": PATH | {"required": True},
        "offset": {"type": "integer", "minimum": 0, "description": "Append to the file, which has so many bytes."},
        "archive": TAR | {"description": "The body is a tar: unpack it below the folder `path`."},
    },
    fails=(*MACHINE, 413),
)
async def write(request: HttpRequest, session_id: str) -> HttpResponse:
    """The body is streamed. A part is answered with the size of the file then: the next part's offset."""
    known_query(request, ("path", "offset", "archive"))
    caller, path = await rows(caller_of, request), request.GET.get("path", "")
    where: dict[str, Any] = {"caller": caller, "session_id": session_id, "path": path, "data": _body(request)}
    if kind := request.GET.get("archive"):
        _only_tar(kind)
        await machines.unpack(**where)
    elif offset := request.GET.get("offset"):
        if not re.fullmatch(r"[0-9]{1,15}", offset):
            raise Invalid("offset: a whole number.", field="offset")
        return answer(WrittenShape(path=path, size_bytes=await machines.append(**where, offset=int(offset))))
    else:
        await operations.put_file(**where)
    return answer(WrittenShape(path=path), 201)


@operation("Move a file or folder", body=FileAct, gives={200: WrittenShape}, query={"path": PATH | {"required": True}},
           fails=(*MACHINE, 422))  # fmt: skip
@done_once
async def act(request: HttpRequest, session_id: str) -> HttpResponse:
    caller, asked = await rows(lambda: (caller_of(request), parse(FileAct, body_of(request))))
    path = request.GET.get("path", "")
    await machines.move_file(caller=caller, session_id=session_id, path=path, to=asked.move_to)
    return answer(WrittenShape(path=asked.move_to))


@operation("Remove a file or folder", gives={204: None}, query={"path": PATH | {"required": True}}, fails=MACHINE)
async def remove(request: HttpRequest, session_id: str) -> HttpResponse:
    caller = await rows(caller_of, request)
    await operations.remove_file(caller=caller, session_id=session_id, path=request.GET.get("path", ""))
    return HttpResponse(status=204)


async def _body(request: HttpRequest) -> AsyncIterator[bytes]:
    """The body as it comes (uploads.py), or as Django has it. Raises TooLarge beyond what one request may send."""
    size = 0
    refused = TooLarge(
        f"The body has more than {settings.FILE_MAX_BYTES:,} bytes.",
        field="body",
        remedy="Send it in parts (?offset=), or have the operator raise SANDGATE_FILE_MAX_BYTES.",
    )
    announced = request.headers.get("Content-Length", "0")
    if announced.isdigit() and int(announced) > settings.FILE_MAX_BYTES:
        raise refused
    async for piece in getattr(request, "pieces", None) or _read(request):
        size += len(piece)
        if size > settings.FILE_MAX_BYTES:
            raise refused
        yield piece


async def _read(request: HttpRequest) -> AsyncIterator[bytes]:
    while piece := request.read(PIECE_BYTES):
        yield piece


def _download(pieces: AsyncIterator[bytes], path: str, kind: str = BYTES) -> StreamingHttpResponse:
    response = StreamingHttpResponse(pieces, content_type=kind)
    name = quote(path.rsplit("/", 1)[-1], safe="")
    response["Content-Disposition"] = f"attachment; filename*=UTF-8''{name}"
    response["X-Content-Type-Options"] = "nosniff"
    return response


def _shape(info: FileInfo) -> FileShape:
    fields = ("name", "path", "type", "size_bytes", "modified_at")
    return FileShape(**{name: getattr(info, name) for name in fields})


def _only_tar(kind: str) -> None:
    if kind != "tar":
        raise Invalid("archive: tar is the only kind.", field="archive")
