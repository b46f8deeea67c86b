"""What is left of nodes that were killed, on a folder that only looks like control groups."""

from __future__ import annotations

import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from executions.backends.local.node import cgroups
from tests.local.attack import run, sandbox, value
from tests.node import ask

NOBODY = 65534


def test_only_empty_groups_of_dead_nodes_are_swept_away(tmp_path):
    dead, alive, used = (f"sandgate-{secrets.token_hex(6)}" for _ in range(3))
    for name in (dead, alive, used):
        (tmp_path / name / "sandbox").mkdir(parents=True)
    (tmp_path / used / "sandbox" / "process").touch()  # rmdir refuses, as the kernel does while a process is inside
    claim = cgroups._claimed(alive.removeprefix("sandgate-"))
    assert claim is not None

    with claim:
        cgroups.sweep(tmp_path, 2, unused_seconds=3600)
        assert (tmp_path / dead).exists()
        cgroups.sweep(tmp_path, 2, unused_seconds=0)

    assert not (tmp_path / dead).exists()
    assert (tmp_path / alive / "sandbox").exists()
    assert (tmp_path / used / "sandbox" / "process").exists()


def test_a_name_is_claimed_once():
    name = secrets.token_hex(6)
    first = cgroups._claimed(name)
    assert first is not None

    with first:
        assert cgroups._claimed(name) is None
    again = cgroups._claimed(name)
    assert again is not None
    again.close()


# on the kernel's own


@pytest.fixture
def group(request) -> Iterator[cgroups.Group]:
    """A group of version 2, wherever one is mounted and may be made; controllers are not needed for these."""
    mounted = next((Path(m) for m in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified") if Path(m, "cgroup.procs").exists()
                    and Path(m, "cgroup.controllers").exists()), None)  # fmt: skip
    if mounted is None or not os.access(mounted, os.W_OK):
        pytest.skip("control groups of version 2 are not mounted here, or not this user's to divide")
    folder = mounted / f"sandgate-{secrets.token_hex(6)}"
    folder.mkdir()
    yield cgroups.Group({"memory": folder}, 2)
    (folder / "cgroup.kill").write_text("1")
    folder.rmdir()


FORKS = (
    "import os, time\nfor _ in range(20):\n    if os.fork() == 0: time.sleep(600)\nos.write(1, b'x')\ntime.sleep(600)"
)


def test_killing_a_group_ends_all_of_it_at_once(group):
    leader = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdout=subprocess.PIPE, preexec_fn=lambda: group.add(os.getpid())
    )
    assert leader.stdout is not None
    leader.stdout.read(1)
    folder = group.folders["memory"]
    assert len((folder / "cgroup.procs").read_text().split()) == 21

    group.kill()

    assert leader.wait(5) == -9
    leader.stdout.close()
    assert emptied(folder)


def test_without_cgroup_kill_it_is_frozen_first_so_that_nobody_forks_on(group, monkeypatch):
    leader = subprocess.Popen(
        [sys.executable, "-c", FORKS], stdout=subprocess.PIPE, preexec_fn=lambda: group.add(os.getpid())
    )
    assert leader.stdout is not None
    leader.stdout.read(1)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "cgroup.kill" and exists(path))

    group.kill()

    assert leader.wait(5) == -9
    leader.stdout.close()
    assert (group.folders["memory"] / "cgroup.freeze").read_text().strip() == "1"
    assert emptied(group.folders["memory"])


def emptied(folder: Path) -> bool:
    """Whether the kernel says that nobody is left, within five seconds."""
    deadline = time.monotonic() + 5
    with open(folder / "cgroup.events") as events:
        watch = select.poll()
        watch.register(events, select.POLLPRI)
        while "populated 0" not in os.pread(events.fileno(), 4096, 0).decode():
            if time.monotonic() > deadline:
                return False
            watch.poll(100)
    return True


async def test_limits_hold_on_the_version_that_this_machine_has(node):
    """The node's own groups, whichever version: the guest that takes too much dies, and the meter says so."""
    if ask(node.run_dir, op="check")["walls"]["cgroups"] is not True:
        pytest.skip("this machine has no control groups with memory, pids and cpu for this user")
    async with sandbox(node.backend, memory_mib=128) as handle:
        outcome = await run(node.backend, handle, "x = bytearray(1 << 30)\nfor i in range(0, len(x), 4096): x[i] = 1")
        assert outcome["error"] is not None
        assert await value(node.backend, handle, "1 + 1") == 2


