"""One attack for each wall of the local runtime, from inside a real sandbox."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.local.attack import ended, host_pids, run, sandbox, started, value
from tests.node import RunningNode, running_node

ROOT = os.geteuid() == 0
SYSCALLS = """
import ctypes, errno, struct
libc = ctypes.CDLL(None, use_errno=True)
def attempt(call):
    ctypes.set_errno(0)
    return call() < 0 and errno.errorcode.get(ctypes.get_errno())
"""


@pytest.fixture
def backend(node: RunningNode):
    return node.backend


# host visibility


async def test_only_the_minimal_root_is_seen(backend, node, template_python):
    listing = "import os\n[sorted(os.listdir(path)) for path in ('/', '/home', '/tmp', '/run')]"
    hidden = [
        str(Path(__file__)),
        str(node.run_dir),
        "/etc/shadow",
        "/var/run",
        "/var/lib",
        "/sys/kernel",
        "/dev/sda",
        "/dev/vda",
    ]
    async with sandbox(backend) as handle:
        root, home, tmp, run_ = await value(backend, handle, listing)
        there = await value(backend, handle, f"[path for path in {hidden!r} if os.path.exists(path)]")

    of_the_interpreter = {part for path in (template_python, template_python.resolve()) for part in path.parts[1:3]}
    shown = {
        "bin",
        "dev",
        "etc",
        "home",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "mnt",
        "opt",
        "proc",
        "root",
        "run",
        "sbin",
        "sys",
        "tmp",
    }
    assert set(root) - of_the_interpreter <= shown | {"usr", "var"}
    assert set(home) - of_the_interpreter == {"user"}
    assert set(tmp) - of_the_interpreter == set()
    assert run_ == []
    assert there == []


async def test_nothing_but_private_folders_can_be_written(backend, template_python):
    code = """
import os
written = []
for folder, _, _ in os.walk('/'):
    if folder.startswith(('/proc', '/usr')):
        continue
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
        written.append(folder)
    except OSError:
        pass
sorted({'/'.join(f.split('/')[:3]) for f in written if not f.startswith('/dev/shm/')})
"""
    async with sandbox(backend) as handle:
        written = await value(backend, handle, code)

    parents = {str(parent) for path in (template_python, template_python.resolve()) for parent in path.parents}
    assert set(written) - parents <= {"/home/user", "/tmp", "/dev/shm"}


async def test_processes_of_others_are_not_seen(backend):
    async with sandbox(backend) as other:
        await started(backend, other)
        async with sandbox(backend) as handle:
            pids = await value(backend, handle, "import os\n[int(p) for p in os.listdir('/proc') if p.isdigit()]")

    assert len(pids) == 2  # the agent and this interpreter
    assert 1 in pids


async def test_the_agent_cannot_be_read(backend):
    code = """
blocked = []
for name in ('environ', 'mem', 'maps', 'fd', 'root', 'cwd', 'exe', 'syscall', 'stack'):
    path = '/proc/1/' + name
    try:
        import os
        os.listdir(path) if name == 'fd' else os.readlink(path) if name in ('root', 'cwd', 'exe') else open(path, 'rb').read(1)
    except OSError:
        blocked.append(name)
blocked
"""
    async with sandbox(backend) as handle:
        blocked = await value(backend, handle, code)

    assert blocked == ["environ", "mem", "maps", "fd", "root", "cwd", "exe", "syscall", "stack"]


async def test_the_environment_is_scrubbed(template_python):
    with running_node(template_python, env={**os.environ, "E2B_API_KEY": "very-secret"}) as node:
        code = """
import glob, os
found = [name for name, text in os.environ.items() if 'secret' in text]
for path in glob.glob('/proc/[0-9]*/environ'):
    try:
        found += [path] if b'very-secret' in open(path, 'rb').read() else []
    except OSError:
        pass
found
"""
        async with sandbox(node.backend) as handle:
            assert await value(node.backend, handle, code) == []


async def test_no_descriptor_is_inherited(backend):
    child = "import subprocess\nsubprocess.run(['ls', '/proc/self/fd'], capture_output=True, text=True).stdout.split()"
    own = """
import os
kinds = set()
for descriptor in os.listdir('/proc/self/fd'):
    try:
        kinds.add(os.readlink('/proc/self/fd/' + descriptor).split(':')[0])
    except FileNotFoundError:
        pass
