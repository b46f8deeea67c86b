"""Sandboxes as such, and what one does in a session beside running code: contexts, folders as archives, files in parts."""

from __future__ import annotations

import asyncio
import posixpath
import re
import secrets
import shlex
import tarfile
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from django.db.models import QuerySet

from executions import backends
from executions.backends.base import Backend, FileInfo
from executions.errors import Conflict, FileRefused, Invalid, NotFound, Unsupported
from executions.hop import rows
from executions.keys import Caller
from executions.models import Execution, Sandbox
from executions.operations.reap import retire
from executions.operations.sessions import _alive, _checked, _in_use, gone_is_recorded, put_file
from executions.operations.wait import cancel, wait
from executions.states import LANGUAGES, EndReason, Scope

KILLED = "its sandbox was ended"
RUN_ENDS_SECONDS = 5  # for which the end of a run is waited for
COMMAND_SECONDS = 600  # for what is done with an archive or a part that has arrived
DEPTH = 64
BLOCK = 512


# Sandboxes


def sandboxes_of(caller: Caller) -> QuerySet[Sandbox]:
    """Those of the caller's team, or of their agent where the key has one."""
    caller.needs(Scope.READ)
    found = Sandbox.objects.filter(team=caller.team).select_related("agent", "template")
    if caller.key is not None and caller.key.backend:
        found = found.filter(backend=caller.key.backend)
    return found.filter(agent=caller.key.agent_id) if caller.key is not None and caller.key.agent_id else found


def find_sandbox(caller: Caller, sandbox_id: str) -> Sandbox:
    """Raises NotFound, also for another team's."""
    sandbox = sandboxes_of(caller).filter(pk=sandbox_id).first()
    if sandbox is None:
        raise NotFound(f"There is no sandbox {sandbox_id[:100]}.", field="sandbox_id")
    return sandbox


async def kill_sandbox(*, caller: Caller, sandbox_id: str) -> Sandbox:
    """End it with all that runs in it. Idempotent. Raises NotFound."""

    def to_end() -> tuple[Sandbox, list[Execution]]:
        caller.needs(Scope.RUN)
        sandbox = find_sandbox(caller, sandbox_id)
        return sandbox, list(Execution.objects.open().filter(sandbox=sandbox))

    sandbox, open_ones = await rows(to_end)
    for execution in open_ones:
        await cancel(execution=execution, caller=caller, reason=KILLED)
    if open_ones and not sandbox.kept:  # whoever runs it ends the sandbox with the run
        await asyncio.gather(*(wait(execution, RUN_ENDS_SECONDS) for execution in open_ones))
    else:
        await retire(sandbox, EndReason.KILLED)
    return await rows(find_sandbox, caller, sandbox_id)


# Contexts


async def list_contexts(*, caller: Caller, session_id: str) -> list[dict[str, Any]]:
    sandbox = await _alive(caller, session_id, Scope.READ)
    with gone_is_recorded(sandbox):
        return await backends.get(sandbox.backend).list_contexts(sandbox.machine)


async def create_context(*, caller: Caller, session_id: str, language: str, cwd: str | None) -> dict[str, Any]:
    """A further interpreter with variables of its own. Raises Invalid, SessionGone, Unsupported."""
    if language not in LANGUAGES:
        raise Invalid(f"{language!r} is not a language here; there are {', '.join(LANGUAGES)}.", field="language")
    sandbox = await _alive(caller, session_id)
    backend = backends.get(sandbox.backend)
    if language not in backend.capabilities.languages:
        raise Unsupported(f"{sandbox.backend} has no {language}.")
    with gone_is_recorded(sandbox):
        return await backend.create_context(sandbox.machine, language=language, cwd=_checked(cwd) if cwd else None)


async def restart_context(*, caller: Caller, session_id: str, context_id: str) -> None:
    """Its variables are lost, the files stay. Raises ContextUnknown, SessionGone."""
    sandbox = await _alive(caller, session_id)
    with gone_is_recorded(sandbox):
        await backends.get(sandbox.backend).restart_context(sandbox.machine, _name(context_id))


async def remove_context(*, caller: Caller, session_id: str, context_id: str) -> None:
    sandbox = await _alive(caller, session_id)
    with gone_is_recorded(sandbox):
        await backends.get(sandbox.backend).remove_context(sandbox.machine, _name(context_id))


def _name(context_id: str) -> str:
    if not context_id.isprintable() or "/" in context_id or len(context_id) > 64:
        raise NotFound(f"There is no context {context_id[:70]!r}.", field="context_id")
    return context_id


# Files and folders


async def move_file(*, caller: Caller, session_id: str, path: str, to: str) -> None:
    """A file or folder gets another path; what was there is replaced. Raises FileRefused."""
    path, to = _checked(path), _checked(to)
    sandbox = await _alive(caller, session_id)
    with gone_is_recorded(sandbox):
        await backends.get(sandbox.backend).move_file(sandbox.machine, path, to)


async def stat_file(*, caller: Caller, session_id: str, path: str) -> FileInfo:
    """One file's size and moment. Raises FileRefused where there is none."""
    where = posixpath.normpath(posixpath.join("/home/user", _checked(path)))
    sandbox = await _alive(caller, session_id, Scope.READ)
    with gone_is_recorded(sandbox):
        beside = await backends.get(sandbox.backend).list_files(sandbox.machine, posixpath.dirname(where))
    for info in beside:
        if info.path == where and info.type == "file":
            return info
    raise FileRefused(f"path '{path}' does not exist, or is no file", missing=True)


