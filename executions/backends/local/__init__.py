"""The local runtime: sandboxes on this machine, made by the node that `command()` starts. See docs/local-runtime.md."""

from __future__ import annotations

import sys
from pathlib import Path

from executions.backends.local.backend import LocalBackend

__all__ = ["LocalBackend", "command"]


def command(run_dir: str | Path, templates: dict[str, str]) -> list[str]:
    """The argv that starts the node, to which --die-with-parent may be added."""
    argv = [sys.executable, "-I", str(Path(__file__).parent / "node"), "--run-dir", str(run_dir)]
    for name, python in templates.items():
        argv += ["--template", f"{name}={python}"]
    return argv
