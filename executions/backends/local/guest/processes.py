"""Processes of the sandbox as its pid 1 sees them: forking guests, reaping everybody, finding descendants."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from . import linux, walls

TICKS = os.sysconf("SC_CLK_TCK")
FUTEX = {"x86_64": "202", "aarch64": "98"}.get(linux.MACHINE, "")
SWEEPS = (0.001,) * 10 + (0.01,) * 20  # pauses in seconds


class Reaper:
    """Pid 1 inherits every orphan; whoever cares about an exit says so."""

    def __init__(self) -> None:
        self._watchers: dict[int, Callable[[int], None]] = {}
        self.roots: set[int] = set()  # all that the agent has ever started for guests: a session outlives its leader
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    def watch(self, pid: int, ended: Callable[[int], None]) -> None:
        """Call `ended` with the wait status when this child has ended."""
        self._watchers[pid] = ended
        self.roots.add(pid)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if ended := self._watchers.pop(pid, None):
                ended(status)


def fork_guest(plan: dict, rules: int | None, become: Callable[[], Any], data_mib: int = walls.DATA_MIB) -> int:
    """Fork a process that runs guest code through `become`, which never returns; its pid. OSError at the limit."""
    pid = os.fork()
    if pid:
        return pid
    try:
        asyncio._set_running_loop(None)
        walls.become_guest(plan, rules, data_mib)
        become()
    except BaseException:
        os.write(2, traceback.format_exc(limit=-3).encode())
    _exit()


def close_all_but(descriptor: int) -> None:
    """Keep the three standard streams and this one."""
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))


def _exit() -> NoReturn:
    os._exit(70)


Moment = tuple[int, int]  # a process's start time (in ticks of 10 ms since boot) and its pid: they order all processes


def now() -> Moment:
    """Every process that exists is at or before it, every later one behind it."""
    with open("/proc/loadavg") as file:
        last_pid = int(file.read().rpartition(" ")[2])  # of this namespace
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS), last_pid


def table() -> dict[int, tuple[int, int, int]]:
    """Every process that lives: {pid: (parent, session, start in ticks)}."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in "ZX":
                found[int(name)] = int(fields[1]), int(fields[3]), int(fields[19])
    return found


def descendants(pid: int, processes: dict[int, tuple[int, int, int]] | None = None) -> set[int]:
    """What `pid` started, directly or not, and what shares its session."""
    processes = table() if processes is None else processes
    found = {pid}
    while True:
        more = {
            p for p, (parent, session, _) in processes.items() if p not in found and (parent in found or session == pid)
        }
        if not more:
            return found - {pid}
        found |= more


def started_by(pid: int, since: Moment, roots: set[int]) -> set[int]:
    """What a run of `pid` has started since then, however it hid: all that began later and is nobody else's.

    `roots` are the processes that the agent has started. A daemon in a session of its own has lost its parent, so it
    is told by its age: what stems from another root, or from a process that is older than the run, is not the run's.
    """
    processes = table()
    spared = {os.getpid(), pid}
    for root in roots - {pid}:
        spared |= {root} | descendants(root, processes)
    new = {p for p, (_, _, start) in processes.items() if (start, p) > since and p not in spared}
    old = set(processes) - new - {os.getpid(), pid}
    while more := {p for p in new if processes[p][0] in old}:
        new, old = new - more, old | more
    return new


def kill(pids: set[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


async def extinguish(find: Callable[[], set[int]]) -> None:
    """Kill what `find` finds until it finds nothing; what forks faster than it is found takes all guests along."""
    for pause in SWEEPS:
        if not (found := find()):
            return
        kill(found)
        await asyncio.sleep(pause)
    os.kill(-1, signal.SIGKILL)  # the kernel lets nobody fork meanwhile; pid 1 is not meant


def new_threads(pid: int, since: Moment) -> list[bool]:
    """Of each thread that began since then, whether it is at work just now, and does not wait for a lock."""
    found = []
    for task in (name for name in _names(f"/proc/{pid}/task") if int(name) != pid):
        try:
            with open(f"/proc/{pid}/task/{task}/stat") as file:
                start = int(file.read().rpartition(")")[2].split()[19])
            with open(f"/proc/{pid}/task/{task}/syscall") as file:
                call = file.read().split()[0]
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        if (start, int(task)) > since:
            found.append(call != FUTEX)
    return found


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
