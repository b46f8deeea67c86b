"""Taking more than one's share: processes, memory, disk, time, output."""

from __future__ import annotations

import json

from executions.attacks.arena import Arena, Attack, Ran, Through
from executions.backends.base import Handle

MIB = 1 << 20


async def _can_still_be_told(arena: Arena, handle: Handle, ran: Ran) -> str:
    """While the bomb still burns: the sandbox answers, and dies when it is told to."""
    if await arena.value(handle, "6 * 7") != 42:
        raise Through("the sandbox answers wrongly")
    await arena.kill(handle)
    return f"stopped after {ran.seconds:.1f} s; the agent answered and the sandbox ended at once"


async def _stopped(arena: Arena, handle: Handle, ran: Ran) -> str:
    if ran.seconds > 1 + 6:
        raise Through(f"it took {ran.seconds:.1f} s to stop what was allowed 1")
    return f"stopped after {ran.seconds:.1f} s"


async def _nothing_lives_on(arena: Arena, handle: Handle, ran: Ran) -> str:
    left = await arena.value(handle, _DAEMONS)
    if left:
        raise Through(f"of the stopped cell these run on: {left}")
    return f"stopped after {ran.seconds:.1f} s, with what it had started"


async def _output_is_cut(arena: Arena, handle: Handle, ran: Ran) -> str:
    if ran.said_bytes > 3 * MIB:
        raise Through(f"{ran.said_bytes} bytes arrived where {MIB} were allowed")
    return f"{ran.said_bytes:,} bytes arrived in {ran.seconds:.1f} s"


async def _text_arrives(arena: Arena, handle: Handle, ran: Ran) -> str:
    ran.stdout.encode()  # a lone surrogate would break every later reader
    json.dumps(ran.stdout)
    return f"{ran.said_bytes:,} characters of text"


async def _error_is_cut(arena: Arena, handle: Handle, ran: Ran) -> str:
    longest = max(len(text) for error in ran.errors for text in error.values())
    if longest > 3 * MIB:
        raise Through(f"an error of {longest} characters")
    return f"cut to {longest:,} characters"


async def _results_are_held(arena: Arena, handle: Handle, ran: Ran) -> str:
    return f"{ran.results:,} results in {ran.seconds:.1f} s"


_DAEMONS = r"""
import os
def _daemons():
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/cmdline') as file:
                if (said := file.read()).startswith('attest-daemon'):
                    yield said.replace('\0', ' ')
        except OSError:
            pass
list(_daemons())
"""
_DAEMON = r"""
def daemon(name):
    if os.fork() == 0:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            os.execv('/bin/bash', ['bash', '-c', f'trap "" INT TERM HUP; exec -a {name} sleep 3600'])
        os._exit(0)
    os.wait()
"""

