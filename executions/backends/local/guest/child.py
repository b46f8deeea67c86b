"""Contexts whose interpreter is a child: it reads one line for each cell from descriptor 3 and answers on descriptor 4.

    result HEX            the value as text
    png HEX               a picture that the cell has drawn
    error HEX HEX HEX     name, value, traceback
    end [STATUS]          after everything else; a status that is not 0 is an error, too

HEX is the picture or the text's UTF-8 in hexadecimal digits, "-" where it is empty. What the cell prints goes to stdout and stderr
themselves; the child flushes them before it answers.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator

from .python_context import Channels

Scoped = Callable[[dict[str, str]], tuple[str, str]]  # code that sets variables, and code that puts them back


def as_hex(code: str) -> str:
    return code.encode().hex() or "-"


class Child:
    """The interpreter."""

    def __init__(self, argv: list[str], environment: dict[str, str], encode: Callable[[str], str] = as_hex) -> None:
        cells_read, self._cells = os.pipe()
        replies, replies_write = os.pipe()

        def descriptors() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            cells, answers = os.dup(cells_read), os.dup(replies_write)
            os.dup2(cells, 3)
            os.dup2(answers, 4)
            os.closerange(5, os.sysconf("SC_OPEN_MAX"))

        subprocess.Popen(argv, env=environment, preexec_fn=descriptors, close_fds=False)
        os.close(cells_read)
        os.close(replies_write)
        self._replies = os.fdopen(replies)
        self._encode = encode

    def evaluate(self, code: str) -> Iterator[dict[str, object]]:
        """The events of one cell but for its end; ends this process when the child has ended."""
        data = self._encode(code).encode() + b"\n"
        while data:
            data = data[os.write(self._cells, data) :]
        for line in self._replies:
            kind, *fields = line.split()
            if kind == "end":
                if fields and fields != ["0"]:
                    status = f"exit status {fields[0]}"
                    yield {"type": "error", "name": "ExitStatus", "value": status, "traceback": status}
                return
            if kind == "png":
                picture = base64.b64encode(bytes.fromhex(fields[0])).decode()
                yield {"type": "result", "main": False, "mime": {"image/png": picture}}
                continue
            texts = ["" if field == "-" else bytes.fromhex(field).decode("utf-8", "replace") for field in fields]
            if kind == "result":
                yield {"type": "result", "main": True, "mime": {"text/plain": texts[0]}}
            elif kind == "error":
                yield {"type": "error", **dict(zip(("name", "value", "traceback"), texts, strict=True))}
        os._exit(1)  # the agent starts another


def run(control: socket.socket, child: Child, scoped: Scoped) -> None:
    """Run cells in the child until the agent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the child's
    channels = Channels(control)
    say = channels.send
    count = 0
    with control.makefile("rb") as requests:
        for line in requests:
            request = json.loads(line)
            count += 1
            say(type="count", execution_count=count)
            channels.wait_for_others(-1)  # for none of them: the child does not look
            do, undo = scoped(request["env"])
            for code, audible in ((do, False), (request["code"], True), (undo, False)):
                for event in child.evaluate(code) if code or audible else ():
                    if audible:
                        say(**event)
            say(type="end")
    os._exit(0)
