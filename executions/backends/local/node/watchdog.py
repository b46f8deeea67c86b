"""The memory of one sandbox, looked at from outside where no control group limits it: who takes too much is killed in time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from node import meters
from node.unborn import Unborn

LOOK_SECONDS = (0.01, 0.1)  # between two looks
GROWTH_BYTES = 4 << 30  # what one processor can fill at most in a second; measured were 1.7 GiB, of sockets 3
TOLERANCE_BYTES = 16 << 20  # of not knowing how much is used
FEW = 4  # processes, at which a close look for the record costs little
PATIENCE = 25  # looks in a row at too much memory, however many guests were killed; then the sandbox ends


class Watchdog:
    """`heard` is told at each look what is used at most, and the largest of what RLIMIT_DATA counts."""

    def __init__(self, process: Unborn, limits: dict[str, Any], heard: Callable[[int, int], None]) -> None:
        self.look_at = 0.0  # when the next look is due, by the monotonic clock
        self.kills = self._most_processes = 0
        self._process, self._heard = process, heard
        self._limit, self._cpu_count = limits["memory_mib"] << 20, limits["cpu_count"]
        self._account = meters.Account()
        self._tasks: list[str] = []
        self._ran_ns = self._left_bytes = self._too_much = 0
        self._killed: set[int] = set()
        self._stopped: list[int] = []

    def measure(self) -> meters.Measured:
        measured = meters.measure(self._process.pid, own_network=not self._process.reduced)
        self._most_processes = max(self._most_processes, len(measured.tasks))
        return measured

    def most_processes(self) -> int:
        return self._most_processes

    def look(self) -> bool:
        """Look, if somebody has run, and kill the largest guests until the rest fits. False when there is too much all the same.

        The next look is due before one that fills memory as fast as it can has filled what is left.
        """
        if self._too_much or not self._ran_ns or meters.ran_ns(self._tasks) != self._ran_ns:
            measured = self.measure()
            self._tasks, self._ran_ns = measured.tasks, measured.ran_ns
            self._too_much = self._too_much + 1 if self._kill_beyond(measured) else 0
        least, most = LOOK_SECONDS
        self.look_at = time.monotonic() + min(most, max(least, self._left_bytes / GROWTH_BYTES / self._cpu_count))
        return self._too_much < PATIENCE

    def _kill_beyond(self, measured: meters.Measured) -> bool:
        """Whether more is used than allowed. Then all guests stand still until who was killed is gone."""
        sizes = self.account_for(measured, stop=True)
        used = sum(sizes.values())
        self._killed &= sizes.keys()
        to_stay = used - sum(sizes[pid] for pid in self._killed)
        for pid in sorted(list(sizes)[1:], key=lambda pid: -sizes[pid]):  # the agent is none of them
            if to_stay <= self._limit:
                break
            if pid not in self._killed:
                to_stay -= sizes[pid]
                self.kills += 1
                self._killed.add(pid)
                _signal(pid, signal.SIGKILL)
        self._stop(measured) if used > self._limit else self._go_on()
        return used > self._limit

    def account_for(self, measured: meters.Measured, stop: bool = False) -> dict[int, int]:
        """What each process has at least; looks closely where bounds are too far apart to say whether all have too much."""
        kernel = measured.kernel_bytes(measured.socket_bytes(self._process.diag))
        in_kernel = sum(kernel.values())
        self._account.see(measured)
        own, most = self._account.least_bytes(measured), self._account.most_bytes(measured)
        beyond = most + in_kernel > self._limit >= sum(own.values()) + in_kernel
        few = len(measured.each) <= FEW
        if (few or beyond) and most - sum(own.values()) > (TOLERANCE_BYTES if few else self._limit // 8):
            if stop and beyond:
                self._stop(measured)
            self._account.look_closely(measured)
            own, most = self._account.least_bytes(measured), self._account.most_bytes(measured)
        self._left_bytes = self._limit - most - in_kernel
        self._heard(most + in_kernel, measured.data_bytes)
        return {pid: own[pid] + kernel[pid] for pid in measured.each}

    def _stop(self, measured: meters.Measured) -> None:
        """Guests get no further; who has stopped himself goes on being so."""
        for pid, one in list(measured.each.items())[1:]:
            if not one.stopped and pid not in self._stopped:
                self._stopped.append(pid)
                _signal(pid, signal.SIGSTOP)

    def _go_on(self) -> None:
        while self._stopped:
            _signal(self._stopped.pop(), signal.SIGCONT)  # children before parents, who then see nothing of it


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
