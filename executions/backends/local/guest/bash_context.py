"""A bash context: one persistent shell; each cell is evaluated in it, its status is an error event when not 0."""

from __future__ import annotations

import socket

from . import child

# Cells come as \x.. for printf, so that none needs a process to be read.
LOOP = r"""
trap ':' INT
while IFS= read -r __cell <&3; do
  printf -v __cell %b "$__cell"
  eval "$__cell" 3<&- 4>&-
  echo "end $?" >&4
done
"""


def _escaped(code: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in code.encode())


def _scoped(env: dict[str, str]) -> tuple[str, str]:
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


def run(control: socket.socket, environment: dict[str, str], limits: dict[str, int]) -> None:
    """Run cells until the agent hangs up. The process is already a guest."""
    shell = child.Child(["/bin/bash", "-c", LOOP], environment, _escaped)
    child.run(control, shell, _scoped)
