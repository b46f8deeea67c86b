import json

import pytest

from executions.operations import waiting
from tests.plane.conftest import behave, caller, scripted, seeded

__all__ = ["behave", "caller", "scripted", "seeded"]


@pytest.fixture(autouse=True)
def routed(agent, seeded):
    agent.route = ["first", "second"]
    agent.save()


@pytest.fixture
def call(async_client, key):
    async def send(method: str, path: str, body=None, *, token: str | None = key, raw: bytes | None = None, **headers):
        named = {"Authorization": f"Bearer {token}"} if token else {}
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        answer = await async_client.generic(
            method, path, data, content_type="application/json", headers={**named, **headers}
        )
        if answer.status_code == 202:
            await waiting.look()  # as whatever process is first does in the product
        return answer

    return send
