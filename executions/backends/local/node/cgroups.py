"""Control groups, as root or where a user was given some: hard limits and honest meters of one sandbox, on version 1 and version 2."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

V1_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct")
V2_CONTROLLERS = ("memory", "pids", "cpu")
ASIDE = "sandgate.aside"  # the group of those who stepped aside
ROUNDS = 10  # for who forks while the processes of a group step aside
PERIOD_US = 100_000
PEAKS = ("memory.max_usage_in_bytes", "memory.peak")  # of version 1 and 2


@dataclass(slots=True)
class Group:
    """The folders of one sandbox; one for version 2, one a controller for version 1."""

    folders: dict[str, Path]
    version: int
    _meters: dict[str, int] = field(default_factory=dict)  # files that are read at every run stay open

    def _write(self, controller: str, name: str, value: object) -> None:
        (self.folders[controller] / name).write_text(str(value))

    def _read(self, controller: str, name: str) -> bytes:
        """A meter as it stands now. FileNotFoundError where this kernel does not have it."""
        if name not in self._meters:
            path = self.folders[controller] / name
            try:
                self._meters[name] = os.open(path, (os.O_RDWR if name in PEAKS else os.O_RDONLY) | os.O_CLOEXEC)
            except FileNotFoundError:
                raise
            except OSError:  # this kernel cannot reset it
                self._meters[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._meters[name], 4096, 0)

    def limit(self, *, memory_bytes: int, processes: int, cpu_count: float) -> None:
        quota = int(cpu_count * PERIOD_US)
        if self.version == 2:
            self._write("memory", "memory.max", memory_bytes)
            self._write("memory", "memory.swap.max", 0) if (
                self.folders["memory"] / "memory.swap.max"
            ).exists() else None
            self._write("memory", "memory.oom.group", 0)
            self._write("cpu", "cpu.max", f"{quota} {PERIOD_US}")
        else:
            self._write("memory", "memory.limit_in_bytes", memory_bytes)
            self._write("cpu", "cpu.cfs_quota_us", quota)
        self._write("pids", "pids.max", processes)

    def add(self, pid: int) -> None:
        for folder in set(self.folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    def cpu_us(self) -> int:
        if self.version == 2:
            return int(self._read("cpu", "cpu.stat").split()[1])
        return int(self._read("cpuacct", "cpuacct.usage")) // 1000

    def peak_memory_bytes(self) -> int:
        """Since the last reset, where the kernel can reset it."""
        try:
            return int(self._read("memory", PEAKS[self.version - 1]))
        except FileNotFoundError:  # memory.peak came with Linux 5.19
            return int(self._read("memory", "memory.current"))

    def reset_peak(self) -> None:
        """For who reads through the same descriptor, in version 2; from Linux 6.12 on: before, the peak is the sandbox's."""
        with contextlib.suppress(OSError, KeyError):
            os.pwrite(self._meters[PEAKS[self.version - 1]], b"0", 0)

    def memory_kills(self) -> int:
        """How many processes were killed because memory was used up."""
        words = self._read("memory", "memory.events" if self.version == 2 else "memory.oom_control").split()
        return int(words[words.index(b"oom_kill") + 1]) if b"oom_kill" in words else 0

    def most_processes(self) -> int:
        for name in ("pids.peak", "pids.current"):  # the first came with Linux 6.1
            try:
                return int(self._read("pids", name))
            except FileNotFoundError:
                continue
        return 0

    def kill(self) -> None:
        """Kill whoever is inside: what a node left that died."""
        for folder in set(self.folders.values()):
            if (folder / "cgroup.kill").exists():  # version 2, from Linux 5.14 on: all at once
                (folder / "cgroup.kill").write_text("1")
                continue
            if (folder / "cgroup.freeze").exists():
                (folder / "cgroup.freeze").write_text("1")  # who is frozen does not fork, and can be killed
            for pid in (folder / "cgroup.procs").read_text().split():
                try:
                    os.kill(int(pid), 9)
                except ProcessLookupError:
                    pass

    def remove(self) -> None:
        """Remove the folders. OSError while processes are inside."""
        while self._meters:
            os.close(self._meters.popitem()[1])
        for folder in set(self.folders.values()):
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass


