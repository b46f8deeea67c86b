"""What a sandbox uses, read from /proc from outside: the meter where there are no control groups."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

COUNTED = ("RssAnon:", "RssShmem:", "VmData:")
TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Measured:
    """`memory_bytes` is cheap and counts pages that forks share again for each; `exact_bytes()` does not, and costs more."""

    cpu_us: int = 0
    memory_bytes: int = 0
    data_bytes: int = 0  # of the guest that has most of what RLIMIT_DATA counts, resident or not
    tasks: int = 0  # processes and their threads
    each: dict[int, int] = field(default_factory=dict)

    def exact_bytes(self) -> dict[int, int]:
        """The proportional size of each guest, largest first; the agent, which is the first process, is none."""
        guests = {pid: _proportional(pid, cheap) for pid, cheap in list(self.each.items())[1:]}
        return dict(sorted(guests.items(), key=lambda guest: -guest[1]))


def _proportional(pid: int, otherwise: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:")), otherwise)
    except FileNotFoundError:
        return 0
    except OSError:  # it made itself unreadable: then it counts in full
        return otherwise


def measure(pid: int) -> Measured:
    """The sum over `pid`, which is the agent, and all its descendants; times in steps of the clock tick (10 ms)."""
    total = Measured()
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            with open(f"/proc/{one}/stat") as file:
                times = file.read().rpartition(")")[2].split()[11:15]
            with open(f"/proc/{one}/status") as file:
                sizes = {line.split(":")[0]: int(line.split()[1]) for line in file if line.startswith(COUNTED)}
            for task in os.listdir(f"/proc/{one}/task"):
                total.tasks += 1
                with open(f"/proc/{one}/task/{task}/children") as file:
                    waiting += map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
        total.cpu_us += sum(map(int, times)) * TICK_US
        if one != pid:
            total.data_bytes = max(total.data_bytes, sizes.get("VmData", 0) * 1024)
        total.each[one] = (
            sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
        ) * 1024  # with shared mappings, which no rlimit counts
        total.memory_bytes += total.each[one]
    return total
