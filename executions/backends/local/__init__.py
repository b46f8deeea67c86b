"""The local runtime: sandboxes on this machine, made by the node that `command()` starts. See docs/local-runtime.md."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from executions.backends.local.backend import LocalBackend

__all__ = ["LocalBackend", "command", "look"]


def look() -> dict[str, Any]:
    """Try the walls on this machine, without a node: {"isolation", "walls"}. OSError where not even that is possible."""
    with tempfile.TemporaryDirectory(prefix="sandgate-look-") as folder:
        try:
            done = subprocess.run(
                [*command(folder, {}), "--look"], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
            )
            return json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError) as problem:
            raise OSError(f"the walls could not be tried: {problem}") from problem


def command(run_dir: str | Path, templates: dict[str, str]) -> list[str]:
    """The argv that starts the node, to which --die-with-parent may be added."""
    argv = [sys.executable, "-I", str(Path(__file__).parent / "node"), "--run-dir", str(run_dir)]
    for name, python in templates.items():
        argv += ["--template", f"{name}={python}"]
    return argv