kinds
"""
    async with sandbox(backend) as handle:
        of_a_child = await value(backend, handle, child)
        of_the_interpreter = await value(backend, handle, own)
        events = [event async for event in backend.run_command(handle, "ls /proc/self/fd")]

    said = "".join(event.data["text"] for event in events if event.kind == "stdout")
    assert of_a_child == said.split() == ["0", "1", "2", "3"]  # ls itself opens the folder as 3
    assert of_the_interpreter <= {"/dev/null", "pipe", "socket", "anon_inode"}


async def test_what_a_user_installs_belongs_below_his_home(backend):
    async with sandbox(backend) as handle:
        found = await value(
            backend, handle, "import site\n[site.USER_BASE, site.USER_SITE, site.getusersitepackages()]"
        )

    assert found[0] == "/home/user/.local"
    assert found[1] == found[2]
    assert found[1].startswith("/home/user/.local/lib/python3")


async def test_the_host_name_and_ipc_are_its_own(backend):
    async with sandbox(backend) as handle:
        name = await value(backend, handle, "import socket\nsocket.gethostname()")
        segments = await value(backend, handle, "len(open('/proc/sysvipc/shm').readlines())")

    assert name == "sandbox"
    assert segments == 1  # the heading


# who it is


@pytest.mark.skipif(not ROOT, reason="an ordinary user has one uid on the host")
async def test_each_sandbox_has_a_host_uid_of_its_own(backend):
    async with sandbox(backend) as one, sandbox(backend) as other:
        pids = [(await started(backend, handle))[1] for handle in (one, other)]
        uids = [os.stat(f"/proc/{pid}").st_uid for pid in pids]

    assert 0 not in uids
    assert os.getuid() not in uids
    assert len(set(uids)) == 2


async def test_it_has_no_capabilities_and_gains_none(backend):
    code = """
import os, subprocess
facts = dict(line.split(':', 1) for line in open('/proc/self/status') if ':' in line)
caps = {facts[name].strip() for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')}
refused = []
for attempt in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.chroot('/tmp'), lambda: os.setresuid(0, 0, 0)):
    try:
        attempt()
    except OSError:
        refused.append(True)
