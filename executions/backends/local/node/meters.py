"""What a sandbox uses, read from /proc from outside: the meter where there are no control groups."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass, field

from node import sockets

COUNTED = ("RssAnon:", "VmPTE:", "VmData:")
TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SOCKET_BYTES, FEW_SOCKETS = sockets.most_bytes(), 32
DESCRIPTOR_BYTES = 8 << 10  # what a pipe or file keeps in the kernel at most, for each descriptor; sockets keep more


@dataclass(slots=True)
class Process:
    resident_bytes: int  # of its own memory; what forks share counts for each. Files in memory are limited as a disk
    faults: int  # since it was forked: each gave it one page at most, as it has no huge ones
    kernel_bytes: int  # page tables, and what its descriptors keep
    stopped: bool
    descriptors: int

    @property
    def private_bytes(self) -> int:
        """At most."""
        return min(self.resident_bytes, self.faults * PAGE_BYTES)


@dataclass(slots=True)
class Measured:
    cpu_us: int = 0
    ran_ns: int = 0  # 0 where the kernel does not say
    data_bytes: int = 0  # of the guest that has most of what RLIMIT_DATA counts, resident or not
    tasks: list[str] = field(default_factory=list)  # processes and their threads, as folders of /proc
    each: dict[int, Process] = field(default_factory=dict)  # the agent first
    sockets: int = 0

    def socket_bytes(self, diag: socket.socket | None) -> int:
        """What sockets keep; at most, where they are few or cannot be asked."""
        if diag is not None and self.sockets > FEW_SOCKETS:
            with contextlib.suppress(OSError):
                return sockets.held_bytes(diag)
        return self.sockets * SOCKET_BYTES

    def kernel_bytes(self, in_sockets: int) -> dict[int, int]:
        """What the kernel keeps for each; what is in sockets is said to be theirs who have the most descriptors."""
        agent, *guests = self.each
        descriptors = sum(self.each[pid].descriptors for pid in guests)
        shares = {pid: in_sockets * self.each[pid].descriptors // max(1, descriptors) for pid in guests}
        shares[agent] = in_sockets if not descriptors else 0
        return {pid: one.kernel_bytes + shares[pid] for pid, one in self.each.items()}


@dataclass(slots=True)
class Mark:
    """A process when it was first seen, or looked at closely: then `size_bytes` is its share of what it has."""

    resident_bytes: int
    faults: int = 0
    size_bytes: int = 0


class Account:
    """Between which bounds the memory of a sandbox lies, from what is cheap to read: what is mapped and how often it faulted.

    Forks share what their parent had, so that only what each has got since counts. A close look makes the bounds meet.
    """

    def __init__(self) -> None:
        self._known_bytes = 0
        self._marks: dict[int, Mark] = {}

    def see(self, measured: Measured) -> None:
        """Mark the new, forget the dead."""
        known = self._marks
        self._marks = {pid: known.get(pid) or Mark(one.resident_bytes) for pid, one in measured.each.items()}

    def look_closely(self, measured: Measured) -> None:
        """Takes some milliseconds for each process. The agent counts where it can be read."""
        self._marks = {
            pid: Mark(one.resident_bytes, one.faults, _proportional(pid, one.resident_bytes if number else 0))
            for number, (pid, one) in enumerate(measured.each.items())
        }
        self._known_bytes = sum(mark.size_bytes for mark in self._marks.values())

    def most_bytes(self, measured: Measured) -> int:
        private = sum(one.private_bytes for one in measured.each.values())
        new = sum(one.faults - self._marks[pid].faults for pid, one in measured.each.items())
        return min(private, self._known_bytes + new * PAGE_BYTES)

    def least_bytes(self, measured: Measured) -> dict[int, int]:
        """Of each process."""
        return {
            pid: max(0, self._marks[pid].size_bytes + one.resident_bytes - self._marks[pid].resident_bytes)
            for pid, one in measured.each.items()
        }


def _proportional(pid: int, otherwise: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:")), otherwise)
    except FileNotFoundError:
        return 0
    except OSError:  # it made itself unreadable: then it counts in full
        return otherwise


def ran_ns(tasks: list[str]) -> int:
    """How long these have run, together; 0 where one is gone, or the kernel does not say."""
    total = 0
    try:
        for task in tasks:
            with open(f"{task}/schedstat") as file:
                total += int(file.read().split()[0])
    except (OSError, IndexError):
        return 0
    return total


def measure(pid: int, own_network: bool = True) -> Measured:
    """The sum over `pid`, which is the agent, and all its descendants; times in steps of the clock tick (10 ms).

    Sockets are counted in its network namespace, where it has one of its own, otherwise at its guests' descriptors.
    """
    total = Measured()
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            tasks = [f"/proc/{one}/task/{task}" for task in os.listdir(f"/proc/{one}/task")]
            total.ran_ns += ran_ns(tasks)  # before the rest: what runs meanwhile shows at the next look
            with open(f"/proc/{one}/stat") as file:
                state, *words = file.read().rpartition(")")[2].split()[:15]
                facts = [int(word) for word in words]
            with open(f"/proc/{one}/status") as file:
                sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file if line.startswith(COUNTED)}
            total.tasks += tasks
            for task in tasks:
                with open(f"{task}/children") as file:
                    waiting += map(int, file.read().split())
            descriptors = os.stat(f"/proc/{one}/fd").st_size  # their number, from Linux 6.2 on
        except (FileNotFoundError, ProcessLookupError):
            continue
        total.cpu_us += sum(facts[10:14]) * TICK_US
        if one != pid:
            total.data_bytes = max(total.data_bytes, sizes.get("VmData", 0))
        total.each[one] = Process(
            sizes.get("RssAnon", 0),
            facts[6] + facts[8],
            sizes.get("VmPTE", 0) + descriptors * DESCRIPTOR_BYTES,
            state in "Tt",
            descriptors,
        )
    with contextlib.suppress(OSError):
        total.sockets = sockets.how_many(pid) if own_network else sum(map(_sockets, list(total.each)[1:]))
    return total


def _sockets(pid: int) -> int:
    folder, found = f"/proc/{pid}/fd", 0
    try:
        for name in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                found += os.readlink(f"{folder}/{name}").startswith("socket:")
    except FileNotFoundError:
        return 0
    except OSError:  # it made itself unreadable: then each may be one
        return os.stat(folder).st_size
    return found
