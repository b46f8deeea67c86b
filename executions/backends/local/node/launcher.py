"""Starts one template's zygote: outer namespaces, the minimal root, an unprivileged uid, then exec. One process each.

    python -I …/node launch '{"python": …, "prefixes": […], "root": …, "uid": …, "control": …}'

It stays as the zygote's parent: when the node dies it is killed, and takes the zygote (pid 1 of its namespace) along.
"""

from __future__ import annotations

import json
import os
import signal
import socket

from guest import linux
from node import root

CONTROL = 3  # the zygote's socket to the node
OUTER = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS


def main(argument: str) -> int:
    plan = json.loads(argument)
    if plan["control"] != CONTROL:
        os.dup2(plan["control"], CONTROL)
        os.close(plan["control"])
    control = socket.socket(fileno=CONTROL)
    os.umask(0o022)
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
    root.build(plan["root"], plan["prefixes"])
    if plan["uid"] is not None:
        os.setgroups([])
        os.setresgid(plan["uid"], plan["uid"], plan["uid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # a change of uid cleared it
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    os.setsid()
    os.set_inheritable(CONTROL, True)
    os.closerange(CONTROL + 1, os.sysconf("SC_OPEN_MAX"))
    environment = {
        "PATH": f"{os.path.dirname(plan['python'])}:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/run", "TMPDIR": "/run", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg", "MPLCONFIGDIR": "/run/matplotlib", "IPYTHONDIR": "/run/ipython",
    }  # fmt: skip
    start = f"import sys; sys.path.insert(0, {root.OURS!r}); from guest import zygote; zygote.main()"
    os.execve(plan["python"], [plan["python"], "-I", "-B", "-c", start], environment)
