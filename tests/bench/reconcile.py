"""Kill the product at random moments while its E2B misbehaves: within 30 s of its return both sides name the same sandboxes.

python -m tests.bench.reconcile [ROUNDS]     200, or RECONCILE_ROUNDS
"""

from __future__ import annotations

import os
import random
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

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
KEEPING = (
    "turning_until > strftime('%Y-%m-%d %H:%M:%f', 'now')"  # somebody is taking its files out, for a minute at most
)
OPEN = f"SELECT id, state, kept, {KEEPING} FROM executions_sandbox WHERE ended_at IS NULL AND backend = 'e2b'"
GOING_ON = "SELECT count(*) FROM executions_execution WHERE ended_at IS NULL"
SPENT = "SELECT sum(spent_nano_usd) FROM executions_sandbox WHERE ended_at IS NOT NULL AND backend = 'e2b'"


@dataclass
class Told:
    """What the rounds have shown."""

    seconds: list[float] = field(default_factory=list)  # from the product's return until both agreed
    found: int = 0  # sandboxes that were alive when the product was killed
    asked: int = 0
    billed: tuple[int, int] = (0, 0)  # nano-dollars for all that has ended: here, there


def rounds(count: int, double: Double, data: Path, python: Path | None, *, seed: int | None = None) -> Told:
    """So many kills. AssertionError, with both lists, where they do not agree in time."""
    chance, told, port = random.Random(seed), Told(), servers.free_port()
    more = double.settings() | {"SANDGATE_LOG_LEVEL": "WARNING"}
    product = start(data, port, python, **more)
    key = product.key
    try:
        _no_ceilings(data)
        for _ in range(count):
            double.tell(**FAULTS)
            told.asked += _loaded(product, key, chance)
            told.found += len(double.live())
            with ThreadPoolExecutor(1) as beside:  # the product is back before its screen is
                agreed = beside.submit(_agreed, double, data, f"http://127.0.0.1:{port}")
                product = start(data, port, python, **more)
                told.seconds.append(agreed.result())
        ((spent,),) = _asked(data, SPENT)
        told.billed = spent, sum(one["nano_usd"] for one in double.meter()["sandboxes"] if one["state"] == "ended")
    finally:
        servers.end(product.process)
    return told


def _loaded(product: Product, key: str, chance: random.Random) -> int:
    """Runs, sessions and cancels from many clients, until the product is killed in the midst of them; how many were asked for."""
    over, asked = threading.Event(), 0

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
    time.sleep(chance.uniform(0.5, 5))  # the moment is what is random
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


def _agreed(double: Double, data: Path, url: str) -> float:
    """Seconds from the product's first answer until both name the same sandboxes, all of them sessions that live on, and
    nothing is left half done."""
    while True:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/healthz", timeout=5, trust_env=False).is_success:
                break
        time.sleep(0.1)
    began = time.monotonic()
    while True:
        theirs, ours = set(double.live()), _asked(data, OPEN)
        known = {
            name.replace("_", ""): f"{state}{', kept' * kept}{', files are being kept' * (keeping or 0)}"
            for name, state, kept, keeping in ours
        }
        ((going_on,),) = _asked(data, GOING_ON)
        at = time.monotonic() - began
        if theirs == set(known) and set(known.values()) <= FINE and not going_on:
            return at
        if at > WITHIN_SECONDS:
            wrong = {
                name: known.get(name, "not open here") + " and not there" * (name not in theirs)
                for name in theirs | set(known)
            }
            raise AssertionError(f"after {at:.0f} s {going_on} executions go on, and: {wrong}")
        time.sleep(0.25)


def _asked(data: Path, question: str) -> list[tuple]:
    with closing(sqlite3.connect(f"file:{data}/sandgate.sqlite3?mode=ro", uri=True, timeout=30)) as database:
        return database.execute(question).fetchall()


def _no_ceilings(data: Path) -> None:
    with closing(sqlite3.connect(data / "sandgate.sqlite3", timeout=30)) as database, database:
        database.execute('UPDATE executions_quota SET "limit" = 1000000000000000')


def main() -> None:
    count = int(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("RECONCILE_ROUNDS", "200"))
    named = os.environ.get("SANDGATE_TEMPLATE_PYTHON")
    with running_double() as double, servers.folder() as data:
        told = rounds(count, double, data, Path(named) if named else None)
    taken = sorted(told.seconds)
    print(
        f"{count} kills in {told.asked} requests, {told.found} sandboxes alive at the moment of a kill: agreed every time, "
        f"after {taken[len(taken) // 2]:.1f} s at the median and {taken[-1]:.1f} s at most. "
        f"What has ended was billed here with {told.billed[0] / 1e9:.6f} $, by the double's meter {told.billed[1] / 1e9:.6f} $."
    )


if __name__ == "__main__":
    main()
