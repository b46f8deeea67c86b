"""The zygote of a template as the node sees it: started in the background, restarted when it dies."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from node import root

WARM_SECONDS = 120
RETRY_SECONDS = 5
FACTS = "import json, sys; sys.stdout.write(json.dumps({'prefixes': [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]}))"


class Zygote:
    """`state` is warming, ready or broken; `detail` says why, `facts` what it has."""

    def __init__(self, name: str, python: str, run_dir: Path, uid: int | None) -> None:
        self.name, self.python, self.run_dir, self.uid = name, python, run_dir, uid
        self.state, self.detail = "warming", ""
        self.facts: dict[str, Any] = {}
        self.shadowed: list[str] = []
        self.settled = asyncio.Event()
        self.control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None

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
        self.shadowed = [p for p in prefixes if any(p.startswith(s + "/") for s in root.SHADOWED)]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        plan = {
            "python": self.python, "prefixes": prefixes, "root": str(self.run_dir / "root"), "uid": self.uid,
            "control": theirs.fileno(),
        }  # fmt: skip
        launcher = str(Path(__file__).parent)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", launcher, "launch", json.dumps(plan),
            stdin=asyncio.subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], env={"LANG": "C.UTF-8"},
        )  # fmt: skip
        theirs.close()
        self.control = ours
        try:
            answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(ours, 1 << 16), WARM_SECONDS)
            said = json.loads(answer or b"{}")
            if "ready" in said:
                self.facts = said["ready"]
                self._settle("ready")
            else:
                self._settle("broken", said.get("broken", "the zygote ended while it was starting"))
            await self._process.wait()
            if self.state == "ready":
                self.settled.clear()
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

    def fork(self, plan: dict[str, Any], descriptors: list[int]) -> None:
        """Ask for one sandbox. OSError when the zygote is gone."""
        if self.control is None:
            raise OSError("the zygote is gone")
        socket.send_fds(self.control, [json.dumps(plan).encode()], descriptors)

    async def _stop(self) -> None:
        if self.control is not None:
            self.control.close()  # it ends by itself when it sees this, and all its sandboxes with it
            self.control = None
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(asyncio.shield(self._process.wait()), 2)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
