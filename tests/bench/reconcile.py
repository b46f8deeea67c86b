"""Kill the product at random moments while its E2B misbehaves: within 30 s of its return both sides name the same sandboxes.

python -m tests.bench.reconcile [ROUNDS] [--beside N] [--postgresql]     200, or RECONCILE_ROUNDS

N installations share the rounds, each with a double, a database, a data folder and ports of its own: most of a round is waiting.
"""

from __future__ import annotations

import argparse
import os
import random
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg

from tests import servers
from tests.double import Double, running_double
from tests.product import Product, start

FAULTS = {
    "create_ms": [300, 900],
    "vanish": 0.03,
    "vanish_seconds": 3,
    "refuse": [
        {"on": "create", "status": 429, "share": 0.03, "retry_after": 1},
        {"on": "create", "status": 503, "share": 0.03},
        {"on": "create", "status": 502, "share": 0.03},
        {"on": "kill", "status": 503, "share": 0.05},
    ],
    "kill_hangs": 0.03,
    "forgets": 0.02,
    "loses": 0.05,
    "cuts": 0.03,
}
WITHIN_SECONDS = 30
FINE = {"leased, kept", "paused, kept", "retiring, kept, files are being kept"}
CLIENTS = 12
NODELESS = ("--no-node",)  # the local runtime has no part in this
NOW = {"sqlite": "strftime('%Y-%m-%d %H:%M:%f', 'now')", "postgresql": "now()"}
OPEN = (  # turning_until: somebody is taking its files out, for a minute at most
    "SELECT id, state, kept, turning_until > {now} FROM executions_sandbox WHERE ended_at IS NULL AND backend = 'e2b'"
)
GOING_ON = "SELECT id, state, waits_for, heartbeat_at, sandbox_id FROM executions_execution WHERE ended_at IS NULL"
SPENT = "SELECT sum(spent_nano_usd) FROM executions_sandbox WHERE ended_at IS NOT NULL AND backend = 'e2b'"
NO_CEILINGS = 'UPDATE executions_quota SET "limit" = 1000000000000000'


@dataclass
class Told:
    """What the rounds have shown."""

    seconds: list[float] = field(default_factory=list)  # from the product's return until both agreed
    found: int = 0  # sandboxes that were alive when the product was killed
    asked: int = 0
    billed: tuple[int, int] = (0, 0)  # nano-dollars for all that has ended: here, there


@dataclass
class Rows:
    """The database of one installation, asked from outside."""

    data: Path
    url: str = ""  # of a PostgreSQL; else it is the file in `data`

    def ask(self, question: str) -> list[tuple[Any, ...]]:
        asked = question.format(now=NOW["postgresql" if self.url else "sqlite"])
        if self.url:
            user, _, path = self.url.removeprefix("postgresql://").partition("@/")
            folder, _, name = path.rpartition("/")
            with psycopg.connect(host=folder, user=user, dbname=name, autocommit=True) as database:
                found = database.execute(asked.encode())
                return found.fetchall() if found.description else []
        with closing(sqlite3.connect(self.data / "sandgate.sqlite3", timeout=30)) as database, database:
            return database.execute(asked).fetchall()


def rounds(count: int, double: Double, data: Path, *, url: str = "", seed: int | None = None) -> Told:
    """So many kills. AssertionError, with both lists and the product's log, where they do not agree in time."""
    chance, told, port, database = random.Random(seed), Told(), servers.free_port(), Rows(data, url)
    more = double.settings() | {"SANDGATE_LOG_LEVEL": "WARNING"} | ({"DATABASE_URL": url} if url else {})
    product = start(data, port, options=NODELESS, **more)
    key = product.key
    try:
        database.ask(NO_CEILINGS)
        for _ in range(count):
            double.tell(**FAULTS)
            told.asked += _loaded(product, key, double, chance)
            told.found += len(double.live())
            with ThreadPoolExecutor(1) as beside:  # the product is back before its screen is
                agreed = beside.submit(_agreed, double, database, f"http://127.0.0.1:{port}")
                product = start(data, port, options=NODELESS, **more)
                told.seconds.append(agreed.result())
        ((spent,),) = database.ask(SPENT)
        told.billed = int(spent), sum(one["nano_usd"] for one in double.meter()["sandboxes"] if one["state"] == "ended")
    except AssertionError as e:
        e.add_note("The product's log since its return:\n" + "".join(product.screen[-200:]))
        raise
    finally:
        servers.end(product.process)
    return told


