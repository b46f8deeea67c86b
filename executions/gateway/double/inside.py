"""What the double's sandboxes answer themselves: the interpreter's stream, commands and files (Connect with JSON)."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from email import message_from_bytes
from typing import Any
from urllib.parse import parse_qs

from executions.backends import wire
from executions.backends.base import Event
from executions.errors import ContextUnknown, FileRefused
from executions.gateway.asgi import answer, gone, whole_body
from executions.gateway.double.cloud import Box, Cloud

KEEPALIVE_SECONDS = 5
FOR_EVER = 86_400.0
BODY_LIMIT_BYTES = 64 << 20
PIECE_BYTES = 64 << 10
ENTRY = {"file": "FILE_TYPE_FILE", "directory": "FILE_TYPE_DIRECTORY"}


class Cut(Exception):
    """The connection is to be broken off here."""


async def interpreter(cloud: Cloud, box: Box, path: str, scope: Any, receive: Any, send: Any) -> None:
    method, backend = scope["method"], cloud.backend
    try:
        body = json.loads(await whole_body(receive, BODY_LIMIT_BYTES) or b"{}")
        match method, path.strip("/").split("/"):
            case "GET", ["health"]:
                await answer(send, 200, "OK")
            case "POST", ["execute"]:
                await _execute(cloud, box, body, receive, send)
            case "GET", ["contexts"]:
                await answer(send, 200, await backend.list_contexts(box.handle))
            case "POST", ["contexts"]:
                language = body.get("language") or "python"
                await answer(
                    send, 200, await backend.create_context(box.handle, language=language, cwd=body.get("cwd"))
                )
            case "POST", ["contexts", context_id, "restart"]:
                await backend.restart_context(box.handle, context_id)
                await answer(send, 200, {})
            case "DELETE", ["contexts", context_id]:
                await backend.remove_context(box.handle, context_id)
                await answer(send, 200, {})
            case _:
                await answer(send, 404, "Not found")
    except ContextUnknown:
        await answer(send, 404, "Context not found")


async def _execute(cloud: Cloud, box: Box, body: dict[str, Any], receive: Any, send: Any) -> None:
    if not isinstance(body.get("code"), str):
        return await answer(send, 422, "code: a string")
    context_id, language = body.get("context_id"), body.get("language")
    if context_id and language:
        return await answer(send, 400, "Only one of context_id or language can be provided")
    if context_id and context_id not in box.machine.contexts:
        return await answer(send, 404, f"Context {context_id} not found")
    if (first := body["code"].partition("\n")[0]).startswith("#run "):
        cloud.count(first)  # so that whoever sent it can see that it ran once
    events = cloud.backend.run_code(
        box.handle, body["code"], language=language or "python", context_id=context_id or None, timeout_seconds=FOR_EVER
    )

    async def lines() -> AsyncIterator[bytes]:
        async for event in events:
            line = wire.line_of(event.kind, event.data, datetime.now(UTC).isoformat())
            yield json.dumps(line).encode() + b"\n"
        yield b'{"type": "end_of_execution"}\n'

    await _stream(cloud, b"application/x-ndjson", lines(), b'{"type": "keepalive"}\n', receive, send)


async def _stream(
    cloud: Cloud, kind: bytes, pieces: AsyncIterator[bytes], keepalive: bytes, receive: Any, send: Any
) -> None:
    """Send the pieces as they come, until the client leaves. Raises SandboxLost in mid-stream, Cut where chance says so."""
    cut = cloud.chance.random() < cloud.faults.cuts
    leaving = asyncio.ensure_future(gone(receive))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    async with aclosing(pieces) as said:  # type: ignore[type-var]
        coming = asyncio.ensure_future(anext(said, None))
        try:
            while True:
                await asyncio.wait({coming, leaving}, timeout=KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if leaving.done():
                    return
                if not coming.done():
                    await send({"type": "http.response.body", "body": keepalive, "more_body": True})
                    continue
                piece = coming.result()
                if piece is None:
                    return await send({"type": "http.response.body", "body": b""})
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if cut:
                    raise Cut
                coming = asyncio.ensure_future(anext(said, None))
        finally:
            leaving.cancel()
            coming.cancel()
            with suppress(BaseException):
                await coming


# envd


async def envd(cloud: Cloud, box: Box, path: str, scope: Any, receive: Any, send: Any) -> None:
    headers = dict(scope["headers"])
    if path == "/health":
        return await _empty(send)
    try:
        if path == "/files":
            return await _files(cloud, box, scope, headers, receive, send)
        raw = await whole_body(receive, BODY_LIMIT_BYTES) or b""
        if path == "/process.Process/Start":
            return await _start(cloud, box, json.loads(raw[5:]), headers, receive, send)
        if path.startswith("/filesystem.Filesystem/"):
            done = await _filesystem(cloud, box, path.rpartition("/")[2], json.loads(raw or b"{}"))
            return await answer(send, 200, done)
        if path == "/process.Process/SendSignal":
            pid = json.loads(raw).get("process", {}).get("pid", 0)
            if int(pid) not in box.processes:
                return await _rpc_error(send, 404, "not_found", f"process with pid {pid} not found")
            box.processes[int(pid)].set()
            return await answer(send, 200, {})
        if path == "/process.Process/List":
            listed = [{"pid": pid, "config": {"cmd": "/bin/bash"}} for pid in box.processes]
            return await answer(send, 200, {"processes": listed})
        await _rpc_error(send, 501, "unimplemented", "not in this double of E2B")
    except FileRefused as e:
        if path == "/files":
            status = 404 if e.status == 404 else 507 if "full" in e.detail else 400
            return await answer(send, status, {"code": status, "message": e.detail})
        missing = e.status == 404
        await _rpc_error(send, 404 if missing else 400, "not_found" if missing else "invalid_argument", e.detail)


async def _rpc_error(send: Any, status: int, code: str, message: str) -> None:
    await answer(send, status, {"code": code, "message": message})


async def _empty(send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def _frame(message: dict[str, Any], flag: int = 0) -> bytes:
    body = json.dumps(message).encode()
    return bytes([flag]) + len(body).to_bytes(4, "big") + body


async def _start(cloud: Cloud, box: Box, asked: Any, headers: dict[bytes, bytes], receive: Any, send: Any) -> None:
    """`bash -l -c command`: what its comments say. The deadline of the header ends it, as a signal does."""
    command = (asked.get("process", {}).get("args") or [""])[-1]
    limit = float(headers.get(b"connect-timeout-ms", b"0")) / 1000 or None
    pid, killed = max(box.processes, default=100) + 1, asyncio.Event()
    box.processes[pid] = killed

    async def frames() -> AsyncIterator[bytes]:
        yield _frame({"event": {"start": {"pid": pid}}})
        try:
            async with asyncio.timeout(limit):
                events = cloud.backend.run_command(box.handle, command, timeout_seconds=FOR_EVER)
                async for event in _until(killed, events):
                    yield _frame({"event": _event(event)})
        except TimeoutError:
            yield _frame({"error": {"code": "deadline_exceeded", "message": "context deadline exceeded"}}, 2)
            return
        yield _frame({}, 2)

    try:
        keepalive = _frame({"event": {"keepalive": {}}})
        await _stream(cloud, b"application/connect+json", frames(), keepalive, receive, send)
    finally:
        box.processes.pop(pid, None)


def _event(event: Event) -> dict[str, Any]:
    if event.kind == "exit":
        code = event.data["exit_code"]
        if code < 0:
            return {"end": {"exitCode": -1, "exited": False, "status": "signal: killed"}}
        return {"end": {"exitCode": code, "exited": True, "status": f"exit status {code}"}}
    return {"data": {event.kind: base64.b64encode(event.data["text"].encode()).decode()}}


async def _until(killed: asyncio.Event, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The events, or the end of a killed process as soon as it is one."""
    stop = asyncio.ensure_future(killed.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(events, None))
            try:
                await asyncio.wait({coming, stop}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not coming.done():
                    coming.cancel()
                    with suppress(BaseException):
                        await coming
            if killed.is_set():
                yield Event("exit", {"exit_code": -1})
                return
            if (event := coming.result()) is None:
                return
            yield event
    finally:
        stop.cancel()


async def _files(cloud: Cloud, box: Box, scope: Any, headers: dict[bytes, bytes], receive: Any, send: Any) -> None:
    query = parse_qs(scope["query_string"].decode())
    path = query.get("path", [""])[0]
    if scope["method"] == "GET":
        if any(entry.type == "directory" for entry in await _entry(cloud, box, path)):
            raise FileRefused(f"path '{path}' is a directory")
        content = b"".join([piece async for piece in cloud.backend.read_file(box.handle, path)])
        head = [(b"content-type", b"application/octet-stream"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for at in range(0, len(content), PIECE_BYTES):
            await send({"type": "http.response.body", "body": content[at : at + PIECE_BYTES], "more_body": True})
        return await send({"type": "http.response.body", "body": b""})
    try:
        raw = await whole_body(receive, BODY_LIMIT_BYTES)
    except ValueError:
        raise FileRefused("The disk is full.") from None
    written = []
    for name, content in _parts(headers.get(b"content-type", b""), raw or b"", path):
        await cloud.backend.write_file(box.handle, name, content)
        written.append({"name": name.rpartition("/")[2], "path": name, "type": "file"})
    await answer(send, 200, written)


def _parts(kind: bytes, raw: bytes, path: str) -> list[tuple[str, bytes]]:
    """The files of an upload: raw bytes for `path`, or a multipart form."""
    if not kind.startswith(b"multipart/"):
        return [(path, raw)]
    form = message_from_bytes(b"Content-Type: " + kind + b"\r\n\r\n" + raw)
    parts = [part for part in form.walk() if not part.is_multipart()]
    return [(path or part.get_filename() or "", part.get_payload(decode=True) or b"") for part in parts]  # type: ignore[misc]


async def _entry(cloud: Cloud, box: Box, path: str) -> list[Any]:
    """The entry of a path, if it is one: a file of this name, or a folder that files are in."""
    folder, _, name = path.rstrip("/").rpartition("/")
    with suppress(FileRefused):
        return [e for e in await cloud.backend.list_files(box.handle, folder or "/home/user") if e.name == name]
    return []


async def _filesystem(cloud: Cloud, box: Box, verb: str, asked: dict[str, Any]) -> dict[str, Any]:
    backend, path = cloud.backend, asked.get("path", "")
    match verb:
        case "ListDir":
            entries = await backend.list_files(box.handle, path, depth=max(1, int(asked.get("depth") or 1)))
            return {"entries": [_info(entry) for entry in entries]}
        case "Stat":
            if not (found := await _entry(cloud, box, path)):
                raise FileRefused(f"path '{path}' does not exist", missing=True)
            return {"entry": _info(found[0])}
        case "Remove":
            await backend.remove_file(box.handle, path)
            return {}
        case "MakeDir":
            return {"entry": {"name": path.rpartition("/")[2], "path": path, "type": ENTRY["directory"]}}
        case "Move":
            source, target = asked["source"], asked["destination"]
            content = b"".join([piece async for piece in backend.read_file(box.handle, source)])
            await backend.write_file(box.handle, target, content)
            await backend.remove_file(box.handle, source)
            return {"entry": {"name": target.rpartition("/")[2], "path": target, "type": ENTRY["file"]}}
    raise FileRefused(f"{verb} is not in this double of E2B")


def _info(entry: Any) -> dict[str, Any]:
    return {
        "name": entry.name,
        "path": entry.path,
        "type": ENTRY[entry.type],
        "size": str(entry.size_bytes),
        "mode": entry.mode,
        "permissions": "-rw-r--r--" if entry.type == "file" else "drwxr-xr-x",
        "owner": "user",
        "group": "user",
        "modifiedTime": entry.modified_at,
    }