su = subprocess.run(['su', '-c', 'id -u'], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
(caps, facts['NoNewPrivs'].strip(), facts['Seccomp'].strip(), len(refused), su, os.getuid())
"""
    async with sandbox(backend) as handle:
        found = await value(backend, handle, code)

    assert found == ({"0000000000000000"}, "1", "2", 5, "", 1000)


# the network


async def test_the_hosts_loopback_is_not_reached(backend):
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted = threading.Event()
        server.settimeout(10)
        port = server.getsockname()[1]
        code = f"import socket\ntry:\n    socket.create_connection(('127.0.0.1', {port}), 3)\nexcept OSError as e:\n    got = type(e).__name__\ngot"
        async with sandbox(backend) as handle:
            assert await value(backend, handle, code) == "ConnectionRefusedError"
        assert not accepted.is_set()


async def test_no_network_is_reached(backend):
    code = """
import socket
reached = []
for address in ('169.254.169.254', '10.0.0.1', '192.168.0.1', '8.8.8.8'):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        s = socket.socket(socket.AF_INET, kind)
        s.settimeout(2)
        try:
            s.connect((address, 53))
            reached.append(address)
        except OSError:
            pass
try:
    socket.getaddrinfo('example.org', 80)
    reached.append('dns')
except OSError:
    pass
(reached, [name for _, name in socket.if_nameindex()])
"""
    async with sandbox(backend) as handle:
        assert await value(backend, handle, code) == ([], ["lo"])


async def test_its_own_loopback_works(backend):
    code = """
import socket
server = socket.create_server(('127.0.0.1', 8000))
client = socket.create_connection(('127.0.0.1', 8000))
server.accept()[0].sendall(b'hi')
client.recv(2)
"""
    async with sandbox(backend) as one, sandbox(backend) as other:
        assert await value(backend, one, code) == b"hi"
        assert await value(backend, other, code) == b"hi"


async def test_raw_packet_and_vsock_sockets_are_refused(backend):
    code = """
import socket
refused = []
for family, kind in ((17, 3), (40, 1), (2, 3), (38, 5)):
    try:
        socket.socket(family, kind)
    except OSError:
        refused.append(family)
refused
"""
    async with sandbox(backend) as handle:
        assert await value(backend, handle, code) == [17, 40, 2, 38]


async def test_abstract_sockets_of_the_host_are_not_reached(backend):
    name = f"sandgate-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        code = f"import socket\ntry:\n    socket.socket(socket.AF_UNIX).connect('\\0{name}')\nexcept OSError as e:\n    got = type(e).__name__\ngot"
        async with sandbox(backend) as handle:
            assert await value(backend, handle, code) in ("ConnectionRefusedError", "PermissionError")


# the kernel


async def test_dangerous_system_calls_are_refused(backend):
    code = (
        SYSCALLS
        + """
b = ctypes.create_string_buffer(256)
calls = {
    'mount': lambda: libc.mount(b'x', b'/tmp', b'tmpfs', 0, None),
    'umount': lambda: libc.umount2(b'/proc', 2),
    'unshare': lambda: libc.unshare(0x10000000),
    'setns': lambda: libc.setns(0, 0),
    'ptrace': lambda: libc.ptrace(16, 1, 0, 0),
    'process_vm_readv': lambda: libc.process_vm_readv(1, b, 1, b, 1, 0),
    'shmget': lambda: libc.shmget(0, 4096, 0o1600),
    'memfd': lambda: libc.memfd_create(b'x', 0),
    'personality': lambda: libc.personality(0x0040000),
    'tiocsti': lambda: libc.ioctl(0, ctypes.c_ulong(0x5412), b),
    'tiocsti_high': lambda: libc.ioctl(0, ctypes.c_ulong(0x1_0000_5412), b),
}
import platform
if platform.machine() == 'x86_64':
    for name, number in {'bpf': 321, 'io_uring': 425, 'keyctl': 250, 'perf': 298, 'userfaultfd': 323, 'kexec': 246, 'module': 175,
                         'pivot_root': 155, 'fsopen': 430, 'open_tree': 428, 'syslog': 103, 'pidfd_getfd': 438}.items():
        calls[name] = lambda number=number: libc.syscall(number, 0, b, 0, 0, 0)
    calls['clone_newuser'] = lambda: libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)
{name: got for name, call in calls.items() if (got := attempt(call)) != 'EPERM'}
"""
    )
    async with sandbox(backend) as handle:
        assert await value(backend, handle, code) == {}


async def test_new_and_foreign_calls_are_unknown(backend):
    code = (
        SYSCALLS
        + "(attempt(lambda: libc.syscall(435, 0, 0)), attempt(lambda: libc.syscall(600)), attempt(lambda: libc.syscall(0x40000000 + 39)))"
    )
    async with sandbox(backend) as handle:
        assert await value(backend, handle, code) == ("ENOSYS", "ENOSYS", "ENOSYS")


async def test_kernel_files_cannot_be_opened_for_writing(backend):
    code = """
import os
opened = []
for path in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/proc/sys/kernel/modprobe', '/proc/sys/user/max_user_namespaces',
             '/proc/1/oom_score_adj', '/proc/self/uid_map', '/dev/kmsg', '/dev/mem', '/sys/fs/cgroup/memory/tasks'):
    try:
        os.close(os.open(path, os.O_WRONLY))
        opened.append(path)
    except OSError:
        pass
opened
"""
    async with sandbox(backend) as handle:
        assert await value(backend, handle, code) == []


async def test_the_data_stack_runs_unmodified(backend):
    code = """
import asyncio, multiprocessing, os, pty, sqlite3, subprocess, threading
import numpy as np
answers = []
answers.append(float((np.ones((200, 200)) @ np.ones((200, 200))).sum()))
thread = threading.Thread(target=lambda: answers.append('thread')); thread.start(); thread.join()
with multiprocessing.get_context('fork').Pool(2) as pool:
    answers.append(pool.map(abs, [-1, -2]))
async def child():
    process = await asyncio.create_subprocess_exec('echo', 'async', stdout=asyncio.subprocess.PIPE)
    return (await process.communicate())[0]
answers.append(await child())
database = sqlite3.connect('/tmp/x.sqlite'); database.execute('create table t (a)'); answers.append(database.execute('select count(*) from t').fetchone())
answers.append(subprocess.run('cat /etc/hostname | tr a-z A-Z', shell=True, capture_output=True, text=True).stdout)
master, slave = pty.openpty(); answers.append(os.isatty(slave))
answers
"""
    async with sandbox(backend) as handle:
        assert await value(backend, handle, code) == [8e6, "thread", [1, 2], b"async\n", (0,), "SANDBOX\n", True]


# control


async def test_the_agent_cannot_be_touched(backend):
    code = """