async def archive(*, caller: Caller, session_id: str, path: str) -> AsyncIterator[bytes]:
    """The files below a folder as a tar, in pieces: one file at a time is read, and none is held."""
    path = _checked(path).rstrip("/") or "/"
    sandbox = await _alive(caller, session_id, Scope.READ)
    backend = backends.get(sandbox.backend)
    with gone_is_recorded(sandbox):
        found = await backend.list_files(sandbox.machine, path, depth=DEPTH)
    return _in_use(sandbox, _tar(backend, sandbox, path, found))


async def _tar(backend: Backend, sandbox: Sandbox, root: str, found: list[FileInfo]) -> AsyncIterator[bytes]:
    base = root if root.startswith("/") else f"/home/user/{root}"
    for info in sorted(found, key=lambda one: one.path):
        if info.type not in ("file", "directory"):
            continue
        entry = tarfile.TarInfo(info.path.removeprefix(base).lstrip("/"))
        entry.mode, entry.mtime = info.mode & 0o777, _seconds(info.modified_at)
        if info.type == "directory":
            entry.type = tarfile.DIRTYPE
            yield _header(entry)
            continue
        entry.size = info.size_bytes
        left = entry.size
        try:
            pieces = backend.read_file(sandbox.machine, info.path)
            first = await anext(pieces, b"")
        except FileRefused:
            continue  # it was removed meanwhile, or is none that can be read
        yield _header(entry)
        piece = first
        while piece and left:
            yield piece[:left]
            left -= min(left, len(piece))
            piece = await anext(pieces, b"")
        await pieces.aclose()  # type: ignore[attr-defined]
        if left:
            raise ConnectionError(f"{info.path} became shorter while it was read")
        yield b"\0" * (-entry.size % BLOCK)
    yield b"\0" * (2 * BLOCK)


def _header(entry: tarfile.TarInfo) -> bytes:
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _seconds(moment: str) -> int:
    try:
        return max(0, int(datetime.fromisoformat(moment).timestamp()))
    except ValueError:
        return 0


async def unpack(*, caller: Caller, session_id: str, path: str, data: AsyncIterator[bytes]) -> None:
    """Put the files of a tar (also compressed) below a folder. It is unpacked inside, as the guest's user. Raises FileRefused."""
    name, folder = f"/tmp/.archive-{secrets.token_hex(8)}", _quoted(path)
    unpacked = f"mkdir -p {folder} && tar -xf {name} --no-same-owner -C {folder}"
    await _arrived(caller, session_id, name, data, f"{unpacked}; code=$?; rm -f {name}; exit $code", "the archive")


async def append(*, caller: Caller, session_id: str, path: str, offset: int, data: AsyncIterator[bytes]) -> int:
    """Add a part to a file that has `offset` bytes; its size then. Raises Conflict with the `size_bytes` that it has."""
    name, quoted = f"/tmp/.part-{secrets.token_hex(8)}", _quoted(path)
    joined = (
        f"size=$(stat -c %s {quoted} 2>/dev/null || echo 0); "
        f'if [ "$size" = {offset} ]; then cat {name} >> {quoted}; code=$?; else code=9; fi; '
        f"rm -f {name}; stat -c %s {quoted} 2>/dev/null || echo 0; exit $code"
    )
    said, code = await _arrived(caller, session_id, name, data, joined, "the part", accepts=9)
    if not (told := re.search(r"(?:^|\n)(\d{1,15})\s*$", said)):
        raise FileRefused("The sandbox does not say how large the file is.")
    size = int(told[1])
    if code:
        raise Conflict(
            f"{path} has {size} bytes, not {offset}.", size_bytes=size, remedy="Send what lies behind size_bytes."
        )
    return size


def _quoted(path: str) -> str:
    """For a shell; absolute, so that it is never an option."""
    return shlex.quote(posixpath.join("/home/user", _checked(path)))


async def _arrived(
    caller: Caller, session_id: str, name: str, data: AsyncIterator[bytes], command: str, what: str, accepts: int = 0
) -> tuple[str, int]:
    """Write a body to a file inside, then do something with it there: (what was said, exit code)."""
    sandbox = await _alive(caller, session_id)
    backend = backends.get(sandbox.backend)
    if not (backend.capabilities.executes and backend.capabilities.commands):
        raise Unsupported(f"{sandbox.backend} runs no commands, which this needs.")
    await put_file(caller=caller, session_id=session_id, path=name, data=data)
    said, errors, code = "", "", 0
    with gone_is_recorded(sandbox):
        async for event in backend.run_command(sandbox.machine, command, timeout_seconds=COMMAND_SECONDS):
            match event.kind:
                case "stdout":
                    said = (said + event.data["text"])[-4096:]
                case "stderr":
                    errors = (errors + event.data["text"])[-500:]
                case "exit":
                    code = event.data["exit_code"]
    if code not in (0, accepts):
        raise FileRefused(f"{what} could not be taken: {errors.strip() or f'exit code {code}'}")
    return said, code


__all__ = [
    "append", "archive", "create_context", "find_sandbox", "kill_sandbox", "list_contexts", "move_file",
    "remove_context", "restart_context", "sandboxes_of", "stat_file", "unpack",
]  # fmt: skip
