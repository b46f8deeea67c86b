"""The line to the node: requests and replies are lines of JSON. A meter is a line that stays open while a run goes on."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from contextlib import suppress
from typing import Any

from executions.backends.local import http
from executions.errors import BackendError, BackendUnavailable, SandboxLost, SandboxOutOfMemory, SandboxRefused

NODE_SECONDS = 90  # a template may warm up first, and run its start command
KEPT = 16  # connections that wait for a next use, of each node
LOST = {"out_of_memory": SandboxOutOfMemory}

_kept: dict[str, list[socket.socket]] = {}
os.register_at_fork(after_in_child=_kept.clear)


class Link:
    """One connection to the node that serves `run_dir`, made or used again; between two uses the node knows nothing of it."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self._socket: socket.socket | None = None
        self._waiting = False  # for an answer, which nobody else must read

    async def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """BackendUnavailable where the node does not answer, SandboxLost where it knows no such sandbox."""
        try:
            async with asyncio.timeout(NODE_SECONDS):
                if self._socket is None:
                    self._socket = _take(self.run_dir) or await http.connected(self.run_dir, "node.sock")
                answer = json.loads(await self._exchange(json.dumps({"op": op, **request}).encode() + b"\n"))
        except (OSError, TimeoutError) as problem:
            raise BackendUnavailable(
                f"The node at {self.run_dir} does not answer.", remedy="Start it: sandbox_node."
            ) from problem
        if "error" not in answer:
            return answer
        if answer["error"] == "lost":
            raise LOST.get(answer.get("reason"), SandboxLost)(answer["detail"])
        if answer["error"] in ("refused", "invalid", "exists"):
            raise SandboxRefused(answer["detail"])
        if answer["error"] == "unavailable":
            raise BackendUnavailable(answer["detail"])
        raise BackendError(answer["detail"])

    async def _exchange(self, line: bytes) -> bytes:
        """Send a line and receive one; by hand, for streams take as long again as the node does."""
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        self._waiting = True
        await loop.sock_sendall(self._socket, line)
        received = b""
        while not received.endswith(b"\n"):
            piece = await loop.sock_recv(self._socket, 1 << 16)
            if not piece:
                raise ConnectionError("the node has hung up")
            received += piece
        self._waiting = False
        return received

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def release(self) -> None:
        """Keep the connection for the next use, where the node remembers nothing of this one."""
        kept = _kept.setdefault(self.run_dir, [])
        if self._socket is None or self._waiting or len(kept) >= KEPT:
            self.close()
        else:
            kept.append(self._socket)


def _take(run_dir: str) -> socket.socket | None:
    """A connection that was kept and that the node has not closed since."""
    while kept := _kept.get(run_dir):
        connection = kept.pop()
        try:
            connection.recv(1)  # nothing was asked: it can only say that it has hung up
        except BlockingIOError:
            return connection
        except ConnectionError:
            pass
        connection.close()
    return None


class Meter:
    """What the node measures of one run. SandboxLost, with the reason where there is one, when the sandbox has ended."""

    def __init__(self, run_dir: str, sandbox_id: str) -> None:
        self._run_dir, self._sandbox_id = run_dir, sandbox_id
        self._link = Link(run_dir)
        self._watching: asyncio.Task[None] | None = None
        self._metering = False
        self.exceeded = False  # the CPU time is used up

    async def _ask(self, op: str) -> dict[str, Any]:
        try:
            return await self._link.ask(op, sandbox_id=self._sandbox_id)
        except BackendUnavailable as problem:  # the node's end was the sandbox's
            raise SandboxLost() from problem

    async def begin(self) -> None:
        self._metering = True
        await self._ask("begin")

    async def used(self) -> dict[str, Any]:
        """{"cpu_us", "peak_memory_bytes"} since begin(); the last that is asked."""
        used = await self._ask("used")
        self._metering = False
        return used

    async def why(self) -> dict[str, Any]:
        """{"reached": [named limits], "memory_kills": int, "memory_mib": int} since begin()."""
        return await self._ask("why")

    def limit_cpu(self, seconds: float, stop: Any) -> None:
        """Call `stop` when the run has used this much CPU time."""
        self._watching = asyncio.create_task(self._watch(seconds, stop))

    async def _watch(self, seconds: float, stop: Any) -> None:
        link = Link(self._run_dir)
        try:
            with suppress(BackendError):
                await link.ask("spent", sandbox_id=self._sandbox_id, cpu_us=int(seconds * 1_000_000))
                self.exceeded = True
                stop()
        finally:
            link.close()

    def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._metering:
            self._link.close()  # which ends it
        else:
            self._link.release()
