"""Templates as rows: what each holds is in its sandboxes, and one that is broken says why and bothers no other."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from executions import backends
from executions.backends.base import Limits, SandboxSpec
from executions.backends.local import environment
from executions.errors import BackendUnavailable, NoBackend
from executions.hop import rows
from executions.models import Template
from executions.operations import rebuild, template_states, templates
from executions.routes import plan
from tests.local.attack import run, value
from tests.node import ask, running_node


def spec(template: str) -> SandboxSpec:
    return SandboxSpec("t" + os.urandom(6).hex(), template, timeout_seconds=60, limits=Limits(memory_mib=512))


async def state_of(backend, name: str, *wanted: str) -> str:
    """The template's detail once it is in one of these states."""
    async with asyncio.timeout(60):
        while True:
            found = (await backend.check()).templates.get(name)
            if found is not None and found.state in wanted:
                return found.detail
            await asyncio.sleep(0.05)  # the node is another process: there is nothing else to wait on


@asynccontextmanager
async def template(node, python: Path, **content):
    """A template of the node while this block lasts; its name."""
    name = "t" + os.urandom(4).hex()
    await node.backend.have_template(name, {"python": str(python), **content})
    try:
        yield name
    finally:
        await node.backend.have_template(name, None)


# at the node


async def test_a_fresh_sandbox_finds_the_templates_files_and_what_its_start_command_made(node, template_python):
    files = {"notes/hello.txt": "grüße", "/tmp/at-tmp.txt": "there"}
    command = "cat notes/hello.txt > made; (sleep 1000 &) ; echo said"
    async with template(node, template_python, files=files, start_command=command) as name:
        handle = await node.backend.create(spec(name))

        seen = "(open('made').read(), open('/tmp/at-tmp.txt').read(), open('/home/user/notes/hello.txt').read())"
        assert await value(node.backend, handle, seen) == ("grüße", "there", "grüße")
        out = await run(node.backend, handle, "!pgrep -c sleep")
        assert out["said"].strip() == "1"
        await node.backend.kill(handle)


async def test_a_failing_start_command_says_what_it_said_and_leaves_no_sandbox(node, template_python):
    async with template(node, template_python, start_command="echo no such disk >&2; exit 7") as name:
        with pytest.raises(BackendUnavailable, match=r"ended with 7: no such disk"):
            await node.backend.create(spec(name))

        assert await node.backend.list() == []


async def test_a_file_outside_of_what_is_writable_is_refused_by_the_walls_and_said(node, template_python):
    for path in ("/usr/bin/x", "../../etc/x"):
        async with template(node, template_python, files={path: "x"}) as name:
            with pytest.raises(BackendUnavailable, match="could not be made"):
                await node.backend.create(spec(name))


async def test_a_broken_template_says_why_and_leaves_the_others_alone(node, template_python):
    async with template(node, Path("/nowhere/bin/python")) as broken:
        assert "/nowhere/bin/python is not there" in await state_of(node.backend, broken, "broken")
        with pytest.raises(BackendUnavailable, match=f"{broken} is broken: /nowhere"):
            await node.backend.create(spec(broken))

        handle = await node.backend.create(spec("default"))
        assert await value(node.backend, handle, "1 + 1") == 2
        await node.backend.kill(handle)


async def test_an_unknown_template_is_named_with_those_that_there_are(node):
    with pytest.raises(BackendUnavailable, match="no template 'nosuch'; it has: default"):
        await node.backend.create(spec("nosuch"))


async def test_one_on_demand_sleeps_until_a_sandbox_is_asked_for(node, template_python):
    async with template(node, template_python, warm=False) as name:
        await state_of(node.backend, name, "asleep")
        handle = await node.backend.create(spec(name))

        assert await value(node.backend, handle, "1 + 1") == 2
        await state_of(node.backend, name, "ready")
        await node.backend.kill(handle)


