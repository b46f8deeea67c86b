"""The languages of a sandbox, and the one contract that each of them keeps.

A language is a function `run(control, environment, limits)` that never returns. It is called in a fork that is already a
guest, in the context's folder, with stdout and stderr in place. From `control` it reads a line of JSON for each cell:
{"code", "env", "language"}; `env` holds for that cell. To `control` it writes lines of JSON: {"type": "count",
"execution_count"}, {"type": "result", "main", "mime"}, {"type": "error", "name", "value", "traceback"}, also {"type":
"stdout" or "stderr", "text"}, and after everything that the cell has said {"type": "end"}. SIGINT ends the running cell;
what does not end by it is killed, and the context starts anew. When `control` closes it ends.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace

from . import bash_context, java_context, javascript_context, python_context, r_context, walls

Run = Callable[[socket.socket, dict[str, str], dict[str, int]], None]


@dataclass(frozen=True)
class Language:
    run: Run
    missing: Callable[[], str] = lambda: ""  # why it cannot be had here, and how it can; "" where it can
    has_child: bool = False  # it runs cells in a process of its own, and none before its count has been read
    like: str = ""  # the language whose default context it shares
    data_mib: int = walls.DATA_MIB  # of RLIMIT_DATA at least, which holds where there are no control groups


JAVASCRIPT = Language(javascript_context.run, javascript_context.missing)
LANGUAGES = {
    "python": Language(python_context.run, data_mib=python_context.DATA_MIB),
    "bash": Language(bash_context.run, has_child=True),
    "javascript": JAVASCRIPT,
    "typescript": replace(JAVASCRIPT, like="javascript"),
    "java": Language(java_context.run, java_context.missing, has_child=True, data_mib=4096),
    "r": Language(r_context.run, r_context.missing, has_child=True),
}
ALIASES = {"python3": "python", "py": "python", "sh": "bash", "js": "javascript", "ts": "typescript"}

absent: dict[str, str] = {}  # language: why; looked up once, in the zygote


def look() -> list[str]:
    """The languages that can be had in this root; remembers why others cannot."""
    absent.update({name: why for name, language in LANGUAGES.items() if (why := language.missing())})
    return [name for name in LANGUAGES if name not in absent]
