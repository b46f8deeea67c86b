"""A fair queue: of agents that came one after the other, each with a crowd, none waits longer than the others."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

import httpx

from tests import servers
from tests.product import Product, start

AGENTS, EACH, PLACES = 5, 24, 3
CODE = "#~ 0.2\n#= 1"
OVER_SECONDS = 300


def queues(rounds: int, data: Path, database: str) -> list[list[float]]:
    """Mean seconds for which each agent's runs have waited since there was room, the one that came first first; per round."""
    named = os.environ.get("SANDGATE_TEMPLATE_PYTHON")
    more = {"DATABASE_URL": database, "SANDGATE_LOG_LEVEL": "ERROR", "SANDGATE_SCRIPTED": "1"}
    product = start(data, servers.free_port(), Path(named) if named else None, **more)
    try:
        return [_queue(product) for _ in range(rounds)]
    finally:
        servers.end(product.process)


def _queue(product: Product) -> list[float]:
    from executions import keys
    from executions.models import Agent, Execution, Quota, Team
    from executions.states import Scope, Unit, WhenExhausted

    team = Team.objects.get(name="Home")
    Quota.objects.all().delete()
    quota = Quota.objects.create(
        team=team, unit=Unit.CONCURRENT_EXECUTIONS, limit=0, when_exhausted=WhenExhausted.WAIT,
        max_wait_seconds=OVER_SECONDS,
    )  # fmt: skip
    _, key = keys.make_key(team=team, agent=None, name=secrets.token_hex(3), scopes=list(Scope.values))
    names = [f"crowd-{secrets.token_hex(3)}" for _ in range(AGENTS)]
    agents = [Agent.objects.create(team=team, name=name, route=["scripted"]) for name in names]
    for name in names:
        asyncio.run(_crowd(product, key, name))
    began = time.time()
    Quota.objects.filter(pk=quota.pk).update(limit=PLACES)
    mine = Execution.objects.filter(agent__in=agents)
    while mine.open().exists():
        assert time.time() < began + OVER_SECONDS, f"{mine.open().count()} still wait"
        time.sleep(0.5)
    waits = defaultdict(list)
    for agent, state, started_at in mine.values_list("agent", "state", "started_at"):
        assert state == "succeeded", state
        waits[agent].append(started_at.timestamp() - began)
    assert {len(of_one) for of_one in waits.values()} == {EACH}
    return [mean(waits[agent.pk]) for agent in agents]


async def _crowd(product: Product, key: str, agent: str) -> None:
    headers = {"Authorization": f"Bearer {key}", "Prefer": "respond-async"}
    async with httpx.AsyncClient(base_url=product.url, headers=headers, timeout=60, trust_env=False) as client:
        body = {"code": CODE, "agent": agent}
        told = await asyncio.gather(*(client.post("/api/v1/executions", json=body) for _ in range(EACH)))
    assert {answer.status_code for answer in told} == {202}, told[0].text
