"""From a fork of the zygote to a sandbox: the order matters and is explained line by line.

pid 1 of new namespaces → map → loopback → /proc; here it waits for its plan; then private folders → descriptors → rlimits
→ no capabilities → seccomp; and in every process that runs guest code: Landlock and lower limits.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
from pathlib import Path

from . import landlock, linux, places, reduced, seccomp

USER = 1000
RLIMIT_SIGPENDING = 11
NETLINK_SOCK_DIAG = 4
INNER = (
    linux.CLONE_NEWUSER
    | linux.CLONE_NEWNS
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
)
INODES_PER_MIB = 64
# Watches are counted against the zygote's user as well: one sandbox must not take those of all its siblings.
OF_THE_NAMESPACE = {"max_user_namespaces": 0, "max_inotify_instances": 16, "max_inotify_watches": 8192}
# what tells of the machine and not of the sandbox
MASKED = (
    "cmdline", "config.gz", "diskstats", "interrupts", "iomem", "ioports", "kallsyms", "kcore", "key-users", "keys", "latency_stats",
    "modules", "partitions", "sched_debug", "softirqs", "timer_list",
)  # fmt: skip
DATA_MIB = 2048  # of RLIMIT_DATA at least: node reserves that much and never touches most of it
TCP_BUFFER = "4096 65536 131072"  # bytes that a connection keeps at most in each direction, without control groups
ZEROS = 1 << 60  # bytes of /dev/zero, where it is a file
TERMINALS = 64  # the machine has 4096 for all
AGENT_MIB = 256  # of data beyond the guest's limit, without control groups
RESERVED_PROCESSES = 16  # what the agent may start beyond the guest's own limit: it must still be able to kill


def begin(plan: dict, node: socket.socket) -> None:
    """Make this fork, pid 1 of new namespaces, at home in them. Raises OSError at the first thing that is refused."""
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # or the node may not write our maps
    if plan["self_map"]:
        for name, line in (("setgroups", "deny"), ("uid_map", "1000 1000 1"), ("gid_map", "1000 1000 1")):
            Path(f"/proc/self/{name}").write_text(line)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as diag:
        # the node learns our pid from the kernel and writes the maps; it asks this socket what those in here keep in memory
        socket.send_fds(node, [b"unshared"], [] if plan["counted"] else [diag.fileno()])
    if node.recv(16) != b"mapped":
        raise OSError("the node did not map this sandbox")
    if not plan["self_map"]:
        os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # the change of uid reset it; /proc/self must be ours
    socket.sethostname("sandbox")
    linux.bring_up_loopback()
    linux.unshare(linux.CLONE_NEWCGROUP)  # only now: its root is the group that the node has put us into
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("proc", "/proc", "proc", flags)  # failing here is fatal: the outer one shows the zygote
    for name, value in OF_THE_NAMESPACE.items():
        Path(f"/proc/sys/user/{name}").write_text(str(value))
    if not plan["counted"]:
        for name in ("tcp_rmem", "tcp_wmem"):
            Path(f"/proc/sys/net/ipv4/{name}").write_text(TCP_BUFFER)
    for name in MASKED:
        if os.path.isfile(f"/proc/{name}"):
            linux.mount("/dev/null", f"/proc/{name}", None, linux.MS_BIND)


def enclose(plan: dict, keep: set[int], filter_program: bytes) -> None:
    """Put up the walls that depend on the plan."""
    places.settle(plan)
    if plan.get("reduced"):
        reduced.around_agent(plan)
        os.chdir(plan["home"])
        restrict(plan, keep, filter_program)
        return
    layer = f"{plan['layers']}/{plan['layer']}" if plan.get("layer") else ""
    opened = os.open(layer, os.O_PATH) if layer else -1  # what comes next may cover it
    _mount_private_folders(plan["limits"], plan["shadowed"], plan["counted"], layer)
    _mount_layer(plan["layers"], layer, opened)
    restrict(plan, keep, filter_program)


def restrict(plan: dict, keep: set[int], filter_program: bytes) -> None:
    """The walls of one process: descriptors, limits, capabilities, system calls."""
    _close_all_but(keep)
    _limit(plan)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # guests have the same uid: they must not read this process
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(filter_program)


def _mount_private_folders(limits: dict, shadowed: list[str], counted: bool, layer: str) -> None:
    opened = {path: os.open(path, os.O_PATH) for path in shadowed}
    flags = linux.MS_NOSUID | linux.MS_NODEV
    own = f"uid={USER},gid={USER}"
    size, inodes = limits["disk_mib"], limits["disk_mib"] * INODES_PER_MIB
    linux.mount("sandbox", "/tmp", "tmpfs", flags, f"size={size}m,nr_inodes={inodes},mode=755,{own}")
    os.mkdir("/tmp/home", 0o755)
    os.mkdir("/tmp/tmp")
    os.chmod("/tmp/tmp", 0o1777)
    linux.mount("/tmp/home", "/home/user", None, linux.MS_BIND)  # one size for both
    linux.mount("/tmp/tmp", "/tmp", None, linux.MS_BIND)
    shm = min(64, max(1, limits["memory_mib"] // 4))
    linux.mount("sandbox", "/dev/shm", "tmpfs", flags, f"size={shm}m,nr_inodes=4096,mode=1777,{own}")
    linux.mount(
        "devpts",
        "/dev/pts",
        "devpts",
        linux.MS_NOSUID | linux.MS_NOEXEC,
        f"newinstance,ptmxmode=0666,mode=0620,max={TERMINALS}",
    )
    linux.mount("sandbox", "/run", "tmpfs", flags, "size=4k,mode=755")  # over the zygote's
    if not counted:  # shared pages of the device would be counted by nobody: zeros come from a file with a hole
        with open("/run/zero", "wb") as zero:
            zero.truncate(ZEROS)
        linux.mount("/run/zero", "/dev/zero", None, linux.MS_BIND)
        linux.harden("/dev/zero")
        os.unlink("/run/zero")
    if layer:
        os.symlink(layer, "/run/packages")
    linux.harden("/run")
    for path, descriptor in opened.items():  # an interpreter below a private folder stays at its path
        os.makedirs(path, exist_ok=True)
        linux.mount(f"/proc/self/fd/{descriptor}", path, None, linux.MS_BIND | linux.MS_REC)
        os.close(descriptor)
    os.chdir("/home/user")


def _mount_layer(layers: str, layer: str, opened: int) -> None:
    """Show the sandbox its own packages, read-only as they are, and hide everybody else's."""
    seen = os.path.isdir(layers)  # not where a private folder has covered it
    if not layer:
        if seen:
            linux.mount("/mnt", layers, None, linux.MS_BIND)  # which is empty
        return
    if seen:
        linux.mount("sandbox", layers, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=4k,nr_inodes=8,mode=755")
    os.makedirs(layer, exist_ok=True)
    linux.mount(f"/proc/self/fd/{opened}", layer, None, linux.MS_BIND)
    os.close(opened)
    if seen:
        linux.harden(layers)


def _close_all_but(keep: set[int]) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    low = 3
    for descriptor in sorted(keep):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _limit(plan: dict) -> None:
    limits = plan["limits"]
    for limit, value in (
        (
            resource.RLIMIT_CORE,
            1,
        ),  # not 0, which a handler in core_pattern ignores; 1 means none at all (fs/coredump.c)
        (resource.RLIMIT_NOFILE, 4096),
        (resource.RLIMIT_FSIZE, limits["disk_mib"] << 20),
        (resource.RLIMIT_NPROC, limits["processes"] + plan.get("others", 0) + RESERVED_PROCESSES),
        (resource.RLIMIT_MEMLOCK, 64 << 10),
        (resource.RLIMIT_MSGQUEUE, 0),
        (RLIMIT_SIGPENDING, 1024),
    ):
        present = resource.getrlimit(limit)
        value = value if present[1] == resource.RLIM_INFINITY else min(value, present[1])
        if present != (value, value):  # a filter that stands already lets nobody touch the core's
            resource.setrlimit(limit, (value, value))
    if not plan["counted"]:  # nobody else limits the agent, and guests choose what it reads
        linux.prctl(linux.PR_SET_THP_DISABLE, 1)
        if plan["cores"]:
            os.sched_setaffinity(0, plan["cores"])
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, ((limits["memory_mib"] + AGENT_MIB) << 20, hard))


def become_guest(plan: dict, rules: int | None, data_mib: int = DATA_MIB) -> None:
    """Lower this fork of the agent to what runs guest code; call it once, last."""
    os.setsid()
    linux.prctl(linux.PR_SET_DUMPABLE, 1)
    if not plan.get("reduced"):  # there /proc is read-only
        Path("/proc/self/oom_score_adj").write_text("1000")  # the agent dies last
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    processes = plan["limits"]["processes"] + plan.get("others", 0)
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    if not plan["counted"]:
        memory = max(data_mib, plan["limits"]["memory_mib"]) << 20
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    if plan.get("reduced"):
        reduced.around_guest(plan)
    else:
        landlock.enforce(rules)
    if not plan["counted"]:
        seccomp.install(seccomp.for_guests())
