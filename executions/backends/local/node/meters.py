"""What a sandbox uses, read from /proc from outside: the meter where there are no control groups."""

from __future__ import annotations

import os
from dataclasses import dataclass

TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Measured:
    cpu_us: int = 0
    memory_bytes: int = 0  # private pages: what forks share with the zygote is nobody's
    largest_guest: int = 0
    processes: int = 0


def measure(pid: int) -> Measured:
    """The sum over `pid` and all its descendants; times in steps of the kernel's clock tick (10 ms)."""
    total, largest = Measured(), 0
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            with open(f"/proc/{one}/stat") as file:
                times = file.read().rpartition(")")[2].split()[11:15]
            with open(f"/proc/{one}/statm") as file:
                _, resident, shared, *_ = map(int, file.read().split())
            for task in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{task}/children") as file:
                    waiting += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
        total.cpu_us += sum(map(int, times)) * TICK_US
        memory = (resident - shared) * PAGE
        total.memory_bytes += memory
        total.processes += 1
        if one != pid and memory > largest:
            largest, total.largest_guest = memory, one
    return total