ATTACKS = (
    Attack(
        "fork_bomb", ("rlimits",), limits={"processes": 40}, judge=_can_still_be_told, suicide=True, seconds=10,
        code=r"""
def bomb():
    children = 0
    try:
        while children < 200:
            if os.fork() == 0:
                signal.pause()
            children += 1
    except OSError:
        pass
    return children
attempt('more than 40 processes', lambda: bomb() > 40)
attempt('one more by a shell', lambda: output('/bin/true') is not None)
""",
    ),
    Attack(
        "fork_bomb_of_a_shell", ("rlimits",), limits={"processes": 40}, judge=_can_still_be_told, suicide=True, seconds=3,
        command="bomb() { bomb | bomb & }; bomb 2>/dev/null; sleep 1", ends=("value", "timeout"),
    ),
    Attack(
        "thread_bomb", ("rlimits",), limits={"processes": 40}, judge=_can_still_be_told, suicide=True,
        code=r"""
def bomb():
    threads = 0
    try:
        while threads < 200:
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
            threads += 1
    except RuntimeError:
        pass
    return threads
attempt('more than 40 threads', lambda: bomb() > 40)
""",
    ),
    Attack(
        "disk_fill", ("readonly_root",), limits={"disk_mib": 32}, seconds=30,
        code=r"""
def fill():
    written = 0
    for path in ('/tmp/a', '/home/user/b', '/var/tmp/c'):
        try:
            with open(path, 'wb', buffering=0) as file:
                while written < 1 << 30:
                    written += file.write(b'x' * (1 << 20))
        except OSError:
            pass
    return written
attempt('more than 32 MiB', lambda: (n := fill()) > 33 << 20 and n)
for path in ('/tmp/a', '/home/user/b'):
    os.unlink(path)
""",
    ),
    Attack(
        "inode_fill", ("readonly_root",), limits={"disk_mib": 32}, seconds=30,
        code=r"""
def fill(path):
    n = 0
    try:
        while n < 100_000:
            os.mkdir(f'{path}/{n}')
            n += 1
    except OSError:
        pass
    return n
for path in ('/tmp', '/home/user', '/dev/shm'):
    attempt(path, lambda: (n := fill(path)) > 10_000 and n)
""",
    ),
    Attack(
        "file_descriptors", ("rlimits",), fresh=True,
        code=r"""
def fill(make):
    held = []
    try:
        while len(held) < 5000:
            held.append(make())
    except OSError:
        pass
    n = len(held)
    for one in held:
        os.close(one) if isinstance(one, int) else one.close()
    return n > 1024 and n
attempt('files', lambda: fill(lambda: os.open('/dev/null', os.O_RDONLY)))
attempt('sockets', lambda: fill(socket.socket))
attempt('a higher limit', lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20)))
""",
    ),
    Attack(
        "giant_sparse_file", ("rlimits",),
        code=r"""
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for path in ('/home/user/giant', '/tmp/giant', '/dev/shm/giant'):
    with open(path, 'wb') as file:
        attempt(f'truncate {path}', lambda: file.truncate(1 << 40))
        attempt(f'allocate {path}', lambda: os.posix_fallocate(file.fileno(), 0, 1 << 40))
        attempt(f'seek and write {path}', lambda: os.pwrite(file.fileno(), b'x', 1 << 40))
    os.unlink(path)
""",
    ),
    Attack(
        "shared_memory", ("seccomp",), own_kernel=False,
        code=r"""
attempt('memfd_create', lambda: os.memfd_create('x'))
attempt('memfd_secret', lambda: call('memfd_secret', 0))
attempt('shmget', lambda: call('shmget', 0, 1 << 30, 0o1600))
attempt('msgget', lambda: call('msgget', 0, 0o1600))
attempt('semget', lambda: call('semget', 0, 1, 0o1600))
attempt('mq_open', lambda: call('mq_open', b'/x', os.O_CREAT | os.O_RDWR, 0o600, 0))
def fill():
    n = 0
    try:
        with open('/dev/shm/x', 'wb', buffering=0) as file:
            while n < 1 << 30:
                n += file.write(b'x' * (1 << 20))
    except OSError:
        pass
    os.unlink('/dev/shm/x')
    return n
attempt('more than 64 MiB of /dev/shm', lambda: (n := fill()) > 64 << 20 and n)
""",
    ),
    Attack(
        "terminals", ("readonly_root", "namespaces"), fresh=True, own_kernel=False,
        code=r"""
import pty
def take(_):
    held = []
    try:
        while len(held) < 1000:
            held += pty.openpty()
    except OSError:
        pass
    return len(held) // 2
pipes = []
for _ in range(10):
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, b'%d' % take(0))
        signal.pause()
    pipes.append(read)
taken = sum(int(os.read(read, 10)) for read in pipes)
attempt('so many that the machine has none left', lambda: taken > 200 and taken)
""",
    ),
    Attack(
        "file_watches", ("namespaces",), fresh=True, own_kernel=False,
        code=r"""
def take():
    n = 0
    while libc.inotify_init1(0) >= 0:
        n += 1
    return n
attempt("so many that the template's other sandboxes have none left", lambda: (n := take()) > 64 and n)
""",
    ),
    Attack(
        "queued_signals", ("rlimits",), fresh=True, own_kernel=False,
        code=r"""
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN + 1])
info = (ctypes.c_int * 32)(signal.SIGRTMIN + 1, 0, -1)
def queue():
    n = 0
    try:
        while n < 200_000:
            call('rt_sigqueueinfo', os.getpid(), int(signal.SIGRTMIN) + 1, info)
            n += 1
    except OSError:
        pass
    return n
attempt('without end', lambda: (n := queue()) > 10_000 and n)
""",
    ),
    Attack(
        "cpu_spin", ("agent",), seconds=1, ends=("timeout",), judge=_stopped,
        code="while True:\n    pass",
    ),
    Attack("sleep", ("agent",), seconds=1, ends=("timeout",), judge=_stopped, code="time.sleep(600)"),
    Attack(
        "ignored_signals", ("agent",), seconds=1, ends=("timeout",), judge=_stopped,
        code=r"""
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
while True:
    try:
        time.sleep(600)
    except BaseException:
        pass
""",
    ),
    Attack(
        "caught_interrupts", ("agent",), seconds=1, ends=("timeout",), judge=_stopped,
        code="while True:\n    try:\n        time.sleep(600)\n    except BaseException:\n        pass",
    ),
    Attack(
        "deaf_c_call", ("agent",), seconds=1, ends=("timeout",), judge=_stopped,
        code="import hashlib\nhashlib.pbkdf2_hmac('sha512', b'x', b'y', 2_000_000_000)",
    ),
    Attack(
        "pathological_regex", ("agent",), seconds=1, ends=("timeout",), judge=_stopped,
        code="re.match(r'(a|aa)+$', 'a' * 80 + 'b')",
    ),
    Attack(
        "endless_line", ("agent",), seconds=1, ends=("timeout",), judge=_output_is_cut, limits={"output_bytes": MIB},
        code="while True:\n    sys.stdout.write('x' * 1000)",
    ),
    Attack(
        "daemon_of_a_stopped_cell", ("agent",), seconds=1, ends=("timeout",), judge=_nothing_lives_on, fresh=True,
        code=_DAEMON + "daemon('attest-daemon-1')\nsubprocess.run('setsid -f bash -c \"exec -a attest-daemon-2 sleep 3600\"', shell=True)\n"
        "time.sleep(600)",
    ),
    Attack(
        "daemon_outlives_the_run", ("namespaces",), judge=_can_still_be_told, suicide=True,
        code=_DAEMON + "daemon('@MARKER@-daemon')",
    ),
    Attack(
        "gigabyte_without_newline", ("agent",), seconds=60, judge=_output_is_cut, limits={"output_bytes": MIB},
        code="piece = b'x' * (1 << 20)\nfor _ in range(1024):\n    view = memoryview(piece)\n    while view:\n"
        "        view = view[os.write(1, view):]",
    ),
    Attack(
        "million_tiny_writes", ("agent",), seconds=60, judge=_output_is_cut, limits={"output_bytes": 2 * MIB},
        code="for _ in range(1_000_000):\n    os.write(1, b'x')",
    ),
    Attack(
        "binary_ansi_and_osc_output", ("agent",), judge=_text_arrives,
        code=r"""
os.write(1, bytes(range(256)) * 4096)
print('\x1b]0;owned\x07\x1b]52;c;b3duZWQ=\x07\x1b[2J\x1b[9999;9999H\x1bP+q\x1b\\\x9d\x90\u202e\ud800'.encode('utf-8', 'surrogatepass'))
sys.stdout.buffer.write(b'\xed\xa0\x80\xff\xfe\x00\xf4\x90\x80\x80\n')
""",
    ),
    Attack(
        "huge_exception_message", ("agent",), ends=("ValueError",), judge=_error_is_cut,
        code="raise ValueError('x' * 50_000_000)",
    ),
    Attack(
        "deep_recursion", ("agent",), ends=("ContextRestarting", "RecursionError", "MemoryError"), seconds=30,
        code="sys.setrecursionlimit(10**9)\ndef f():\n    [*map(lambda _: f(), [0])]\nf()",
    ),
    Attack(
        "hundred_thousand_results", ("agent",), seconds=4, ends=("value", "timeout"), judge=_results_are_held,
        code="from IPython.display import display\nfor number in range(100_000):\n    display(number)",
    ),
)  # fmt: skip
