"""E2B's process.Process: Start with its stream of output, List, SendSignal. A client that leaves kills nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import struct
from dataclasses import dataclass, field
from typing import Any

from .http import Refused, Request
from .processes import descendants, fork_guest, kill

PIECE = 32 * 1024
SIGNALS = {"SIGNAL_SIGKILL": signal.SIGKILL, "SIGNAL_SIGTERM": signal.SIGTERM}
KEEPALIVE_SECONDS = 50


class ConnectError(Exception):
    """An answer of the Connect protocol other than success."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message


@dataclass
class Command:
    pid: int
    config: dict[str, Any]
    tag: str | None
    output: asyncio.Queue[tuple[str, bytes]] = field(default_factory=lambda: asyncio.Queue(64))
    pumps: asyncio.Future | None = None
    abandoned: bool = False  # the client has left
    status: int | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


def _envelope(message: dict[str, Any], last: bool = False) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack(">BI", 2 if last else 0, len(data)) + data


async def _message(request: Request) -> dict[str, Any]:
    data = await request.whole()
    if len(data) < 5 or struct.unpack(">I", data[1:5])[0] > len(data) - 5:
        raise Refused(400, {"code": "invalid_argument", "message": "the message is incomplete"})
    try:
        return json.loads(data[5 : 5 + struct.unpack(">I", data[1:5])[0]])
    except ValueError:
        raise Refused(400, {"code": "invalid_argument", "message": "the message is not JSON"}) from None


class Commands:
    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.running: dict[int, Command] = {}
        self.unary = {"List": self._list, "SendSignal": self._signal}

    async def start(self, request: Request) -> None:
        body = await _message(request)
        milliseconds = request.headers.get("connect-timeout-ms")
        deadline = int(milliseconds) / 1000 if milliseconds and milliseconds.isdigit() else None
        request.begin(200, "application/connect+json")
        try:
            command = self._spawn(body)
            await request.send(_envelope({"event": {"start": {"pid": command.pid}}}))
            try:
                await asyncio.wait_for(self._stream(command, request), deadline)
            except TimeoutError:
                kill(descendants(command.pid) | ({command.pid} if command.status is None else set()))
                raise ConnectError("deadline_exceeded", "the deadline has passed") from None
        except ConnectError as refusal:
            await request.send(_envelope({"error": {"code": refusal.code, "message": refusal.message}}, last=True))
        else:
            await request.send(_envelope({}, last=True))
        await request.end()

    def _spawn(self, body: dict[str, Any]) -> Command:
        config = body.get("process")
        if not isinstance(config, dict) or not isinstance(config.get("cmd"), str):
            raise ConnectError("invalid_argument", "process.cmd is missing")
        if body.get("pty"):
            raise ConnectError("unimplemented", "this sandbox has no terminals yet")
        cwd = config.get("cwd") or "/home/user"
        if cwd.startswith("~"):
            cwd = "/home/user" + cwd[1:]
        if not os.path.isdir(cwd):
            raise ConnectError("invalid_argument", f"cwd '{cwd}' does not exist")
        environment = self.agent.environment(cwd) | {str(k): str(v) for k, v in (config.get("envs") or {}).items()}
        argv = [config["cmd"], *map(str, config.get("args") or [])]
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()

        def become() -> None:
            os.dup2(out_write, 1)
            os.dup2(err_write, 2)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            os.chdir(cwd)
            os.execvpe(argv[0], argv, environment)

        try:
            pid = fork_guest(self.agent.plan, self.agent.rules, become)
        except OSError as problem:
            os.close(out_read)
            os.close(err_read)
            raise ConnectError("resource_exhausted", str(problem)) from None
        finally:
            os.close(out_write)
            os.close(err_write)
        command = self.running[pid] = Command(pid, config, body.get("tag"))
        self.agent.reaper.watch(pid, lambda status: self._ended(command, status))
        command.pumps = asyncio.gather(_pump(command, "stdout", out_read), _pump(command, "stderr", err_read))
        return command

    def _ended(self, command: Command, status: int) -> None:
        command.status = status
        self.running.pop(command.pid, None)
        command.ended.set()

    async def _stream(self, command: Command, request: Request) -> None:
        async def drained() -> None:
            await command.pumps
            await command.output.put(("", b""))

        finishing = asyncio.create_task(drained())
        try:
            while True:
                try:
                    name, piece = await asyncio.wait_for(command.output.get(), KEEPALIVE_SECONDS)
                except TimeoutError:
                    await request.send(_envelope({"event": {"keepalive": {}}}))
                    continue
                if not name:
                    break
                await request.send(_envelope({"event": {"data": {name: base64.b64encode(piece).decode()}}}))
            await command.ended.wait()
        finally:
            finishing.cancel()
            command.abandoned = True
            while not command.output.empty():
                command.output.get_nowait()
        await request.send(_envelope({"event": {"end": _end(command.status or 0)}}))

    def _list(self, body: dict[str, Any]) -> dict[str, Any]:
        described = []
        for command in self.running.values():
            described.append(
                {"config": command.config, "pid": command.pid} | ({"tag": command.tag} if command.tag else {})
            )
        return {"processes": described}

    def _signal(self, body: dict[str, Any]) -> dict[str, Any]:
        selector = body.get("process") or {}
        matching = [
            c for c in self.running.values() if c.pid == selector.get("pid") or (c.tag and c.tag == selector.get("tag"))
        ]
        if not matching:
            raise ConnectError("not_found", "no such process")
        number = SIGNALS.get(body.get("signal", ""))
        if number is None:
            raise ConnectError("invalid_argument", "unknown signal")
        for command in matching:
            kill(descendants(command.pid) | {command.pid}, number)
        return {}


def _end(status: int) -> dict[str, Any]:
    if os.WIFSIGNALED(status):
        name = signal.strsignal(os.WTERMSIG(status)) or "unknown"
        return {
            "exitCode": -1,
            "exited": False,
            "status": f"signal: {name.lower()}",
            "error": f"signal: {name.lower()}",
        }
    code = os.WEXITSTATUS(status)
    end: dict[str, Any] = {"exitCode": code, "exited": True, "status": f"exit status {code}"}
    return end | ({"error": f"exit status {code}"} if code else {})


async def _pump(command: Command, name: str, descriptor: int) -> None:
    """Move output to the queue; when nobody reads it any more it is thrown away, so the process goes on."""
    os.set_blocking(descriptor, False)
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        while True:
            try:
                piece = os.read(descriptor, PIECE)
            except BlockingIOError:
                readable.clear()
                await readable.wait()
                continue
            except OSError:
                return
            if not piece:
                return
            if not command.abandoned:
                await command.output.put((name, piece))
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
