"""The packages that sandboxes import: one environment per lock and template, never the product's own. Knows no Django.

    python -m executions.backends.local.environment UNDER BUILD [REQUIREMENT …]

makes one and exits with 0; or with 1, the reason on stderr and in the folder, where failed() finds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from executions.errors import BackendUnavailable

DEFAULT_LOCK = Path(__file__).with_name("data.txt")
NEEDED_BYTES = 1100 << 20
INSTALL_SECONDS = 900
RETRY_SECONDS = 600  # after which an environment that could not be made is tried again
UNUSED_SECONDS = 86_400


def python_of(under: Path, lock: Path = DEFAULT_LOCK, packages: Sequence[str] = (), build: int = 0) -> Path:
    """Where the interpreter of this environment lies, made or not: the lock, and what a template asks for beside it."""
    asked = json.dumps([*sorted(packages), build]).encode() if packages or build else b""
    digest = hashlib.sha256(lock.read_bytes() + sys.version.encode() + asked).hexdigest()
    return under / digest[:16] / "bin" / "python"


def is_made(under: Path, lock: Path = DEFAULT_LOCK, packages: Sequence[str] = (), build: int = 0) -> bool:
    return _stamp(python_of(under, lock, packages, build)).exists()


def failed(under: Path, packages: Sequence[str], build: int) -> str:
    """Why this environment could not be made, for some minutes; then it may be tried again. Empty where nothing failed."""
    said = _failure(python_of(under, packages=packages, build=build))
    try:
        return said.read_text() if time.time() - said.stat().st_mtime < RETRY_SECONDS else ""
    except FileNotFoundError:
        return ""


def make(
    under: Path,
    lock: Path = DEFAULT_LOCK,
    packages: Sequence[str] = (),
    build: int = 0,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """The interpreter of this environment, made now if it was not. Raises BackendUnavailable with a remedy."""
    python = python_of(under, lock, packages, build)
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
        say(f"Installing the sandboxes' packages into {home} (once, about 700 MB).")
        shutil.rmtree(home, ignore_errors=True)  # an earlier attempt that was cut short
        try:
            _install(python, lock, packages)
        except BackendUnavailable:
            shutil.rmtree(home, ignore_errors=True)
            raise
        _stamp(python).touch()
    return python


def sweep(under: Path, wanted: set[Path]) -> None:
    """Remove the environments that no template has had for a day, the longest that a sandbox made from one may live."""
    for python in wanted:
        with contextlib.suppress(OSError):
            os.utime(_stamp(python))
    for stamp in under.glob("*/made"):
        if time.time() - stamp.stat().st_mtime > UNUSED_SECONDS:
            shutil.rmtree(stamp.parent, ignore_errors=True)
            for other in under.glob(f"{stamp.parent.name}.*"):
                other.unlink(missing_ok=True)


def _failure(python: Path) -> Path:
    home = python.parent.parent
    return home.with_name(f"{home.name}.failed")


def _stamp(python: Path) -> Path:
    return python.parent.parent / "made"


def uv_environ() -> dict[str, str]:
    """The variables for uv: it trusts what this machine trusts (an organisation's own proxy, say), where that is known."""
    known = ssl.get_default_verify_paths()
    trusts = known.cafile or (known.capath and any(Path(known.capath).iterdir()))
    return {**os.environ, "UV_SYSTEM_CERTS": "true"} if trusts else dict(os.environ)


def _install(python: Path, lock: Path, packages: Sequence[str]) -> None:
    """The shipped lock, then what a template asks for, as wheels only: nothing of theirs runs here."""
    from uv import find_uv_bin

    base = getattr(sys, "_base_executable", sys.executable)
    home = python.parent.parent
    _run([find_uv_bin(), "--quiet", "--no-config", "venv", "--no-python-downloads", "--python", base, str(home)])
    pins = home / "shipped.txt"  # what the interpreter itself needs stays as it was locked
    pins.write_text(
        "".join(f"{pin}\n" for pin in re.findall(r"^([a-zA-Z0-9][^\s;]*==[^\s;]+)", lock.read_text(), re.M))
    )
    wheels = ["--only-binary", ":all:", "-c", str(pins), *packages]
    if packages:
        _pip(python, ["--dry-run", *wheels])  # what cannot be had is known before all the rest is installed
    _pip(python, ["--require-hashes", "-r", str(lock)])
    if packages:
        _pip(python, wheels)


def _pip(python: Path, arguments: list[str]) -> None:
    """With uv in seconds; with pip where uv cannot, as pip knows this machine's index, proxy and certificates."""
    from uv import find_uv_bin

    compiled = [] if "--dry-run" in arguments else ["--compile-bytecode"]
    try:
        _run(
            [find_uv_bin(), "--quiet", "--no-config", "pip", "install", *compiled, "--python", str(python), *arguments]
        )
    except BackendUnavailable as problem:
        quietly = ["--quiet", "--disable-pip-version-check"]
        try:
            _run([sys.executable, "-m", "pip", "--python", str(python), "install", *quietly, *arguments])
        except BackendUnavailable:
            raise problem from None  # uv says better why


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=uv_environ(),
            timeout=INSTALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise BackendUnavailable(f"The packages were not installed within {INSTALL_SECONDS} s.") from None
    if done.returncode:
        raise BackendUnavailable(
            f"The sandboxes' packages could not be installed.\n{done.stdout.strip()[-2000:]}",
            remedy="see that a package index can be reached (PIP_INDEX_URL, HTTPS_PROXY), then start again",
        )


if __name__ == "__main__":
    folder, number, wanted = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    try:
        make(folder, packages=wanted, build=number)
        _failure(python_of(folder, packages=wanted, build=number)).unlink(missing_ok=True)
    except (BackendUnavailable, OSError) as problem:
        words = problem.detail if isinstance(problem, BackendUnavailable) else str(problem)
        _failure(python_of(folder, packages=wanted, build=number)).write_text(words)
        sys.exit(words)
