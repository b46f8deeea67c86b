"""What runs inside: the words that attacks are written in, and the neighbour with things to lose."""

from __future__ import annotations

KIT = r'''
import ctypes, errno, json, os, platform, re, resource, signal, socket, stat, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
through, refused = {}, {}
def attempt(way, act):
    """A way gets through when it ends without an exception and finds something (None counts as something)."""
    try:
        found = act()
    except Exception as problem:
        refused[way] = errno.errorcode.get(getattr(problem, 'errno', None), type(problem).__name__)
    else:
        if found is None or found:
            through[way] = repr(found)[:300]
        else:
            refused[way] = 'nothing'
def checked(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), '')
def c(function, *arguments):
    checked(getattr(libc, function)(*arguments))
CALLS = dict(zip(
    ('bpf', 'io_uring_setup', 'keyctl', 'add_key', 'request_key', 'perf_event_open', 'userfaultfd', 'kexec_load', 'init_module',
     'finit_module', 'delete_module', 'pivot_root', 'fsopen', 'open_tree', 'move_mount', 'mount_setattr', 'syslog', 'pidfd_getfd',
     'pidfd_open', 'pidfd_send_signal', 'kcmp', 'process_madvise', 'fanotify_init', 'open_by_handle_at', 'swapon', 'quotactl',
     'clone', 'shmget', 'msgget', 'semget', 'mq_open', 'memfd_secret', 'move_pages', 'sched_setattr', 'ioprio_set', 'rt_sigqueueinfo',
     'tgkill', 'setns', 'clock_settime'),
    {'x86_64': (321, 425, 250, 248, 249, 298, 323, 246, 175, 313, 176, 155, 430, 428, 429, 442, 103, 438, 434, 424, 312, 440, 300, 304,
                167, 179, 56, 29, 68, 64, 240, 447, 279, 314, 251, 129, 234, 308, 227),
     'aarch64': (280, 425, 219, 217, 218, 241, 282, 104, 105, 273, 106, 41, 430, 428, 429, 442, 116, 438, 434, 424, 272, 440, 262, 265,
                 224, 60, 220, 194, 186, 190, 180, 447, 239, 274, 30, 138, 131, 268, 112)}[platform.machine()]))
buffer = ctypes.create_string_buffer(4096)
def call(name, *arguments):
    libc.syscall.restype = ctypes.c_long
    checked(libc.syscall(ctypes.c_long(CALLS[name]), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
def opened(path, flags=os.O_WRONLY):
    """Open and close again: nothing is written."""
    os.close(os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY))
def output(*argv, **options):
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=10, **options).stdout
def in_a_fork(act):
    """What `act` returned in a child, as text; its wait status where it died."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(write, repr(act()).encode()[:4096])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    status = os.waitpid(pid, 0)[1]
    return said or status
'''

NEIGHBOUR = r"""
import os, socket, subprocess
reduced = @REDUCED@  # no sockets, shared memory and terminals there
_paths = ['/home/user/@MARKER@', '/tmp/@MARKER@'] + ([] if reduced else ['/dev/shm/@MARKER@'])
for _path in _paths:
    with open(_path, 'w') as _file:
        _file.write('@MARKER@')
sleeper = subprocess.Popen(['/bin/bash', '-c', 'exec -a @MARKER@ sleep 3600'])
if not reduced:
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind('\0@MARKER@')
    abstract.listen()
    server = socket.create_server(('127.0.0.1', 28173))
os.environ['NEIGHBOUR'] = secret = '@MARKER@'
standing = lambda: (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0), os.sched_getscheduler(0))
stood = standing()
True
"""

NEIGHBOUR_ASKED = r"""
import pty
def _whole():
    for path in _paths:
        if open(path).read() != '@MARKER@':
            return path
    if sleeper.poll() is not None:
        return 'its process ended'
    for asked in () if reduced else (abstract, server):
        asked.setblocking(False)
        try:
            return f'a stranger connected: {asked.accept()}'
        except BlockingIOError:
            pass
    if secret != '@MARKER@' or standing() != stood:
        return 'its state or priority changed'
    for descriptor in () if reduced else pty.openpty():
        os.close(descriptor)
    if subprocess.run(['true']).returncode:
        return 'it cannot start processes'
    return True
_whole()
"""
