"""The node under load: it stays as it is, many clients share it, and its crash at any moment leaves nothing."""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from executions.backends.base import SandboxSpec
from executions.backends.local import LocalBackend
from executions.errors import BackendError
from tests import servers
from tests.bench.soak import growth, soak
from tests.local.attack import ended, host_pids, run, sandbox, started, value
from tests.node import running_node, wait_ready
from tests.product import HOME

CLIENT = """
import asyncio, json, secrets, sys
from executions.backends.base import SandboxSpec
from executions.backends.local import LocalBackend

async def one(backend, number):
    handle = await backend.create(SandboxSpec("c" + secrets.token_hex(8), "default", 60))
    texts = [e.data["mime"]["text/plain"] async for e in backend.run_code(handle, f"{number} * 2") if e.kind == "result"]
    seen = len(await backend.list())
    await backend.kill(handle)
    return texts[0], seen

async def main():
    backend = LocalBackend("local", {"RUN_DIR": sys.argv[1]})
    sys.stdout.write(json.dumps(await asyncio.gather(*(one(backend, n) for n in range(8)))))

print("ready", flush=True)
sys.stdin.read(1)
asyncio.run(main())
"""


async def test_hundreds_of_sandboxes_leave_the_node_as_it_was(template_python):
    """The ten thousand are `make soak`'s; here memory may still settle, so twice the allowance."""
    with running_node(template_python) as node:
        assert growth(await soak(node, 200)) == ""


def test_two_processes_share_one_node(node):
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(node.run_dir)], cwd=HOME, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    assert [client.stdout.readline() for client in clients if client.stdout] == [b"ready\n"] * 2
    for client in clients:
        assert client.stdin is not None
        client.stdin.write(b"x")  # both at once
        client.stdin.flush()
    answers = [json.loads(client.communicate(timeout=60)[0]) for client in clients]

    for answer in answers:
        assert [text for text, _ in answer] == [str(number * 2) for number in range(8)]
    assert max(seen for answer in answers for _, seen in answer) > 8  # each has seen the other's


async def test_another_process_goes_on_with_a_sandbox_by_its_handle(node):
    async with sandbox(node.backend) as handle:
        await run(node.backend, handle, "x = 41")

        other = LocalBackend("local", {"RUN_DIR": str(node.run_dir)})
        assert await value(other, handle, "x + 1") == 42


async def test_a_client_finds_a_node_that_was_started_again(template_python):
    with running_node(template_python) as node:
        assert await node.backend.list() == []
        node.process.terminate()
        node.process.wait()

        again = subprocess.Popen(node.process.args, stdin=subprocess.DEVNULL, preexec_fn=servers.die_with_parent)
        try:
            wait_ready(again, node.run_dir)
            assert await node.backend.list() == []
        finally:
            again.terminate()
            again.wait(10)


async def test_sigterm_drains_nobody_gets_a_new_sandbox_and_all_end_within_seconds(template_python):
    with running_node(template_python) as node:
        handle = await node.backend.create(SandboxSpec("d" + secrets.token_hex(8), "default", 60))
        _, pid = await started(node.backend, handle)
        pidfd = os.pidfd_open(pid)
        node.process.send_signal(signal.SIGTERM)

        with pytest.raises(BackendError):
            await forever(node.backend)
        assert ended(pidfd)
        os.close(pidfd)
        assert node.process.wait(10) == 0


async def forever(backend: LocalBackend) -> None:
    while True:
        await backend.create(SandboxSpec("e" + secrets.token_hex(8), "default", 60))


async def busy(backend: LocalBackend) -> None:
    """Create, run and kill for ever; errors are what a dying node may give."""
    while True:
        try:
            handle = await backend.create(SandboxSpec("k" + secrets.token_hex(8), "default", 60))
            daemon = "import subprocess; subprocess.Popen(['setsid', 'sleep', '600'], stdout=-3, stderr=-3)"
            await run(backend, handle, daemon)
            await backend.kill(handle)
        except BackendError:
            await asyncio.sleep(0.01)


def below(pid: int) -> set[int]:
    found, waiting = set(), [pid]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            try:
                children = set(map(int, task.read_text().split())) - found
            except OSError:
                continue
            found |= children
            waiting += children
    return found


async def test_killed_at_random_moments_it_leaves_no_process_behind(template_python):
    """A few of them here, since a zygote warms up for each; SANDGATE_TEST_CRASHES=30 tries more."""
    moments = random.Random(os.environ.get("SANDGATE_TEST_SEED", "1"))
    for _ in range(int(os.environ.get("SANDGATE_TEST_CRASHES", "4"))):
        with running_node(template_python) as node:
            clients = [asyncio.create_task(busy(node.backend)) for _ in range(3)]
            await asyncio.sleep(moments.uniform(0, 0.4))  # the moment is what is tried
            pidfds = []
            for pid in below(node.process.pid):
                try:
                    pidfds.append(os.pidfd_open(pid))
                except ProcessLookupError:
                    continue
            node.process.kill()

            still = [pidfd for pidfd in pidfds if not select.select([pidfd], [], [], 5)[0]]
            assert still == []
            for pidfd in pidfds:
                os.close(pidfd)
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            node.process.wait()
            assert host_pids(str(node.run_dir)) == []  # a launcher that was just being started
