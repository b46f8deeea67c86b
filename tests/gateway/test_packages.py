"""Packages at E2B: the plane's own verbs, by E2B's SDK over a real socket, in sandboxes of the product that runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from executions import backends, keys, operations
from executions.hop import rows
from executions.models import Agent
from executions.operations import bases, setup
from executions.operations.machines import create_context
from executions.operations.reap import _retiring
from executions.packages import layers
from executions.serializers import SessionRequest, Submission, parse
from executions.states import Scope
from tests.index import Index
from tests.product import Product

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def index(index: Index) -> Index:
    index.add("greeting", "1.0", {"greeting/__init__.py": "from frame import around\n"}, requires=("frame>=1",))
    index.add("frame", "1.2", {"frame.py": "def around(x): return f'[{x}]'\n"})
    return index


@pytest.fixture
def caller(product: Product, template_python, settings, index, agent: Agent) -> Iterator[keys.Caller]:
    """Of an agent all of whose sandboxes are E2B's, which is the product that runs."""
    url = f"{product.url}/e2b"
    options = {"API_KEY": product.key, "API_URL": url, "SANDBOX_URL": url, "ISOLATION": "namespaces"}
    settings.SANDBOXES = {"e2b": {"BACKEND": "executions.backends.e2b.E2BBackend", "OPTIONS": options}}
    settings.TEMPLATE_PYTHON = str(template_python)
    setup.seed()
    agent.packages = ["*"]
    agent.save()
    key, _ = keys.make_key(team=agent.team, agent=agent, name="of the tests", scopes=list(Scope.values))
    yield keys.Caller(team=agent.team, agent=agent, key=key, scopes=frozenset(Scope.values), door="rest")
    backends._live.clear()
    bases._known.clear()


async def ran(caller: keys.Caller, code: str, **fields: Any) -> Any:
    """One run of the agent as the next request finds it; its sandbox, when it was a fresh one, has ended then."""
    agent = await rows(Agent.objects.select_related("template", "team").get, pk=caller.agent.pk)
    request = parse(Submission, {"code": code, **fields})
    shape = await operations.execute(caller=replace(caller, agent=agent), request=request)
    await asyncio.gather(*_retiring)
    return shape


async def opened(caller: keys.Caller) -> str:
    return (await operations.open_session(caller=caller, request=parse(SessionRequest, {}))).pk


async def test_the_agents_lock_is_in_its_next_sandbox_at_e2b_whose_hash_was_proved_there(caller, index):
    done = await operations.install_for_agent(caller=caller, requirements=["greeting"])
    fetched = sum(index.served.values())

    run = await ran(caller, "import greeting; print(greeting.around('x'), greeting.__file__)")

    assert done.added == {"greeting": "1.0", "frame": "1.2"}
    assert (run.backend, run.logs.stdout) == ("e2b", "[x] /home/user/.packages/greeting/__init__.py\n"), run
    assert sum(index.served.values()) == fetched, "it came from the store, not from the index"


async def test_a_lock_that_arrives_as_something_else_is_refused_and_leaves_no_sandbox(caller, index):
    await operations.install_for_agent(caller=caller, requirements=["greeting"])
    archive, _ = layers.archive([pin["sha256"] for pin in (await rows(operations.lock_of, caller, None)).pins])
    archive.write_bytes(archive.read_bytes() + b"\0" * 10_240)

    run = await ran(caller, "1")

    assert run.error_code == "sandbox_refused"
    assert "the archive has another hash" in run.detail
    assert await backends.get("e2b").list() == []


async def test_what_is_put_into_a_session_at_e2b_is_seen_by_its_kernel_by_other_contexts_and_programs(caller, index):
    session = await opened(caller)
    home = "import os; os.environ['HOME'] = '/tmp'; x = 1"  # as the kernel of E2B's cloud, which is root's
    assert (await ran(caller, home, session_id=session)).error is None

    await operations.install(caller=caller, session_id=session, requirements=["greeting"])

    program = "import subprocess, sys; print(subprocess.run([sys.executable, '-c', 'import greeting'], env={**os.environ, 'HOME': '/home/user'}).returncode)"
    same = await ran(caller, f"import greeting; print(x, greeting.around('x')); {program}", session_id=session)
    context = await create_context(caller=caller, session_id=session, language="python", cwd=None)
    other = await ran(caller, "import greeting; print('there')", session_id=session, context_id=context["id"])
    assert same.logs.stdout == "1 [x]\n0\n", same
    assert other.logs.stdout == "there\n", other
    await operations.end_session(caller=caller, session_id=session)


async def test_what_one_session_was_given_is_not_believed_of_its_siblings(caller, index):
    first = await opened(caller)
    await operations.install(caller=caller, session_id=first, requirements=["greeting"])
    bases._known.clear()  # as in another process, which asks the sandbox that has it

    again = await operations.install(caller=caller, session_id=first, requirements=["greeting"])
    second = await opened(caller)
    done = await operations.install(caller=caller, session_id=second, requirements=["greeting"])

    assert again.added == {}
    assert done.added == {"greeting": "1.0", "frame": "1.2"}
    for session in (first, second):
        await operations.end_session(caller=caller, session_id=session)
