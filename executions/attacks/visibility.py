"""Seeing what is not one's own: processes, environments, files, names and memory of the host and of neighbours."""

from __future__ import annotations

import os
import socket

from executions.attacks.arena import Arena, Attack, Ran, Through
from executions.backends.base import Handle


async def _not_the_hosts_name(arena: Arena, handle: Handle, ran: Ran) -> str:
    names = {name for name in (socket.gethostname(), socket.getfqdn(), os.uname().nodename) if name != "localhost"}
    for name in names:
        if name in ran.stdout.split("\n"):
            raise Through(f"the host's name {name} is seen")
    return f"it calls itself {ran.stdout.split()[0]}"


ATTACKS = (
    Attack(
        "processes_of_others", ("namespaces",),
        code=r"""
def seen():
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{pid}/cmdline') as file:
                if '@MARKER@' in (said := file.read()) and int(pid) != os.getpid():
                    yield said
        except OSError:
            pass
attempt('in /proc', lambda: list(seen()))
attempt('by ps', lambda: '@MARKER@' in output('ps', '-ef'))
attempt('beyond pid 1', lambda: os.readlink('/proc/self') != str(os.getpid()))
""",
    ),
    Attack(
        "pid_1_and_the_launcher", ("capabilities", "namespaces"), own_kernel=False,
        code=r"""
for name in ('environ', 'mem', 'maps', 'smaps', 'pagemap', 'syscall', 'stack', 'auxv', 'io', 'patch_state'):
    attempt(name, lambda: open(f'/proc/1/{name}', 'rb').read(1))
    attempt(f'task/1/{name}', lambda: open(f'/proc/1/task/1/{name}', 'rb').read(1))
for name in ('root', 'cwd', 'exe', 'ns/mnt', 'ns/user'):
    attempt(name, lambda: os.readlink(f'/proc/1/{name}'))
for name in ('fd', 'fdinfo', 'map_files', 'root/', 'cwd/'):
    attempt(name, lambda: os.listdir(f'/proc/1/{name}'))
attempt('the parent', lambda: os.getppid() not in (0, 1) and open(f'/proc/{os.getppid()}/environ').read())
""",
    ),
    Attack(
        "memory_of_others", ("seccomp", "namespaces"), own_kernel=False,
        code=r"""
class Vector(ctypes.Structure):
    _fields_ = [('at', ctypes.c_void_p), ('size', ctypes.c_size_t)]
mine, theirs = Vector(ctypes.addressof(buffer), 64), Vector(id(through), 64)
for pid in (1, os.getppid()):
    attempt(f'process_vm_readv {pid}', lambda: c('process_vm_readv', pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0))
    attempt(f'process_vm_writev {pid}', lambda: c('process_vm_writev', pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0))
    attempt(f'ptrace attach {pid}', lambda: c('ptrace', 16, pid, 0, 0))
    attempt(f'ptrace seize {pid}', lambda: c('ptrace', 0x4206, pid, 0, 0))
    attempt(f'kcmp {pid}', lambda: call('kcmp', pid, os.getpid(), 0, 0, 0))
    attempt(f'pidfd_getfd {pid}', lambda: call('pidfd_getfd', os.pidfd_open(pid), 0, 0))
    attempt(f'move_pages {pid}', lambda: call('move_pages', pid, 0, 0, 0, 0, 0))
    attempt(f'process_madvise {pid}', lambda: call('process_madvise', os.pidfd_open(pid), 0, 0, 0, 0))
    attempt(f'setns {pid}', lambda: c('setns', os.pidfd_open(pid), 0x20000))
""",
    ),
    Attack(
        "host_paths", ("readonly_root", "namespaces"), own_kernel=False,
        code=r"""
for path in ('/etc/shadow', '/etc/machine-id', '/etc/ssh', '/etc/sudoers', '/boot', '/var/lib', '/var/log', '/var/run', '/run/docker.sock',
             '/root/.ssh', '/root/.bash_history', '/srv', '/media', '/lost+found', '/sys/kernel', '/sys/class', '/sys/fs/cgroup', '/dev/mem',
             '/dev/kmsg', '/dev/sda', '/dev/vda', '/dev/kvm', '/dev/fuse', '/dev/net/tun', '/dev/vsock', '/dev/mqueue', '/dev/hugepages'):
    attempt(path, lambda: os.path.lexists(path) and os.listdir(path) if os.path.isdir(path) else os.path.lexists(path))
attempt('homes of others', lambda: [h for h in os.listdir('/home') if h != 'user' and os.path.exists(f'/home/{h}/.bashrc')])
attempt('users of the host', lambda: [l for l in open('/etc/passwd') if l.split(':')[0] not in ('root', 'user', 'nobody')])
attempt('/proc/kcore', lambda: open('/proc/kcore', 'rb').read(16))
attempt('the way out by a folder that is left', lambda: os.chdir('/proc/self/cwd/../../../../../../..') or os.path.exists('etc/shadow'))
os.chdir('/home/user')
""",
    ),
    Attack(
        "mount_sources", ("readonly_root",), own_kernel=False,
        code=r"""
MADE = ('tmpfs', 'proc', 'devtmpfs', 'devpts', 'sysfs')
def told():
    for line in open('/proc/self/mountinfo'):
        left, _, right = line.partition(' - ')
        source, at = left.split()[3:5]
        if right.split()[0] not in MADE and not source.endswith(at):
            yield f'{source} at {at}'
attempt('a path of the host that is another one inside', lambda: list(told()))
""",
    ),
    Attack(
        "kernel_log", ("seccomp", "namespaces"), own_kernel=False,
        code=r"""
attempt('syslog', lambda: call('syslog', 3, buffer, 4096))
attempt('syslog size', lambda: call('syslog', 10, 0, 0))
attempt('/proc/kmsg', lambda: opened('/proc/kmsg', os.O_RDONLY))
attempt('/dev/kmsg', lambda: opened('/dev/kmsg', os.O_RDONLY))
attempt('dmesg', lambda: output('dmesg'))
""",
    ),
    Attack(
        "kernel_details", ("namespaces",), own_kernel=False,
        code=r"""
for name in ('cmdline', 'config.gz', 'keys', 'key-users', 'timer_list', 'sched_debug', 'latency_stats', 'modules', 'interrupts', 'iomem',
             'ioports', 'diskstats', 'partitions', 'kallsyms', 'kpagecount', 'pagetypeinfo', 'slabinfo', 'vmallocinfo'):
    attempt(name, lambda: open(f'/proc/{name}', 'rb').read(200))
""",
    ),
    Attack(
        "host_name", ("namespaces",), judge=_not_the_hosts_name,
        code=r"""
for way in (socket.gethostname, lambda: os.uname().nodename, lambda: open('/etc/hostname').read(), socket.getfqdn,
            lambda: open('/proc/sys/kernel/hostname').read(), lambda: output('hostname'), lambda: os.environ.get('HOSTNAME', '')):
    try:
        print(way().strip())
    except OSError:
        pass
""",
    ),
    Attack(
        "files_of_others", ("namespaces",),
        code=r"""
def found():
    for top in ('/tmp', '/var/tmp', '/home/user', '/dev/shm', '/run', '/mnt'):
        for folder, folders, names in os.walk(top):
            yield from (f'{folder}/{name}' for name in folders + names if name.startswith('sandgate-'))
attempt('temporary and home folders', lambda: list(found()))
""",
    ),
    Attack(
        "the_service_itself", ("readonly_root",), seconds=40,
        code=r"""
NAMES = {'manage.py', '.env', 'sandgate.sqlite3', 'db.sqlite3', 'secret_key', 'node.sock', 'node.lock', 'asgi.py'}
def found(wanted):
    for folder, folders, names in os.walk('/'):
        folders[:] = [f for f in folders if f'{folder}/{f}' not in ('//proc', '//sys')
                      and f not in ('site-packages', 'dist-packages', 'share', 'node_modules')]
        yield from filter(wanted, (f'{folder}/{name}' for name in names))
def is_socket(path):
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode) and not path.startswith(('//home/user', '//tmp'))
    except OSError:
        return False
attempt('its source, database, settings, sockets', lambda: list(found(lambda path: os.path.basename(path) in NAMES)))
attempt('a socket of anybody', lambda: list(found(is_socket))[:9])
""",
    ),
    Attack(
        "shared_memory_of_others", ("namespaces",),
        code=r"""
attempt('/dev/shm', lambda: [n for n in os.listdir('/dev/shm') if n.startswith('sandgate-')])
for kind in ('shm', 'sem', 'msg'):
    attempt(f'SysV {kind}', lambda: open(f'/proc/sysvipc/{kind}').readlines()[1:])
attempt('message queues', lambda: os.listdir('/dev/mqueue'))
""",
    ),
    Attack(
        "abstract_sockets", ("namespaces",),
        code=r"""
attempt("the neighbour's", lambda: socket.socket(socket.AF_UNIX).connect('\0@MARKER@'))
attempt("the host's", lambda: socket.socket(socket.AF_UNIX).connect('\0@MARKER@-host'))
attempt('in /proc/net/unix', lambda: 'sandgate-' in open('/proc/net/unix').read())
for name in ('/tmp/.X11-unix/X0', 'org/freedesktop/systemd1', '/tmp/dbus'):
    attempt(name, lambda: socket.socket(socket.AF_UNIX).connect('\0' + name))
""",
    ),
    Attack(
        "inherited_descriptors", ("agent",), own_kernel=False,
        code=r"""
def strange(pid):
    for descriptor in os.listdir(f'/proc/{pid}/fd'):
        try:
            kind = os.readlink(f'/proc/{pid}/fd/{descriptor}')
        except OSError:
            continue
        if not kind.startswith(('/dev/null', '/dev/pts', 'pipe:', 'socket:', 'anon_inode:', '/proc/', '/home/user', '/tmp')):
            yield kind
def listening():
    for descriptor in map(int, os.listdir('/proc/self/fd')):
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as one:
                    if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        yield descriptor
        except OSError:
            pass
attempt('of the interpreter', lambda: list(strange('self')))
attempt('of a child', lambda: set(output('ls', '/proc/self/fd').split()) - {'0', '1', '2', '3'})
attempt("the agent's listening socket", lambda: list(listening()))
""",
    ),
    Attack(
        "core_dumps", ("rlimits",), own_kernel=False,
        code=r"""
def crash():
    if (pid := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(9)
    return os.WCOREDUMP(os.waitpid(pid, 0)[1])
attempt('a crash', crash)
attempt('a file', lambda: [name for name in os.listdir() if name.startswith('core')])
attempt('a higher limit', lambda: resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30)))
attempt('a limit that a handler of the host does not look at',
        lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])))
attempt('a hard limit that it does not look at', lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)))
""",
    ),
)  # fmt: skip
