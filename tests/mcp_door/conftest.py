"""The official client against the real door, in this process; what runs is what the code's comments say (scripted)."""

from __future__ import annotations

import contextlib
import copy

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from executions import keys, operations
from executions.mcp import door
from executions.models import Agent
from executions.states import Scope

URL = "http://127.0.0.1/mcp"


@pytest.fixture(autouse=True)
def scripted(settings):
    settings.ALLOWED_HOSTS = ["127.0.0.1"]
    settings.SANDBOXES = {
        **copy.deepcopy(settings.SANDBOXES),
        "scripted": {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": {}},
    }


@pytest.fixture
def agent(transactional_db, team):
    operations.seed()
    return Agent.objects.create(team=team, name="etl", isolation_floor="none", packages=["emoji"])


@pytest.fixture
def key(agent) -> str:
    return scripted_key(agent)


def scripted_key(agent, **fields) -> str:
    """A token bound to the backend on which nothing runs."""
    fields = {"backend": "scripted", "scopes": Scope.values, **fields}
    return keys.make_key(team=agent.team, agent=agent, name="for tests", **fields)[1]


@contextlib.asynccontextmanager
async def http(token: str | None, **headers: str):
    """HTTP into the door; the app's lifespan ends with it."""
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        transport = httpx2.ASGITransport(app=door.application)
        async with httpx2.AsyncClient(transport=transport, headers=headers, timeout=30) as client:
            yield client
    finally:
        await operations.drain(5)
        await door.app.close()


@contextlib.asynccontextmanager
async def connected(token: str, *, mode: str = "auto", **headers: str):
    async with (
        http(token, **headers) as client,
        Client(streamable_http_client(URL, http_client=client), mode=mode) as mcp,
    ):
        yield mcp


def text(result) -> str:
    return result.content[0].text
