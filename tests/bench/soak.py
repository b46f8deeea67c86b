"""`make soak`: many sandboxes at one node, a few at a time; it must be as small at the end as it was at the beginning."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
from pathlib import Path

from tests.local.attack import descendants
from tests.node import RunningNode, running_node
from tests.product import HOME

SANDBOXES = int(os.environ.get("SOAK_SANDBOXES", "10000"))
AT_ONCE = 3
GROWTH_KIB = 3 * 1024  # of the node's and the zygote's own memory, between the first tenth and the end


def sizes(node: RunningNode) -> dict[str, int]:
    """Resident memory of the node and of its zygotes, open descriptors, processes below, CPU time of the node."""
    pid = node.process.pid
    launchers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    zygotes = [z for one in launchers for z in Path(f"/proc/{one}/task/{one}/children").read_text().split()]
    ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return {
        "node_kib": _rss_kib(pid),
        "zygote_kib": sum(_rss_kib(int(zygote)) for zygote in zygotes),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "processes": descendants(pid),
        "cpu_ms": ticks * 1000 // os.sysconf("SC_CLK_TCK"),
    }


def _rss_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


async def settled(node: RunningNode, like: dict[str, int] | None) -> dict[str, int]:
    """The sizes once nothing is being made or ended: as many processes as before, or as after a pause without change."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        now = sizes(node)
        if now["processes"] == (like["processes"] if like else now["processes"]) and not await node.backend.list():
            await asyncio.sleep(0.5)
            if sizes(node)["processes"] == now["processes"]:
                return sizes(node)
        await asyncio.sleep(0.1)
    return sizes(node)


async def one(node: RunningNode) -> float:
    from executions.backends.base import SandboxSpec

    began = time.perf_counter()
    handle = await node.backend.create(SandboxSpec(f"soak{secrets.token_hex(8)}", "default", 60))
    events = [event.kind async for event in node.backend.run_code(handle, "1 + 1", timeout_seconds=30)]
    await node.backend.kill(handle)
    assert "result" in events, events
    return time.perf_counter() - began


async def soak(node: RunningNode, count: int = SANDBOXES) -> list[dict[str, int]]:
    """Run so many; the sizes at each tenth."""
    left, table, taken = count, [await settled(node, None)], []

    async def worker(share: int) -> None:
        for _ in range(share):
            taken.append(await one(node))

    for tenth in range(10):
        share = left // (10 - tenth)
        left -= share
        taken.clear()
        shares = [share // AT_ONCE + (n < share % AT_ONCE) for n in range(AT_ONCE)]
        await asyncio.gather(*map(worker, shares))
        now = await settled(node, table[0])
        table.append(now | {"done": count - left, "p50_ms": round(sorted(taken)[len(taken) // 2] * 1000)})
        print("  ".join(f"{name} {value}" for name, value in table[-1].items()), flush=True)
    return table


def growth(table: list[dict[str, int]]) -> str:
    """What has grown that should not have; empty where all is well."""
    early, late = table[2], table[-1]
    grown = [
        f"{name} by {late[name] - early[name]}"
        for name in ("node_kib", "zygote_kib")
        if late[name] - early[name] > GROWTH_KIB
    ]
    grown += [
        f"{name} by {late[name] - early[name]}" for name in ("descriptors", "processes") if late[name] > early[name]
    ]
    return ", ".join(grown)


def main() -> None:
    import django

    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    django.setup()
    from executions.backends.local import environment

    named = os.environ.get("SANDGATE_TEMPLATE_PYTHON")
    with running_node(Path(named) if named else environment.make(HOME / "var" / "templates")) as node:
        table = asyncio.run(soak(node))
    if grown := growth(table):
        sys.exit(f"the node has grown: {grown}")
    print(f"{SANDBOXES} sandboxes, nothing has grown; CPU of the node: {table[-1]['cpu_ms'] / SANDBOXES:.1f} ms each")


if __name__ == "__main__":
    main()
