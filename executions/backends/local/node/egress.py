"""The egress proxy as the node sees it: a process of its own without rights, started when a sandbox first needs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Any

from guest import linux, seccomp
from node import proxy
from node.uids import Block

PORT = 3128  # where a sandbox finds it, on its own loopback
REMEMBERED = 500  # ended sandboxes whose ledger somebody may still ask for


class Egress:
    """One request after the other; OSError where the proxy cannot be had."""

    def __init__(self, block: Block | None) -> None:
        self.block = block
        self._uid: int | None = None
        self._control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._ended: deque[str] = deque()

    async def open(self, identifier: str, allow: list[str], agent: str, listener: socket.socket) -> None:
        """Serve what connects to this listener by these rules."""
        async with self._turn:
            request = {"op": "open", "id": identifier, "allow": allow, "agent": agent}
            try:
                answer = await self._ask(request, listener)
            except OSError:  # not started yet, or it has died
                await self._start()
                answer = await self._ask(request, listener)
        if "error" in answer:
            raise OSError(f"the egress proxy: {answer['error']}")

    async def take(self, identifier: str, after: int, final: bool) -> dict[str, Any]:
        """A page of the sandbox's ledger behind record `after`; with `final` its connections end first."""
        return await self._tell({"op": "take", "id": identifier, "after": after, "final": final}) or {
            "records": [],
            "more": False,
        }

    async def close(self, identifier: str) -> None:
        """End the sandbox's connections; its ledger stays for a while. When the proxy has died, they have ended with it."""
        await self._tell({"op": "close", "id": identifier})
        self._ended.append(identifier)
        if len(self._ended) > REMEMBERED:
            await self._tell({"op": "forget", "id": self._ended.popleft()})

    async def stop(self) -> None:
        """End the process, and with it every connection."""
        self._let_go()
        if self._process is not None:
            await self._process.wait()

    async def _tell(self, request: dict[str, Any]) -> dict[str, Any]:
        async with self._turn:
            with contextlib.suppress(OSError):
                return await self._ask(request)
        return {}

    async def _ask(self, request: dict[str, Any], listener: socket.socket | None = None) -> dict[str, Any]:
        if self._control is None:
            raise OSError("the egress proxy does not run")
        try:
            descriptors = [listener.fileno()] if listener is not None else []
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
            answer = await asyncio.get_running_loop().sock_recv(self._control, 1 << 18)
            if not answer:
                raise OSError("the egress proxy has ended")
            return json.loads(answer)
        except BaseException:  # an answer that was not waited for would be taken for the next one's
            self._let_go()
            raise

    async def _start(self) -> None:
        if self.block is not None and self._uid is None:
            self._uid = self.block.take()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            plan = {"uid": self._uid, "control": theirs.fileno()}
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", str(Path(__file__).parent), "egress", json.dumps(plan),
                stdin=asyncio.subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], env={"LANG": "C.UTF-8"},
            )  # fmt: skip
        self._control = ours

    def _let_go(self) -> None:
        if self._control is not None:
            self._control.close()  # it ends when it sees this
            self._control = None
        if self._process is not None and self._process.returncode is None:
            self._process.kill()


def main(argument: str) -> int:
    """The process itself: everything is loaded by now, for it cannot read our files once its rights are gone."""
    plan = json.loads(argument)
    os.chdir("/")
    os.closerange(3, plan["control"])
    os.closerange(plan["control"] + 1, os.sysconf("SC_OPEN_MAX"))
    if plan["uid"] is not None:
        linux.drop_bounding_set()  # which needs the rights that the next lines take
        os.setgroups([])
        os.setresgid(plan["uid"], plan["uid"], plan["uid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of uid would have cleared it
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    if linux.MACHINE in seccomp.ARCHITECTURES:
        seccomp.install(seccomp.program())
    proxy.main(socket.socket(fileno=plan["control"]))
    return 0
