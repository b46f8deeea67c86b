"""Which limit an error of a run stands for: the guest says what it met, the node says whether that is so."""

from __future__ import annotations

import errno
import re
from typing import Any

from executions.backends.base import Event
from executions.states import NamedLimit

ERRNO = re.compile(r"\[Errno (\d+)\]")
OF_ERRNO = {
    errno.ENOMEM: NamedLimit.OUT_OF_MEMORY,
    errno.EAGAIN: NamedLimit.TOO_MANY_PROCESSES,
    errno.EMFILE: NamedLimit.TOO_MANY_FILES,
    errno.ENOSPC: NamedLimit.DISK_FULL,
    errno.EFBIG: NamedLimit.DISK_FULL,
}
UNMETERED = {"[Errno 24]", "[Errno 27]"}  # of one process, of one file: the kernel says it to that process alone


def suspected(name: str, value: str) -> NamedLimit | None:
    """The limit that an exception speaks of."""
    if name.endswith("MemoryError"):
        return NamedLimit.OUT_OF_MEMORY
    if name == "RuntimeError" and "can't start new thread" in value:
        return NamedLimit.TOO_MANY_PROCESSES
    found = ERRNO.match(value)
    return OF_ERRNO.get(int(found[1])) if found else None


def confirmed(limit: NamedLimit | None, value: str, seen: dict[str, Any]) -> bool:
    """Whether what the node has seen agrees, or nobody but the process can know."""
    return limit is not None and (limit in seen["reached"] or value[:10] in UNMETERED)


def killed(seen: dict[str, Any]) -> Event:
    """The error of a run whose context was killed for its memory."""
    said = (
        f"The code used more than {seen['memory_mib']} MiB of memory; its context was ended and its variables are lost."
    )
    return Event("error", {"name": "OutOfMemory", "value": said, "traceback": "", "reason": NamedLimit.OUT_OF_MEMORY})
