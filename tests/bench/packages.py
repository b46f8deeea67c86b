"""What packages cost, with an index on loopback: `make bench ARGS=packages`, or `python -m tests.bench.packages`.

A cached install into a live session through REST beside `uv pip install` from its cache and `pip install`; a fresh sandbox
with a lock of 20 packages beside one without; 50 who ask at once for the same 30 MB.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import servers
from tests.bench.load import one, request
from tests.bench.table import HEAD, at_most, row, show, timed
from tests.index import Index, running_index
from tests.product import HOME, Product, environment, start

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "20"))
FRESH = int(os.environ.get("BENCH_FRESH", "60"))
CACHED_MS, LOCK_MS = 100, 5
ASKERS = 50


def main() -> None:
    named = os.environ.get("SANDGATE_TEMPLATE_PYTHON")
    print(HEAD)
    measured(Path(named) if named else None)


def measured(python: Path | None) -> None:
    with running_index() as index, servers.folder() as data:
        fill(index)
        settings = {"SANDGATE_PACKAGE_INDEX": f"{index.url}/simple", "SANDGATE_LOG_LEVEL": "WARNING"}
        product = start(data, servers.free_port(), python, **settings)
        try:
            asyncio.run(measure(product, index))
        finally:
            servers.end(product.process)


def fill(index: Index) -> None:
    dice = random.Random(1)
    text = "".join(f"NAME_{n} = {dice.random()}\n" for n in range(20_000))  # 600 kB, as emoji has
    index.add("acme", "1.0", {"acme/__init__.py": "", "acme/data.py": text})
    for n in range(20):
        needs = (f"part-{n + 1}",) if n < 19 else ()
        index.add(f"part-{n}", "1.0", {f"part_{n}/{m}.py": text[: 20_000 + m] for m in range(10)}, requires=needs)
    index.add("heavy", "1.0", {"heavy/blob.bin": dice.randbytes(30_000_000)})


def another_key(product: Product) -> str:
    """The key of an agent whose sandboxes have no lock."""
    code = (
        "from executions import keys; from executions.models import Agent, Team; team = Team.objects.earliest('created_at'); "
        "print(keys.make_key(team=team, name='bench', agent=Agent.objects.create(team=team, name='plain'))[1])"
    )
    command = [sys.executable, "-W", "ignore", "manage.py", "shell", "--no-imports", "-c", code]
    env = environment(product.data, 1, None)
    return subprocess.run(command, cwd=HOME, env=env, check=True, capture_output=True, text=True).stdout.strip()


async def measure(product: Product, index: Index) -> None:
    port, key, plain = int(product.url.rsplit(":", 1)[1]), product.key, another_key(product)

    async def ask(method: str, path: str, body: dict, key: str = key) -> tuple[float, dict]:
        pair = await asyncio.open_connection("127.0.0.1", port)
        began = time.perf_counter()
        status, answer = await one(*pair, request(method, path, key=key, body=json.dumps(body).encode()))
        took = time.perf_counter() - began
        pair[1].close()
        if status >= 300:
            sys.exit(f"{path}: {status} {answer.decode()[:500]}")
        return took, json.loads(answer or b"{}")

    taken = []
    for _ in range(ROUNDS + 2):  # the first ones look, resolve and fetch
        _, session = await ask("POST", "/api/v1/sessions", {"route": ["local"], "timeout_seconds": 600})
        await asyncio.sleep(0.5)  # the node makes its next spare: this is about a session that is there
        took, _ = await ask("POST", f"/api/v1/sessions/{session['id']}/packages", {"packages": ["acme"]})
        taken.append(took)
        await ask("DELETE", f"/api/v1/sessions/{session['id']}", {})
    cached = timed(taken[2:])
    show("a cached install into a live session, through REST", cached, aim=at_most(CACHED_MS, cached.p50_ms))
    for name, figures in peers(index):
        show(f"`{name}` of the same, into an empty folder", figures, f"{figures.p50_ms / cached.p50_ms:.1f} times ours")

    _, run = await ask("POST", "/api/v1/executions", {"code": "1", "route": ["local"]})
    where = f"/api/v1/agents/{run['agent']}/packages"
    await ask("POST", where, {"packages": ["part-0"]})
    without, with_lock = [], []
    for n in range(FRESH + 3):  # in turns: what disturbs one disturbs the other
        turns = [(plain, without), (key, with_lock)]
        for agent, found in turns if n % 2 else reversed(turns):
            took, _ = await ask("POST", "/api/v1/executions", {"code": "1", "route": ["local"]}, agent)
            found.append(took)
    before, after = timed(without[3:]), timed(with_lock[3:])
    pairs = zip(without[3:], with_lock[3:], strict=True)
    more = statistics.median(b - a for a, b in pairs) * 1000  # of each pair: what slows both down is no difference
    show("a fresh sandbox and its first cell, through REST", before)
    show("the same with a lock of 20 packages", after, f"{more:+.1f} ms at the median pair", at_most(LOCK_MS, more))

    began = time.perf_counter()
    await asyncio.gather(*(ask("POST", where, {"packages": ["heavy"]}) for _ in range(ASKERS)))
    fetched = index.fetches("heavy-1.0-py3-none-any.whl")
    spent = f"{time.perf_counter() - began:.1f} s for all"
    row(
        f"{ASKERS} ask at once for the same 30 MB",
        figure=f"fetched {fetched} times, {spent}",
        aim=at_most(1, fetched, "times"),
    )


def peers(index: Index):
    from uv import find_uv_bin

    with tempfile.TemporaryDirectory() as folder:
        where = {"PATH": os.environ["PATH"], "HOME": folder, "UV_CACHE_DIR": f"{folder}/cache"}
        url = f"{index.url}/simple"
        uv = [find_uv_bin(), "pip", "install", "-q", "--no-config", "--default-index", url, "--python", sys.executable]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--index-url", url]
        for name, command in (("uv pip install", uv), ("pip install", pip)):
            taken = []
            for n in range(ROUNDS // 2 + 1):
                began = time.perf_counter()
                done = subprocess.run(
                    [*command, "--target", f"{folder}/{name}-{n}", "acme"], env=where, capture_output=True
                )
                if done.returncode:
                    break
                taken.append(time.perf_counter() - began)
            if len(taken) > 1:
                yield name, timed(taken[1:])
            else:
                row(f"`{name}`", figure=done.stderr.decode()[-80:].strip().replace("|", "/"))


if __name__ == "__main__":
    main()
