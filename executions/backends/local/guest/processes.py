"""Processes of the sandbox as its pid 1 sees them: forking guests, reaping everybody, finding descendants."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from . import walls

TICKS = os.sysconf("SC_CLK_TCK")


class Reaper:
    """Pid 1 inherits every orphan; whoever cares about an exit says so."""

    def __init__(self) -> None:
        self._watchers: dict[int, Callable[[int], None]] = {}
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    def watch(self, pid: int, ended: Callable[[int], None]) -> None:
        """Call `ended` with the wait status when this child has ended."""
        self._watchers[pid] = ended

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


def fork_guest(plan: dict, rules: int | None, become: Callable[[], Any]) -> int:
    """Fork a process that runs guest code through `become`, which never returns; its pid. OSError at the limit."""
    pid = os.fork()
    if pid:
        return pid
    try:
        asyncio._set_running_loop(None)
        walls.become_guest(plan, rules)
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


def now_ticks() -> int:
    """Now, in the unit and origin of a process's start time."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS)


def table() -> dict[int, tuple[int, int, int]]:
    """Every process: {pid: (parent, session, start in ticks)}."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            found[int(name)] = int(fields[1]), int(fields[3]), int(fields[19])
    return found


def descendants(pid: int, since: int = 0) -> set[int]:
    """What `pid` started, directly or not, and what shares its session; only what began at `since` or later."""
    processes = table()
    found = {pid}
    while True:
        more = {
            p for p, (parent, session, _) in processes.items() if p not in found and (parent in found or session == pid)
        }
        if not more:
            break
        found |= more
    return {p for p in found - {pid} if processes[p][2] >= since}


def kill(pids: set[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
