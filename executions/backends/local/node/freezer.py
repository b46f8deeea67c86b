"""Sandboxes that stand still: they use no CPU until they are thawed, and can be killed meanwhile.

Version 2 of control groups freezes a group as a whole. What version 1 has frozen cannot be killed before it is thawed, so
that a node that dies would leave it for ever: there, and without control groups, all its processes are stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from node.cgroups import Group

SECONDS = 5  # until all of it stands still
STILL = "TtZX"


class Freezer:
    """Of one sandbox; `agent` is the process from which all of it descends."""

    def __init__(self, agent: int, group: Group | None) -> None:
        self._agent = agent
        self._folder = group.folders["memory"] if group is not None and group.version == 2 else None
        self._stopped: list[int] = []  # parents before their children

    def freeze(self) -> None:
        """Returns when none of it runs. OSError where that cannot be had; then it runs as before."""
        try:
            if self._folder is not None:
                (self._folder / "cgroup.freeze").write_text("1")
                self._wait(lambda: "frozen 1" in (self._folder / "cgroup.events").read_text())  # type: ignore[operator]
            else:
                self._wait(self._stop)
        except OSError:
            self.thaw()
            raise

    def thaw(self) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):  # it has ended
                (self._folder / "cgroup.freeze").write_text("0")
        while self._stopped:  # children first: their parents do not see that they stood still
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self._stopped.pop(), signal.SIGCONT)

    def _wait(self, stands_still: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not stands_still():
            if time.monotonic() > deadline:
                raise OSError("the sandbox does not stand still")
            time.sleep(0.001)

    def _stop(self) -> bool:
        """Stop whoever runs; True when there was nobody. Who is stopped does not fork, so that this comes to an end."""
        everyone, waiting = [], [self._agent]
        while waiting:
            everyone += waiting
            waiting = [child for pid in waiting for child in children(pid)]
        running = [pid for pid in everyone if _state(pid) not in STILL]
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
            if pid not in self._stopped:
                self._stopped.append(pid)
        return not running


def children(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found |= set(map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()))
    return found


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