class Tree:
    """This node's folders in the control groups. OSError, with the reason, where they cannot be made."""

    def __init__(self, name: str, mounts: str = "/sys/fs/cgroup") -> None:
        base = Path(mounts)
        self.version = 2 if (base / "cgroup.controllers").exists() else 1
        if self.version == 2:
            self.parents = {"": base / f"sandgate-{name}"}
            divide(base)
        else:
            self.parents = {c: base / c / f"sandgate-{name}" for c in V1_CONTROLLERS}
        self._claim = _claimed(name)
        if self._claim is None:
            raise OSError(f"another node uses the groups of {name}")
        sweep(base, self.version)
        self.remove_leftovers()
        for parent in self.parents.values():
            parent.mkdir(exist_ok=True)
            if self.version == 2:
                divide(parent)

    def _group(self, name: str) -> Group:
        if self.version == 2:
            folder = self.parents[""] / name
            return Group(dict.fromkeys(("memory", "pids", "cpu"), folder), 2)
        return Group({c: parent / name for c, parent in self.parents.items()}, 1)

    def create(self, name: str) -> Group:
        group = self._group(name)
        for folder in set(group.folders.values()):
            folder.mkdir(exist_ok=True)
        return group

    def remove_leftovers(self) -> None:
        """Kill and remove what an earlier node of this name left."""
        names = {
            child.name
            for parent in self.parents.values()
            if parent.is_dir()
            for child in parent.iterdir()
            if child.is_dir()
        }
        for name in names:
            group = self._group(name)
            group.folders = {c: f for c, f in group.folders.items() if f.is_dir()}
            deadline = time.monotonic() + 3
            while True:
                group.kill()
                try:
                    group.remove()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)

    def remove(self) -> None:
        self.remove_leftovers()
        for parent in self.parents.values():
            if parent.is_dir():
                parent.rmdir()


def divide(base: Path, controllers: tuple[str, ...] = V2_CONTROLLERS) -> None:
    """Let children of this group of version 2 have controllers. OSError where that is not possible.

    A group that divides what it has holds no processes, the machine's root aside: those in it step into a child first.
    """
    for _ in range(ROUNDS):
        try:
            (base / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
            return
        except OSError as problem:
            if problem.errno != errno.EBUSY:
                raise
        aside = base / ASIDE
        aside.mkdir(exist_ok=True)
        for pid in (base / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                (aside / "cgroup.procs").write_text(pid)
    raise OSError(errno.EBUSY, f"new processes come into {base} again and again")


def delegated(mount: str = "/sys/fs/cgroup", controllers: tuple[str, ...] = V2_CONTROLLERS) -> str:
    """The folder of this process's own group in version 2 where its user may divide it (systemd's Delegate=yes), else ""."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line[3:] for line in lines if line.startswith("0::")), "")
        folder = f"{mount}{own.removesuffix(f'/{ASIDE}')}"  # where an earlier node has put us
        has = Path(folder, "cgroup.controllers").read_text().split()
        writable = (f"{folder}/{name}" for name in ("", "cgroup.procs", "cgroup.subtree_control"))
        if set(controllers) <= set(has) and all(os.access(path, os.W_OK) for path in writable):
            return folder
    return ""


def _claimed(name: str) -> socket.socket | None:
    """A claim to the groups of this name, which the kernel lets go of with the process; None where a live node has it."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0sandgate-groups-{name}")
    except OSError:
        claim.close()
        return None
    return claim


def sweep(base: Path, version: int, *, unused_seconds: float = 3600) -> None:
    """Remove the empty groups of nodes that were killed and never started again."""
    for top in (base,) if version == 2 else (base / controller for controller in V1_CONTROLLERS):
        for folder in top.glob("sandgate-*"):
            if time.time() - folder.stat().st_mtime < unused_seconds:
                continue
            if (claim := _claimed(folder.name.removeprefix("sandgate-"))) is None:
                continue
            with claim, contextlib.suppress(OSError):  # not empty: then it is somebody's after all
                for child in [*(path for path in folder.iterdir() if path.is_dir()), folder]:
                    child.rmdir()