def _loaded(product: Product, key: str, double: Double, chance: random.Random) -> int:
    """Runs, sessions and cancels from many clients, until the product is killed in the midst of them; how many were asked for."""
    over, asked, before = threading.Event(), 0, double.asked("create")

    def client(seed: int) -> None:
        nonlocal asked
        mine = random.Random(seed)
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=product.url, headers=headers, timeout=60, trust_env=False) as http:
            while not over.is_set():
                asked += 1
                with suppress(httpx.HTTPError, KeyError):
                    _something(http, mine)

    clients = [threading.Thread(target=client, args=(chance.random(),), daemon=True) for _ in range(CLIENTS)]
    for one in clients:
        one.start()
    while double.asked("create") == before:
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 4.5))  # the moment is what is random
    product.process.kill()
    product.process.wait()
    over.set()
    for one in clients:
        one.join(70)
    return asked


def _something(http: httpx.Client, chance: random.Random) -> None:
    what = chance.random()
    if what < 0.15:
        made = http.post("/api/v1/sessions", json={"route": ["e2b"], "timeout_seconds": 300}).json()["id"]
        http.post("/api/v1/executions", json={"code": "#= 1", "session_id": made})
        if chance.random() < 0.5:
            http.delete(f"/api/v1/sessions/{made}")
        return
    prefer = {"Prefer": "respond-async"} if what < 0.4 else {}
    code = f"#> on\n#~ {chance.uniform(0, 1):.2f}\n#= 1"
    made = http.post("/api/v1/executions", json={"code": code, "route": ["e2b"]}, headers=prefer).json()["id"]
    if prefer and chance.random() < 0.3:
        http.post(f"/api/v1/executions/{made}/cancel", json={})


def _agreed(double: Double, database: Rows, url: str) -> float:
    """Seconds from the product's first answer until both name the same sandboxes, all of them sessions that live on, and
    nothing is left half done."""
    while True:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/healthz", timeout=5, trust_env=False).is_success:
                break
        time.sleep(0.1)
    began = time.monotonic()
    while True:
        theirs, ours = set(double.live()), database.ask(OPEN)
        known = {
            name.replace("_", ""): f"{state}{', kept' * kept}{', files are being kept' * (keeping or 0)}"
            for name, state, kept, keeping in ours
        }
        going_on = database.ask(GOING_ON)
        at = time.monotonic() - began
        if at > WITHIN_SECONDS:
            wrong = {
                name: known.get(name, "not open here") + " and not there" * (name not in theirs)
                for name in theirs | set(known)
            }
            raise AssertionError(f"after {at:.0f} s these executions go on: {going_on}, and: {wrong}")
        if theirs == set(known) and set(known.values()) <= FINE and not going_on:
            return at
        time.sleep(0.25)


def _installation(count: int, *, on_postgresql: bool) -> Told:
    with ExitStack() as stack:
        url = stack.enter_context(servers.postgresql()) if on_postgresql else ""
        double, data = stack.enter_context(running_double()), stack.enter_context(servers.folder())
        return rounds(count, double, data, url=url)


def main() -> None:
    told = argparse.ArgumentParser(prog="python -m tests.bench.reconcile")
    told.add_argument("rounds", type=int, nargs="?", default=int(os.environ.get("RECONCILE_ROUNDS", "200")))
    told.add_argument("--beside", type=int, default=1, help="installations that share the rounds")
    told.add_argument("--postgresql", action="store_true", help="each with a PostgreSQL of its own")
    asked = told.parse_args()
    shares = [asked.rounds // asked.beside + (n < asked.rounds % asked.beside) for n in range(asked.beside)]
    with ThreadPoolExecutor(asked.beside) as beside:
        going = [beside.submit(_installation, n, on_postgresql=asked.postgresql) for n in shares if n]
    all_told = [one.result() for one in going]
    taken = sorted(seconds for one in all_told for seconds in one.seconds)
    here, there = (sum(one.billed[side] for one in all_told) for side in (0, 1))
    print(
        f"{len(taken)} kills in {sum(one.asked for one in all_told)} requests, {sum(one.found for one in all_told)} sandboxes "
        f"alive at the moment of a kill: agreed every time, after {taken[len(taken) // 2]:.1f} s at the median and {taken[-1]:.1f} s "
        f"at most. What has ended was billed here with {here / 1e9:.6f} $, by the double's meter {there / 1e9:.6f} $."
    )
    if any(one.billed[0] < one.billed[1] for one in all_told):
        sys.exit("Less was billed here than by the meter.")


if __name__ == "__main__":
    main()
