"""E2B's filesystem.Filesystem: Stat, ListDir, MakeDir, Move, Remove."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from . import places
from .connect import ConnectError
from .files import resolved
from .http import Refused

ENTRIES_LIMIT = 20_000
CODES = {errno.ENOENT: "not_found", errno.EEXIST: "already_exists", errno.ENOTDIR: "invalid_argument",
         errno.EACCES: "permission_denied", errno.EPERM: "permission_denied", errno.ELOOP: "failed_precondition"}  # fmt: skip


def _path(body: dict[str, Any], name: str = "path") -> str:
    try:
        return resolved(str(body.get(name) or places.home))
    except Refused as refusal:
        raise ConnectError("invalid_argument", refusal.body["message"]) from None


def _entry(path: str) -> dict[str, Any]:
    facts = os.lstat(path)
    kind = "FILE_TYPE_DIRECTORY" if stat.S_ISDIR(facts.st_mode) else "FILE_TYPE_FILE"
    entry = {
        "name": _text(os.path.basename(path)) or "/",
        "type": kind,
        "path": _text(path),
        "size": str(facts.st_size),
        "mode": stat.S_IMODE(facts.st_mode),
        "permissions": stat.filemode(facts.st_mode),
        "owner": _owner(facts.st_uid),
        "group": _owner(facts.st_gid),
        "modifiedTime": datetime.fromtimestamp(facts.st_mtime, UTC).isoformat().replace("+00:00", "Z"),
    }
    if stat.S_ISLNK(facts.st_mode):
        entry |= {"type": "FILE_TYPE_SYMLINK", "symlinkTarget": _text(os.readlink(path)), "permissions": "Lrwxrwxrwx"}
    return entry


def _text(name: str) -> str:
    """A file's name as text: bytes that are none become U+FFFD, or whoever sends the name on breaks."""
    return os.fsencode(name).decode("utf-8", "replace")


def _owner(number: int) -> str:
    return {1000: "user", 65534: "root"}.get(number, str(number))


def _stat(body: dict[str, Any]) -> dict[str, Any]:
    return {"entry": _entry(_path(body))}


def _make(body: dict[str, Any]) -> dict[str, Any]:
    path = _path(body)
    if os.path.isdir(path):
        raise ConnectError("already_exists", f"directory already exists: {path}")
    os.makedirs(path, 0o755)
    return {"entry": _entry(path)}


def _move(body: dict[str, Any]) -> dict[str, Any]:
    source, target = _path(body, "source"), _path(body, "destination")
    os.lstat(source)
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    shutil.move(source, target)
    return {"entry": _entry(target)}


def _remove(body: dict[str, Any]) -> dict[str, Any]:
    path = _path(body)
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    elif os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
    return {}


def _list(body: dict[str, Any]) -> dict[str, Any]:
    path = _path(body)
    depth = int(body.get("depth") or 1)
    if not os.path.isdir(path):
        os.stat(path)
        raise ConnectError("invalid_argument", f"path is not a directory: {path}")
    entries: list[dict[str, Any]] = []
    level = [path]
    while level and depth > 0:
        depth -= 1
        below: list[str] = []
        for folder in level:
            for name in sorted(os.listdir(folder)):
                try:
                    entries.append(_entry(os.path.join(folder, name)))
                except FileNotFoundError:
                    continue
                if entries[-1]["type"] == "FILE_TYPE_DIRECTORY":
                    below.append(entries[-1]["path"])
                if len(entries) > ENTRIES_LIMIT:
                    raise ConnectError("resource_exhausted", f"more than {ENTRIES_LIMIT} entries")
        level = below
    return {"entries": entries}


def _translated(service: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def call(body: dict[str, Any]) -> dict[str, Any]:
        try:
            return service(body)
        except RecursionError:
            raise ConnectError("resource_exhausted", "the folders are nested too deeply") from None
        except OSError as problem:
            code = CODES.get(problem.errno or 0, "internal")
            raise ConnectError(code, f"{problem.filename or ''}: {os.strerror(problem.errno or 0)}") from None

    return call


unary = {
    name: _translated(service)
    for name, service in {"Stat": _stat, "MakeDir": _make, "Move": _move, "Remove": _remove, "ListDir": _list}.items()
}
