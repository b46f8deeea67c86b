"""The client of the local runtime: asks the node for sandboxes, and talks to each sandbox over its own sockets."""

from __future__ import annotations

import asyncio
import base64
import codecs
import json
import os
import secrets
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from executions.backends import wire
from executions.backends.base import (
    Backend,
    Capabilities,
    Check,
    EgressRecord,
    Event,
    FileInfo,
    Handle,
    Limits,
    Listed,
    SandboxSpec,
    TemplateState,
)
from executions.backends.local import http, limits
from executions.backends.local.link import Link, Meter
from executions.backends.local.streams import Deadline, envelopes, lines
from executions.errors import (
    BackendError,
    BackendUnavailable,
    ContextRestarted,
    ContextUnknown,
    CpuExceeded,
    FileRefused,
    RunTimedOut,
    SandboxLost,
    SandboxMissing,
    Unsupported,
)
from executions.states import ISOLATION

ENVD, INTERPRETER = 49983, 49999
LOST = "The code could not be interrupted; its context was ended and its variables are lost."
STOP_SECONDS = 5  # for the agent to stop a run; after that the sandbox is ended
TYPES = {"FILE_TYPE_DIRECTORY": "directory", "FILE_TYPE_SYMLINK": "symlink"}
LANGUAGES = frozenset({"python", "bash", "javascript", "typescript"})  # of the default template, on any machine
CAPABILITIES = Capabilities(
    limits=True,
    executes=True,
    commands=True,
    files=True,
    contexts=True,
    packages=True,
    internet=True,
    network_rules=True,
    egress=True,
    templates=True,
    pause=True,
    run_limits=True,
    metrics=True,
    ports=True,
)