async def test_changed_content_makes_new_sandboxes_while_the_old_ones_live_on(node, template_python):
    async with template(node, template_python, files={"v": "1"}) as name:
        old = await node.backend.create(spec(name))
        await node.backend.have_template(name, {"python": str(template_python), "files": {"v": "2"}, "digest": "two"})
        async with asyncio.timeout(60):
            while True:
                new = await node.backend.create(spec(name))
                seen = await value(node.backend, new, "open('v').read()")
                await node.backend.kill(new)
                if str(seen) == "2":
                    break

        assert str(await value(node.backend, old, "open('v').read()")) == "1"
        await node.backend.kill(old)


async def test_a_zygote_that_has_grown_is_replaced_when_its_last_sandbox_is_gone(template_python):
    with running_node(template_python, forks_limit=4) as node:
        first = zygotes(node.process.pid)
        handle = await node.backend.create(spec("default"))
        for _ in range(4):
            other = await node.backend.create(spec("default"))
            await node.backend.kill(other)
        async with asyncio.timeout(60):
            while not zygotes(node.process.pid) - first:
                await asyncio.sleep(0.05)
        assert await value(node.backend, handle, "1 + 1") == 2
        assert first & zygotes(node.process.pid)  # it lives as long as its sandbox

        await node.backend.kill(handle)
        async with asyncio.timeout(60):
            while first & zygotes(node.process.pid):
                await asyncio.sleep(0.05)


def zygotes(node_pid: int) -> set[int]:
    """The launchers below a node, one for each zygote."""
    return set(map(int, Path(f"/proc/{node_pid}/task/{node_pid}/children").read_text().split()))


async def test_a_killed_zygote_is_replaced_and_its_template_serves_again(node, template_python):
    async with template(node, template_python) as name:
        before = zygotes(node.process.pid)
        await state_of(node.backend, name, "ready")
        for launcher in zygotes(node.process.pid) - before:
            os.kill(launcher, signal.SIGKILL)
        await state_of(node.backend, name, "warming", "broken")
        await state_of(node.backend, name, "ready")

        handle = await node.backend.create(spec(name))
        assert await value(node.backend, handle, "1 + 1") == 2
        await node.backend.kill(handle)


@pytest.mark.parametrize("content", [{}, {"python": 1}, {"python": "/x", "files": {"a": 1}}, {"absent": "sad"}])
def test_content_of_the_wrong_kind_is_refused(node, content):
    before = ask(node.run_dir, op="check")["templates"].keys()
    answer = ask(node.run_dir, op="template", name="odd", **content)

    assert answer.get("error") == "invalid" or not content
    assert ask(node.run_dir, op="check")["templates"].keys() == before


# from rows


@pytest.fixture
def local(settings, node, template_python, seeded, tmp_path, monkeypatch):
    """The node as the one backend, its templates those of the rows; environments lie in a folder of this test."""
    settings.SANDBOXES = {
        "local": {"BACKEND": "executions.backends.local.LocalBackend", "OPTIONS": {"RUN_DIR": str(node.run_dir)}}
    }
    settings.TEMPLATE_PYTHON = str(template_python)
    monkeypatch.setattr(templates, "UNDER", tmp_path)
    yield backends.get("local")
    ask(node.run_dir, op="template", name="own")
    backends._live.clear()


async def synced(backend, *wanted: str) -> str:
    """Sync as the background loop does until template `own` is in such a state; its detail."""
    async with asyncio.timeout(240):
        while True:
            await templates.sync()
            found = (await backend.check()).templates.get("own")
            if found is not None and found.state in wanted:
                return found.detail
            await asyncio.sleep(0.1)


