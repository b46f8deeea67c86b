"""E2B's process.Process: commands with their output, input and terminals. A client that leaves kills nothing."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import os
import pty
import signal
import struct
import termios
from dataclasses import dataclass, field
from typing import Any

from . import places
from .connect import ConnectError, envelope, messages, only_message
from .contexts import TRUNCATED
from .http import Request
from .processes import Moment, descendants, extinguish, fork_guest, kill, now, started_by

PIECE = 16 * 1024
SIGNALS = {"SIGNAL_SIGKILL": signal.SIGKILL, "SIGNAL_SIGTERM": signal.SIGTERM}
REMEMBERED_SECONDS = 30  # how long an exit can still be connected to
KEEPALIVE_SECONDS = 90

Said = tuple[str, bytes]  # stdout, stderr or pty with a piece; "" at the end


@dataclass(eq=False)
class Command:
    pid: int
    config: dict[str, Any]
    tag: str | None
    outputs: list[int]  # stdout and stderr, or the terminal
    input: int | None  # stdin, or the terminal
    terminal: bool
    since: Moment  # before it began
    status: int | None = None
    silent: bool = False  # it has ended and all that it said is told
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    said_bytes: int = 0
    listeners: set[asyncio.Queue[Said]] = field(default_factory=set)
    pumping: asyncio.Task[None] | None = None

    def listen(self) -> asyncio.Queue[Said]:
        queue: asyncio.Queue[Said] = asyncio.Queue(64)
        self.listeners.add(queue)
        if self.silent:
            queue.put_nowait(("", b""))
        return queue

    def leave(self, queue: asyncio.Queue[Said]) -> None:
        self.listeners.discard(queue)
        while not queue.empty():  # whoever waits to put something goes on
            queue.get_nowait()

    async def tell(self, name: str, piece: bytes) -> None:
        for queue in list(self.listeners):
            await queue.put((name, piece))

    def kill(self, number: int = signal.SIGKILL) -> None:
        kill(descendants(self.pid) | ({self.pid} if self.status is None else set()), number)

    async def stop(self, roots: set[int]) -> None:
        """End it with all that it has started, daemons too; `roots` is what the agent has started."""
        self.kill()
        await extinguish(lambda: started_by(self.pid, self.since, roots))

    def close_input(self) -> None:
        if self.input is not None:
            os.close(self.input)
            self.input = None


class Commands:
    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.known: dict[int, Command] = {}  # running, and ended a little while ago
        self.streams = {"Start": self._start, "Connect": self._connect, "StreamInput": self._stream_input}
        self.unary = {
            "List": self._list, "SendSignal": self._signal, "SendInput": self._send_input,
            "CloseStdin": self._close_stdin, "Update": self._update, "Stop": self._stop,
        }  # fmt: skip

    async def stream(self, request: Request, method: str) -> None:
        """Answer a call that streams, with its end or its error as the last message."""
        try:
            await self.streams[method](request)
        except ConnectError as refusal:
            if not request.begun:
                request.begin(200, "application/connect+json")
            await request.send(envelope({"error": refusal.described()}, last=True))
        else:
            await request.send(envelope({}, last=True))
        await request.end()

    async def _start(self, request: Request) -> None:
        body = await only_message(request)
        request.begin(200, "application/connect+json")
        command = self._spawn(body)
        try:
            await self._relay(command, command.listen(), request)
        except ConnectError:
            await command.stop(self.agent.reaper.roots)  # the deadline
            raise

    async def _connect(self, request: Request) -> None:
        body = await only_message(request)
        request.begin(200, "application/connect+json")
        command = self._found(body)
        await self._relay(command, command.listen(), request)

    async def _relay(self, command: Command, queue: asyncio.Queue[Said], request: Request) -> None:
        """Send what the command says until it ends. ConnectError at the deadline that the client set."""
        milliseconds = request.headers.get("connect-timeout-ms", "")
        deadline = int(milliseconds) / 1000 if milliseconds.isdigit() and int(milliseconds) else None
        ping = request.headers.get("keepalive-ping-interval", "")
        silence = int(ping) if ping.isdigit() and int(ping) else KEEPALIVE_SECONDS
        if command.pumping is None:
            command.pumping = asyncio.create_task(self._pump(command))
        try:
            async with asyncio.timeout(deadline):
                await request.send(envelope({"event": {"start": {"pid": command.pid}}}))
                while True:
                    try:
                        name, piece = await asyncio.wait_for(queue.get(), silence)
                    except TimeoutError:
                        await request.send(envelope({"event": {"keepalive": {}}}))
                        continue
                    if not name:
                        break
                    await request.send(envelope({"event": {"data": {name: base64.b64encode(piece).decode()}}}))
                await request.send(envelope({"event": {"end": _end(command.status or 0)}}))
        except TimeoutError:
            raise ConnectError("deadline_exceeded", "the deadline has passed") from None
        finally:
            command.leave(queue)

    def _spawn(self, body: dict[str, Any]) -> Command:
        config = body.get("process")
        if not isinstance(config, dict) or not isinstance(config.get("cmd"), str):
            raise ConnectError("invalid_argument", "process.cmd is missing")
        cwd = places.found(os.path.join(places.home, str(config.get("cwd") or "~").replace("~", places.home, 1)))
        if not os.path.isdir(cwd):
            raise ConnectError("invalid_argument", f"cwd '{cwd}' does not exist")
        environment = self.agent.environment(cwd) | {str(k): str(v) for k, v in (config.get("envs") or {}).items()}
        argv = [config["cmd"], *map(str, config.get("args") or [])]
        size = body["pty"].get("size", {}) if isinstance(body.get("pty"), dict) else None
        ours, theirs, writer = _terminal(size) if size is not None else _pipes(body.get("stdin", True))

        def become() -> None:
            for standard, descriptor in enumerate(theirs):
                os.dup2(descriptor, standard)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            if size is not None:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            os.chdir(cwd)
            os.execvpe(argv[0], argv, environment)

        since = now()
        try:
            pid = fork_guest(self.agent.plan, self.agent.rules, become)
        except OSError as problem:
            for descriptor in {*ours, *([writer] if writer is not None else [])}:
                os.close(descriptor)
            raise ConnectError("resource_exhausted", str(problem)) from None
        finally:
            for descriptor in set(theirs):
                os.close(descriptor)
        command = self.known[pid] = Command(
            pid, config, body.get("tag"), ours, writer, terminal=size is not None, since=since
        )
        self.agent.reaper.watch(pid, lambda status: self._ended(command, status))
        return command

    def _ended(self, command: Command, status: int) -> None:
        command.status = status
        command.ended.set()
        if not command.terminal:
            command.close_input()
        loop = asyncio.get_running_loop()
        loop.call_later(
            REMEMBERED_SECONDS, lambda: self.known.get(command.pid) is command and self.known.pop(command.pid)
        )

    async def _pump(self, command: Command) -> None:
        names = ("pty",) if command.terminal else ("stdout", "stderr")
        limit = self.agent.plan["limits"]["output_bytes"]
        pumps = [_pumped(command, name, output, limit) for name, output in zip(names, command.outputs, strict=True)]
        await asyncio.gather(*pumps)
        await command.ended.wait()
        if command.terminal:
            command.input = None  # its descriptor was the output's
        command.silent = True
        await command.tell("", b"")

    def _found(self, body: dict[str, Any]) -> Command:
        selector = body.get("process") or {}
        for command in self.known.values():
            if command.pid == selector.get("pid") or (command.tag and command.tag == selector.get("tag")):
                return command
        raise ConnectError("not_found", "no such process")

    def _running(self, body: dict[str, Any]) -> Command:
        command = self._found(body)
        if command.status is not None:
            raise ConnectError("not_found", "the process has ended")
        return command

    def _list(self, body: dict[str, Any]) -> dict[str, Any]:
        running = [command for command in self.known.values() if command.status is None]
        tagged = [({"tag": command.tag} if command.tag else {}) for command in running]
        return {"processes": [{"config": c.config, "pid": c.pid} | tag for c, tag in zip(running, tagged, strict=True)]}

    def _signal(self, body: dict[str, Any]) -> dict[str, Any]:
        number = SIGNALS.get(body.get("signal", ""))
        if number is None:
            raise ConnectError("invalid_argument", "unknown signal")
        self._running(body).kill(number)
        return {}

    async def _stop(self, body: dict[str, Any]) -> dict[str, Any]:
        """Not E2B's: answers when nothing runs any more of what this command has started."""
        await self._found(body).stop(self.agent.reaper.roots)
        return {}

    async def _send_input(self, body: dict[str, Any]) -> dict[str, Any]:
        await self._write(self._running(body), body.get("input") or {})
        return {}

    async def _write(self, command: Command, given: dict[str, Any]) -> None:
        kind = "pty" if command.terminal else "stdin"
        if command.input is None or kind not in given:
            raise ConnectError("internal", f"the process takes no such input; its {kind} may be closed")
        view = memoryview(base64.b64decode(given[kind]))
        while view:
            try:
                view = view[os.write(command.input, view) :]
            except BlockingIOError:
                await _writable(command.input)
            except (OSError, TypeError) as problem:
                raise ConnectError("internal", f"the input could not be written: {problem}") from None

    def _close_stdin(self, body: dict[str, Any]) -> dict[str, Any]:
        command = self._running(body)
        if command.terminal:
            raise ConnectError("failed_precondition", "a terminal has no stdin to close")
        command.close_input()
        return {}

    def _update(self, body: dict[str, Any]) -> dict[str, Any]:
        command = self._running(body)
        if not command.terminal or command.input is None:
            raise ConnectError("failed_precondition", "the process has no terminal")
        _resize(command.input, (body.get("pty") or {}).get("size") or {})
        return {}

    async def _stream_input(self, request: Request) -> None:
        command: Command | None = None
        async for message in messages(request):
            if "start" in message:
                command = self._running(message["start"])
            elif "data" in message and command is not None:
                await self._write(command, message["data"].get("input") or {})
        request.begin(200, "application/connect+json")
        await request.send(envelope({}))


