"""Places between two steps at which a test lets this process die. They do nothing unless SANDGATE_FAULT names one.

`SANDGATE_FAULT=settled:2` kills the process when it passes `settled` for the second time; `settled:2:raise` raises there.
"""

from __future__ import annotations

import os
import signal

_armed: tuple[str, int, str] | None = None
_passed = 0


class Fault(RuntimeError):
    """A fault that a test has asked for."""


def arm(text: str) -> None:
    """From now on fail where this says: `name:n` or `name:n:raise`; empty: nowhere."""
    global _armed, _passed
    name, _, rest = text.partition(":")
    times, _, how = rest.partition(":")
    _armed, _passed = (name, int(times or 1), how) if name else None, 0


def point(name: str) -> None:
    """Here two steps meet, and whoever is between them may die."""
    if _armed is not None and _armed[0] == name:
        _strike(_armed)


def _strike(armed: tuple[str, int, str]) -> None:
    global _passed
    _passed += 1
    if _passed != armed[1]:
        return
    if armed[2] == "raise":
        raise Fault(f"A fault at {armed[0]}.")
    os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get("SANDGATE_FAULT", ""))