import os, resource, signal
refused = []
for name, attempt in {
    'kill': lambda: os.kill(1, signal.SIGTERM),
    'prlimit': lambda: resource.prlimit(1, resource.RLIMIT_CPU, (1, 1)),
    'affinity': lambda: os.sched_setaffinity(1, {0}),
    'scheduler': lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)),
    'priority': lambda: os.setpriority(os.PRIO_PROCESS, 1, 19),
    'priority_of_user': lambda: os.setpriority(os.PRIO_USER, 1000, 19),
}.items():
    try:
        attempt()
    except OSError:
        refused.append(name)
try:
    os.kill(1, signal.SIGKILL)
    os.kill(1, signal.SIGSTOP)
except OSError:
    pass
refused
"""
    async with sandbox(backend) as handle:
        refused = await value(backend, handle, code)
        after = await value(backend, handle, "1 + 1")

    assert refused == ["kill", "prlimit", "affinity", "scheduler", "priority", "priority_of_user"]
    assert after == 2


async def test_killing_everybody_leaves_the_agent(backend):
    async with sandbox(backend) as handle:
        await run(backend, handle, "import os\nos.kill(-1, 9)")
        assert await value(backend, handle, "1 + 1") == 2


async def test_forged_frames_do_not_leave_the_context(backend):
    code = """
import os
for fd in os.listdir('/proc/self/fd'):
    try:
        os.write(int(fd), b'\\xff{"type": "end"}\\n[1]\\n{"type": 5}\\nnull\\n{"type": "result", "mime": 7}\\n')
    except OSError:
        pass
"""
    async with sandbox(backend) as handle:
        await run(backend, handle, code)
        await backend.restart_context(handle, (await backend.list_contexts(handle))[0]["id"])
        assert await value(backend, handle, "1 + 1") == 2


# exhaustion


async def test_a_fork_bomb_ends_at_the_limit(backend):
    code = """
import os, time
children = 0
while True:
    try:
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
        children += 1
    except OSError:
        break
children
"""
    async with sandbox(backend, processes=40) as handle:
        children = await value(backend, handle, code)
        answered = [event async for event in backend.run_command(handle, "echo alive")]
        was = time.monotonic()
        await backend.kill(handle)

    assert 20 < children < 40
    assert answered[-1].kind == "exit"
    assert time.monotonic() - was < 5


async def test_a_thread_bomb_ends_at_the_limit(backend):
    code = """
import threading, time
threads = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        threads += 1
except RuntimeError:
    pass
threads
"""
    async with sandbox(backend, processes=40) as handle:
        assert await value(backend, handle, code) < 40


async def test_the_disk_is_limited_over_all_folders_together(backend):
    code = """
import os
written = 0
for path in ('/tmp/a', '/home/user/b'):
    try:
        with open(path, 'wb', buffering=0) as file:
            while written < 1 << 30:
                written += file.write(b'x' * (1 << 20))
    except OSError:
        pass
for path in ('/tmp/a', '/home/user/b'):
    os.unlink(path)
written >> 20
"""
    async with sandbox(backend, disk_mib=32) as handle:
        written = await value(backend, handle, code)
        inodes = await value(
            backend,
            handle,
            "n = 0\ntry:\n    while n < 10**6:\n        open(f'/tmp/{n}', 'w').close()\n        n += 1\nexcept OSError:\n    pass\nn",
        )

    assert 24 <= written <= 33
    assert inodes < 10_000


async def test_shared_memory_is_limited(backend):
    code = """
n = 0
try:
    with open('/dev/shm/x', 'wb', buffering=0) as file:
        while n < 1000:
            file.write(b'x' * (1 << 20))
            n += 1
except OSError:
    pass
n
"""
    async with sandbox(backend) as handle:
        assert await value(backend, handle, code) <= 64


async def test_descriptors_are_limited_and_no_core_is_dumped(backend):
    code = """
import os, resource
held = []
try:
    while True:
        held.append(os.open('/dev/null', os.O_RDONLY))
except OSError:
    pass
n = len(held)
for f in held:
    os.close(f)