def _pipes(with_input: bool) -> tuple[list[int], list[int], int | None]:
    """Our reading ends, the three standard descriptors of the child, and the writing end of its stdin."""
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    if not with_input:
        return [out_read, err_read], [os.open("/dev/null", os.O_RDONLY), out_write, err_write], None
    in_read, in_write = os.pipe()
    os.set_blocking(in_write, False)
    return [out_read, err_read], [in_read, out_write, err_write], in_write


def _terminal(size: dict[str, Any]) -> tuple[list[int], list[int], int | None]:
    ours, theirs = pty.openpty()
    _resize(ours, size)
    os.set_blocking(ours, False)
    return [ours], [theirs] * 3, ours


def _resize(terminal: int, size: dict[str, Any]) -> None:
    rows, columns = int(size.get("rows") or 24), int(size.get("cols") or 80)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0))


def _end(status: int) -> dict[str, Any]:
    if os.WIFSIGNALED(status):
        name = (signal.strsignal(os.WTERMSIG(status)) or "unknown").lower()
        return {"exitCode": -1, "exited": False, "status": f"signal: {name}", "error": f"signal: {name}"}
    code = os.WEXITSTATUS(status)
    end: dict[str, Any] = {"exitCode": code, "exited": True, "status": f"exit status {code}"}
    return end | ({"error": f"exit status {code}"} if code else {})


async def _writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(descriptor, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_writer(descriptor)


async def _pumped(command: Command, name: str, descriptor: int, limit: int) -> None:
    """Tell all listeners what comes; where there is none, or beyond the limit, it is thrown away, so that the process goes on.

    Terminals have no limit: somebody sits there.
    """
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
            except OSError:  # a terminal whose last user has gone
                return
            if not piece:
                return
            within = command.terminal or command.said_bytes <= limit
            command.said_bytes += len(piece)
            if within:
                await command.tell(name, piece)
                if command.said_bytes > limit and not command.terminal:
                    await command.tell("stderr", TRUNCATED.format(limit).encode())
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