def test_limits_are_written_on_version_2_where_it_has_the_controllers(group):
    controllers = group.folders["memory"].parent / "cgroup.controllers"
    if not {"memory", "pids", "cpu"} <= set(controllers.read_text().split()):
        pytest.skip("control groups of version 2 have no controllers on this machine: their limits were not tried")
    (group.folders["memory"].parent / "cgroup.subtree_control").write_text("+memory +pids +cpu")
    both = cgroups.Group(dict.fromkeys(("memory", "pids", "cpu"), group.folders["memory"]), 2)

    both.limit(memory_bytes=64 << 20, processes=40, cpu_count=1)

    assert (group.folders["memory"] / "memory.max").read_text().strip() == str(64 << 20)
    assert both.cpu_us() >= 0


@pytest.fixture
def dividable(group) -> Iterator[tuple[Path, str]]:
    """A group of version 2 with a controller that divides memory or pages, whichever this machine has left for it."""
    folder = group.folders["memory"]
    control = folder.parent / "cgroup.subtree_control"
    has = (folder.parent / "cgroup.controllers").read_text().split()
    controller = next((name for name in ("memory", "hugetlb", "io") if name in has), None)
    if controller is None:
        pytest.skip("control groups of version 2 have no controller on this machine to be divided")
    before = controller in control.read_text().split()
    control.write_text(f"+{controller}")
    yield folder, controller
    (folder / "cgroup.kill").write_text("1")
    assert emptied(folder)
    for child in (path for path in folder.iterdir() if path.is_dir()):
        child.rmdir()
    if not before:
        (folder / "cgroup.subtree_control").write_text(f"-{controller}")
        control.write_text(f"-{controller}")


def test_processes_of_a_group_step_aside_before_it_is_divided(group, dividable):
    folder, controller = dividable
    inside = subprocess.Popen(["sleep", "600"], preexec_fn=lambda: group.add(os.getpid()))
    with pytest.raises(OSError, match="busy"):
        (folder / "cgroup.subtree_control").write_text(f"+{controller}")

    cgroups.divide(folder, (controller,))

    assert (folder / cgroups.ASIDE / "cgroup.procs").read_text().split() == [str(inside.pid)]
    (folder / "sandbox").mkdir()
    assert controller in (folder / "sandbox" / "cgroup.controllers").read_text().split()
    inside.kill()
    inside.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a group to a user, as systemd does, needs root")
def test_a_user_divides_the_group_that_was_given_to_him_and_finds_it_again(group, dividable):
    folder, controller = dividable
    for name in ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
        os.chown(folder / name, NOBODY, NOBODY)

    def as_its_user() -> bool:
        mount = str(folder.parent)
        given = cgroups.delegated(mount, (controller,))
        cgroups.divide(Path(given), (controller,))
        (Path(given) / "sandbox").mkdir()
        (Path(given) / "sandbox" / "cgroup.procs").write_text(str(os.getppid()))  # one that stepped aside, as a zygote
        return given == str(folder) == cgroups.delegated(mount, (controller,))

    ready, go = os.pipe()
    outer = os.fork()
    if outer == 0:
        try:
            group.add(os.getpid())
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            if (inner := os.fork()) == 0:
                os._exit(0 if as_its_user() else 1)
            os.write(go, str(os.waitpid(inner, 0)[1]).encode())
            time.sleep(600)
        finally:
            os._exit(70)
    os.close(go)
    status = os.read(ready, 10)
    sandboxed = folder / "sandbox" / "cgroup.procs"
    inside = sandboxed.read_text().split() if sandboxed.exists() else []
    os.kill(outer, 9)
    os.waitpid(outer, 0)
    os.close(ready)

    assert (status, inside) == (b"0", [str(outer)])


def test_only_a_group_with_all_controllers_counts_as_given_to_a_user():
    folder = cgroups.delegated()

    assert folder == "" or {"memory", "pids", "cpu"} <= set(Path(folder, "cgroup.controllers").read_text().split())
