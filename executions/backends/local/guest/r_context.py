"""An R context: the machine's R, driven by cells.R."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

from . import child

PROGRAM = Path(__file__).with_name("cells.R")


def missing() -> str:
    if shutil.which("Rscript"):
        return ""
    return "R is not installed on this machine: apt-get install -y r-base-core, then start the node again."


def _scoped(env: dict[str, str]) -> tuple[str, str]:
    if not env:
        return "", ""
    names = ", ".join(map(_quoted, env))
    values = ", ".join(f"{_quoted(name)} = {_quoted(value)}" for name, value in env.items())
    do = f".sandgate_was <- Sys.getenv(c({names}), NA, names = TRUE); do.call(Sys.setenv, list({values}))"
    undo = (
        "local({gone <- is.na(.sandgate_was); Sys.unsetenv(names(.sandgate_was)[gone]); "
        "if (!all(gone)) do.call(Sys.setenv, as.list(.sandgate_was[!gone]))}); rm(.sandgate_was)"
    )
    return f"invisible({{{do}}})", f"invisible({{{undo}}})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\\/", "/")


def run(control: socket.socket, environment: dict[str, str], limits: dict[str, int]) -> None:
    """Run cells until the agent hangs up. The process is already a guest."""
    argv = [shutil.which("Rscript") or "Rscript", "--vanilla", str(PROGRAM)]
    child.run(control, child.Child(argv, environment), _scoped)
