"""One sandbox as the node sees it: born, metered, ended. What the guest says about itself is not asked."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import struct
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from node import meters
from node.cgroups import Group, Tree
from node.uids import Block
from node.zygotes import Zygote

PORTS = (49983, 49999)
BIRTH_SECONDS = 10
CREDENTIALS = struct.Struct("iII")


class Refusal(Exception):
    """A request that cannot be served: code and sentence."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


class Sandbox:
    def __init__(self, request: dict[str, Any], folder: Path) -> None:
        self.id: str = request["sandbox_id"]
        self.template: str = request["template"]
        self.metadata: dict[str, str] = request.get("metadata", {})
        self.limits: dict[str, int] = request["limits"]
        self.env: dict[str, str] = request.get("env", {})
        self.folder = folder
        self.token = secrets.token_hex(16)
        self.started_at = datetime.now(UTC).isoformat()
        self.gone = asyncio.Event()
        self.group: Group | None = None
        self.uid: int | None = None
        self.pid = 0
        self.peak_memory_bytes = 0
        self._pidfd = -1
        self._listeners: list[socket.socket] = []
        self._expiry: asyncio.TimerHandle | None = None

    def described(self) -> dict[str, Any]:
        return {
            "sandbox_id": self.id, "template": self.template, "metadata": self.metadata, "started_at": self.started_at,
            "dir": str(self.folder), "token": self.token,
        }  # fmt: skip

    async def be_born(self, zygote: Zygote, tree: Tree | None, block: Block | None) -> None:
        """Fork it and put it behind its walls. Refusal where one does not stand; then nothing is left."""
        began = time.monotonic()
        self._bind()
        node, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        node.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        node.setblocking(False)
        try:
            if tree is not None:
                self.group = tree.create(self.id)
                limits = self.limits
                self.group.limit(
                    memory_bytes=limits["memory_mib"] << 20,
                    processes=limits["processes"] + 32,
                    cpu_count=limits["cpu_count"],
                )
            self.uid = block.take() if block is not None else None
            plan = {
                "sandbox_id": self.id, "template": self.template, "limits": self.limits, "env": self.env, "token": self.token,
                "self_map": self.uid is None, "limit_data": tree is None, "shadowed": zygote.shadowed,
            }  # fmt: skip
            zygote.fork(plan, [theirs.fileno(), *(listener.fileno() for listener in self._listeners)])
            theirs.close()
            async with asyncio.timeout(BIRTH_SECONDS):
                said, pid = await _receive(node)
                self._hold(pid)
                if said != b"unshared":
                    raise OSError(said.decode() or "the zygote could not fork")
                self._admit(pid)
                node.send(b"mapped")
                said, pid = await _receive(node)
                if said != b"ready":
                    raise OSError(said.decode() or "it ended while its walls were built")
                self._hold(pid)  # the first one, its parent, has ended
                self._watch()
        except (OSError, IndexError, TimeoutError) as problem:
            await self.end()
            raise Refusal("unavailable", f"The sandbox could not be made: {problem or 'no answer in time'}") from None
        finally:
            node.close()
            theirs.close()
            for listener in self._listeners:
                listener.close()
        self.boot_ms = round((time.monotonic() - began) * 1000, 1)

    def _bind(self) -> None:
        self.folder.mkdir(mode=0o700)
        folder = os.open(self.folder, os.O_PATH | os.O_DIRECTORY)
        try:
            for port in PORTS:
                listener = socket.socket(socket.AF_UNIX)
                self._listeners.append(listener)
                listener.bind(f"/proc/self/fd/{folder}/{port}.sock")  # a socket's path has 108 bytes, a folder's more
                os.chmod(f"{port}.sock", 0o600, dir_fd=folder)
                listener.listen(128)
        finally:
            os.close(folder)

    def _admit(self, pid: int) -> None:
        """Put the newborn into its control groups, then write its maps: first limits, then life."""
        if self.group is not None:
            self.group.add(pid)
        if self.uid is not None:
            Path(f"/proc/{pid}/uid_map").write_text(f"1000 {self.uid} 1")
            Path(f"/proc/{pid}/gid_map").write_text(f"1000 {self.uid} 1")

    def _hold(self, pid: int) -> None:
        """Keep a handle on this process that no other can inherit."""
        self._let_go()
        if pid:
            self.pid, self._pidfd = pid, os.pidfd_open(pid)

    def _let_go(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _watch(self) -> None:
        """From now on the end of the process that is held is the sandbox's."""
        asyncio.get_running_loop().add_reader(self._pidfd, self._died)

    def _died(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self.gone.set()

    def expire_in(self, seconds: float, kill: Any) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_later(seconds, kill)

    def usage(self) -> dict[str, int]:
        """What it has used since its birth: {"cpu_us", "peak_memory_bytes"}."""
        if self.group is not None:
            return {"cpu_us": self.group.cpu_us(), "peak_memory_bytes": self.group.peak_memory_bytes()}
        measured = meters.measure(self.pid)
        self.peak_memory_bytes = max(self.peak_memory_bytes, measured.memory_bytes)
        return {"cpu_us": measured.cpu_us, "peak_memory_bytes": self.peak_memory_bytes}

    def watch_memory(self) -> None:
        """Without control groups: kill the largest guest of a sandbox that is over its limit."""
        measured = meters.measure(self.pid)
        self.peak_memory_bytes = max(self.peak_memory_bytes, measured.memory_bytes)
        if measured.memory_bytes > self.limits["memory_mib"] << 20 and measured.largest_guest:
            try:
                os.kill(measured.largest_guest, signal.SIGKILL)
            except ProcessLookupError:
                pass

    async def end(self) -> None:
        """Kill it, wait until the kernel says that all of it is gone, and remove its traces. Idempotent."""
        if self._expiry is not None:
            self._expiry.cancel()
        if self._pidfd >= 0 and not self.gone.is_set():
            self._watch()
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            await self.gone.wait()  # pid 1 ends last, after every process of its namespace
        self._let_go()
        for port in PORTS:
            (self.folder / f"{port}.sock").unlink(missing_ok=True)
        if self.folder.exists():
            self.folder.rmdir()
        if self.group is not None:
            for pause in (0.001, 0.01, 0.1, 0.5, 0):
                try:
                    self.group.remove()
                    break
                except OSError:
                    if not pause:
                        raise
                    self.group.kill()
                    await asyncio.sleep(pause)
        self.gone.set()


async def _receive(node: socket.socket) -> tuple[bytes, int]:
    """One message of the newborn and, from the kernel, its pid. Empty when it has hung up."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(node, lambda: readable.done() or readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(node)
    said, ancillary, _, _ = node.recvmsg(4096, socket.CMSG_SPACE(CREDENTIALS.size))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return said, CREDENTIALS.unpack(data[: CREDENTIALS.size])[0] if said else 0
    return said, 0
