"""Reaching for the controls: of the supervisor, of others, of the kernel."""

from __future__ import annotations

from executions.attacks.arena import Attack

ATTACKS = (
    Attack(
        "signals_to_the_supervisor", ("landlock", "namespaces"), own_kernel=False,
        code=r"""
for pid in (1, os.getppid()):
    for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL, signal.SIGUSR1, 0):
        attempt(f'kill {pid} {number}', lambda: os.kill(pid, number))
    attempt(f'tgkill {pid}', lambda: call('tgkill', pid, pid, 15))
    attempt(f'pidfd {pid}', lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGTERM))
    attempt(f'queue {pid}', lambda: call('rt_sigqueueinfo', pid, 15, (ctypes.c_int * 32)(15, 0, -1)))
read, write = os.pipe()
import fcntl
attempt('by the owner of a pipe', lambda: fcntl.fcntl(read, fcntl.F_SETOWN, 1))
""",
    ),
    Attack(
        "kill_everybody", ("landlock", "namespaces"), ends=("value", "ContextRestarting", "ProcessLookupError", "PermissionError"), fresh=True,
        code="os.kill(-1, signal.SIGKILL)\ntime.sleep(5)",
    ),
    Attack(
        "kill_everybody_by_a_command", ("landlock", "namespaces"), fresh=True,
        command="kill -9 -1; for p in $(seq 1 200); do kill -9 $p 2>/dev/null; done; true",
    ),
    Attack(
        "limits_of_others", ("seccomp", "namespaces"), own_kernel=False,
        code=r"""
for pid in (1, os.getppid()):
    for name in ('CPU', 'NOFILE', 'AS', 'NPROC', 'FSIZE'):
        attempt(f'prlimit {name} {pid}', lambda: resource.prlimit(pid, getattr(resource, f'RLIMIT_{name}'), (1, 1)))
    attempt(f'affinity {pid}', lambda: os.sched_setaffinity(pid, {0}))
    attempt(f'scheduler {pid}', lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)))
    attempt(f'parameters {pid}', lambda: os.sched_setparam(pid, os.sched_param(0)))
    attempt(f'attributes {pid}', lambda: call('sched_setattr', pid, bytes([48, 0, 0, 0, 5]) + bytes(43), 0))
    attempt(f'priority {pid}', lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    attempt(f'io priority {pid}', lambda: call('ioprio_set', 1, pid, 3 << 13))
    attempt(f'oom score {pid}', lambda: opened(f'/proc/{pid}/oom_score_adj'))
attempt('priority of the user', lambda: os.setpriority(os.PRIO_USER, os.getuid(), 19))
attempt('priority of the group', lambda: os.setpriority(os.PRIO_PGRP, 1, 19))
attempt('io priority of the user', lambda: call('ioprio_set', 3, os.getuid(), 3 << 13))
""",
    ),
    Attack(
        "limits_of_its_own", ("capabilities", "rlimits"), own_kernel=False,
        code=r"""
for name in ('NPROC', 'NOFILE', 'FSIZE', 'MEMLOCK', 'CORE', 'MSGQUEUE', 'SIGPENDING'):
    limit = getattr(resource, f'RLIMIT_{name}', 11 if name == 'SIGPENDING' else None)
    soft, hard = resource.getrlimit(limit)
    attempt(f'no limit of {name}', lambda: hard == resource.RLIM_INFINITY)
    attempt(f'a higher {name}', lambda: resource.setrlimit(limit, (hard + 1, hard + 1)))
attempt('a better priority', lambda: os.setpriority(os.PRIO_PROCESS, 0, -5))
attempt('real time', lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
attempt('never killed for memory', lambda: opened('/proc/self/oom_score_adj'))
attempt('a capability', lambda: any(int(l.split()[1], 16) for l in open('/proc/self/status') if l.startswith(('CapInh', 'CapPrm', 'CapEff', 'CapAmb'))))
attempt('new privileges', lambda: c('prctl', 38, 0, 0, 0, 0))
attempt('no filter', lambda: c('prctl', 22, 0, 0, 0, 0))
attempt('an ambient capability', lambda: c('prctl', 47, 2, 21, 0, 0))
""",
    ),
    Attack(
        "control_group_files", ("readonly_root", "landlock"), own_kernel=False,
        code=r"""
for path in ('/sys/fs/cgroup/cgroup.procs', '/sys/fs/cgroup/memory/tasks', '/sys/fs/cgroup/pids/pids.max', '/sys/fs/cgroup/memory/release_agent'):
    attempt(path, lambda: opened(path))
for kind in (b'cgroup', b'cgroup2'):
    attempt(f'mount {kind}', lambda: c('mount', b'x', b'/mnt', kind, 0, None))
attempt('where it is', lambda: [l for l in open('/proc/self/cgroup') if not l.strip().endswith(':/') and 'systemd' not in l and '0::' not in l])
""",
    ),
    Attack(
        "kernel_files", ("landlock", "readonly_root"), own_kernel=False,
        code=r"""
for path in ('/proc/sys/kernel/core_pattern', '/proc/sys/kernel/modprobe', '/proc/sys/kernel/hotplug', '/proc/sys/kernel/hostname',
             '/proc/sys/kernel/randomize_va_space', '/proc/sys/kernel/sysrq', '/proc/sys/kernel/ns_last_pid', '/proc/sys/vm/overcommit_memory',
             '/proc/sys/vm/drop_caches', '/proc/sys/vm/panic_on_oom', '/proc/sys/fs/binfmt_misc/register', '/proc/sys/fs/suid_dumpable',
             '/proc/sys/user/max_user_namespaces', '/proc/sys/net/ipv4/ip_forward', '/proc/sysrq-trigger', '/proc/self/uid_map',
             '/proc/self/setgroups', '/proc/self/attr/current', '/proc/irq/default_smp_affinity', '/proc/mtrr', '/proc/bus/pci/00',
             '/sys/kernel/uevent_helper', '/sys/kernel/debug', '/sys/power/state', '/dev/mem', '/dev/port', '/dev/kmsg'):
    attempt(path, lambda: opened(path))
    attempt(f'{path} to read and write', lambda: opened(path, os.O_RDWR))
attempt('by a link', lambda: os.symlink('/proc/sys/kernel/core_pattern', '/tmp/pattern') or opened('/tmp/pattern'))
os.path.lexists('/tmp/pattern') and os.unlink('/tmp/pattern')
""",
    ),
    Attack(
        "mounts_and_namespaces", ("seccomp",), own_kernel=False,
        code=r"""
os.makedirs('/tmp/at', exist_ok=True)
attempt('tmpfs', lambda: c('mount', b'x', b'/tmp/at', b'tmpfs', 0, None))
attempt('bind', lambda: c('mount', b'/usr', b'/tmp/at', None, 4096, None))
attempt('remount', lambda: c('mount', None, b'/', None, 32 | 4096, None))
attempt('proc', lambda: c('mount', b'proc', b'/tmp/at', b'proc', 0, None))
attempt('umount', lambda: c('umount2', b'/proc', 2))
attempt('umount run', lambda: c('umount2', b'/run', 2))
attempt('pivot_root', lambda: call('pivot_root', b'/tmp', b'/tmp/at'))
attempt('chroot', lambda: os.chroot('/tmp'))
for name in ('fsopen', 'open_tree', 'move_mount', 'mount_setattr'):
    attempt(name, lambda: call(name, -100, b'/', 1, 0, 0))
for name, flag in {'user': 0x10000000, 'mount': 0x20000, 'pid': 0x20000000, 'net': 0x40000000, 'ipc': 0x8000000, 'uts': 0x4000000,
                   'cgroup': 0x2000000, 'time': 0x80}.items():
    attempt(f'unshare {name}', lambda: c('unshare', flag))
    attempt(f'clone {name}', lambda: call('clone', (0 if name == 'time' else flag) | 0x40000011 * (name == 'time'), 0, 0, 0, 0))
attempt('clone3', lambda: checked(libc.syscall(ctypes.c_long(435), buffer, ctypes.c_long(64))))
for name in ('user', 'mnt', 'pid', 'net'):
    attempt(f'setns {name}', lambda: c('setns', os.open(f'/proc/self/ns/{name}', os.O_RDONLY), 0))
attempt('user namespaces allowed', lambda: int(open('/proc/sys/user/max_user_namespaces').read()))
attempt('unshare(1)', lambda: output('unshare', '-Ur', 'id', '-u'))
""",
    ),
    Attack(
        "kernel_surface", ("seccomp",), own_kernel=False,
        code=r"""
attempt('keyctl', lambda: call('keyctl', 0, -3, 1, 0, 0))
attempt('add_key', lambda: call('add_key', b'user', b'x', b'y', 1, -2))
attempt('request_key', lambda: call('request_key', b'user', b'x', 0, -2))
attempt('bpf map', lambda: call('bpf', 0, (ctypes.c_uint32 * 32)(2, 4, 4, 1), 128))
attempt('bpf program', lambda: call('bpf', 5, buffer, 128))
attempt('perf_event_open', lambda: call('perf_event_open', (ctypes.c_uint32 * 32)(1, 128), 0, -1, -1, 0))
attempt('io_uring', lambda: call('io_uring_setup', 8, bytearray(120) and ctypes.create_string_buffer(120)))
attempt('userfaultfd', lambda: call('userfaultfd', 1))
attempt('/dev/userfaultfd', lambda: opened('/dev/userfaultfd', os.O_RDWR))
for name in ('kexec_load', 'init_module', 'finit_module', 'delete_module', 'fanotify_init', 'open_by_handle_at', 'swapon', 'quotactl'):
    attempt(name, lambda: call(name, -1, buffer, 0, 0, 0))
attempt('personality', lambda: c('personality', 0x0040000))
attempt('set the clock', lambda: call('clock_settime', 0, (ctypes.c_int64 * 2)(1, 0)))
attempt('set the host name', lambda: socket.sethostname('x'))
for family, name in ((17, 'packet'), (38, 'crypto'), (40, 'vsock'), (44, 'xdp'), (31, 'bluetooth'), (29, 'can'), (30, 'tipc'), (21, 'rds'),
                     (15, 'key'), (9, 'x25'), (43, 'smc'), (45, 'mctp')):
    for kind in (1, 2, 3, 5):
        attempt(f'{name} socket {kind}', lambda: socket.socket(family, kind))
""",
    ),
    Attack(
        "other_call_tables", ("seccomp",), own_kernel=False,
        code=r"""
import mmap
def run(code):
    page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    return ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
if platform.machine() == 'x86_64':
    # mov eax, 20 (getpid of i386); int 0x80; ret
    attempt('32-bit by int 0x80', lambda: isinstance(said := in_a_fork(lambda: run(b'\xb8\x14\0\0\0\xcd\x80\xc3')), str) and int(said) > 0)
    attempt('x32', lambda: checked(libc.syscall(ctypes.c_long(0x40000000 + 39))))
attempt('a call that nobody has read about', lambda: checked(libc.syscall(ctypes.c_long(600))))
""",
    ),
    Attack(
        "setuid_programs", ("capabilities",), own_kernel=False,
        code=r"""
import shutil
attempt('setuid', lambda: os.setuid(0))
attempt('setresgid', lambda: os.setresgid(0, 0, 0))
attempt('setgroups', lambda: os.setgroups([0]))
for argv in (['su', '-c', 'id -u'], ['sudo', '-n', 'id', '-u'], ['pkexec', 'id', '-u'], ['runuser', '-u', 'root', 'id', '-u']):
    attempt(argv[0], lambda: output(*argv).strip() == '0')
shutil.copy('/usr/bin/id', '/tmp/id')
os.chmod('/tmp/id', 0o6755)
attempt('one of its own', lambda: output('/tmp/id', '-u').strip() == '0')
os.unlink('/tmp/id')
attempt('places where they count', lambda: [p for p in ('/', '/usr', '/tmp', '/home/user', '/dev/shm', '/proc', '/dev/pts')
                                            if not os.statvfs(p).f_flag & os.ST_NOSUID])
attempt('file capabilities', lambda: os.setxattr('/home/user', 'security.capability', bytes(20)))
""",
    ),
    Attack(
        "device_nodes", ("capabilities", "readonly_root"), own_kernel=False,
        code=r"""
SIX = {'null', 'zero', 'full', 'random', 'urandom', 'tty', 'pts', 'ptmx', 'shm', 'fd', 'stdin', 'stdout', 'stderr'}
attempt('others than the six', lambda: set(os.listdir('/dev')) - SIX)
for name, kind, major, minor in (('mem', stat.S_IFCHR, 1, 1), ('disk', stat.S_IFBLK, 254, 0), ('kmsg', stat.S_IFCHR, 1, 11), ('tun', stat.S_IFCHR, 10, 200)):
    for folder in ('/tmp', '/dev', '/dev/shm', '/home/user'):
        attempt(f'mknod {name} in {folder}', lambda: os.mknod(f'{folder}/{name}', kind | 0o666, os.makedev(major, minor)))
attempt('the terminal of the host', lambda: opened('/dev/tty', os.O_RDWR))
attempt('the console', lambda: opened('/dev/console', os.O_RDWR))
""",
    ),
    Attack(
        "terminal_injection", ("seccomp",), own_kernel=False,
        code=r"""
import fcntl, pty, termios
ours, theirs = pty.openpty()
for descriptor in (0, 1, 2, ours, theirs):
    for name, request in (('TIOCSTI', 0x5412), ('TIOCLINUX', 0x541C), ('TIOCSTI with high bits', 0x100005412)):
        attempt(f'{name} {descriptor}', lambda: checked(libc.ioctl(descriptor, ctypes.c_ulong(request), b'x')))
os.close(ours), os.close(theirs)
""",
    ),
)  # fmt: skip
