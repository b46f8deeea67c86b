"""Starts one template's zygote: outer namespaces, the minimal root, an unprivileged uid, then exec. One process each.

    python -I …/node launch '{"python": …, "prefixes": […], "root": …, "uid": …, "control": …}'

It stays as the zygote's parent: when the node dies it is killed, and takes the zygote (pid 1 of its namespace) along.
"""

from __future__ import annotations

import json
import os
import signal

from guest import linux
from node import root

OUTER = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS


def main(argument: str) -> int:
    plan = json.loads(argument)
    os.umask(0o022)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if plan["uid"] is None:  # an ordinary user needs a user namespace for the rest
        uid, gid = os.getuid(), os.getgid()
        linux.unshare(linux.CLONE_NEWUSER | OUTER)
        for name, line in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    else:
        linux.unshare(OUTER)
    child = os.fork()
    if child == 0:
        try:
            _become_zygote(plan)
        except BaseException as problem:
            os.write(2, f"The sandbox root could not be built: {problem!r}\n".encode())
        os._exit(1)
    os.close(plan["control"])
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) & 0xFF


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
    if plan["control"] != 3:
        os.dup2(plan["control"], 3)
    os.set_inheritable(3, True)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    environment = {
        "PATH": f"{os.path.dirname(plan['python'])}:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/run", "TMPDIR": "/run", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg", "MPLCONFIGDIR": "/run/matplotlib", "IPYTHONDIR": "/run/ipython",
    }  # fmt: skip
    start = f"import sys; sys.path.insert(0, {root.OURS!r}); from guest import zygote; zygote.main()"
    os.execve(plan["python"], [plan["python"], "-I", "-B", "-c", start], environment)
