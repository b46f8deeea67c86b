"""What one run uses of its sandbox, and which limits it has reached: measured here, whatever the guest says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

FULL = 0.97  # of the disk: what is left is too little for the next write
DATA_BYTES = 256 << 20  # the least RLIMIT_DATA that a guest has, where there are no control groups
NEAR = 0.95  # of the memory: an allocation that was refused does not show in the peak


@dataclass(slots=True)
class Counters:
    """Since the sandbox was born."""

    cpu_us: int
    memory_kills: int


class Run:
    """From its making on; `sandbox` is asked again at each look. Runs of one sandbox at the same time count together."""

    def __init__(self, sandbox: Any) -> None:
        self.sandbox = sandbox
        self.begun: Counters = sandbox.counters()
        self.peak_memory_bytes = self.peak_data_bytes = 0

    def used(self) -> dict[str, int]:
        self.sandbox.note_peak()
        cpu_us = self.sandbox.counters().cpu_us - self.begun.cpu_us
        return {"cpu_us": max(0, cpu_us), "peak_memory_bytes": self.peak_memory_bytes}

    def why(self) -> dict[str, Any]:
        """Which limits have been reached, and how many processes were killed for the memory's."""
        used, limits = self.used(), self.sandbox.limits
        kills = self.sandbox.counters().memory_kills - self.begun.memory_kills
        reached = []
        memory = limits["memory_mib"] << 20
        refused = self.peak_data_bytes >= NEAR * max(
            memory, DATA_BYTES
        )  # by RLIMIT_DATA, which counts what is not resident
        if kills or refused or used["peak_memory_bytes"] >= NEAR * memory:
            reached.append("out_of_memory")
        if self.sandbox.most_processes() >= limits["processes"]:
            reached.append("too_many_processes")
        if any(self.sandbox.disk_is_full(path) for path in ("/tmp", "/dev/shm")):
            reached.append("disk_full")
        return {"reached": reached, "memory_kills": kills, "memory_mib": limits["memory_mib"]}


def is_full(pid: int, path: str) -> bool:
    """Whether a file system that the guest cannot replace is full, or out of inodes, as this process sees it."""
    try:
        found = os.statvfs(f"/proc/{pid}/root{path}")
    except OSError:  # not ours to look at
        return False
    return found.f_bavail <= (1 - FULL) * found.f_blocks or found.f_favail <= (1 - FULL) * found.f_files


def disk_mib(asked: int, memory_mib: int) -> int:
    """The size of the folders in memory, such that filling them leaves enough to live: ENOSPC comes before the kill."""
    shared = min(64, memory_mib // 4)
    return min(asked, max(memory_mib // 4, memory_mib - shared - 64))
