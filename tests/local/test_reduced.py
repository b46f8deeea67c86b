"""The reduced mode, on a machine that refuses namespaces and mounts as container engines do: what stands, and what is said."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from executions import attacks
from executions.attacks import Arena
from executions.backends.base import Limits, SandboxSpec
from executions.backends.local import LocalBackend
from executions.backends.local.guest import linux, seccomp
from executions.errors import BackendUnavailable, FileRefused, RunTimedOut, SandboxLost
from tests import servers
from tests.local.attack import ended, host_pids, run, value
from tests.node import RunningNode, ask, running_node

SYSTEM_PYTHON = "/usr/bin/python3"
NOBODY = 65534


def container_engine() -> bytes:
    """A filter like that of container engines: no namespaces, no mounts."""
    column = list(seccomp.ARCHITECTURES).index(linux.MACHINE)
    allow = seccomp._instruction(seccomp.RETURN, seccomp.ALLOW)
    parts = [seccomp._instruction(seccomp.LOAD, seccomp.NUMBER)]
    for name in ("mount", "umount2", "pivot_root", "setns", "open_tree", "move_mount", "fsopen", "mount_setattr"):
        parts.append(seccomp._when(seccomp.REFUSED[name][column], seccomp._refuse()))
    parts.append(seccomp._when(seccomp.UNKNOWN["clone3"][column], seccomp._refuse(errno.ENOSYS)))
    parts.append(seccomp._when(seccomp.NUMBERS["unshare"][column], seccomp._refuse()))
    flags = seccomp._instruction(seccomp.ANY_BIT, seccomp.NEW_NAMESPACES, 0, 1)
    parts.append(seccomp._when(seccomp.NUMBERS["clone"][column], seccomp._argument(0), flags, seccomp._refuse(), allow))
    return b"".join([*parts, allow])


def confined() -> None:
    servers.die_with_parent()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(container_engine())


@pytest.fixture(scope="session")
def open_python(template_python: Path) -> Iterator[Path]:
    """A template that every uid can read: of the system's Python, where the one at hand lies below a private folder."""
    ask_base = [str(template_python), "-c", "import sys; print(sys.base_prefix)"]
    base = Path(subprocess.run(ask_base, capture_output=True, text=True, check=True).stdout.strip())
    if all(folder.stat().st_mode & 1 for folder in (*base.parents, *template_python.parents)):
        yield template_python
        return
    with tempfile.TemporaryDirectory(prefix="sandgate-python-") as folder:
        os.chmod(folder, 0o755)
        subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--without-pip", folder], check=True)
        (packages,) = template_python.parents[1].glob("lib/python*/site-packages")
        target = next(Path(folder).glob("lib/python*/site-packages"))
        shutil.copytree(packages, target, dirs_exist_ok=True)
        yield Path(folder) / "bin" / "python"


@pytest.fixture(scope="module", params=["root", "user"] if os.geteuid() == 0 else ["user"])
def reduced(request, open_python: Path) -> Iterator[RunningNode]:
    """A node that is refused namespaces; as root its sandboxes have uids of their own."""
    options: dict = {"preexec_fn": confined, "floor": "reduced"}
    if os.geteuid() == 0 and request.param == "user":
        options |= {"user": NOBODY, "group": NOBODY, "extra_groups": [], "interpreter": SYSTEM_PYTHON}
    with running_node(open_python, **options) as node:
        yield node


def spec(**limits: int) -> SandboxSpec:
    return SandboxSpec("r" + secrets.token_hex(8), "default", timeout_seconds=120, limits=Limits(**limits))


@asynccontextmanager
async def sandbox(node: RunningNode, **limits: int):
    handle = await node.backend.create(spec(**limits))
    try:
        yield handle
    finally:
        await node.backend.kill(handle)


async def test_it_is_named_and_says_what_is_missing(reduced):
    check = await reduced.backend.check()

    assert (check.ok, check.isolation) == (True, "reduced")
    assert "Operation not permitted" in check.walls["namespaces"]
    assert "Landlock" in check.walls["readonly_root"]


async def test_below_the_floor_no_sandbox_is_made_and_the_sentence_says_what_to_type(reduced):
    strict = LocalBackend("local", {"RUN_DIR": str(reduced.run_dir)})

    with pytest.raises(BackendUnavailable, match="SANDGATE_ISOLATION_FLOOR=reduced"):
        await strict.create(spec())
    assert not (await strict.check()).ok
    asked = ask(
        reduced.run_dir, op="create", sandbox_id="x1", template="default", floor="namespaces", timeout_seconds=9,
        limits={"memory_mib": 512, "cpu_count": 1, "disk_mib": 64, "processes": 64, "output_bytes": 1 << 20},
    )  # fmt: skip
    assert "below what was asked for" in asked["detail"]


