"""Tools that touch files: always in the session's sandbox, never on the host."""

from __future__ import annotations

import base64
import codecs

from pydantic import BaseModel, Field

from executions import operations
from executions.errors import Invalid
from executions.mcp import answers
from executions.mcp.answers import Answer
from executions.mcp.call import Call, SessionId
from executions.serializers import Accepted, FileShape

IMAGE_MAX_BYTES = 2_000_000


class ReadFile(Accepted):
    session_id: SessionId
    path: str = Field(description="In the sandbox, e.g. /home/user/out.csv.", max_length=4096)
    offset_bytes: int = Field(0, ge=0)
    max_bytes: int = Field(answers.TEXT_BYTES, ge=1, le=1_000_000)


class WriteFile(Accepted):
    session_id: SessionId
    path: str = Field(description="In the sandbox; relative paths are below /home/user.", max_length=4096)
    content: str
    encoding: str = Field("utf-8", pattern="^(utf-8|base64)$", description="base64 for what is not text.")


class ListFiles(Accepted):
    session_id: SessionId
    path: str = Field("/home/user", max_length=4096)
    depth: int = Field(1, ge=1, le=10)


class FilePart(BaseModel):
    """A part of a file; `next_offset_bytes` is where it goes on, null at the end."""

    path: str
    content: str
    encoding: str
    offset_bytes: int
    next_offset_bytes: int | None


class Written(BaseModel):
    path: str
    size_bytes: int


class Folder(BaseModel):
    path: str
    files: list[FileShape]


async def read_file(call: Call, asked: ReadFile) -> Answer:
    pieces = await operations.get_file(caller=call.caller, session_id=asked.session_id, path=asked.path)
    data, before, more, kind = bytearray(), asked.offset_bytes, False, None
    try:
        async for piece in pieces:
            data += piece[before:]
            before = max(0, before - len(piece))
            kind = None if asked.offset_bytes else _image_type(data)
            if more := len(data) > (IMAGE_MAX_BYTES if kind else asked.max_bytes):
                break
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]
    if kind and not more:
        part = FilePart(path=asked.path, content="", encoding=kind, offset_bytes=0, next_offset_bytes=None)
        found = answers.of(part, f"{asked.path}: {kind}, {len(data):,} bytes")
        found.images = [(kind, base64.b64encode(data).decode())]
        return found
    chosen = bytes(data[: asked.max_bytes])
    more = len(data) > len(chosen)
    content, encoding = _text(chosen, more), "utf-8"
    taken = len(content.encode())
    if chosen and not taken:
        content, encoding, taken = base64.b64encode(chosen).decode(), "base64", len(chosen)
    after = asked.offset_bytes + taken if more else None
    text = content + (f"\n[more from offset_bytes={after}]" if after else "")
    part = FilePart(
        path=asked.path, content=content, encoding=encoding, offset_bytes=asked.offset_bytes, next_offset_bytes=after
    )
    return answers.of(part, text)


def _text(data: bytes, more: bool) -> str:
    """As UTF-8, without the character that the cut to the next part went through; empty where it is no text."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=not more)
    except UnicodeDecodeError:
        return ""


def _image_type(data: bytes | bytearray) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    return "image/jpeg" if data.startswith(b"\xff\xd8\xff") else None


async def write_file(call: Call, asked: WriteFile) -> Answer:
    try:
        data = base64.b64decode(asked.content, validate=True) if asked.encoding == "base64" else asked.content.encode()
    except ValueError as e:
        raise Invalid(f"content: not {asked.encoding}.", field="content") from e
    await operations.put_file(caller=call.caller, session_id=asked.session_id, path=asked.path, data=data)
    return answers.of(Written(path=asked.path, size_bytes=len(data)), f"{asked.path}: {len(data):,} bytes written.")


async def list_files(call: Call, asked: ListFiles) -> Answer:
    found = await operations.list_files(
        caller=call.caller, session_id=asked.session_id, path=asked.path, depth=asked.depth
    )
    shapes = [
        FileShape(name=f.name, path=f.path, type=f.type, size_bytes=f.size_bytes, modified_at=f.modified_at)
        for f in found
    ]
    lines = [f"{f.path}{'/' if f.type == 'directory' else f'  {f.size_bytes:,} bytes'}" for f in shapes]
    listing = answers.capped("\n".join(lines), f"/api/v1/sessions/{asked.session_id}/files?list=1&path={asked.path}")
    return answers.of(Folder(path=asked.path, files=shapes), listing or f"{asked.path} is empty.")