async def test_rows_become_templates_and_those_that_are_switched_off_are_let_go(local, node):
    row = await rows(Template.objects.create, name="own", files={"a.txt": "A"}, start_command="cp a.txt b.txt")
    await synced(local, "ready")
    launchers = zygotes(node.process.pid)
    handle = await local.create(spec("own"))
    assert await value(local, handle, "open('b.txt').read()") == "A"
    await local.kill(handle)

    await templates.sync()  # nothing has changed, and the default template was known before there were rows
    assert zygotes(node.process.pid) == launchers
    await rows(rebuild, row)
    await synced(local, "ready")
    async with asyncio.timeout(60):
        while zygotes(node.process.pid) == launchers:
            await asyncio.sleep(0.05)

    await rows(Template.objects.filter(pk=row.pk).update, is_active=False)
    await templates.sync()
    assert "own" not in (await local.check()).templates


async def test_a_package_that_cannot_be_had_breaks_its_template_alone_and_shows_the_log(local):
    await rows(Template.objects.create, name="own", packages=["no-such-package-of-sandgate==1"])

    assert "installed" in await synced(local, "building")
    assert "no-such-package-of-sandgate" in await synced(local, "broken")
    told = {one["name"]: one for one in await template_states()}
    assert told["own"]["state"] == "broken"
    assert "no-such-package-of-sandgate" in told["own"]["detail"]
    assert told["default"]["state"] == "ready"
    assert (await local.check()).ok
    await templates.stop_building()


async def test_an_option_in_the_place_of_a_package_never_reaches_the_installer(local, tmp_path):
    await rows(Template.objects.create, name="own", packages=["--index-url=http://127.0.0.1:9/"])

    assert "is not a package name" in await synced(local, "broken")
    assert list(tmp_path.iterdir()) == []


async def test_a_template_of_its_own_content_leaves_out_a_backend_that_does_not_know_it(caller, settings):
    settings.SANDBOXES = {
        "e2b": {"BACKEND": "executions.backends.e2b.E2BBackend", "OPTIONS": {"API_KEY": "e2b_0"}},
        "local": {"BACKEND": "executions.backends.local.LocalBackend", "OPTIONS": {"RUN_DIR": "/nowhere"}},
    }
    caller.agent.route = []
    row = Template(name="own", packages=["emoji"])

    route = await rows(plan, caller, asked=None, language="python", template=row)

    why = "template own has packages of its own and no id there: name it in e2b_template"
    assert route.aliases == ["local"]
    assert [(left.alias, left.why) for left in route.skipped] == [("e2b", why)]
    with pytest.raises(NoBackend, match="e2b_template"):
        await rows(plan, caller, asked=["e2b"], language="python", template=row)
    row.e2b_template = "mine"
    assert (await rows(plan, caller, asked=None, language="python", template=row)).aliases == ["e2b", "local"]


@pytest.mark.parametrize(
    ("field", "value_"),
    [("packages", ["emoji; rm -rf /"]), ("packages", ["git+https://example.org/x"]), ("packages", [7]),
     ("files", {"../x": ""}), ("files", {"a": 1}), ("files", {"big": "x" * 70_000}), ("files", ["a"])],
)  # fmt: skip
def test_what_cannot_be_in_a_template_is_named_by_field(field, value_):
    assert list(templates.mistakes(Template(name="x", **{field: value_}))) == [field]


def test_an_environment_is_named_by_its_lock_packages_and_build(tmp_path):
    names = {
        environment.python_of(tmp_path),
        environment.python_of(tmp_path, packages=["emoji"]),
        environment.python_of(tmp_path, packages=["emoji"], build=1),
        environment.python_of(tmp_path, packages=["emoji", "attrs"]),
    }

    assert len(names) == 4
    assert environment.python_of(tmp_path, packages=["attrs", "emoji"]) in names


def test_environments_that_no_template_has_are_swept_away_after_a_day(tmp_path):
    for name in ("old", "new", "kept"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "made").touch()
        (tmp_path / f"{name}.lock").touch()
    long_ago = 1_000_000_000
    os.utime(tmp_path / "old" / "made", (long_ago, long_ago))
    os.utime(tmp_path / "kept" / "made", (long_ago, long_ago))

    environment.sweep(tmp_path, {tmp_path / "kept" / "bin" / "python"})

    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "kept.lock", "new", "new.lock"]
