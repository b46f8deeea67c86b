"""`make soak`: many calls, each under one Idempotency-Key, whose connections are cut at random moments and tried again.

Nothing may run twice, and every try of a call must be answered with the same execution. With RETRY_DATA (a folder that is kept) and
RETRY_FROM (the first call's number) a run goes on where an earlier one ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests import servers
from tests.bench.load import one
from tests.product import start

CALLS, FIRST = int(os.environ.get("RETRY_CALLS", "10000")), int(os.environ.get("RETRY_FROM", "0"))
CLIENTS = 16
SEED = 20261124
MOST_CUTS = 4  # of one call; then it is let finish


@dataclass
class Tally:
    """What became of the calls."""

    calls: int = 0
    tries: int = 0
    cuts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def request(key: str, run: str, n: int, body: dict) -> bytes:
    content = json.dumps(body | {"metadata": {"run": run, "n": str(n)}}).encode()
    head = (
        "POST /api/v1/executions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nIdempotency-Key: {run}-{n}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def cut(port: int, raw: bytes, dice: random.Random) -> str:
    """Send a request and break the connection off: in the middle of it, while it is worked on, or in the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        match dice.choice(("sending", "waiting", "waiting", "reading")):
            case "sending":
                writer.write(raw[: dice.randrange(len(raw))])
                await writer.drain()
                return "sending"
            case "waiting":
                writer.write(raw)
                await writer.drain()
                await asyncio.sleep(dice.choice((0, dice.uniform(0, 0.01), dice.uniform(0, 0.1))))
                return "waiting"
            case _:
                writer.write(raw)
                await reader.read(dice.randrange(1, 400))
                return "reading"
    finally:
        writer.transport.abort()


async def call(port: int, raw: bytes, dice: random.Random, tally: Tally) -> str:
    """One call, cut at random and tried again until it is answered: the execution's id."""
    for _ in range(dice.randrange(MOST_CUTS + 1)):
        tally.cuts[await cut(port, raw, dice)] += 1
        tally.tries += 1
    while True:
        tally.tries += 1
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        try:
            status, body = await one(reader, writer, raw)
        finally:
            writer.transport.abort()
        if status in (429, 503):
            await asyncio.sleep(0.05)
            continue
        if status not in (201, 202):
            tally.wrong.append(f"{status}: {body[:200]!r}")
            return ""
        return json.loads(body)["id"]


async def storm(port: int, key: str, calls: int, body: dict, run: str = "storm", first: int = 0) -> Tally:
    """So many calls, a few at a time; every tenth is asked for once more at the end, and must be the same."""
    tally, waiting = Tally(), iter(range(first, first + calls))

    async def client(number: int) -> None:
        dice = random.Random(SEED + first + number)
        for n in waiting:
            raw = request(key, run, n, body)
            answered = await call(port, raw, dice, tally)
            again = await call(port, raw, random.Random(0), tally) if n % 10 == 0 else answered
            if answered != again:
                tally.wrong.append(f"call {n}: {answered}, then {again}")
            tally.calls += 1
            if tally.calls % 1000 == 0:
                print(f"{tally.calls} calls, {tally.tries} tries", flush=True)

    await asyncio.gather(*map(client, range(CLIENTS)))
    return tally


def stored(database: Path, run: str) -> tuple[int, int, int]:
    """(executions, different calls that they are of, attempts)."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as rows:
        return rows.execute(
            "SELECT COUNT(DISTINCT e.id), COUNT(DISTINCT json_extract(metadata, '$.n')), COUNT(a.id) FROM executions_execution e "
            "LEFT JOIN executions_attempt a ON a.execution_id = e.id WHERE json_extract(metadata, '$.run') = ?",
            [run],
        ).fetchone()


def main() -> None:
    named = os.environ.get("SANDGATE_TEMPLATE_PYTHON")
    with ExitStack() as held:
        data = Path(os.environ.get("RETRY_DATA") or held.enter_context(servers.folder()))
        product = start(data, servers.free_port(), Path(named) if named else None, SANDGATE_SCRIPTED="1")
        held.callback(servers.end, product.process)
        kept = data / "retries.key"  # it is shown at the first start only
        if product.key:
            kept.write_text(product.key)
        port, began = int(product.url.rsplit(":", 1)[1]), time.perf_counter()
        body = {"code": "#> hi\n#~ 0.01\n#= 1", "route": ["scripted"]}
        tally = asyncio.run(storm(port, kept.read_text(), CALLS, body, first=FIRST))
        spent = time.perf_counter() - began
        executions, calls, attempts = stored(data / "sandgate.sqlite3", "storm")
    print(
        f"{tally.calls} calls in {tally.tries} tries, {sum(tally.cuts.values())} connections cut ({dict(tally.cuts)}), "
        f"{spent:.0f} s: in all {executions} executions in {attempts} attempts of {calls} calls, {executions - calls} duplicates"
    )
    if tally.wrong or not executions == calls == attempts == FIRST + CALLS:
        sys.exit("\n".join(tally.wrong[:20]) or "not every call ran exactly once")


if __name__ == "__main__":
    main()
