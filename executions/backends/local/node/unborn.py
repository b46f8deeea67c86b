"""A sandbox before it has a name: forked, mapped, pid 1 of its namespaces, waiting for its plan. One is kept ready.

No guest code has run in it, so it is nobody's yet; what takes longest (two forks, new namespaces, the way into its
control groups, each of which waits for the kernel) is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from node import ground
from node.cgroups import Group, Tree
from node.uids import Block

CREDENTIALS = struct.Struct("iII")
DESCRIPTOR = struct.Struct("i")
SECONDS = 10


class Unborn:
    def __init__(self, uid: int | None, reduced: bool, group: Group | None) -> None:
        self.uid, self.reduced, self.group = uid, reduced, group
        self.pid, self.pidfd = 0, -1
        self._handed: socket.socket | None = None
        self.diag: socket.socket | None = None  # tells what its sockets keep, where no control group counts it
        self._node, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._node.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._node.setblocking(False)

    @classmethod
    async def prepare(
        cls, control: socket.socket, plan: dict[str, Any], block: Block | None, tree: Tree | None
    ) -> Unborn:
        """Have the zygote fork one. OSError with the reason where a namespace cannot be had."""
        group = tree.create(secrets.token_hex(8)) if tree is not None else None
        unborn = cls(block.take() if block is not None else None, plan["reduced"], group)
        try:
            socket.send_fds(control, [json.dumps(plan | {"uid": unborn.uid}).encode()], [unborn._theirs.fileno()])
            unborn._theirs.close()
            async with asyncio.timeout(SECONDS):
                await unborn._expect(b"unshared")
                unborn.diag, unborn._handed = unborn._handed, None
                if group is not None:
                    await asyncio.to_thread(group.add, unborn.pid)  # and with it all that it will fork
                if unborn.uid is not None and not unborn.reduced:
                    Path(f"/proc/{unborn.pid}/uid_map").write_text(f"1000 {unborn.uid} 1")
                    Path(f"/proc/{unborn.pid}/gid_map").write_text(f"1000 {unborn.uid} 1")
                unborn._node.send(b"mapped")
                await unborn._expect(b"waiting")
        except (OSError, TimeoutError) as problem:
            await unborn.discard(block)
            raise OSError(str(problem) or "the zygote did not answer in time") from None
        finally:
            unborn._theirs.close()
        return unborn

    async def _expect(self, word: bytes) -> None:
        said, pid = await self._receive()
        if said != word:
            raise OSError(said.decode("utf-8", "replace") or "it ended while its walls were built")
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.pid, self.pidfd = pid, os.pidfd_open(pid)

    async def _receive(self) -> tuple[bytes, int]:
        """One message and, from the kernel, its sender's pid; empty when it has hung up."""
        loop = asyncio.get_running_loop()
        readable = loop.create_future()
        loop.add_reader(self._node, lambda: readable.done() or readable.set_result(None))
        try:
            await readable
        finally:
            loop.remove_reader(self._node)
        room = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_SPACE(DESCRIPTOR.size)
        said, ancillary, _, _ = self._node.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
        pid = 0
        for _, kind, data in ancillary:
            if kind == socket.SCM_RIGHTS:
                self._handed = socket.socket(fileno=DESCRIPTOR.unpack(data[: DESCRIPTOR.size])[0])
            elif kind == socket.SCM_CREDENTIALS:
                pid = CREDENTIALS.unpack(data[: CREDENTIALS.size])[0]
        return (said, pid) if said and pid else (b"", 0)

    def pids(self) -> list[int]:
        """Itself and its children."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]

    async def be_born(
        self,
        plan: dict[str, Any],
        listeners: list[socket.socket],
        more_seconds: float,
        open_gate: Callable[[socket.socket], Awaitable[None]],
    ) -> None:
        """Give it its plan and its sockets; returns when all walls stand and it serves. OSError or TimeoutError otherwise.

        Where the plan has a port for the proxy, `open_gate` is given the socket that listens there, inside the sandbox.
        """
        socket.send_fds(self._node, [json.dumps(plan).encode()], [listener.fileno() for listener in listeners])
        async with asyncio.timeout(SECONDS + more_seconds):
            if plan["proxy_port"]:
                await self._expect(b"proxy")
                if self._handed is None:
                    raise OSError("the sandbox did not hand over its proxy's socket")
                with self._handed as listener:
                    await open_gate(listener)
            await self._expect(b"ready")
        self._node.close()

    async def discard(self, block: Block | None) -> None:
        """Kill it, wait for its end, and remove its control groups."""
        if self.pidfd >= 0:
            if self.reduced:
                ground.kill_sandbox(self.pid, self.uid)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            await dead(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        if self.diag is not None:
            self.diag.close()
        self._node.close()  # only now: whoever waits for its word hears that it has hung up
        if block is not None and self.uid is not None:
            block.give_back(self.uid)
            self.uid = None
        if self.group is not None:
            group, self.group = self.group, None
            await _remove(group)


async def dead(pidfd: int) -> None:
    """Return when the process behind this descriptor has ended; for a pid 1: with all of its namespace."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(pidfd, lambda: ended.done() or ended.set_result(None))
    try:
        await ended
    finally:
        loop.remove_reader(pidfd)


async def _remove(group: Group) -> None:
    for pause in (0.001, 0.01, 0.1, 0.5, 0):
        try:
            group.remove()
            return
        except OSError:  # the kernel lets go of the last process a little later
            if not pause:
                raise
            group.kill()
            await asyncio.sleep(pause)
