"""Host uids for sandboxes when the node is root: a block that nobody else uses, one uid for each sandbox."""

from __future__ import annotations

import pwd
import socket
from collections import deque

FIRST, SIZE, BLOCKS = 2_100_000_000, 4096, 1024


class Block:
    """A block of uids, held as long as this process lives. OSError where none is free."""

    def __init__(self) -> None:
        taken = _taken()
        for number in range(BLOCKS):
            base = FIRST + number * SIZE
            if any(start < base + SIZE and base < start + count for start, count in taken):
                continue
            self._claim = socket.socket(socket.AF_UNIX)
            try:
                self._claim.bind(f"\0sandgate-uids-{number}")  # the kernel lets go of it with us
            except OSError:
                self._claim.close()
                continue
            self.zygote = base
            self._free = deque(range(base + 1, base + SIZE))  # the longest unused first
            return
        raise OSError("no block of uids is free")

    def take(self) -> int:
        """IndexError when all are in use."""
        return self._free.popleft()

    def give_back(self, uid: int) -> None:
        self._free.append(uid)


def _taken() -> list[tuple[int, int]]:
    ranges = [(user.pw_uid, 1) for user in pwd.getpwall() if user.pw_uid >= FIRST]
    for name in ("/etc/subuid", "/etc/subgid"):
        try:
            with open(name) as file:
                for line in file:
                    _, start, count = line.strip().split(":")
                    ranges.append((int(start), int(count)))
        except (FileNotFoundError, ValueError):
            continue
    return ranges
