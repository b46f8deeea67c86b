"""The agent's side of contexts: starts them, sends them cells, collects what they say, stops them for certain."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import signal
import socket
import time
from collections import deque
from typing import Any

from .languages import LANGUAGES
from .processes import (
    close_all_but,
    descendants,
    extinguish,
    fork_guest,
    kill,
    new_threads,
    now,
    started_by,
)

GRACE_SECONDS = (0.3, 0.7)  # after the first and the second interrupt; then the context's processes end
THREAD_SECONDS = 0.3  # for threads that the run has started to end, too
RESTFUL_LOOKS = 8  # in a row: longer than a turn at the interpreter's lock
HANDOVER_SECONDS = 5  # for an idle context to take its next cell
LINE_LIMIT = 64 << 20  # one result; a longer line ends the context
ITEMS_LIMIT = 2_000_000  # values in one result: beyond it reading the line takes many times its own memory
EVENT_BYTES = 256  # what an event takes beside its text
HIGH_WATER = 4 << 20  # of events that nobody has fetched yet, in bytes; beyond it the context waits
SAYS = (
    "count",
    "stdout",
    "stderr",
    "result",
    "error",
    "end",
)  # what a context may say; more output comes through pipes
PIECE = 64 * 1024
TRUNCATED = "\n[output ends here: it passed the limit of {} bytes]\n"
SWOLLEN = "\n[a result of more than {} values was left out]\n"


class Context:
    """One interpreter with its state. `lock` is held by whoever runs a cell in it."""

    def __init__(self, agent: Any, identifier: str, language: str, cwd: str) -> None:
        self.agent, self.id, self.language, self.cwd = agent, identifier, language, cwd
        self.lock = asyncio.Lock()
        self.events: deque[dict[str, Any]] = deque()
        self.arrived = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.ended = asyncio.Event()
        self.ended.set()
        self.stopping: asyncio.Task | None = None  # keeps the task that interrupts after a client has left
        self.pid = 0
        self._channels: dict[int, str] = {}
        self._interrupting: asyncio.Task | None = None
        self._said = 0
        self._since = now()
        self._counted = False
        self.run = ""  # the run that is going on, by the name that its client gave it
        self.lost: deque[str] = deque(maxlen=64)  # runs that ended with the context

    def described(self) -> dict[str, str]:
        return {"id": self.id, "language": self.language, "cwd": self.cwd}

    # starting and ending

    def start(self) -> None:
        """Fork the interpreter, unless it runs. OSError where that is not possible."""
        if self.pid:
            return
        ours, theirs = socket.socketpair()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()

        channels = [theirs.fileno(), out_write, err_write]
        try:
            self.pid = self._fork(theirs, channels)
        finally:
            theirs.close()
            os.close(out_write)
            os.close(err_write)
        self.ended.clear()
        self._control = ours
        ours.setblocking(False)
        os.set_blocking(out_read, False)
        os.set_blocking(err_read, False)
        self._partial = bytearray()
        self._held = 0
        self._channels = {out_read: "stdout", err_read: "stderr", ours.fileno(): "control"}
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}
        self._reading = False
        self._resume()
        self.agent.reaper.watch(self.pid, self._ended)

    def _fork(self, control: socket.socket, channels: list[int]) -> int:
        agent, environment = self.agent, self.agent.environment(self.cwd)
        language = LANGUAGES[self.language]
        if self.language == "python" and agent.nursling is not None:
            nursling, agent.nursling = agent.nursling, None
            return nursling.become_context(agent.plan, self.cwd, environment, agent.rules, channels)

        def become() -> None:
            os.dup2(channels[1], 1)
            os.dup2(channels[2], 2)
            close_all_but(control.fileno())
            os.chdir(self.cwd)
            language.run(control, environment, agent.plan["limits"])

        return fork_guest(agent.plan, agent.rules, become, language.data_mib)

    def _resume(self) -> None:
        if not self._reading:
            self._reading = True
            loop = asyncio.get_running_loop()
            for descriptor in self._channels:
                loop.add_reader(descriptor, self._read, descriptor)

    def _pause(self) -> None:
        self._reading = False
        loop = asyncio.get_running_loop()
        for descriptor in self._channels:
            loop.remove_reader(descriptor)

    def _ended(self, status: int) -> None:
        for descriptor in list(self._channels):
            while descriptor in self._channels and self._read(descriptor):
                pass
        for descriptor in list(self._channels):
            self._close(descriptor)
        pid, self.pid = self.pid, 0
        self.ended.set()
        if not self.idle.is_set():
            kill(started_by(pid, self._since, self.agent.reaper.roots))  # or a bomb's children keep its memory
            self.lost.append(self.run)
            self._push({"type": "died", "status": status}, 0)
            self.idle.set()

    def _close(self, descriptor: int) -> None:
        name = self._channels.pop(descriptor, None)
        if name is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            self._control.close() if name == "control" else os.close(descriptor)

    def end(self) -> None:
        """Kill the interpreter and everything that it started."""
        if self.pid:
            kill(descendants(self.pid) | {self.pid})

    # what it says

    def _read(self, descriptor: int) -> bool:
        """Take one piece from a channel; False when there is none now."""
        name = self._channels[descriptor]
        if name == "control":
            self._drain()  # what a child has printed came before what the context says now
        try:
            data = os.read(descriptor, PIECE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._close(descriptor)
            return False
        if name == "control":
            self._take_lines(data)
        elif text := self._decoders[name].decode(data):
            self._output(name, text, len(data))
        return True

    def _take_lines(self, data: bytes) -> None:
        self._partial += data
        if len(self._partial) > LINE_LIMIT:
            self.end()
            return
        if b"\n" not in data:
            return
        *lines, rest = self._partial.split(b"\n")
        self._partial = bytearray(rest)
        for line in lines:
            if len(line) > ITEMS_LIMIT and sum(map(line.count, b",:[{")) > ITEMS_LIMIT:
                self._push({"type": "stderr", "text": SWOLLEN.format(ITEMS_LIMIT)}, 0)
                continue
            try:
                event = json.loads(line)
                kind = event["type"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # the user's code wrote to our socket
            if kind not in SAYS:
                continue
            if kind in ("stdout", "stderr"):
                self._output(kind, str(event.get("text")), len(line))
                continue
            if kind == "end":
                self.idle.set()
            elif kind == "count" and not self._counted and LANGUAGES[self.language].has_child:
                self._counted, self._since = True, now()  # its child has started, the cell has not
            self._push(event, len(line))

    def _drain(self) -> None:
        for descriptor in [one for one, name in self._channels.items() if name != "control"]:
            while descriptor in self._channels and self._read(descriptor):
                pass

    def _output(self, name: str, text: str, size: int) -> None:
        limit = self.agent.plan["limits"]["output_bytes"]
        if self._said > limit:
            return
        self._said += size
        self._push({"type": name, "text": text}, size)
        if self._said > limit:
            self._push({"type": "stderr", "text": TRUNCATED.format(limit)}, 0)

    def _push(self, event: dict[str, Any], size: int) -> None:
        if self.id not in self.agent.running:
            return  # a background thread between cells: there is nobody to tell
        event["_size"] = size + EVENT_BYTES
        self.events.append(event)
        self._held += size + EVENT_BYTES
        self.arrived.set()
        if self._held > HIGH_WATER and self._reading:
            self._pause()

    def take(self) -> list[dict[str, Any]]:
        """All events that have arrived, oldest first."""
        taken = list(self.events)
        self.events.clear()
        self.arrived.clear()
        self._held -= sum(event.pop("_size") for event in taken)
        if self.pid and not self._reading:
            self._resume()
        return taken

    # cells

    async def begin(self, code: str, env: dict[str, str], language: str, run: str = "") -> None:
        """Send one cell; its events follow until one says end or died. The caller holds the lock. OSError, TimeoutError."""
        self.start()
        self.take()
        self._said = 0
        self._counted, self.run = False, run
        self._since = now()
        self.idle.clear()
        self.agent.running.add(self.id)
        data = json.dumps({"code": code, "env": env, "language": language}).encode() + b"\n"
        try:
            async with asyncio.timeout(HANDOVER_SECONDS):
                await asyncio.get_running_loop().sock_sendall(self._control, data)
        except (OSError, TimeoutError):
            self.end()  # it is idle and does not read: it is not itself any more
            await self.ended.wait()

    async def interrupt(self) -> None:
        """Stop the running cell; when this returns nothing of it runs any more. Nothing happens to an idle context."""
        if self._interrupting is None and not self.idle.is_set():
            self._interrupting = asyncio.create_task(self._interrupt())
        if self._interrupting is not None:
            await asyncio.shield(self._interrupting)

    async def _interrupt(self) -> None:
        pid = self.pid
        try:
            self.take()
            for patience in GRACE_SECONDS:
                try:
                    os.killpg(pid, signal.SIGINT)
                    await asyncio.wait_for(self._idle_dropping(), patience)
                    break
                except ProcessLookupError:
                    break
                except TimeoutError:
                    await self._extinguish(pid)  # it may be waiting for a child that does not hear
            if not self.idle.is_set() or not await self._threads_ended(pid):
                self.end()
                await self.ended.wait()
            await self._extinguish(pid)
            if not self.pid and self.run not in self.lost:
                self.lost.append(self.run)
        finally:
            self._interrupting = None

    async def _extinguish(self, pid: int) -> None:
        await extinguish(lambda: started_by(pid, self._since, self.agent.reaper.roots))

    async def _threads_ended(self, pid: int) -> bool:
        """Whether the threads of the run end in time, or are at rest as in an idle pool: not just waiting for their turn."""
        deadline, restful_looks = time.monotonic() + THREAD_SECONDS, 0
        while (threads := new_threads(pid, self._since)) and restful_looks < RESTFUL_LOOKS:
            restful_looks = 0 if any(threads) else restful_looks + 1
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def _idle_dropping(self) -> None:
        """Wait until idle, throwing output away so that the context is not held up by it."""
        while not self.idle.is_set():
            self.take()
            arrived = asyncio.create_task(self.arrived.wait())
            idle = asyncio.create_task(self.idle.wait())
            await asyncio.wait({arrived, idle}, return_when=asyncio.FIRST_COMPLETED)
            arrived.cancel()
            idle.cancel()
        self.take()
