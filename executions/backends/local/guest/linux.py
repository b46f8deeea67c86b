"""The system calls that Python does not wrap, by ctypes. Every function raises OSError."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import signal
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_holding = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock during a call
MACHINE = platform.machine()
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CLONE = {"x86_64": 56, "aarch64": 220}
MOUNT_SETATTR, OPENAT2 = 442, 437  # the same on every architecture, like all numbers above 424

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 22, 38, 47
PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_THP_DISABLE = 8, 36, 41
CAP_CHOWN, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 0, 5, 6, 7, 21


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: object) -> int:
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments), f"system call {number}")


def prctl(option: int, *arguments: object) -> int:
    padded = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(_libc.prctl(option, *padded), f"prctl {option}")


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def fork_into(flags: int) -> int:
    """os.fork(), with a child that is in these new namespaces, and pid 1 there, from its first moment.

    The C library's own handlers of a fork do not run: only for a process of one thread that is itself pid 1, because
    the library remembers that number. One fork less than unsharing first saves a sixth of the work of a sandbox.
    """
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _holding.syscall(
        ctypes.c_long(CLONE[MACHINE]), ctypes.c_ulong(flags | signal.SIGCHLD), None, None, None, None
    )
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    number = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return pid


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    _checked(_libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def harden(target: str, *, recursive: bool = False, flags: int = MS_RDONLY | MS_NOSUID | MS_NODEV) -> None:
    """Add mount flags to what is mounted at `target`; unlike a remount it keeps the flags that are locked."""
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    syscall(MOUNT_SETATTR, -100, target.encode(), 0x8000 if recursive else 0, attributes, ctypes.c_size_t(32))


def open_beneath(folder: str, path: str, flags: int, mode: int) -> int:
    """Open `path` below `folder`, wherever its links lead: what would leave the folder is refused (openat2)."""
    parent = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = struct.pack("QQQ", flags, mode if flags & os.O_CREAT else 0, 0x08)  # RESOLVE_BENEATH
        return syscall(OPENAT2, parent, path.encode(), how, ctypes.c_size_t(len(how)))
    finally:
        os.close(parent)


def pivot_root(new: str) -> None:
    """Make `new`, which is a mount, the root, and let go of the old one."""
    os.chdir(new)
    syscall(PIVOT_ROOT[MACHINE], b".", b".")
    _checked(_libc.umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/")


def drop_bounding_set(keep: tuple[int, ...] = ()) -> None:
    for capability in range(64):
        if capability in keep:
            continue
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # the last one that this kernel knows, or there is no right to


def drop_capabilities(keep: tuple[int, ...] = ()) -> None:
    """Empty all five sets, for good once no_new_privs is set; these (below 32) stay until the next call, also over exec."""
    drop_bounding_set(keep)
    prctl(PR_CAP_AMBIENT, 4)
    kept = sum(1 << capability for capability in keep)
    header = struct.pack("II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _checked(_libc.capset(header, struct.pack("6I", kept, kept, kept, 0, 0, 0)), "capset")
    for capability in keep:
        prctl(PR_CAP_AMBIENT, 2, capability)


def bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sH14x", b"lo", 1)  # IFF_UP
        fcntl.ioctl(probe, 0x8914, request)  # SIOCSIFFLAGS


def has_capabilities(*wanted: int) -> bool:
    """Whether this process is root and may what root does: change uids, kill, and these."""
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    needed = sum(1 << capability for capability in (CAP_SETUID, CAP_SETGID, CAP_KILL, *wanted))
    return os.geteuid() == 0 and effective & needed == needed
