"""The first Python context of a sandbox, forked before the sandbox has a plan; when it gets one, it puts up its own walls."""

from __future__ import annotations

import json
import os
import socket

from . import processes, python_context, walls


class Nursling:
    """A process that waits to become a context; no guest code has run in it."""

    def __init__(self, program: bytes, rehearse: bool) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._ours.close()
                _wait(theirs, program, rehearse)
            finally:
                os._exit(70)
        theirs.close()

    def fileno(self) -> int:
        return self._ours.fileno()

    def become_context(self, plan: dict, cwd: str, environment: dict, rules: int | None, channels: list[int]) -> int:
        """Hand over the plan and the context's control socket, stdout and stderr; its pid."""
        message = json.dumps({"plan": plan, "cwd": cwd, "environment": environment}).encode()
        socket.send_fds(self._ours, [message], channels if rules is None else [*channels, rules])
        self._ours.close()
        return self.pid


def _wait(agent: socket.socket, program: bytes, rehearse: bool) -> None:
    if rehearse:
        python_context.rehearse()  # copies now the pages that a first cell would copy later
    message, descriptors, _, _ = socket.recv_fds(agent, 1 << 20, 4)
    if not message:
        return  # the sandbox was not needed
    given = json.loads(message)
    control, out, err, *rules = descriptors
    walls.restrict(given["plan"], set(descriptors), program)
    walls.become_guest(given["plan"], rules[0] if rules else None, python_context.DATA_MIB)
    os.dup2(out, 1)
    os.dup2(err, 2)
    processes.close_all_but(control)
    os.chdir(given["cwd"])
    python_context.run(socket.socket(fileno=control), given["environment"], given["plan"]["limits"])
