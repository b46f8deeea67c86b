"""A frozen sandbox uses no CPU, keeps everything, can be killed, and dies with its node."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone

from executions import backends, operations
from executions.backends.local.node.freezer import Freezer
from executions.errors import SandboxLost
from executions.models import Sandbox
from executions.serializers import SessionRequest
from executions.states import ExecutionState, SandboxState
from tests.local.attack import ended, host_pids, sandbox, started, value
from tests.local.test_cgroups import group
from tests.local.test_reduced import open_python, reduced
from tests.local.test_reduced import sandbox as reduced_sandbox
from tests.node import running_node
from tests.plane.conftest import asks

__all__ = ["group", "open_python", "reduced"]
BUSY = "import subprocess, sys\nfor _ in range(3): subprocess.Popen([sys.executable, '-c', 'while True: pass', '{}'])"


def ticks(pids: list[int]) -> int:
    return sum(sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) for pid in pids)


def spin(count: int = 20) -> None:
    """Use so many ticks of CPU: time in which others, if they ran, would have used some, too."""
    until = ticks([os.getpid()]) + count
    while ticks([os.getpid()]) < until:
        pass


async def busy(backend, handle, marker: str) -> list[int]:
    await value(backend, handle, BUSY.format(marker) + "\nkept = 41")
    while len(pids := host_pids(marker)) < 3:
        await asyncio.sleep(0.01)
    return pids


async def test_what_is_frozen_uses_no_cpu_and_goes_on_where_it_was(node):
    async with sandbox(node.backend) as handle:
        pids = await busy(node.backend, handle, "freezes1")

        await node.backend.pause(handle)
        await node.backend.pause(handle)
        before = ticks(pids)
        spin()
        after = ticks(pids)
        await node.backend.resume(handle, timeout_seconds=60)
        await node.backend.resume(handle, timeout_seconds=60)

        assert before == after
        assert await value(node.backend, handle, "kept + 1") == 42
        while ticks(pids) == after:
            await asyncio.sleep(0.01)


async def test_nobody_escapes_by_forking_on_and_who_had_stopped_himself_stays_so(node):
    forks = "import os\nwhile True:\n    if os.fork():\n        os._exit(0)  # never the same pid for long"
    async with sandbox(node.backend) as handle:
        _, sleeper = await started(node.backend, handle)
        await value(node.backend, handle, "import signal, os\nos.kill(sleeper.pid, signal.SIGSTOP)")
        await value(
            node.backend, handle, f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', '''{forks}'''])\n1"
        )

        await node.backend.pause(handle)
        seen = host_pids("never the same pid")
        spin()
        assert host_pids("never the same pid") == seen
        await node.backend.resume(handle, timeout_seconds=60)

        assert "T" in Path(f"/proc/{sleeper}/stat").read_text().rpartition(")")[2].split()[0]


async def test_what_is_frozen_is_killed_and_is_gone_then(node):
    async with sandbox(node.backend) as handle:
        _, pid = await started(node.backend, handle)
        pidfd = os.pidfd_open(pid)
        await node.backend.pause(handle)

        assert await node.backend.kill(handle)

        assert ended(pidfd)
        os.close(pidfd)
        for verb in (node.backend.pause(handle), node.backend.resume(handle, timeout_seconds=1)):
            with pytest.raises(SandboxLost):
                await verb


async def test_what_is_frozen_ends_when_its_time_is_over(node):
    async with sandbox(node.backend) as handle:
        _, pid = await started(node.backend, handle)
        pidfd = os.pidfd_open(pid)
        await node.backend.pause(handle)

        await node.backend.set_timeout(handle, 0)

        assert ended(pidfd)
        os.close(pidfd)


async def test_a_node_that_is_killed_leaves_nothing_frozen_behind(template_python):
    with running_node(template_python) as node:
        handle = await node.backend.create(sandbox_spec())
        _, pid = await started(node.backend, handle)
        pidfd = os.pidfd_open(pid)
        await node.backend.pause(handle)

        node.process.send_signal(signal.SIGKILL)

        assert ended(pidfd)
        os.close(pidfd)


async def test_the_reduced_mode_freezes_too(reduced):
    async with reduced_sandbox(reduced) as handle:
        pids = await busy(reduced.backend, handle, "freezes2")

        await reduced.backend.pause(handle)
        before = ticks(pids)
        spin()
        after = ticks(pids)
        await reduced.backend.resume(handle, timeout_seconds=60)

        assert before == after
        assert await value(reduced.backend, handle, "kept") == 41


def sandbox_spec():
    from executions.backends.base import SandboxSpec

    return SandboxSpec("a0freezer0", "default", timeout_seconds=120)


def test_version_2_freezes_the_group_as_a_whole(group):
    leader = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lambda: group.add(os.getpid()))
    freezer = Freezer(leader.pid, group)

    freezer.freeze()
    before = ticks([leader.pid])
    spin()
    assert ticks([leader.pid]) == before
    assert Path(f"/proc/{leader.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
    freezer.thaw()
    while ticks([leader.pid]) == before:
        spin(1)

    leader.kill()
    leader.wait()


# Through the plane


@pytest.mark.django_db
async def test_an_idle_session_is_frozen_and_the_next_call_finds_its_variables(caller, node, settings):
    settings.SANDBOXES = {
        "local": {
            "BACKEND": "executions.backends.local.LocalBackend",
            "OPTIONS": {"RUN_DIR": str(node.run_dir), "FLOOR": "none"},
        }
    }
    backends._live.clear()
    caller.agent.route = ["local"]
    session = await operations.open_session(caller=caller, request=SessionRequest(pause_after_seconds=1))
    await operations.execute(caller=caller, request=asks("kept = 41", session_id=session.pk))
    await Sandbox.objects.aupdate(last_used_at=timezone.now() - timedelta(seconds=60))

    await operations.reap(orphans=False)
    frozen = await Sandbox.objects.aget()
    began = time.monotonic()
    shape = await operations.execute(caller=caller, request=asks("kept + 1", session_id=session.pk))
    took = time.monotonic() - began
    files = await operations.execute(
        caller=caller,
        request=asks(
            "import os\nos.makedirs('outputs', exist_ok=True)\nos.mkfifo('outputs/pipe')\n"
            "os.symlink('/etc/passwd', 'outputs/link')\nopen('outputs/sparse', 'wb').truncate(300 << 20)\n"
            "open(b'outputs/half\\xed\\xa0\\x80', 'wb').write(b'x')\nopen('outputs/a\\nb.txt', 'w').write('kept')",
            session_id=session.pk,
        ),
    )
    over = await operations.end_session(caller=caller, session_id=session.pk)

    assert frozen.state == SandboxState.PAUSED
    assert frozen.reserved_nano_usd > 0  # its memory is held: it is billed on
    assert (shape.state, shape.results[0]["text/plain"], took < 1) == (ExecutionState.SUCCEEDED, "42", True)
    assert files.state == ExecutionState.SUCCEEDED, files.error
    assert over.state == SandboxState.GONE
    assert over.kept_said == "1 file kept (4 bytes); 2 left out: cannot be read; 1 left out: too large."
    async with aclosing(operations.artifact_pieces((await over.artifacts.aget()).sha256)) as pieces:
        assert b"".join([piece async for piece in pieces]) == b"kept"


@pytest.mark.django_db
async def test_a_frozen_session_is_extended_without_waking_it_up(caller, node, settings):
    settings.SANDBOXES = {
        "local": {
            "BACKEND": "executions.backends.local.LocalBackend",
            "OPTIONS": {"RUN_DIR": str(node.run_dir), "FLOOR": "none"},
        }
    }
    backends._live.clear()
    caller.agent.route = ["local"]
    session = await operations.open_session(caller=caller, request=SessionRequest(timeout_seconds=60))
    await operations.pause_session(caller=caller, session_id=session.pk)

    later = await operations.extend_session(caller=caller, session_id=session.pk, seconds=3600)

    assert (later.state, later.leased_until > session.leased_until) == (SandboxState.PAUSED, True)
    assert later.reserved_nano_usd > 3500 * later.rate_nano_usd_per_second
    await operations.end_session(caller=caller, session_id=session.pk)
