"""The walls of the reduced mode, for machines that refuse namespaces: Landlock in three layers, seccomp, a uid, rlimits.

The launcher puts the first layer around the zygote, the agent the second around its sandbox, each guest the third around
itself. What it does not stop is listed in docs/local-runtime.md.
"""

from __future__ import annotations

import os
import signal
import socket

from . import landlock, linux

READABLE = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/proc/cpuinfo", "/proc/meminfo", "/proc/filesystems",
    "/dev/random", "/dev/urandom",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/full")
ZERO = "/dev/zero"  # can be mapped as shared memory, which only a control group counts


def begin(plan: dict, node: socket.socket) -> None:
    """What can be done before the plan is known: in place of the namespaces."""
    node.send(b"unshared")
    if node.recv(16) != b"mapped":
        raise OSError("the node did not want this sandbox")
    if plan["uid"] is not None:
        os.setgroups([])
        os.setresgid(plan["uid"], plan["uid"], plan["uid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # the zygote's end is ours; a change of uid would clear it
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)  # orphans come to the agent, as they come to a pid 1
    os.setsid()


def around_zygote(readable: list[str], writable: list[str]) -> None:
    landlock.enforce(_rules(readable, writable, "/proc", True))


def around_agent(plan: dict) -> None:
    landlock.enforce(_rules(plan["readable"], [plan["home"], plan["tmp"]], "/proc", plan["counted"]))


def around_guest(plan: dict) -> None:
    """Of /proc only what is the caller's own."""
    landlock.enforce(_rules(plan["readable"], [plan["home"], plan["tmp"]], f"/proc/{os.getpid()}", plan["counted"]))


def _rules(readable: list[str], writable: list[str], proc: str, counted: bool) -> int:
    devices = (*DEVICES, ZERO) if counted else DEVICES
    rules = landlock.ruleset((*READABLE, *readable, proc), tuple(writable), devices)
    if rules is None:
        raise OSError("this kernel has no Landlock")
    return rules
