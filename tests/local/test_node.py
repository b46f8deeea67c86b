"""The node's own life: whatever happens to it, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from executions.backends.base import SandboxSpec
from executions.backends.local import LocalBackend, command
from executions.errors import BackendUnavailable, SandboxLost
from tests.local.attack import descendants, ended, run, sandbox, started, value
from tests.node import connected_socket, listening, running_node, wait_ready


def spec() -> SandboxSpec:
    return SandboxSpec("n" + os.urandom(6).hex(), "default", timeout_seconds=60)


def traces(run_dir: Path) -> list[str]:
    """Sockets, mounts and control groups of a node."""
    left = [str(path) for path in run_dir.rglob("*") if path.is_socket()]
    left += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(run_dir) in line]
    return left


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_the_end_of_the_node_is_the_end_of_its_sandboxes(template_python, number):
    with running_node(template_python) as node:
        handle = await node.backend.create(spec())
        _, pid = await started(node.backend, handle)
        pidfd = os.pidfd_open(pid)
        node.process.send_signal(number)

        assert ended(pidfd)
        os.close(pidfd)
        node.process.wait(10)
        if number == signal.SIGTERM:
            assert traces(node.run_dir) == []
        with pytest.raises(SandboxLost):
            await run(node.backend, handle, "1")


async def test_a_node_that_starts_again_removes_what_the_last_one_left(template_python):
    with running_node(template_python) as node:
        await node.backend.create(spec())
        node.process.kill()
        node.process.wait()

        again = subprocess.Popen(command(node.run_dir, {"default": str(template_python)}), stdin=subprocess.DEVNULL)
        try:
            wait_ready(again, node.run_dir)
            assert await node.backend.list() == []
            assert list((node.run_dir / "sandboxes").iterdir()) == []
            async with sandbox(node.backend) as handle:
                assert await value(node.backend, handle, "1 + 1") == 2
        finally:
            again.terminate()
            again.wait(10)


async def test_a_killed_zygote_takes_its_sandboxes_along_and_comes_again(template_python):
    with running_node(template_python) as node:
        handle = await node.backend.create(spec())
        _, pid = await started(node.backend, handle)
        pidfd = os.pidfd_open(pid)
        children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
        zygotes = [z for c in children for z in Path(f"/proc/{c}/task/{c}/children").read_text().split()]
        os.kill(int(zygotes[0]), signal.SIGKILL)

        assert ended(pidfd)
        os.close(pidfd)
        with pytest.raises(SandboxLost):
            await run(node.backend, handle, "1")


def test_only_one_node_serves_a_folder(template_python):
    with running_node(template_python, ready=False) as node:
        listening(node)
        second = subprocess.run(command(node.run_dir, {}), capture_output=True, text=True, timeout=20)

    assert second.returncode == 1
    assert "Another node" in second.stderr


def test_dies_with_its_parent(tmp_path):
    program = (
        "import subprocess, sys, time\n"
        f"node = subprocess.Popen({[*command(tmp_path / 'run', {}), '--die-with-parent']!r}, stdin=subprocess.DEVNULL)\n"
        "print(node.pid, flush=True)\ntime.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pidfd = os.pidfd_open(int(parent.stdout.readline()))
    while not (tmp_path / "run" / "node.sock").exists():
        assert parent.poll() is None
    parent.kill()
    parent.wait()
    parent.stdout.close()

    assert ended(pidfd)
    os.close(pidfd)


async def test_an_unknown_template_or_a_broken_one_is_unavailable_and_says_why(tmp_path):
    with running_node(tmp_path / "missing" / "python", ready=False) as node:
        listening(node)
        with pytest.raises(BackendUnavailable, match="make the template's environment"):
            await node.backend.create(spec())
        check = await node.backend.check()

    assert not check.ok
    assert "missing" in check.detail


def test_the_socket_is_private_and_bad_requests_are_answered(node):
    assert (node.run_dir / "node.sock").stat().st_mode & 0o777 == 0o600
    assert node.run_dir.stat().st_mode & 0o777 == 0o700
    with connected_socket(node.run_dir / "node.sock") as connection:
        for request in (b"nonsense\n", b'{"op": "walls"}\n', b"[]\n", b'{"op": "create", "sandbox_id": "../x"}\n'):
            connection.sendall(request)
            assert b'"error": "invalid"' in connection.recv(4096)


async def test_long_run_folders_work(template_python, tmp_path):
    run_dir = tmp_path / ("x" * 100) / "run"
    process = subprocess.Popen(command(run_dir, {"default": str(template_python)}), stdin=subprocess.DEVNULL)
    backend = LocalBackend("local", {"RUN_DIR": str(run_dir)})
    try:
        wait_ready(process, run_dir)
        async with sandbox(backend) as handle:
            assert await value(backend, handle, "1 + 1") == 2
    finally:
        process.terminate()
        process.wait(10)


async def test_many_sandboxes_leave_nothing(node):
    def counted() -> tuple[int, int]:
        return len(os.listdir(f"/proc/{node.process.pid}/fd")), descendants(node.process.pid)

    async def settled() -> tuple[int, int]:
        """What is there once spare sandboxes, which are made in the background, neither come nor go any more."""
        seen, times = counted(), 0
        async with asyncio.timeout(60):
            while times < 20:
                await asyncio.sleep(0.05)
                now = counted()
                seen, times = now, times + 1 if now == seen else 0
        return seen

    async def use(times: int) -> None:
        for _ in range(times):
            async with sandbox(node.backend) as handle:
                await value(node.backend, handle, "1 + 1")

    await use(1)  # what is opened once stays open
    before = await settled()
    await use(25)

    assert await settled() == before
    assert list((node.run_dir / "sandboxes").iterdir()) == []
