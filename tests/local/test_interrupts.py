"""After an interrupt everything that the run has started is dead, and what earlier runs started on purpose lives on."""

from __future__ import annotations

import asyncio
import secrets
import time

import pytest

from executions.errors import ContextRestarted, RunTimedOut
from tests.local.attack import host_pids, run, sandbox, value
from tests.node import RunningNode

DAEMON = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.closerange(0, 100)
        os.execvp('sleep', ['sleep', '{marker}'])
    os._exit(0)
os.wait()
"""
SETSID = "import subprocess\nsubprocess.run(['setsid', '-f', 'sleep', '{marker}'])"
HOPPER = """
import os
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 100)
    while True:
        if os.fork():
            os._exit(0)
"""
LIVING = """
import glob
def living():
    found = []
    for path in glob.glob('/proc/[0-9]*/stat'):
        try:
            state = open(path).read().rpartition(')')[2].split()[0]
        except OSError:
            continue
        found += [path] if state not in 'ZX' else []
    return len(found)
"""
CALLS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(600)",
    "foreign_sleep": "import ctypes\nlibc = ctypes.CDLL(None)\nwhile True: libc.sleep(600)",
    "regex": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
    "child": "import subprocess\nsubprocess.run(['bash', '-c', 'trap \"\" INT TERM; while :; do sleep 1; done'])",
    "flood": "while True: print('x' * 1000)",
    "awaited": "import asyncio\nawait asyncio.sleep(600)",
}
LOST = {
    "deaf": "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
    "numpy": "import numpy as np\nnp.linalg.svd(np.random.rand(3000, 3000))",
    "thread": "import threading, time\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()\ntime.sleep(600)",
}


@pytest.fixture
def backend(node: RunningNode):
    return node.backend


def marker() -> str:
    return str(secrets.randbelow(10**9) + 10**9)


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)  # a process on the other side of the wall; there is nothing to wait on


async def interrupted(backend, handle, code: str, seconds: float = 0.4) -> tuple[list, float]:
    """What a run said that ran out of time, and how long it took to stop it."""
    said: list = []
    began = time.monotonic()
    with pytest.raises(RunTimedOut):
        await collect(backend.run_code(handle, code, timeout_seconds=seconds), said)
    return said, time.monotonic() - began - seconds


async def collect(events, said: list) -> None:
    async for event in events:
        said.append(event)


@pytest.mark.parametrize("name", CALLS)
async def test_it_stops_soon_and_the_variables_stay(backend, name):
    async with sandbox(backend) as handle:
        await run(backend, handle, "kept = 5")
        said, took = await interrupted(backend, handle, CALLS[name])

        assert took < 2
        assert "error" not in [event.kind for event in said]
        assert await value(backend, handle, "kept") == 5


@pytest.mark.parametrize("name", LOST)
async def test_what_cannot_be_interrupted_ends_with_its_variables_and_says_so(backend, name):
    async with sandbox(backend, memory_mib=2048) as handle:
        await run(backend, handle, "kept = 5")
        said, took = await interrupted(backend, handle, LOST[name])
        threads = await value(backend, handle, "import threading\nthreading.active_count()")

        assert took < 4
        assert [event.data["name"] for event in said if event.kind == "error"] == ["ContextRestarting"]
        assert threads == 1
        assert await value(backend, handle, "'kept' in globals()") is False


@pytest.mark.parametrize("code", [DAEMON, SETSID], ids=["double_fork", "setsid"])
async def test_a_daemon_of_the_run_ends_with_it_and_the_variables_stay(backend, code):
    mark = marker()
    async with sandbox(backend) as handle:
        await run(backend, handle, "kept = 5")
        went = asyncio.create_task(
            interrupted(backend, handle, code.replace("{marker}", mark) + "\nimport time\ntime.sleep(600)", 3)
        )
        await until(lambda: host_pids(mark))
        await went

        assert host_pids(mark) == []
        assert await value(backend, handle, "kept") == 5


async def test_an_idle_pool_of_threads_costs_nothing(backend):
    pool = "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor()\npool.submit(int).result()\n"
    async with sandbox(backend) as handle:
        said, _ = await interrupted(backend, handle, pool + "import time\ntime.sleep(600)")

        assert [event.kind for event in said if event.kind == "error"] == []
        assert await value(backend, handle, "pool.submit(lambda: 5).result()") == 5


async def test_a_cancelled_run_that_lost_its_variables_says_so(backend):
    async with sandbox(backend) as handle:
        events = backend.run_code(handle, LOST["thread"].replace("time.sleep", "print('on')\ntime.sleep"))
        async for event in events:
            if event.kind == "stdout":
                break

        with pytest.raises(ContextRestarted):
            await events.aclose()


async def test_a_daemon_of_an_earlier_run_lives_on_with_what_it_starts(backend):
    mark = marker()
    server = (
        f"import subprocess\nsubprocess.run(['setsid', '-f', 'bash', '-c', 'while :; do sleep 0.05; done #{mark}'])"
    )
    async with sandbox(backend) as handle:
        await run(backend, handle, server)
        await interrupted(backend, handle, "import time\ntime.sleep(600)")

        assert host_pids(mark)


async def test_what_a_command_started_is_not_the_runs(backend):
    mark = marker()
    async with sandbox(backend) as handle:
        went = asyncio.create_task(interrupted(backend, handle, "import time\ntime.sleep(600)", 2))
        await asyncio.sleep(0.1)
        async for _ in backend.run_command(handle, f"sleep {mark} >/dev/null 2>&1 &"):
            pass
        await went

        assert host_pids(mark)


async def test_a_process_that_flees_from_pid_to_pid_is_caught(backend):
    async with sandbox(backend) as handle:
        await interrupted(backend, handle, HOPPER + "import time\ntime.sleep(600)")
        look = "import time\nmost = 0\nfor _ in range(50):\n    most = max(most, living())\n    time.sleep(0.005)\nmost"

        assert await value(backend, handle, LIVING + look) == 2  # the agent and this interpreter


async def test_a_guest_at_its_process_limit_is_still_stopped(backend):
    bomb = "import os, time\nwhile True:\n    try:\n        if os.fork() == 0:\n            while True: pass\n    except OSError: pass"
    async with sandbox(backend, processes=40) as handle:
        await run(backend, handle, "kept = 5")
        _, took = await interrupted(backend, handle, bomb, 1)

        assert took < 5
        assert await value(backend, handle, LIVING + "living()") == 2


async def test_a_fork_that_comes_to_the_end_of_its_cell_ends_without_a_word(backend):
    async with sandbox(backend) as handle:
        forked = await run(
            backend, handle, "import os, time\npid = os.fork()\nif not pid: 1 / 0\ntime.sleep(0.3)\n'parent'"
        )
        after = await value(backend, handle, LIVING + "(pid > 0, living())")

    assert (forked["error"], forked["value"]) == (None, "parent")
    assert after == (True, 2)


async def test_a_stopped_command_takes_its_daemons_along(backend):
    mark = marker()
    async with sandbox(backend) as handle:
        with pytest.raises(RunTimedOut):
            await collect(backend.run_command(handle, f"setsid -f sleep {mark}; sleep 600", timeout_seconds=0.5), [])
        assert host_pids(mark) == []

        mark = marker()
        events = backend.run_command(handle, f"setsid -f sleep {mark}; echo on; sleep 600")
        async for event in events:
            if event.kind == "stdout":
                break
        await until(lambda: host_pids(mark))
        await events.aclose()
        assert host_pids(mark) == []


async def test_an_interrupt_that_comes_late_does_not_hit_the_next_run(backend):
    async with sandbox(backend) as handle:
        await run(backend, handle, "done = 0")
        first = asyncio.create_task(interrupted(backend, handle, "import time\ntime.sleep(600)"))
        await asyncio.sleep(0.1)
        second = await run(backend, handle, "import time\ntime.sleep(0.5)\ndone = 1")
        await first

        assert second["error"] is None
        assert await value(backend, handle, "done") == 1


async def test_the_environment_of_a_bash_run_is_put_back(backend):
    async def bash(code: str, env: dict[str, str] | None = None) -> str:
        events = backend.run_code(handle, code, language="bash", env=env)
        return "".join([event.data["text"] async for event in events if event.kind == "stdout"])

    async with sandbox(backend, env={"KEPT": "1"}) as handle:
        await bash("plain=2")
        given = await bash("printenv KEPT ONCE plain", env={"KEPT": "a b", "ONCE": "it's", "plain": "x\ny"})
        later = await bash('printenv KEPT ONCE plain; echo "$KEPT-${ONCE-unset}-$plain"; set | grep -c __')

    assert given == "a b\nit's\nx\ny\n"
    assert later == "1\n1-unset-2\n"[:-1] + "\n" + later.splitlines()[-1] + "\n"
    assert "__had" not in later
