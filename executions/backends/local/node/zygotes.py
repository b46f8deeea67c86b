"""The zygote of a template as the node sees it: started in the background, restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Any

from node import root
from node.uids import Block
from node.unborn import Unborn

WARM_SECONDS = 120
RETRY_SECONDS = 5
SPARES = 2
REFILL_SECONDS = 0.03
FACTS = "import json, sys; sys.stdout.write(json.dumps({'prefixes': [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]}))"


class Zygote:
    """`state` is warming, ready or broken; `detail` says why, `facts` what it has."""

    def __init__(self, name: str, python: str, run_dir: Path, block: Block | None) -> None:
        self.name, self.python, self.run_dir, self.block = name, python, run_dir, block
        self.state, self.detail = "warming", ""
        self.facts: dict[str, Any] = {}
        self.settled = asyncio.Event()
        self._control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._plan: dict[str, Any] = {}
        self._spares: deque[Unborn] = deque()
        self._refilling: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Keep it alive until cancelled."""
        try:
            while True:
                try:
                    await self._once()
                except (OSError, ValueError) as problem:
                    self._settle("broken", str(problem))
                await asyncio.sleep(RETRY_SECONDS)
        finally:
            await self._stop()

    def _settle(self, state: str, detail: str = "") -> None:
        self.state, self.detail = state, detail
        self.settled.set()

    async def _once(self) -> None:
        prefixes = root.prefixes(await self._ask_interpreter())
        shadowed = [p for p in prefixes if any(p.startswith(s + "/") for s in root.SHADOWED)]
        self._plan = {"self_map": self.block is None, "shadowed": shadowed}
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        plan = {
            "python": self.python, "prefixes": prefixes, "root": str(self.run_dir / "root"),
            "uid": self.block.zygote if self.block else None, "control": theirs.fileno(),
        }  # fmt: skip
        launcher = str(Path(__file__).parent)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", launcher, "launch", json.dumps(plan),
            stdin=asyncio.subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], env={"LANG": "C.UTF-8"},
        )  # fmt: skip
        theirs.close()
        self._control = ours
        try:
            answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(ours, 1 << 16), WARM_SECONDS)
            said = json.loads(answer or b"{}")
            if "ready" in said:
                self.facts = said["ready"]
                await self._refill()  # the first one shows that namespaces can be had here
                self._settle("ready")
            else:
                self._settle("broken", said.get("broken", "the zygote ended while it was starting"))
            await self._process.wait()
            if self.state == "ready":
                self._settle("broken", "the zygote died; it is started again")
        finally:
            await self._stop()

    async def _ask_interpreter(self) -> dict[str, Any]:
        if not os.access(self.python, os.X_OK):
            raise OSError(f"{self.python} is not there; make the template's environment first")
        process = await asyncio.create_subprocess_exec(
            self.python, "-I", "-c", FACTS, stdout=asyncio.subprocess.PIPE, env={"LANG": "C.UTF-8"}
        )
        output, _ = await asyncio.wait_for(process.communicate(), 30)
        if process.returncode:
            raise OSError(f"{self.python} does not run")
        return json.loads(output)

    async def unborn(self) -> Unborn:
        """A sandbox without a name: the spare one, or a new one. OSError where there is none to be had."""
        if self._spares:
            spare = self._spares.popleft()
        elif self._control is not None:
            spare = await Unborn.prepare(self._control, self._plan, self.block)
        else:
            raise OSError("the zygote is gone")
        if self._refilling is None or self._refilling.done():
            self._refilling = asyncio.create_task(self._refill_later())
        return spare

    async def _refill_later(self) -> None:
        await asyncio.sleep(REFILL_SECONDS)  # first the sandbox that was asked for
        with contextlib.suppress(OSError):
            await self._refill()

    async def _refill(self) -> None:
        while len(self._spares) < SPARES and self._control is not None:
            self._spares.append(await Unborn.prepare(self._control, self._plan, self.block))

    async def _stop(self) -> None:
        if self._refilling is not None:
            self._refilling.cancel()
            await asyncio.gather(self._refilling, return_exceptions=True)
        while self._spares:
            await self._spares.popleft().discard(self.block)
        if self._control is not None:
            self._control.close()  # it ends by itself when it sees this, and all its sandboxes with it
            self._control = None
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), 2)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
