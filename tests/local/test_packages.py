"""Packages where code runs: into a live session, into an agent's lock, out of an index of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from executions import backends, keys, operations
from executions.hop import rows
from executions.models import Agent
from executions.operations import bases, setup
from executions.serializers import SessionRequest, Submission, parse
from executions.states import Scope
from tests.index import Index, running_index
from tests.node import RunningNode

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def index(settings, tmp_path) -> Iterator[Index]:
    with running_index() as served:
        settings.PACKAGE_INDEX = f"{served.url}/simple"
        settings.DATA = tmp_path
        yield served


@pytest.fixture
def caller(node: RunningNode, template_python, settings, index, agent: Agent) -> Iterator[keys.Caller]:
    settings.SANDBOXES = {
        "local": {"BACKEND": "executions.backends.local.LocalBackend", "OPTIONS": node.backend.options}
    }
    settings.TEMPLATE_PYTHON = str(template_python)
    setup.seed()
    agent.packages = ["*"]
    agent.save()
    key, _ = keys.make_key(team=agent.team, agent=agent, name="of the tests", scopes=list(Scope.values))
    yield keys.Caller(team=agent.team, agent=agent, key=key, scopes=frozenset(Scope.values), door="rest")
    backends._live.clear()
    bases._known.clear()


async def again(caller: keys.Caller) -> keys.Caller:
    """The same caller as the next request finds it."""
    agent = await rows(Agent.objects.select_related("template", "team").get, pk=caller.agent.pk)
    return replace(caller, agent=agent)


async def said(caller: keys.Caller, code: str, **fields) -> str:
    """What a run printed, or the exception that ended it."""
    shape = await operations.execute(caller=await again(caller), request=parse(Submission, {"code": code, **fields}))
    return shape.logs.stdout.strip() if shape.error is None else f"{shape.error.name}: {shape.error.value}"


async def opened(caller: keys.Caller) -> str:
    return (await operations.open_session(caller=await again(caller), request=parse(SessionRequest, {}))).pk


async def test_a_package_installed_without_a_session_is_importable_in_the_agents_next_fresh_sandbox(caller, index):
    index.add("greeting", "1.0", {"greeting/__init__.py": "from frame import around\n"}, requires=("frame>=1",))
    index.add("frame", "1.2", {"frame.py": "def around(x): return f'[{x}]'\n"})
    code = "import greeting; print(greeting.around('x'))"
    assert "No module named 'greeting'" in await said(caller, code)

    done = await operations.install_for_agent(caller=caller, requirements=["greeting"])

    assert done.added == {"greeting": "1.0", "frame": "1.2"}
    assert await said(caller, code) == "[x]"
    script = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'import frame; print(1)'], capture_output=True).stdout)"
    assert await said(caller, script) == "b'1\\n'"


async def test_a_package_can_be_imported_in_a_live_session_without_a_restart(caller, index):
    index.add("greeting", "1.0", {"greeting.py": "words = 'hello'\n"})
    session = await opened(caller)
    assert "No module named" in await said(caller, "x = 1\nimport greeting", session_id=session)

    done = await operations.install(caller=caller, session_id=session, requirements=["greeting"])

    assert [(p.name, p.version, p.requested) for p in done.packages] == [("greeting", "1.0", True)]
    assert await said(caller, "import greeting; print(x, greeting.words)", session_id=session) == "1 hello"
    await operations.end_session(caller=caller, session_id=session)
