"""The reduced mode from outside: where its sandboxes' folders lie, and how they are ended without a PID namespace.

A sandbox of it lives in the machine's own tree, on ground that only its uid may enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from guest import landlock, linux, seccomp
from node import root
from node.freezer import children
from node.uids import Block

INODES_PER_MIB = 64
HERE = Path(__file__).resolve().parent.parent


def impossible(own_uid: bool) -> str:
    """Why this machine cannot have the reduced mode; empty where it can."""
    abi = landlock.abi()
    if linux.MACHINE not in seccomp.ARCHITECTURES:
        return f"there is no system call table for {linux.MACHINE}."
    if not own_uid and abi < 6:
        return f"as an ordinary user it needs Landlock ABI 6 (Linux 6.12), and the kernel has {abi}; start as root."
    return "" if abi else "the kernel has no Landlock."


def clear(run_dir: Path) -> None:
    """Remove what an earlier node left."""
    with contextlib.suppress(FileNotFoundError):
        found = _base(run_dir).lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            _remove(_base(run_dir))


def _remove(folder: Path) -> None:
    """However deep it is: shutil.rmtree() gives up at a thousand folders in each other, with an exception."""
    subprocess.run(["/bin/rm", "-rf", "--", folder], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _base(run_dir: Path) -> Path:
    return Path(tempfile.gettempdir()) / f"sandgate-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:12]}"


class Ground:
    """Folders below the temporary one, since the run folder is nobody's but the node's. OSError where others are in the way."""

    def __init__(self, run_dir: Path, block: Block | None) -> None:
        self.block = block
        self.base = _base(run_dir)
        for folder in (self.base, self.base / "homes"):
            folder.mkdir()
            folder.chmod(0o711)
        (self.base / "gone").mkdir(mode=0o700)
        shutil.copytree(HERE / "guest", self.base / "ours/guest", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE.parent / "wire.py", self.base / "ours/wire.py")
        for path in (self.base / "ours", *(self.base / "ours").rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        self._own(self.base / "scratch", block.zygote if block else None)

    def _own(self, folder: Path, uid: int | None) -> str:
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)
        if uid is not None:
            os.chown(folder, uid, uid)
        return str(folder)

    def readable(self, prefixes: list[str]) -> list[str]:
        etc = [f"/etc/{name}" for name in root.SHOWN_OF_ETC]
        return [*prefixes, *etc, str(self.base / "ours")]

    def plan(self, prefixes: list[str]) -> dict[str, Any]:
        """What the launcher is told beside the usual."""
        return {
            "readable": self.readable(prefixes), "ours": str(self.base / "ours"), "scratch": str(self.base / "scratch"),
            "homes": str(self.base / "homes"),
        }  # fmt: skip

    def reachable(self, prefixes: list[str]) -> None:
        """OSError where an interpreter lies below a folder that the sandboxes' uids may not enter."""
        for prefix in prefixes if self.block is not None else ():
            for folder in (*reversed(Path(prefix).parents), Path(prefix)):
                if not folder.stat().st_mode & 0o001:
                    raise OSError(f"without namespaces {prefix} must be readable by all: chmod o+x {folder}")

    def make_home(self, name: str, uid: int | None) -> dict[str, Any]:
        """What the plan of one sandbox holds: its folders, and how many processes its uid has beside it."""
        home = self._own(self.base / "homes" / name, uid)
        tmp = self._own(Path(home) / ".tmp", uid)
        return {"home": home, "tmp": tmp, "others": 0 if uid is not None else _processes_of(os.getuid())}

    def remove_home(self, name: str) -> None:
        """Its processes are dead: nobody swaps anything. A guest chooses how long this takes, so nobody waits for it."""
        gone = self.base / "gone" / secrets.token_hex(8)
        with contextlib.suppress(FileNotFoundError):
            (self.base / "homes" / name).rename(gone)
            asyncio.get_running_loop().run_in_executor(None, _remove, gone)

    def is_over(self, name: str, disk_mib: int) -> bool:
        """Whether a sandbox holds more than this, or folders too deep to see. Follows no link; stops counting where it is clear."""
        size = count = 0
        try:
            for _, folders, files, at in os.fwalk(self.base / "homes" / name):
                for entry in (*folders, *files):
                    with contextlib.suppress(FileNotFoundError):
                        size += os.stat(entry, dir_fd=at, follow_symlinks=False).st_blocks * 512
                        count += 1
                if size > disk_mib << 20 or count > disk_mib * INODES_PER_MIB:
                    return True
        except RecursionError:
            return True
        except OSError as problem:  # it changes while it is counted
            return problem.errno == errno.EMFILE
        return False

    def remove(self) -> None:
        _remove(self.base)


def kill_sandbox(agent: int, uid: int | None) -> None:
    """All of it at once where it has a uid of its own, else by its tree."""
    if uid is None:
        kill_trees({agent})
        return
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)  # the kernel lets nobody fork meanwhile
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def kill_trees(pids: set[int]) -> None:
    """Stop all that descends from these until there is nobody new, then kill them: who is stopped does not fork."""
    stopped: set[int] = set()
    waiting = set(pids)
    while waiting:
        for pid in waiting:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGSTOP)
        stopped |= waiting
        waiting = {child for pid in stopped for child in children(pid)} - stopped
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _processes_of(uid: int) -> int:
    """Processes and threads of a user: what RLIMIT_NPROC counts."""
    found = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if folder.stat().st_uid == uid:
                    found += len(os.listdir(folder / "task"))
    return found
