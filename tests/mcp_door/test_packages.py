"""Installing over MCP while an index takes its time: what is heard meanwhile, and how it goes on."""

from __future__ import annotations

import re

import pytest

from executions.models import Agent, PackageLock
from executions.operations import bases
from tests.index import running_index
from tests.mcp_door.conftest import connected, scripted_key, text

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def slow_index(settings, tmp_path, monkeypatch):
    """An index that gives no wheel until `hold` is set, for calls that answer after 1 s and tell every 0.1 s."""
    with running_index() as found:
        settings.PACKAGE_INDEX, settings.PACKAGE_INDEX_PRIVATE = f"{found.url}/simple", ""
        settings.DATA = tmp_path
        settings.MCP_ANSWER_SECONDS, settings.MCP_PROGRESS_SECONDS = 1, 0.1
        monkeypatch.setattr(bases, "of_template", lambda template: bases.Base("3.11", "x86_64", {}))
        found.hold.clear()
        yield found


@pytest.fixture
def own_key(agent) -> str:
    """Of an agent that may change its lock, which a test key may not."""
    return scripted_key(agent, backend="")


async def test_an_install_that_lasts_tells_what_is_fetched_and_goes_on_when_it_is_asked_again(
    agent, own_key, slow_index
):
    files = [slow_index.add("polish", "1.0", requires=("shoe",)), slow_index.add("shoe", "2.0")]
    await Agent.objects.filter(pk=agent.pk).aupdate(packages=["polish"])
    heard, answers = [], []

    async def hear(progress, total, message):
        heard.append(message)

    async with connected(own_key) as mcp:
        while not answers or "fetched" not in text(answers[-1]):
            answers.append(await mcp.call_tool("install_package", {"packages": ["polish"]}, progress_callback=hear))
            assert answers[-1].structured_content["state"] == "running", text(answers[-1])
        slow_index.hold.set()
        while answers[-1].structured_content["state"] == "running":
            answers.append(await mcp.call_tool("install_package", {"packages": ["polish"]}))

    assert heard[0] in ("looking at the policy", "resolving polish")
    assert re.fullmatch(r"fetched 0 of 2 packages, 0\.0 MB of 0\.0 MB: (polish, shoe|shoe, polish)", heard[-1])
    assert answers[0].structured_content["progress"] in text(answers[0])
    assert "call install_package with the same arguments" in text(answers[0])
    assert [package["name"] for package in answers[-1].structured_content["packages"]] == ["polish"]
    assert [slow_index.fetches(file) for file in files] == [1, 1]
    assert (await PackageLock.objects.aget()).versions == {"polish": "1.0", "shoe": "2.0"}
