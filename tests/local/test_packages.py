"""Packages where code runs: into a live session, into an agent's lock, out of an index of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import AsyncMock

import pytest

from executions import backends, keys, operations
from executions.backends.local.backend import CAPABILITIES, LocalBackend
from executions.hop import rows
from executions.models import Agent, AuditEvent, Package, Pool, Sandbox, Template
from executions.operations import bases, placing, replenish, setup
from executions.packages import layers
from executions.packages.history import runs_with
from executions.serializers import SessionRequest, Submission, parse
from executions.states import EndReason, Scope
from tests.node import RunningNode

pytestmark = pytest.mark.django_db(transaction=True)


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
    told = await rows(operations.environment, caller=await again(caller))
    assert told["packages"]["in_every_sandbox"] == done.added
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


async def test_pip_install_in_a_cell_goes_the_same_way_and_says_what_became_of_it(caller, index):
    index.add("greeting", "1.0", {"greeting.py": "words = 'hello'\n"})
    code = "x = '''\n%pip install evil\n'''\n%pip install -q greeting\n!pip install missing-one\nimport greeting\nprint(greeting.words)"

    shape = await operations.execute(caller=await again(caller), request=parse(Submission, {"code": code}))

    assert shape.logs.stdout == "Importable now: greeting 1.0\nhello\n", shape
    assert shape.logs.stderr.startswith("install_failed: It cannot be installed:")
    assert await rows(lambda: list(Package.objects.values_list("name", "execution"))) == [("greeting", shape.id)]
    assert await rows(lambda: [run.pk for run in runs_with(caller.team, "greeting", "1.0")]) == [shape.id]


async def test_a_cell_that_installs_what_the_policy_denies_is_told_so_and_goes_on(caller, index):
    caller.agent.packages = []
    await rows(caller.agent.save)

    shape = await operations.execute(
        caller=await again(caller), request=parse(Submission, {"code": "%pip install greeting\nprint(1)"})
    )

    assert shape.logs.stdout == "1\n"
    assert shape.logs.stderr.startswith("package_denied: Agent etl may not install greeting; allowed are: none.")


async def test_an_agents_packages_are_seen_by_its_own_sandboxes_alone_and_cannot_be_changed(caller, index, team):
    index.add("greeting", "1.0", {"greeting.py": "words = 'hello'\n"})
    await operations.install_for_agent(caller=caller, requirements=["greeting"])
    other = await rows(Agent.objects.create, team=team, name="other", isolation_floor="none")

    theirs = str(backends.get("local").layers)
    look = (
        f"import os; print(os.path.isdir({theirs!r}) and os.listdir({theirs!r}) or [], os.path.exists('/opt/packages'))"
    )
    alone = await said(replace(caller, agent=other), look)
    own = await said(caller, f"{look}; open('/opt/packages/greeting.py', 'w')")

    assert alone == "[] False"
    assert own.startswith("OSError: [Errno 30] Read-only file system")
    assert await rows(lambda: [run.agent.name for run in runs_with(team, "greeting", "1.0")]) == ["etl"]


async def test_a_sandbox_elsewhere_is_sent_the_same_lock_and_proves_its_hash(caller, index, monkeypatch):
    index.add("greeting", "1.0", {"greeting.py": "words = 'hello'\n"})
    await operations.install_for_agent(caller=caller, requirements=["greeting"])
    monkeypatch.setattr(LocalBackend, "capabilities", replace(CAPABILITIES, layers=False))
    monkeypatch.setattr(LocalBackend, "remote", True)
    put = AsyncMock(side_effect=placing.said)
    monkeypatch.setattr(placing, "said", put)

    assert await said(caller, "import greeting; print(greeting.__file__)") == "/home/user/.packages/greeting.py"
    assert "sha256sum -c" in put.call_args.args[1]

    archive, _ = layers.archive([pin["sha256"] for pin in (await rows(operations.lock_of, caller, None)).pins])
    archive.write_bytes(archive.read_bytes() + b"\0" * 10_240)
    refused = await operations.execute(caller=await again(caller), request=parse(Submission, {"code": "1"}))
    assert "the archive has another hash" in refused.detail
    assert refused.error_code == "sandbox_refused"


@pytest.mark.parametrize("change", ["grown", "taken back"])
async def test_a_warm_sandbox_of_the_agents_own_pool_has_its_lock_mounted_and_follows_it(caller, index, ada, change):
    index.add("greeting", "1.0", {"greeting.py": "word = 'one'\n"})
    index.add("later", "1.0", {"later.py": "word = 'two'\n"})
    look = "import importlib.util as u; print([n for n in ('greeting', 'later') if u.find_spec(n)])"
    if change == "taken back":
        await operations.install_for_agent(caller=caller, requirements=["greeting"])
    await operations.install_for_agent(
        caller=await again(caller), requirements=["later" if change == "taken back" else "greeting"]
    )
    template = await Template.objects.aget(name="default")
    await Pool.objects.acreate(backend="local", template=template, target=1, packages_of=caller.agent)
    try:
        first = await warm_run(caller, look)
        if change == "grown":
            await operations.install_for_agent(caller=await again(caller), requirements=["later"])
        else:
            event = await AuditEvent.objects.filter(action="agent_changed").alatest("seq")
            by = keys.Caller(team=caller.team, agent=None, person=ada, door="admin")
            await rows(lambda: operations.revert(event, caller=by, reason="too much"))
        second = await warm_run(caller, look)
    finally:
        await Pool.objects.aupdate(target=0)
        await replenish.replenish()
        await replenish.settled()

    both, one = "['greeting', 'later']", "['greeting']"
    assert (first, second) == ((one, both) if change == "grown" else (both, one))
    ends = [s async for s in Sandbox.objects.filter(state="gone").values_list("end_reason", flat=True)]
    assert EndReason.EVICTED in ends  # the successor with the former lock
    assert not await Sandbox.objects.open().aexists()


async def warm_run(caller: keys.Caller, code: str) -> str:
    """What a run printed in a sandbox that was ready before."""
    for _ in range(2):
        await replenish.replenish()
        await replenish.settled()
    shape = await operations.execute(caller=await again(caller), request=parse(Submission, {"code": code}))
    await replenish.settled()  # its successor is there, with the lock of now
    assert shape.from_pool, await rows(list, Pool.objects.values_list("trouble", flat=True))
    return shape.logs.stdout.strip()