class LocalBackend(Backend):
    """Sandboxes behind namespaces on this machine. OPTIONS: RUN_DIR, the node's folder; FLOOR, the least isolation."""

    remote = False
    has_node = True

    @property
    def isolation(self) -> str:  # type: ignore[override]
        """What the node has found that this machine allows; until one has run here, what is to be expected."""
        try:
            return Path(self.run_dir, "isolation").read_text().strip() or "namespaces"
        except OSError:
            return "namespaces"

    @property
    def refusal(self) -> str:
        floor = self.options.get("FLOOR", "namespaces")
        if ISOLATION.index(self.isolation) >= ISOLATION.index(floor):
            return ""
        return (
            f"this machine gives local sandboxes the isolation {self.isolation!r}, which is below the floor of this "
            f"installation ({floor}); manage.py doctor says how to raise the one, SANDGATE_ISOLATION_FLOOR={self.isolation} "
            "lowers the other"
        )

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """With the languages that some template of the node has; a template without one refuses it."""
        try:
            noted = [json.loads(path.read_text()) for path in Path(self.run_dir, "languages").iterdir()]
        except (OSError, ValueError):  # before the node runs, or while it writes
            noted = []
        return replace(CAPABILITIES, languages=LANGUAGES.union(*noted), layers=self.isolation != "reduced")

    @property
    def is_reached(self) -> bool:
        return os.path.exists(os.path.join(self.run_dir, "node.sock"))

    @property
    def layers(self) -> Path:
        """Where the folders of packages lie that its sandboxes may be given; the node makes it."""
        return Path(self.run_dir, "layers")

    @property
    def run_dir(self) -> str:
        return os.path.abspath(self.options["RUN_DIR"])

    async def _node(self, op: str, **request: Any) -> dict[str, Any]:
        """One request to the node. BackendUnavailable where it does not answer, SandboxLost where it knows no such sandbox."""
        link = Link(self.run_dir)
        try:
            return await link.ask(op, **request)
        finally:
            link.release()

    # life

    async def create(self, spec: SandboxSpec) -> Handle:
        if self.refusal:
            raise BackendUnavailable(self.refusal[0].upper() + self.refusal[1:] + ".")
        limits = {name: getattr(spec.limits, name) for name in Limits.__dataclass_fields__}
        made = await self._node(
            "create", sandbox_id=spec.sandbox_id, template=spec.template, timeout_seconds=spec.timeout_seconds, limits=limits,
            env=spec.env, metadata=spec.metadata, network_allow=list(spec.network_allow),
            agent=spec.agent, layer=spec.layer, floor=self.options.get("FLOOR", "namespaces"),
        )  # fmt: skip
        return _handle(made)

    async def connect(self, handle: Handle) -> None:
        async with http.request(handle["dir"], ENVD, "GET", "/health") as answer:
            if answer.status != 204:
                raise SandboxLost()

    async def set_timeout(self, handle: Handle, seconds: int) -> None:
        await self._node("set_timeout", sandbox_id=handle["sandbox_id"], seconds=seconds)

    async def pause(self, handle: Handle) -> None:
        await self._turned("pause", handle)

    async def resume(self, handle: Handle, *, timeout_seconds: int) -> None:
        await self._turned("resume", handle, seconds=timeout_seconds)

    async def _turned(self, op: str, handle: Handle, **request: Any) -> None:
        try:
            await self._node(op, sandbox_id=handle["sandbox_id"], **request)
        except BackendUnavailable as problem:  # the node's end was the sandbox's, but one that is late is not gone
            raise BackendError(problem.detail) from problem

    async def kill(self, handle: Handle) -> bool:
        return await self.kill_by_id(handle["sandbox_id"])

    async def kill_by_id(self, sandbox_id: str) -> bool:
        try:
            await self._node("kill", sandbox_id=sandbox_id)
        except BackendUnavailable as problem:
            raise BackendError(problem.detail) from problem
        return True

    async def check(self) -> Check:
        try:
            found = await self._node("check")
        except BackendError as problem:
            return Check(ok=False, detail=problem.detail, isolation=self.isolation)
        templates = found["templates"]
        said = [f"{name}: {t['state']}" + (f" ({t['detail']})" if t["detail"] else "") for name, t in templates.items()]
        asked = [templates["default"]] if "default" in templates else templates.values()
        ready = any(
            t["state"] in ("ready", "asleep") for t in asked
        )  # another that is broken is not the backend's matter
        states = {name: TemplateState(t["state"], t["detail"], t.get("digest", "")) for name, t in templates.items()}
        if self.refusal:
            ready, said = False, [self.refusal]
        return Check(
            ok=ready, detail="; ".join(said) or "no templates", isolation=self.isolation, walls=found["walls"],
            templates=states,
        )  # fmt: skip

    async def have_template(self, name: str, content: dict[str, Any] | None) -> None:
        await self._node("template", name=name, **(content or {}))

    async def egress(self, handle: Handle, *, after: int = 0, final: bool = False) -> list[EgressRecord]:
        found: list[EgressRecord] = []
        more = True
        while more:
            page = await self._node("egress", sandbox_id=handle["sandbox_id"], after=after, final=final)
            found += [EgressRecord(**record) for record in page["records"]]
            after, more = found[-1].number if found else after, page["more"]
        return found

    # code

    async def run_code(
        self,
        handle: Handle,
        code: str,
        *,
        language: str = "python",
        context_id: str | None = None,
        env: dict[str, str] | None = None,
        timeout_seconds: float = 60,
        cpu_seconds: float = 0,
    ) -> AsyncIterator[Event]:
        run = secrets.token_hex(8)
        body = json.dumps(
            {"code": code, "env_vars": env, "context_id": context_id, "language": None if context_id else language, "run": run}
        ).encode()  # fmt: skip
        meter, deadline = self._meter(handle), Deadline(timeout_seconds)
        ended = False
        try:
            try:
                await meter.begin()
            except SandboxLost as lost:
                raise SandboxMissing(lost.detail) if type(lost) is SandboxLost else lost from None
            if cpu_seconds:
                meter.limit_cpu(cpu_seconds, deadline.now)
            async with http.request(handle["dir"], INTERPRETER, "POST", "/execute", body=body) as answer:
                if answer.status != 200:
                    raise _refusal(answer.status, (await answer.whole()).decode("utf-8", "replace"))
                async for line in lines(answer, deadline):
                    if line.get("type") == "end_of_execution":
                        ended = True
                    elif event := await _event(line, meter):
                        yield event
            if not ended:
                raise SandboxLost()
            if usage := await _used(meter):
                yield usage
        except TimeoutError:
            ended = True
            if await self._stop(handle, context_id or language, run):
                yield Event("error", {"name": "ContextRestarting", "value": LOST, "traceback": ""})
            if usage := await _used(meter):
                yield usage
            if meter.exceeded:
                raise CpuExceeded(f"The code used more than {cpu_seconds:g} s of CPU time and was stopped.") from None
            raise RunTimedOut(f"The code ran longer than {timeout_seconds:g} s and was stopped.") from None
        except (ContextUnknown, Unsupported, SandboxMissing):
            ended = True
            raise
        except SandboxLost:
            ended = True
            await self._explain(handle)
            raise
        finally:
            meter.close()
            if not ended and await self._stop(handle, context_id or language, run):
                raise ContextRestarted(LOST)

    def _meter(self, handle: Handle) -> Meter:
        """What measures a run from outside; a runtime without such gives one that knows nothing."""
        return Meter(self.run_dir, handle["sandbox_id"])

    async def _explain(self, handle: Handle) -> None:
        """Raise SandboxLost in its most exact form, where the node knows why the sandbox has ended."""
        with suppress(BackendUnavailable):
            await self._node("fate", sandbox_id=handle["sandbox_id"])

    async def _stop(self, handle: Handle, context: str, run: str) -> bool:
        """Return when nothing of the run runs any more: True when that cost the context. What does not obey is ended."""
        body = json.dumps({"run": run}).encode()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                async with http.request(
                    handle["dir"], INTERPRETER, "POST", f"/contexts/{quote(context)}/interrupt", body=body
                ) as answer:
                    if answer.status == 200:
                        return bool((await answer.json())["lost"])
        except TimeoutError:
            pass
        except SandboxLost:
            return False
        await self.kill(handle)
        return True

    async def run_command(
        self,
        handle: Handle,
        command: str,
        *,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_seconds: float = 60,
        cpu_seconds: float = 0,
    ) -> AsyncIterator[Event]:
        meter = self._meter(handle)
        process = {"cmd": "/bin/bash", "args": ["-l", "-c", command], "envs": env or {}, "cwd": cwd}
        message = json.dumps({"process": process, "stdin": False}).encode()
        headers = _authorized(handle) | {
            "content-type": "application/connect+json",
            "connect-timeout-ms": str(int(timeout_seconds * 1000)),
        }
        body = struct.pack(">BI", 0, len(message)) + message
        decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}
        exit_code: int | None = None
        pid = 0
        deadline = Deadline(timeout_seconds + STOP_SECONDS)  # the agent stops it; this is for one that does not
        try:
            await meter.begin()
            if cpu_seconds:
                meter.limit_cpu(cpu_seconds, deadline.now)
            async with http.request(
                handle["dir"], ENVD, "POST", "/process.Process/Start", headers=headers, body=body
            ) as answer:
                async for envelope in envelopes(answer, deadline):
                    if error := envelope.get("error"):
                        raise _command_refusal(error, timeout_seconds)
                    with http.understood():
                        event = envelope.get("event", {})
                        pid = event.get("start", {}).get("pid", pid)
                        data = event.get("data", {}).items()
                        said = [(kind, decoders[kind].decode(base64.b64decode(piece))) for kind, piece in data]
                        if "end" in event:
                            exit_code = event["end"].get("exitCode", 0)
                    for kind, text in said:
                        yield Event(kind, {"text": text})
            if exit_code is None:
                raise SandboxLost()
            if usage := await _used(meter):
                yield usage
        except TimeoutError:
            if not meter.exceeded:
                await self.kill(handle)
                raise RunTimedOut() from None
            await self._stop_command(handle, pid)
            pid = 0
            if usage := await _used(meter):
                yield usage
            raise CpuExceeded(f"The command used more than {cpu_seconds:g} s of CPU time and was stopped.") from None
        except SandboxLost:
            pid = 0
            await self._explain(handle)
            raise
        finally:
            meter.close()
            if exit_code is None and pid:
                await self._stop_command(handle, pid)
        yield Event("exit", {"exit_code": exit_code})

    async def _stop_command(self, handle: Handle, pid: int) -> None:
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._rpc(handle, "process.Process/Stop", {"process": {"pid": pid}})
        except BackendError:
            pass  # it has ended
        except TimeoutError:
            await self.kill(handle)

    # contexts

    async def _contexts(self, handle: Handle, method: str, path: str, body: Any = None) -> Any:
        data = b"" if body is None else json.dumps(body).encode()
        async with http.request(handle["dir"], INTERPRETER, method, path, body=data) as answer:
            if answer.status != 200:
                raise _refusal(answer.status, (await answer.whole()).decode("utf-8", "replace"))
            return await answer.json()

    async def list_contexts(self, handle: Handle) -> list[dict[str, Any]]:
        found = await self._contexts(handle, "GET", "/contexts")
        with http.understood():
            return [{name: str(one[name]) for name in ("id", "language", "cwd")} for one in found]

    async def create_context(self, handle: Handle, *, language: str, cwd: str | None = None) -> dict[str, Any]:
        return await self._contexts(handle, "POST", "/contexts", {"language": language, "cwd": cwd})

    async def restart_context(self, handle: Handle, context_id: str) -> None:
        await self._contexts(handle, "POST", f"/contexts/{quote(context_id, safe='')}/restart")

    async def remove_context(self, handle: Handle, context_id: str) -> None:
        await self._contexts(handle, "DELETE", f"/contexts/{quote(context_id, safe='')}")

    # files

    async def write_file(self, handle: Handle, path: str, data: bytes | AsyncIterator[bytes]) -> None:
        headers = _authorized(handle) | {"content-type": "application/octet-stream"}
        target = f"/files?path={quote(path, safe='')}"
        async with http.request(handle["dir"], ENVD, "POST", target, headers=headers, body=data) as answer:
            if answer.status != 200:
                raise _file_refusal(answer.status, await answer.json())

    async def read_file(self, handle: Handle, path: str) -> AsyncIterator[bytes]:
        target = f"/files?path={quote(path, safe='')}"
        async with http.request(handle["dir"], ENVD, "GET", target, headers=_authorized(handle)) as answer:
            if answer.status != 200:
                raise _file_refusal(answer.status, await answer.json())
            async for piece in answer.pieces():
                yield piece

    async def _rpc(self, handle: Handle, method: str, message: dict[str, Any]) -> dict[str, Any]:
        headers = _authorized(handle) | {"content-type": "application/json", "connect-protocol-version": "1"}
        async with http.request(
            handle["dir"], ENVD, "POST", f"/{method}", headers=headers, body=json.dumps(message).encode()
        ) as answer:
            said = await answer.json()
            if answer.status != 200:
                raise _file_refusal(answer.status, said)
            return said

    async def list_files(self, handle: Handle, path: str, *, depth: int = 1) -> list[FileInfo]:
        listed = await self._rpc(handle, "filesystem.Filesystem/ListDir", {"path": path, "depth": depth})
        with http.understood():
            return [
                FileInfo(
                    name=entry["name"], path=entry["path"], type=TYPES.get(entry["type"], "file"),
                    size_bytes=int(entry["size"]), mode=entry["mode"], modified_at=entry["modifiedTime"],
                )
                for entry in listed["entries"]
            ]  # fmt: skip

    async def remove_file(self, handle: Handle, path: str) -> None:
        await self._rpc(handle, "filesystem.Filesystem/Remove", {"path": path})

    async def move_file(self, handle: Handle, path: str, to: str) -> None:
        await self._rpc(handle, "filesystem.Filesystem/Move", {"source": path, "destination": to})

    async def open_port(self, handle: Handle, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if port not in (ENVD, INTERPRETER):
            raise ConnectionRefusedError(f"nothing listens on port {port}")
        try:
            return await http.open_socket(handle["dir"], f"{port}.sock")
        except (OSError, TimeoutError) as problem:
            raise SandboxLost() from problem

    async def list(self) -> list[Listed]:  # the last one: below it, the name is no longer the type
        listed = await self._node("list")
        return [Listed(s["sandbox_id"], _handle(s), s["started_at"]) for s in listed["sandboxes"]]


def _handle(made: dict[str, Any]) -> Handle:
    return {"sandbox_id": made["sandbox_id"], "dir": made["dir"], "token": made["token"]}


def _authorized(handle: Handle) -> dict[str, str]:
    return {"x-access-token": handle["token"]}


def _refusal(status: int, text: str) -> BackendError:
    if status == 404:
        return ContextUnknown(text)
    return Unsupported(text) if status == 400 else BackendError(text)


def _file_refusal(status: int, said: Any) -> BackendError:
    message = str(said.get("message", "")) if isinstance(said, dict) else ""
    if status >= 500 and status != 507:
        return BackendError(message)
    return FileRefused(message or None, missing=status == 404)


async def _used(meter: Meter) -> Event | None:
    """The usage event; none where the sandbox ended right after the code."""
    try:
        used = await meter.used()
    except SandboxLost:
        return None
    return Event("usage", {name: used[name] for name in ("cpu_us", "peak_memory_bytes")})


async def _event(line: dict[str, Any], meter: Meter) -> Event | None:
    """This product's event for a line of E2B's, with the limit that an error stands for; None for what is unknown."""
    if line.get("type") == "error":
        return await _error(line, meter)
    said = wire.said(line)
    return Event(*said) if said else None


async def _error(line: dict[str, Any], meter: Meter) -> Event:
    error = {name: str(line.get(name) or "") for name in ("name", "value", "traceback")}
    died = "status" in line  # the agent's word; what code raises has none
    limit = limits.suspected(error["name"], error["value"])
    if died or limit is not None:
        seen = await meter.why()
        if died and seen["memory_kills"]:
            return limits.killed(seen)
        if limit is not None and limits.confirmed(limit, error["value"], seen):
            error["reason"] = limit.value
    return Event("error", error)


def _command_refusal(error: dict[str, Any], timeout_seconds: float) -> BackendError:
    message = str(error.get("message", ""))
    if error.get("code") == "deadline_exceeded":
        return RunTimedOut(f"The command ran longer than {timeout_seconds:g} s and was stopped.")
    return FileRefused(message) if error.get("code") == "invalid_argument" else BackendError(message)
