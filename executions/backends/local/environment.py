"""The packages that sandboxes import: one environment per lock, never the product's own. Knows no Django."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from executions.errors import BackendUnavailable

DEFAULT_LOCK = Path(__file__).with_name("data.txt")
NEEDED_BYTES = 900 << 20


def python_of(under: Path, lock: Path = DEFAULT_LOCK) -> Path:
    """Where the interpreter of this lock's environment lies, made or not."""
    digest = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()
    return under / digest[:16] / "bin" / "python"


def is_made(under: Path, lock: Path = DEFAULT_LOCK) -> bool:
    return _stamp(python_of(under, lock)).exists()


def make(under: Path, lock: Path = DEFAULT_LOCK, say: Callable[[str], object] = lambda line: None) -> Path:
    """The interpreter of this lock's environment, made now if it was not. Raises BackendUnavailable with a remedy."""
    python = python_of(under, lock)
    if _stamp(python).exists():
        return python
    home = python.parent.parent
    under.mkdir(parents=True, exist_ok=True)
    with open(under / f"{home.name}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # two starts at once: the second waits and finds it made
        if _stamp(python).exists():
            return python
        if shutil.disk_usage(under).free < NEEDED_BYTES:
            raise BackendUnavailable(
                f"The disk is too full for the sandboxes' packages: {NEEDED_BYTES >> 20} MB are needed in {under}.",
                remedy=f"df -h {under}   (free some, or name another folder: export SANDGATE_DATA=/path)",
            )
        say(f"Installing the sandboxes' packages into {home} (once, about 500 MB).")
        shutil.rmtree(home, ignore_errors=True)  # an earlier attempt that was cut short
        _install(python, lock)
        _stamp(python).touch()
    return python


def _stamp(python: Path) -> Path:
    return python.parent.parent / "made"


def uv_environ() -> dict[str, str]:
    """The variables for uv: it trusts what this machine trusts (an organisation's own proxy, say), where that is known."""
    known = ssl.get_default_verify_paths()
    trusts = known.cafile or (known.capath and any(Path(known.capath).iterdir()))
    return {**os.environ, "UV_SYSTEM_CERTS": "true"} if trusts else dict(os.environ)


def _install(python: Path, lock: Path) -> None:
    """With uv in seconds; with pip where uv cannot, as pip knows this machine's index, proxy and certificates."""
    from uv import find_uv_bin

    base = getattr(sys, "_base_executable", sys.executable)
    uv, pip = [find_uv_bin(), "--quiet", "--no-config"], [sys.executable, "-m", "pip", "--python", str(python)]
    hashes = ["--require-hashes", "-r", str(lock)]
    _run([*uv, "venv", "--no-python-downloads", "--python", base, str(python.parent.parent)])
    try:
        _run([*uv, "pip", "install", "--compile-bytecode", "--python", str(python), *hashes])
    except BackendUnavailable:
        _run([*pip, "install", "--quiet", "--disable-pip-version-check", *hashes])


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=uv_environ(),
    )
    if done.returncode:
        raise BackendUnavailable(
            f"The sandboxes' packages could not be installed.\n{done.stdout.strip()[-2000:]}",
            remedy="see that a package index can be reached (PIP_INDEX_URL, HTTPS_PROXY), then start again",
        )