async def test_the_data_stack_subprocesses_threads_and_bash_run(reduced):
    async with sandbox(reduced) as handle:
        code = "import pandas as pd, numpy as np\npd.DataFrame({'a': np.arange(4)}).a.sum().item()"
        assert await value(reduced.backend, handle, code) == 6
        assert (
            await value(reduced.backend, handle, "import subprocess; subprocess.check_output(['echo', 'x'])") == b"x\n"
        )
        threads = "import threading\nn = []\nt = threading.Thread(target=lambda: n.append(1)); t.start(); t.join(); n"
        assert await value(reduced.backend, handle, threads) == [1]
        nested = "import asyncio\nasync def f():\n p = await asyncio.create_subprocess_exec('true')\n return await p.wait()\nawait f()"
        assert await value(reduced.backend, handle, nested) == 0
        seen = [e.data async for e in reduced.backend.run_code(handle, "echo $HOME; pwd", language="bash")]
        assert len({line for e in seen for line in e.get("text", "").split()}) == 1


async def test_files_go_by_their_usual_names_and_only_the_sandboxs_own(reduced):
    backend = reduced.backend
    async with sandbox(reduced) as handle:
        await backend.write_file(handle, "/home/user/a.txt", b"A")
        await backend.write_file(handle, "/tmp/b.txt", b"B")

        assert (
            await value(
                backend,
                handle,
                "import os, tempfile; open('a.txt').read() + open(os.path.join(tempfile.gettempdir(), 'b.txt')).read()",
            )
            == "AB"
        )
        assert [f.name for f in await backend.list_files(handle, "/home/user") if f.type == "file"] == ["a.txt"]
        await run(
            backend,
            handle,
            "import os; os.symlink('/proc/1', 'p'); os.symlink('/etc/passwd', 'q'); os.symlink('/', 'r')",
        )
        for path in (
            "/etc/passwd",
            "/proc/self/environ",
            "q",
            "p/environ",
            "p/cmdline",
            "r/etc/passwd",
            "/home/user/r/etc/hosts",
        ):
            with pytest.raises((FileRefused, SandboxLost)):
                async for _ in backend.read_file(handle, path):
                    pass
        for path in ("r", "/", "p/fd"):
            with pytest.raises(FileRefused):
                await backend.list_files(handle, path)


ATTACKS = {
    "another's process": "open('/proc/1/cmdline').read()",
    "the processes there are": "__import__('os').listdir('/proc')",
    "passwords": "open('/etc/shadow').read()",
    "users": "open('/etc/passwd').read()",
    "the database": "open({data!r}).read()",
    "the folder of homes": "__import__('os').listdir('..')",
    "shared memory": "open('/dev/shm/x', 'w')",
    "the temporary folder of all": "open('/tmp/x', 'w')",
    "an internet socket": "__import__('socket').socket()",
    "a unix socket": "__import__('socket').socket(__import__('socket').AF_UNIX)",
    "a pair of datagrams": "__import__('socket').socketpair(__import__('socket').AF_UNIX, __import__('socket').SOCK_DGRAM)",
    "a terminal of others": "__import__('os').openpty()",
    "a new namespace": "__import__('ctypes').CDLL(None, use_errno=True).unshare(0x10000000) and open('/none')",
    "a signal to the node": "__import__('os').kill({node}, 0)",
    "a signal to the agent": "__import__('os').kill(__import__('os').getppid(), 9)",
    "the mode of another's file": "__import__('os').chmod({data!r}, 0o600)",
    "the times of another's file": "__import__('os').utime({data!r})",
    "the name of another's file": "__import__('os').rename({data!r}, {data!r} + 'x')",
    "a hard link to another's file": "__import__('os').link({data!r}, 'mine')",
    "core_pattern": "open('/proc/sys/kernel/core_pattern', 'w')",
}  # fmt: skip


ANSWERED = ("the mode of another's file", "the times of another's file")  # with one uid for all: and nothing is done


