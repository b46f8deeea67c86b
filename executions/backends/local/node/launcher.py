"""Starts one template's zygote: outer namespaces, the minimal root, an unprivileged uid, then exec. One process each.

    python -I …/node launch '{"python": …, "prefixes": […], "root": …, "uid": …, "control": …}'

It stays as the zygote's parent: when the node dies it is killed, and takes the zygote (pid 1 of its namespace) along.
In the reduced mode it outlives the node for as long as it takes to kill all.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket

from guest import linux, reduced, seccomp
from node import ground, root

LOOK_SECONDS = 0.1
CONTROL = 3  # the zygote's socket to the node
OUTER = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS


def main(argument: str) -> int:
    plan = json.loads(argument)
    if plan["control"] != CONTROL:
        os.dup2(plan["control"], CONTROL)
        os.close(plan["control"])
    control = socket.socket(fileno=CONTROL)
    os.umask(0o022)
    if plan["reduced"]:
        return _keep(plan, control)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _unshare(plan)
    except OSError as problem:
        _say(control, f"Namespaces are refused here: {problem}")
        return 1
    child = os.fork()
    if child == 0:
        try:
            _become_zygote(plan)
        except BaseException as problem:
            _say(control, f"The sandbox root could not be built: {problem}")
        os._exit(1)
    control.close()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF


def _keep(plan: dict, control: socket.socket) -> int:
    """Without a PID namespace nothing takes a sandbox's orphans along: they come here and are killed, as all are at the end."""
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    node = os.getppid()
    zygote = os.fork()
    if zygote == 0:
        try:
            _become_zygote(plan)
        except BaseException as problem:
            _say(control, f"The walls of the reduced mode could not be put up: {problem}")
        os._exit(1)
    control.close()
    while True:
        signal.sigtimedwait([], LOOK_SECONDS)
        ended = _reaped()
        if zygote in ended or os.getppid() != node:
            break
        ground.kill_trees(ground.children(os.getpid()) - {zygote})
    while left := ground.children(os.getpid()):
        ground.kill_trees(left)
        _reaped()
    return 0


def _reaped() -> set[int]:
    """Who has ended."""
    found = set()
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            found.add(pid)
    return found


def _say(control: socket.socket, problem: str) -> None:
    control.send(json.dumps({"broken": problem}).encode())


def _unshare(plan: dict) -> None:
    if plan["uid"] is not None:
        linux.unshare(OUTER)
        return
    uid, gid = os.getuid(), os.getgid()  # an ordinary user needs a user namespace for the rest
    linux.unshare(linux.CLONE_NEWUSER | OUTER)
    for name, line in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _become_zygote(plan: dict) -> None:
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    keep: tuple[int, ...] = ()
    if not plan["reduced"]:
        root.build(plan["root"], plan["prefixes"], plan["layers"])
    elif plan["uid"] is not None:  # without user namespaces only these give each sandbox a uid; they end in each fork
        keep = (linux.CAP_SETUID, linux.CAP_SETGID)
        linux.prctl(linux.PR_SET_KEEPCAPS, 1)
    if plan["uid"] is not None:
        linux.drop_bounding_set(keep)
        os.setgroups([])
        os.setresgid(plan["uid"], plan["uid"], plan["uid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of uid cleared it
    linux.drop_capabilities(keep)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    scratch, ours = plan["scratch"], plan["ours"]
    if plan["reduced"]:
        reduced.around_zygote(plan["readable"], [scratch, plan["homes"]])
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # later the filter forbids it
        seccomp.install(seccomp.program(reduced=True, own_uid=plan["uid"] is not None))
    os.setsid()
    os.set_inheritable(CONTROL, True)
    os.closerange(CONTROL + 1, os.sysconf("SC_OPEN_MAX"))
    environment = {
        "PATH": f"{os.path.dirname(plan['python'])}:/usr/local/bin:/usr/bin:/bin",
        "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg", "MPLCONFIGDIR": f"{scratch}/matplotlib", "IPYTHONDIR": f"{scratch}/ipython",
    }  # fmt: skip
    start = f"import sys; sys.path.insert(0, {ours!r}); from guest import {plan['entry']}; {plan['entry']}.main()"
    os.execve(plan["python"], [plan["python"], "-I", "-B", "-c", start], environment)
