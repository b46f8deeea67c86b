"""A bash context: one persistent shell; each cell is evaluated in it, its status is an error event when not 0."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess

from .python_context import Channels

# The shell reads each cell from descriptor 3 as base64, with what undoes its environment, and answers with the status
# on descriptor 4.
LOOP = r"""
trap ':' INT
while IFS=' ' read -r __cell __undo <&3; do
  eval "$(base64 -d <<<"$__cell")" 3<&- 4>&-
  __status=$?
  eval "$(base64 -d <<<"$__undo")"
  echo "$__status" >&4
done
"""


def run(control: socket.socket, environment: dict[str, str]) -> None:
    """Run cells until the agent hangs up. The process is already a guest."""
    import base64

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cells_read, cells_write = os.pipe()
    status_read, status_write = os.pipe()

    def descriptors() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        a, b = os.dup(cells_read), os.dup(status_write)
        os.dup2(a, 3)
        os.dup2(b, 4)
        os.closerange(5, os.sysconf("SC_OPEN_MAX"))

    subprocess.Popen(["/bin/bash", "-c", LOOP], env=environment, preexec_fn=descriptors, close_fds=False)
    os.close(cells_read)
    os.close(status_write)
    statuses = os.fdopen(status_read)
    count = 0

    say = Channels(control).send
    with control.makefile("rb") as requests:
        for line in requests:
            request = json.loads(line)
            count += 1
            say(type="count", execution_count=count)
            do, undo = _environment(request["env"])
            words = [base64.b64encode(text.encode()) for text in (do + request["code"], undo or ":")]
            os.write(cells_write, b" ".join(words) + b"\n")
            status = statuses.readline().strip()
            if not status:
                os._exit(1)  # the shell has ended: the agent starts another
            if status != "0":
                say(type="error", name="ExitStatus", value=f"exit status {status}", traceback=f"exit status {status}")
            say(type="end")
    os._exit(0)


def _environment(env: dict[str, str]) -> tuple[str, str]:
    """What sets these variables in the shell, and what puts them back as they were."""
    do, undo = [], []
    for n, (name, value) in enumerate(env.items()):
        do.append(f"__had{n}=${{{name}+${{{name}@a}}.}} __was{n}=${{{name}-}}; export {name}={_quoted(value)}\n")
        undo.append(
            f"if [[ $__had{n} ]]; then {name}=$__was{n}; [[ $__had{n} == *x* ]] || export -n {name}; else unset {name}; fi\n"
            f"unset __had{n} __was{n}\n"
        )
    return "".join(do), "".join(undo)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
