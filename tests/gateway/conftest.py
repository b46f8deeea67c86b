"""E2B's unmodified SDKs, pointed at the product that runs, as four tenants."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.product import HOME, Product, environment

TENANTS = """
import json
from executions import keys
from executions.models import Agent, Quota, Team

def tenant(name, **fields):
    team = Team.objects.create(name=name)
    agent = Agent.objects.create(team=team, name="agent", packages=[], **fields)
    return team, agent

eve = tenant("Elsewhere")
poor = tenant("Poor")
Quota.objects.create(team=poor[0], unit="concurrent_sandboxes", window="total", limit=0)
broke = tenant("Broke")
Quota.objects.create(team=broke[0], unit="nano_usd", window="day", limit=1)
still = tenant("Still")
Quota.objects.create(team=still[0], unit="executions", window="day", limit=0)
cloud = tenant("Cloud", isolation_floor="none")
online = tenant("Online", network_allow=["a.example", "127.0.0.2:9"])
made = {
    "eve": keys.make_key(team=eve[0], agent=eve[1], name="eve")[1],
    "poor": keys.make_key(team=poor[0], agent=poor[1], name="poor")[1],
    "broke": keys.make_key(team=broke[0], agent=broke[1], name="broke")[1],
    "still": keys.make_key(team=still[0], agent=still[1], name="still")[1],
    "online": keys.make_key(team=online[0], agent=online[1], name="online")[1],
    "of_a_team": keys.make_key(team=cloud[0], name="of a team")[1],
    "scripted": keys.make_key(team=cloud[0], agent=cloud[1], name="test key", backend="scripted")[1],
    "reader": keys.make_key(team=cloud[0], agent=cloud[1], name="reader", scopes=["read"])[1],
}
print(json.dumps(made))
"""


@pytest.fixture(scope="session")
def tenants(product: Product) -> dict[str, str]:
    """Keys of others, by name: eve, of another team; poor, broke and still, to whom no sandbox, no money and no run is
    left; online, who may reach something; of_a_team, which names no agent; scripted; reader."""
    env = environment(product.data, 1, None)
    command = [sys.executable, "-W", "ignore", "manage.py", "shell", "--no-imports", "-c", TENANTS]
    said = subprocess.run(command, cwd=HOME, env=env, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(said.stdout.strip().splitlines()[-1])


def options(product: Product, key: str | None = None) -> dict[str, Any]:
    """What the SDK's calls are given instead of variables of the environment."""
    url = f"{product.url}/e2b"
    return {"api_url": url, "sandbox_url": url, "api_key": key or product.key}


@pytest.fixture
def mine(product: Product) -> dict[str, Any]:
    return options(product)


@pytest.fixture
def sandbox(mine: dict[str, Any]) -> Iterator[Any]:
    """A sandbox of the synchronous SDK, gone after the test."""
    from e2b_code_interpreter import Sandbox

    made = Sandbox.create(timeout=120, **mine)
    yield made
    made.kill()


@pytest.fixture
def raw(product: Product) -> Iterator[httpx.Client]:
    """Plain HTTP to the gateway, without a key."""
    with httpx.Client(base_url=f"{product.url}/e2b", timeout=30, trust_env=False) as client:
        yield client


def addressed(sandbox: Any, port: int = 49983, *, token: str | None = None) -> dict[str, str]:
    """The headers by which the SDKs address a sandbox; `token` instead of its own."""
    own = sandbox._envd_access_token if token is None else token
    return {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": str(port), "X-Access-Token": own}
