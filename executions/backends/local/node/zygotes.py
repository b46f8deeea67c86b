"""One zygote as the node sees it: its process, the sandboxes that it has forked, and the spares that wait for a name."""

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
from node.cgroups import Tree
from node.ground import Ground
from node.uids import Block
from node.unborn import Unborn

WARM_SECONDS = 120
SPARES = 2
REFILL_SECONDS = 0.03
FACTS = "import json, sys; sys.stdout.write(json.dumps({'prefixes': [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]}))"


class Zygote:
    """`facts` is what it has; `forks` counts the sandboxes that it has made, `ended` says that its process is gone."""

    def __init__(
        self,
        python: str,
        run_dir: Path,
        block: Block | None,
        tree: Tree | None,
        below: Ground | None = None,
        entry: str = "zygote",
    ) -> None:
        self.python, self.run_dir, self.below, self.entry = python, run_dir, below, entry
        self.block, self.tree = block, tree
        self.facts: dict[str, Any] = {}
        self.forks = 0
        self.first_rss_bytes = 0
        self.ended = asyncio.Event()
        self._making = 0
        self._born: set[Unborn] = set()
        self._control: socket.socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._plan: dict[str, Any] = {}
        self._spares: deque[Unborn] = deque()
        self._refilling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when it is warm and has shown that it can fork a sandbox. OSError or ValueError with the reason."""
        prefixes = root.prefixes(await self._ask_interpreter())
        shadowed = [p for p in prefixes if any(p.startswith(s + "/") for s in root.SHADOWED)]
        self._plan = {
            "self_map": self.block is None, "counted": self.tree is not None, "shadowed": shadowed,
            "layers": str(self.run_dir / "layers"),
            "reduced": self.below is not None,
        }  # fmt: skip
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._control = ours
        plan = {
            "python": self.python, "prefixes": prefixes, "root": str(self.run_dir / "root"),
            "layers": str(self.run_dir / "layers"), "uid": self.block.zygote if self.block else None, "control": theirs.fileno(),
            "reduced": self.below is not None, "entry": self.entry, "ours": root.OURS, "scratch": "/run",
        }  # fmt: skip
        if self.below is not None:
            self.below.reachable(prefixes)
            self._plan["readable"] = self.below.readable(prefixes)
            plan |= self.below.plan(prefixes)
        launcher = str(Path(__file__).parent)
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", launcher, "launch", json.dumps(plan),
                stdin=asyncio.subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], env={"LANG": "C.UTF-8"},
            )  # fmt: skip
        finally:
            theirs.close()
        self._ending = asyncio.create_task(self._process.wait())
        self._ending.add_done_callback(lambda task: self.ended.set())
        try:
            answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(ours, 1 << 16), WARM_SECONDS)
        except TimeoutError:
            raise OSError(f"its packages were not imported within {WARM_SECONDS} s") from None
        said = json.loads(answer or b"{}")
        if "ready" not in said:
            raise OSError(said.get("broken", "the zygote ended while it was starting"))
        self.facts = said["ready"]
        await self._refill()  # the first one shows that namespaces can be had here
        self.first_rss_bytes = self.rss_bytes()

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

    def rss_bytes(self) -> int:
        """Resident memory of the zygote itself; 0 when it is gone."""
        assert self._process is not None
        try:
            launcher = f"/proc/{self._process.pid}"
            child = Path(f"{launcher}/task/{self._process.pid}/children").read_text().split()[0]
            return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0

    def alive(self) -> int:
        """How many of its sandboxes live, with those that are being made."""
        self._born = {unborn for unborn in self._born if unborn.pidfd >= 0}
        return len(self._born) + self._making

    async def unborn(self) -> Unborn:
        """A sandbox without a name: the spare one, or a new one. OSError where there is none to be had."""
        if self._control is None:
            raise OSError("the zygote is gone")
        self.alive()  # forgets the dead
        self._making += 1
        try:
            spare = self._spares.popleft() if self._spares else await self._prepare(rehearse=False)
            self._born.add(spare)
        finally:
            self._making -= 1
        if self._refilling is None or self._refilling.done():
            self._refilling = asyncio.create_task(self._refill_later())
        return spare

    async def _refill_later(self) -> None:
        await asyncio.sleep(REFILL_SECONDS)  # first the sandbox that was asked for
        with contextlib.suppress(OSError):
            await self._refill()

    async def _refill(self) -> None:
        while len(self._spares) < SPARES and self._control is not None:
            self._spares.append(await self._prepare())

    async def _prepare(self, *, rehearse: bool = True) -> Unborn:
        """A new one; where nobody waits for it, it also does now what would make its first cell slow."""
        assert self._control is not None
        self.forks += 1
        return await Unborn.prepare(self._control, self._plan | {"rehearse": rehearse}, self.block, self.tree)

    async def give_up_spares(self) -> None:
        """It makes no more sandboxes; those that live are left alone."""
        if self._refilling is not None:
            self._refilling.cancel()
            await asyncio.gather(self._refilling, return_exceptions=True)
        while self._spares:
            await self._spares.popleft().discard(self.block)

    async def stop(self) -> None:
        """End it, and with it all its sandboxes."""
        await self.give_up_spares()
        if self._control is not None:
            self._control.close()  # it ends by itself when it sees this, and all its sandboxes with it
            self._control = None
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), 2)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
