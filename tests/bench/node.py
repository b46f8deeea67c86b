"""What is measured at the node: through the backend's own client, without the plane."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from statistics import median

from executions.backends.base import Handle, Limits, SandboxSpec
from tests.bench.load import Figures
from tests.bench.table import at_least, at_most, row, show, timed
from tests.node import RunningNode
from tests.product import descendants

CELL = "import numpy as np, pandas as pd; pd.DataFrame({'a': np.arange(1000)}).a.sum()"
SMALL = "1 + 1"
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "200"))
PAUSE_SECONDS = 0.15  # between two fresh sandboxes, where the time of one is meant and not how many there can be
FILE_MB = 100
PIECE = b"\xa5" * (1 << 20)


class Bench:
    """One node and its client."""

    def __init__(self, node: RunningNode) -> None:
        self.node, self.backend = node, node.backend

    async def create(self, **limits: int) -> Handle:
        spec = SandboxSpec(f"bench{secrets.token_hex(8)}", "default", 600, replace(Limits(), **limits))
        return await self.backend.create(spec)

    async def run(self, handle: Handle, code: str, language: str = "python") -> float:
        """Seconds until the cell has ended; it must have given a result."""
        began = time.perf_counter()
        events = [e async for e in self.backend.run_code(handle, code, language=language, timeout_seconds=60)]
        assert [event.kind for event in events].count("result") == 1, events
        return time.perf_counter() - began

    async def fresh(self) -> float:
        """Seconds from asking for a sandbox to the result of its first cell."""
        began = time.perf_counter()
        handle = await self.create()
        await self.run(handle, CELL)
        took = time.perf_counter() - began
        await self.backend.kill(handle)
        return took

    async def several_fresh(self, rounds: int, pause: float) -> Figures:
        taken = []
        for _ in range(rounds):
            await asyncio.sleep(pause)
            taken.append(await self.fresh())
        return timed(taken)

    async def kill(self, handles: list[Handle]) -> None:
        for handle in handles:
            await self.backend.kill(handle)

    # the figures

    async def one_at_a_time(self) -> tuple[Figures, Figures]:
        """Fresh and warm."""
        await self.several_fresh(3, PAUSE_SECONDS)
        fresh = await self.several_fresh(ROUNDS, PAUSE_SECONDS)
        aims = f"{at_most(20, fresh.p50_ms)}; p95 {at_most(35, fresh.p95_ms)}"
        show("fresh sandbox to first result (numpy, pandas), at the node", fresh, aim=aims)
        show("the same without a pause in between", await self.several_fresh(ROUNDS, 0))
        handle = await self.create()
        taken = [await self.run(handle, SMALL) for _ in range(ROUNDS + 10)]
        warm = timed(taken[10:])
        show("warm cell, at the node", warm, aim=at_most(2, warm.p50_ms))
        await self.backend.kill(handle)
        return fresh, warm

    async def javascript(self) -> None:
        firsts = []
        for _ in range(max(10, ROUNDS // 10)):
            handle = await self.create()
            await asyncio.sleep(PAUSE_SECONDS)
            firsts.append(await self.run(handle, SMALL, "javascript"))
            await self.backend.kill(handle)
        first = timed(firsts)
        show("first JavaScript cell in a sandbox", first, aim=at_most(120, first.p50_ms))
        handle = await self.create()
        warm = timed([await self.run(handle, SMALL, "javascript") for _ in range(ROUNDS + 10)][10:])
        show("warm JavaScript cell", warm, aim=at_most(5, warm.p50_ms))
        await self.backend.kill(handle)

    async def among_many(self) -> None:
        """300 alive, each with a cell run; then one more at a time."""
        handles = []
        for _ in range(300):
            handles.append(await self.create())
            await self.run(handles[-1], SMALL)
        among = await self.several_fresh(max(50, ROUNDS // 2), PAUSE_SECONDS)
        show("fresh sandbox to first result, 300 others alive", among, aim=at_most(25, among.p50_ms))
        await self.kill(handles)

    async def burst(self) -> None:
        """100 asked for at the same moment."""

        async def one(began: float) -> tuple[Handle, float]:
            handle = await self.create()
            await self.run(handle, CELL)
            return handle, time.perf_counter() - began

        lasts = []
        for _ in range(3):
            began = time.perf_counter()
            done = await asyncio.gather(*(one(began) for _ in range(100)))
            taken = sorted(seconds for _, seconds in done)
            lasts.append(taken)
            await self.kill([handle for handle, _ in done])
            await asyncio.sleep(1)  # the spares are made anew
        lasts.sort(key=lambda taken: taken[-1])
        taken, last = lasts[1], lasts[1][-1]
        figures = replace(timed(taken), rate=100 / last)
        show(f"burst of 100 fresh sandboxes: the last at {last:.2f} s", figures, aim=at_most(1.5, last, "s"))

    async def idle(self) -> None:
        """500 that do nothing: what each keeps for itself, and that nothing of them is left."""
        before, free = descendants(self.node.process.pid), _available_bytes()
        handles = [await self.create() for _ in range(500)]
        await asyncio.sleep(2)  # the spares are made anew
        sandboxes = [_private_bytes(pid) for pid in self._sandboxes()]
        taken = (free - _available_bytes()) / 500
        each = median(sandboxes) / (1 << 20)
        row(
            "private memory of an idle sandbox, 500 alive", figure=f"{each:.1f} MiB; of the machine's, with the kernel's "
            f"part, {taken / (1 << 20):.1f} MiB", aim=at_most(8, each, "MiB"),
        )  # fmt: skip
        await self.kill(handles)
        await asyncio.sleep(2)
        left = len(descendants(self.node.process.pid)) - len(before)
        folders = len(list((self.node.run_dir / "sandboxes").iterdir())) + len(await self.backend.list())
        row(
            "left when they are killed",
            figure=f"{left} processes, {folders} sandboxes",
            aim="nothing: " + ("missed" if left or folders else "met"),
        )

    def _sandboxes(self) -> list[int]:
        """The first processes of all sandboxes: children of the zygotes, who are children of the launchers."""
        zygotes = [z for launcher in _children(self.node.process.pid) for z in _children(launcher)]
        return [pid for zygote in zygotes for pid in _children(zygote)]

    async def files(self) -> None:
        """In and out, as streams of bytes."""
        handle = await self.create(memory_mib=1024)
        await self.backend.write_file(handle, "/home/user/small", PIECE)
        agent = next(pid for pid in self._sandboxes() if Path(f"/proc/{pid}/root/home/user/small").exists())
        watched = agent, self.node.process.pid
        before = [_peak_kib(pid) for pid in watched]

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(FILE_MB):
                yield PIECE

        rates: dict[str, list[float]] = {"in": [], "out": []}
        for _ in range(7):
            began = time.perf_counter()
            await self.backend.write_file(handle, "/home/user/large", pieces())
            written = time.perf_counter()
            read = 0
            async for piece in self.backend.read_file(handle, "/home/user/large"):
                read += len(piece)
            ended = time.perf_counter()
            assert read == FILE_MB << 20
            rates["in"].append(read / 1e6 / (written - began))
            rates["out"].append(read / 1e6 / (ended - written))
        for way, found in rates.items():
            rate = median(found)
            row(f"a file of {FILE_MB} MiB {way}", figure=f"{rate:.0f} MB/s", aim=at_least(300, rate, "MB/s"))
        agent_mib, node_mib = ((_peak_kib(pid) - then) / 1024 for pid, then in zip(watched, before, strict=True))
        row(
            "what that added to the peak memory of the agent and of the node",
            figure=f"{agent_mib:.1f} and {node_mib:.1f} MiB", aim=at_most(8, max(agent_mib, node_mib), "MiB"),
        )  # fmt: skip
        await self.backend.kill(handle)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _private_bytes(pid: int) -> int:
    """What this process and all below it share with nobody."""
    total = 0
    for one in {pid} | descendants(pid):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(line.split()[1]) * 1024
    return total


def _available_bytes() -> int:
    return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024


def _peak_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0])


async def measure(node: RunningNode) -> tuple[Figures, Figures]:
    """All of it; what a fresh sandbox and a warm cell took, for the ratios."""
    bench = Bench(node)
    fresh, warm = await bench.one_at_a_time()
    await bench.javascript()
    await bench.burst()
    await bench.among_many()
    await bench.idle()
    await bench.files()
    return fresh, warm
