"""The system call filter: a list of what numpy, plots, threads and subprocesses never need, refused for good.

Classic BPF as in linux/filter.h; see Documentation/userspace-api/seccomp_filter.rst of the kernel.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import struct

from . import linux

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64); None where that architecture does not have it
REFUSED: dict[str, tuple[int | None, int]] = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "swapon": (167, 224),
    "swapoff": (168, 225), "reboot": (169, 142), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "syslog": (103, 116),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161),
    "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "vhangup": (153, 58), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "uselib": (134, None), "personality": (135, 92),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "io_setup": (206, 0),
}  # fmt: skip
UNKNOWN = {"clone3": (435, 435)}  # ENOSYS: libc falls back to clone, whose flags can be read
LAST_KNOWN = 462  # mseal; later calls answer ENOSYS until somebody has read about them

# calls on a process: the first argument must be 0, which means the caller itself
ON_SELF_ONLY = {
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274),
}  # fmt: skip
NUMBERS = {"clone": (56, 220), "unshare": (272, 97), "ioctl": (16, 29), "socket": (41, 198), "socketpair": (53, 199),
           "setpriority": (141, 140), "ioprio_set": (251, 30), "prlimit64": (302, 261), "setrlimit": (160, 164)}  # fmt: skip

# Where no control group counts what the kernel keeps for a process, these would keep memory that no meter shows.
UNCOUNTED = {"splice": (275, 76), "tee": (276, 77), "vmsplice": (278, 75)}  # whole pages behind one byte in a pipe
SETSOCKOPT, MMAP, PRCTL, SET_AFFINITY = (54, 208), (9, 222), (157, 167), (203, 122)
SOL_SOCKET, BUFFER_SIZES, FILTERS = 1, (7, 8, 32, 33), (26, 50, 51, 52)  # a size above its limit is silently cut anyway
SHARED_ANONYMOUS = (
    0x21  # its pages stay when nobody maps them any more; a file in /dev/shm does the same, and is counted
)
HUGE_PAGES = 0x40000  # from the operator's own reserve
PR_SET_THP_DISABLE = 41  # huge pages: one byte would keep two MiB
LANDLOCK_CREATE_RULESET = 444  # a ruleset holds any number of rules
RLIMIT_CORE = 4  # fixed at 1: a lower one would let a crash start the host's core dump handler
NEW_NAMESPACES = 0x7E020000
TERMINAL_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
FAMILIES = (1, 2, 10, 16)  # unix, inet, inet6, netlink; vsock would reach a hypervisor past the network namespace

CONNECTED = (1, 5)  # stream and seqpacket: one of datagrams could still send to any path
# by the answer: nothing is done, which most programs bear better than a refusal of what decorates a copy
OF_PATHS = {
    0: {"chmod": (90, None), "fchmodat": (268, 53), "fchmodat2": (452, 452), "utime": (132, None), "utimes": (235, None),
        "futimesat": (261, None)},
    errno.EPERM: {"chown": (92, None), "lchown": (94, None), "fchownat": (260, 54)},
    errno.ENOTSUP: {"setxattr": (188, 5), "lsetxattr": (189, 6), "removexattr": (197, 14), "lremovexattr": (198, 15)},
}  # fmt: skip
UTIMENSAT = (280, 88)
LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCH, ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _refuse(number: int = errno.EPERM) -> bytes:
    return _instruction(RETURN, ERRNO | number)


def _when(number: int, *body: bytes) -> bytes:
    """Run `body` for this system call only; it must leave the call's number loaded or return."""
    inside = b"".join(body)
    return _instruction(EQUAL, number, 0, len(inside) // 8) + inside


def _argument(index: int) -> bytes:
    return _load(index)  # the low half: the kernel reads these arguments as 32 bits


def _load(index: int, high: bool = False) -> bytes:
    return _instruction(LOAD, ARGUMENT + 8 * index + 4 * high)


@functools.cache
def program(
    machine: str = linux.MACHINE, *, reduced: bool = False, own_uid: bool = True, counted: bool = True
) -> bytes:
    """The filter for this architecture. KeyError where there is no table for it.

    Not `counted`: no control group counts its memory and its processors, so that only what a meter shows may be taken.
    `reduced`: no network namespace keeps sockets apart, so there are none but connected pairs. Not `own_uid`: nothing but
    this filter keeps the modes, owners and times of the user's other files, which Landlock does not look at.
    """
    arch = ARCHITECTURES[machine]
    column = list(ARCHITECTURES).index(machine)
    call = {name: numbers[column] for name, numbers in NUMBERS.items()}
    allow = _instruction(RETURN, ALLOW)
    parts = [
        _instruction(LOAD, ARCH),
        _instruction(EQUAL, arch, 1, 0),
        _instruction(RETURN, KILL),
        _instruction(LOAD, NUMBER),
        _instruction(AT_LEAST, LAST_KNOWN + 1, 0, 1),  # x32 numbers are far above, too
        _refuse(errno.ENOSYS),
    ]
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            parts.append(_when(numbers[column], _refuse()))
    for numbers in UNKNOWN.values():
        parts.append(_when(numbers[column], _refuse(errno.ENOSYS)))
    parts.append(_when(MMAP[column], _argument(3), _instruction(ANY_BIT, HUGE_PAGES, 0, 1), _refuse(errno.ENOMEM),
                       *([] if counted else _not_shared_anonymous()), allow))  # fmt: skip
    if not counted:
        parts += _uncounted(column)
    for numbers in ON_SELF_ONLY.values():
        parts.append(_when(numbers[column], _argument(0), _instruction(EQUAL, 0, 1, 0), _refuse(), allow))
    parts.append(_when(call["clone"], _argument(0), _instruction(ANY_BIT, NEW_NAMESPACES, 0, 1), _refuse(), allow))
    parts.append(
        _when(call["unshare"], _argument(0), _instruction(ANY_BIT, NEW_NAMESPACES | 0x80, 0, 1), _refuse(), allow)
    )
    injection = [step for request in TERMINAL_INJECTION for step in (_instruction(EQUAL, request, 0, 1), _refuse())]
    parts.append(_when(call["ioctl"], _argument(1), *injection, allow))
    if reduced:
        parts += _reduced(column, call, own_uid)
    for name in () if reduced else ("socket", "socketpair"):
        families = [step for family in FAMILIES for step in (_instruction(EQUAL, family, 0, 1), allow)]
        parts.append(_when(call[name], _argument(0), *families, _refuse(errno.EAFNOSUPPORT)))
    on_self = [_instruction(EQUAL, 0, 1, 0), _refuse()]
    parts.append(_when(call["setpriority"], _argument(0), *on_self, _argument(1), *on_self, allow))
    ioprio_process = [_instruction(EQUAL, 1, 1, 0), _refuse()]
    parts.append(_when(call["ioprio_set"], _argument(0), *ioprio_process, _argument(1), *on_self, allow))
    core = _instruction(EQUAL, RLIMIT_CORE, 0, 1)
    parts.append(_when(call["setrlimit"], _argument(0), core, _refuse(), allow))
    asking = (
        _instruction(EQUAL, 0, 0, 3) + _load(2, high=True) + _instruction(EQUAL, 0, 0, 1)
    )  # no new limit: both halves are 0
    only_asking = _load(2) + asking + allow + _refuse()
    parts.append(
        _when(
            call["prlimit64"], _argument(0), _instruction(EQUAL, 0, 1, 0), _refuse(),
            _argument(1), _instruction(EQUAL, RLIMIT_CORE, 0, len(only_asking) // 8), only_asking, allow,
        )
    )  # fmt: skip
    parts.append(allow)
    return b"".join(parts)


def _not_shared_anonymous() -> list[bytes]:
    return [_instruction(AND, SHARED_ANONYMOUS), _instruction(EQUAL, SHARED_ANONYMOUS, 0, 1), _refuse()]


def _uncounted(column: int) -> list[bytes]:
    allow = _instruction(RETURN, ALLOW)
    options = [step for one in BUFFER_SIZES for step in (_instruction(EQUAL, one, 0, 1), _refuse(0))]
    options += [step for one in FILTERS for step in (_instruction(EQUAL, one, 0, 1), _refuse())]
    of_sockets = [_instruction(EQUAL, SOL_SOCKET, 1, 0), allow, _argument(2), *options, allow]
    huge = [_instruction(EQUAL, PR_SET_THP_DISABLE, 0, 1), _refuse(), allow]
    return [
        *(_when(numbers[column], _refuse(errno.ENOSYS)) for numbers in UNCOUNTED.values()),
        _when(SET_AFFINITY[column], _refuse()),
        _when(SETSOCKOPT[column], _argument(1), *of_sockets),
        _when(PRCTL[column], _argument(0), *huge),
    ]


def for_guests() -> bytes:
    """What the agent still needs and its guests do not, where they are not counted."""
    return b"".join(
        [_instruction(LOAD, NUMBER), _when(LANDLOCK_CREATE_RULESET, _refuse()), _instruction(RETURN, ALLOW)]
    )


def _reduced(column: int, call: dict[str, int], own_uid: bool) -> list[bytes]:
    allow = _instruction(RETURN, ALLOW)
    kinds = [step for kind in CONNECTED for step in (_instruction(EQUAL, kind, 0, 1), allow)]
    pair = [_instruction(EQUAL, 1, 1, 0), _refuse(), _argument(1), _instruction(AND, 0xF), *kinds, _refuse()]
    parts = [_when(call["socket"], _refuse()), _when(call["socketpair"], _argument(0), *pair)]
    if not own_uid:
        for answer, calls in OF_PATHS.items():
            parts += [
                _when(numbers[column], _refuse(answer)) for numbers in calls.values() if numbers[column] is not None
            ]
        open_file = [
            _instruction(EQUAL, 0, 0, 2),
            _load(1, high=True),
            _instruction(EQUAL, 0, 1, 0),
        ]  # no path is named
        parts.append(_when(UTIMENSAT[column], _load(1), *open_file, _refuse(0), allow))
    return parts


def install(code: bytes) -> None:
    """Put the filter on this process and all it will start. no_new_privs must be set."""
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    linux.prctl(linux.PR_SET_SECCOMP, 2, ctypes.c_char_p(header))