@pytest.mark.parametrize("what", ATTACKS)
async def test_blocked(reduced, what, tmp_path):
    tmp_path.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text("x")
    if os.geteuid() == 0:  # it is the node's own, as its user's files are
        os.chown(secret, *(2 * [reduced.run_dir.stat().st_uid]))
    before = secret.stat()
    async with sandbox(reduced) as handle:
        outcome = await run(reduced.backend, handle, ATTACKS[what].format(data=str(secret), node=reduced.process.pid))

        answered_only = (reduced.run_dir.stat().st_uid == NOBODY or os.geteuid()) and what in ANSWERED
        assert answered_only or outcome["error"] in ("PermissionError", "OSError", "FileNotFoundError"), outcome
        assert await value(reduced.backend, handle, "1 + 1") == 2
    assert (secret.stat().st_mode, secret.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


async def test_daemons_end_with_their_sandbox(reduced):
    marker = str(secrets.randbelow(10**9) + 10**9)
    daemon = (
        "import os, sys\nfor _ in range(2):\n    if os.fork(): os._exit(0) if _ else None; break\n    os.setsid()\n"
        f"else: os.execvp('sleep', ['sleep', '{marker}'])"
    )
    async with sandbox(reduced) as handle:
        await run(
            reduced.backend, handle, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {daemon!r}])"
        )
        pids = await appeared(marker)
        pidfds = [os.pidfd_open(pid) for pid in pids]
        await reduced.backend.kill(handle)

        assert all(ended(pidfd) for pidfd in pidfds)


async def appeared(marker: str) -> list[int]:
    async with asyncio.timeout(10):
        while not (pids := host_pids(f"sleep\0{marker}")):
            await asyncio.sleep(0.01)
    return pids


async def test_a_fork_bomb_stays_within_its_limit_and_ends_with_its_sandbox(reduced):
    async with sandbox(reduced, processes=40) as handle, sandbox(reduced) as other:
        bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        with pytest.raises((RunTimedOut, SandboxLost)):
            await run(reduced.backend, handle, bomb, timeout_seconds=2)
        assert await value(reduced.backend, other, "1 + 1") == 2


async def test_memory_is_watched(reduced):
    async with sandbox(reduced, memory_mib=300) as handle:
        outcome = await run(
            reduced.backend, handle, "x = bytearray(2 << 30)\nfor i in range(0, len(x), 4096): x[i] = 1"
        )

        assert outcome["error"]
        assert await value(reduced.backend, handle, "1 + 1") == 2


async def test_what_is_written_is_watched_too(reduced):
    async with sandbox(reduced, disk_mib=20) as handle:
        fill = "for n in range(100):\n    open(f'f{n}', 'wb').write(bytes(10 << 20))\nimport time; time.sleep(20)"
        with pytest.raises(SandboxLost):
            await run(reduced.backend, handle, fill)


async def test_folders_too_deep_to_count_end_their_sandbox_and_hold_nobody_up(reduced):
    deep = "import os, time\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\ntime.sleep(20)"
    async with sandbox(reduced) as handle:
        with pytest.raises(SandboxLost):
            await run(reduced.backend, handle, deep)
        why = ask(reduced.run_dir, op="fate", sandbox_id=handle["sandbox_id"])

    fill = "for n in range(100):\n    open(f'f{n}', 'wb').write(bytes(10 << 20))\nimport time; time.sleep(20)"
    async with sandbox(reduced, disk_mib=20) as other:
        with pytest.raises(SandboxLost):  # the disks are still watched
            await run(reduced.backend, other, fill)
    assert why["reason"] == "disk_full"


TRIED = (
    "memory_bomb_in_children", "memory_that_nobody_maps", "cpu_beyond_its_share", "kill_everybody",
    "links_on_download_paths", "signals_to_the_supervisor", "kernel_files", "files_of_others",
)  # fmt: skip


async def test_attacks_are_tried_here_too(reduced):
    async with Arena(reduced.backend) as arena:
        findings = [await arena.try_(attack) for attack in attacks.ALL if attack.name in TRIED]

    assert {finding.case: (finding.verdict, finding.seen) for finding in findings if finding.verdict != "blocked"} == {}
    assert len(findings) == len(TRIED)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_nothing_outlives_the_node(open_python, number):
    with running_node(open_python, preexec_fn=confined, floor="reduced") as node:
        handle = await node.backend.create(spec())
        marker = str(secrets.randbelow(10**9) + 10**9)
        command = f"setsid sleep {marker} >/dev/null 2>&1 & disown"
        async for _ in node.backend.run_command(handle, command):
            pass
        pidfds = [os.pidfd_open(pid) for pid in await appeared(marker)]
        node.process.send_signal(number)

        assert all(ended(pidfd) for pidfd in pidfds)
        node.process.wait(10)


def test_the_same_machine_without_the_filter_gives_namespaces(node):
    assert (node.run_dir / "isolation").read_text() == "namespaces"
