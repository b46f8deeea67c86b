"""What only the host can see: nothing lives on, nothing was touched, the node and its client stay small."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

import pytest

from executions import attacks
from executions.attacks import Arena
from executions.errors import SandboxLost
from tests.local.attack import descendants, ended, host_pids, started, value
from tests.node import ask

KERNEL_FILES = ("core_pattern", "modprobe", "hostname", "randomize_va_space", "sysrq")
BY_NAME = {attack.name: attack for attack in attacks.ALL}
LOUD = (
    "gigabyte_without_newline", "million_tiny_writes", "flood_of_frames", "endless_frame", "frame_that_swells", "huge_exception_message",
    "fork_bomb", "memory_bomb", "binary_ansi_and_osc_output",
)  # fmt: skip


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_mib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() >> 20


def peak_mib() -> int:
    """The most memory that this process has had since it was asked to forget."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


async def test_the_node_and_its_client_stay_small(node):
    async def round() -> None:
        async with Arena(node.backend) as arena:
            for name in LOUD:
                assert (await arena.try_(BY_NAME[name])).verdict == "blocked", name
        await asyncio.sleep(0.3)  # the spare sandboxes are made anew

    await round()  # what is made at first use
    before = descriptors(node.process.pid), resident_mib(node.process.pid), descriptors(os.getpid())
    processes = descendants(node.process.pid)
    Path("/proc/self/clear_refs").write_text("5")  # forget what earlier tests had at most
    own = peak_mib()

    await round()

    assert abs(descriptors(node.process.pid) - before[0]) <= 4
    assert resident_mib(node.process.pid) - before[1] <= 8
    assert descriptors(os.getpid()) - before[2] <= 2
    assert peak_mib() - own < 64
    assert descendants(node.process.pid) <= processes + 2
    assert ask(node.run_dir, op="list")["sandboxes"] == []


async def test_no_file_of_the_host_is_touched(node, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("whole")
    kernel = {path: path.read_text() for path in map(Path("/proc/sys/kernel").joinpath, KERNEL_FILES) if path.exists()}
    before = {
        path: path.stat().st_mtime_ns
        for path in (canary, Path("/etc/passwd"), Path("/etc"), Path("/usr/bin"), Path("/dev"))
    }

    of_the_node = set(node.run_dir.iterdir())
    async with Arena(node.backend) as arena:
        for attack in (*attacks.GROUPS["files"], *attacks.GROUPS["control"]):
            await arena.try_(attack)

    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path: path.read_text() for path in kernel} == kernel
    assert set(node.run_dir.iterdir()) == of_the_node
    assert list((node.run_dir / "sandboxes").iterdir()) == []
    assert not any(os.path.exists(f"{top}/owned") for top in ("", "/tmp", "/etc", "/home", "/root", "/dev/shm"))


@pytest.mark.parametrize(
    "name", ["daemon_outlives_the_run", "kill_everybody", "fork_bomb", "ignored_signals", "daemon_of_a_stopped_cell"]
)
async def test_nothing_of_an_attack_lives_on(node, name):
    async with Arena(node.backend) as arena:
        await arena.try_(BY_NAME[name])
        marker = arena.marker

    assert host_pids(marker) == []
    assert host_pids("attest-daemon") == []


async def test_the_agents_death_in_mid_run_is_the_end_of_all_of_it(node):
    async with Arena(node.backend) as arena:
        handle = await arena.create()
        marker, pid = await started(node.backend, handle)
        agent = int(
            next(
                line.split()[1]
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if line.startswith("PPid")
            )
        )
        agent = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
        pidfd = os.pidfd_open(pid)
        said = []

        async def listen() -> None:
            code = "import time\nprint('begun')\ntime.sleep(60)"
            async for event in node.backend.run_code(handle, code, timeout_seconds=30):
                said.append(event.kind)
                if event.kind == "stdout":
                    os.kill(agent, 9)

        with pytest.raises(SandboxLost):
            await listen()

        assert "stdout" in said
        assert ended(pidfd)
        assert host_pids(marker) == []
        await arena.whole()
    os.close(pidfd)


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has one uid on the host")
async def test_what_a_guest_makes_belongs_to_nobody_on_the_host(node):
    async with Arena(node.backend) as arena:
        handle = await arena.create()
        _, pid = await started(node.backend, handle)
        map_ = Path(f"/proc/{pid}/uid_map").read_text().split()

        assert int(map_[1]) >= 2_100_000_000
        assert await value(node.backend, handle, "import os\nos.stat('/home/user').st_uid") == 1000