(n < 1024, resource.getrlimit(resource.RLIMIT_CORE))
"""
    async with sandbox(backend) as handle:
        assert await value(backend, handle, code) == (True, (1, 1))


async def test_output_is_cut_at_its_limit(backend):
    async with sandbox(backend, output_bytes=100_000) as handle:
        events = [
            e
            async for e in backend.run_code(
                handle, "import sys\nsys.stdout.write('x' * 50_000_000)\nprint()\n7", timeout_seconds=30
            )
        ]

    said = sum(len(event.data["text"]) for event in events if event.kind == "stdout")
    assert 100_000 <= said < 200_000
    assert "limit of 100000 bytes" in "".join(event.data["text"] for event in events if event.kind == "stderr")
    assert [event.data["mime"]["text/plain"] for event in events if event.kind == "result"] == ["7"]


async def test_a_daemon_ends_with_its_sandbox(backend):
    async with sandbox(backend) as handle:
        marker = f"{time.time_ns()}"
        await run(backend, handle, f"import subprocess\nsubprocess.run('setsid -f sleep {marker}', shell=True)")
        for _ in range(100):
            if pids := host_pids(marker):
                break
            await asyncio.sleep(0.01)
        pidfd = os.pidfd_open(pids[0])
    assert ended(pidfd)
    os.close(pidfd)


async def test_packages_put_into_the_sandbox_are_found_by_every_python(backend):
    async with sandbox(backend) as handle:
        await backend.write_file(handle, "/home/user/.packages/brand_new.py", b"answer = 42")
        await backend.write_file(handle, "/home/user/.packages/json.py", b"raise SystemError")
        in_a_cell = await value(backend, handle, "import brand_new\nbrand_new.answer")
        events = [
            e async for e in backend.run_command(handle, "python -c 'import brand_new, json; print(brand_new.answer)'")
        ]

    in_a_script = "".join(event.data["text"] for event in events if event.kind == "stdout")
    assert (in_a_cell, in_a_script) == (42, "42\n")


# where no control group counts


@pytest.mark.skipif(ROOT, reason="control groups count what these keep")
async def test_what_no_meter_shows_cannot_be_had(backend):
    code = (
        SYSCALLS
        + """
import mmap, os, socket
pair = socket.socketpair()
r, w = os.pipe()
def size(option):
    before = pair[0].getsockopt(1, option)
    pair[0].setsockopt(1, option, 1 << 20)
    return pair[0].getsockopt(1, option) - before
b = ctypes.create_string_buffer(64)
calls = {
    'shared': lambda: libc.mmap(0, 4096, 3, 0x21, -1, 0),
    'huge': lambda: libc.mmap(0, 2 << 20, 3, 0x40022, -1, 0),
    'splice': lambda: libc.splice(r, 0, w, 0, 1, 0),
    'tee': lambda: libc.tee(r, w, 1, 0),
    'vmsplice': lambda: libc.vmsplice(w, b, 1, 0),
    'affinity': lambda: libc.sched_setaffinity(0, 8, b'\\xff' * 8),
    'filter': lambda: libc.setsockopt(pair[0].fileno(), 1, 26, b, 16),
    'rules': lambda: libc.syscall(444, b, 8, 0),
    'large pages': lambda: libc.prctl(41, 0, 0, 0, 0),
}
{name: attempt(call) for name, call in calls.items()}, size(7), size(8), os.path.getsize('/dev/zero') > 0, open('/dev/zero', 'rb').read(9)
"""
    )
    async with sandbox(backend) as handle:
        refused, sending, receiving, is_file, zeros = await value(backend, handle, code)

    assert refused == {
        "shared": "EPERM", "huge": "ENOMEM", "splice": "ENOSYS", "tee": "ENOSYS", "vmsplice": "ENOSYS", "affinity": "EPERM",
        "filter": "EPERM", "rules": "EPERM", "large pages": "EPERM",
    }  # fmt: skip
    assert (sending, receiving, is_file, zeros) == (0, 0, True, bytes(9))


@pytest.mark.skipif(ROOT, reason="control groups share out the processors")
async def test_sandboxes_are_spread_over_the_processors(backend):
    cores = sorted(os.sched_getaffinity(0))
    async with sandbox(backend, cpu_count=1) as one, sandbox(backend, cpu_count=1) as other:
        first, second = [await value(backend, handle, "import os\nos.sched_getaffinity(0)") for handle in (one, other)]

    assert (len(first), len(second)) == (1, 1)
    assert len(first | second) == min(2, len(cores))
