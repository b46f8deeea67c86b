"""What an admission has left of the caller's quotas, as HTTP fields.

`RateLimit-Policy` and `RateLimit` are those of draft-ietf-httpapi-ratelimit-headers-11 (May 2026), one item for each quota
of executions, creations or concurrency; `RateLimit-Limit`, `-Remaining` and `-Reset` are the earlier drafts' and tell of the
tightest one. Budgets and the rest stand in GET /limits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from datetime import datetime

from django.utils import timezone

from executions import quotas
from executions.errors import SandgateError
from executions.states import Unit, Window

UNITS = {  # to the registered quota units
    Unit.EXECUTIONS: "requests",
    Unit.CREATIONS: "requests",
    Unit.CONCURRENT_EXECUTIONS: "concurrent-requests",
    Unit.CONCURRENT_SANDBOXES: "concurrent-requests",
}
SECONDS = {Window.SECOND: 1, Window.MINUTE: 60, Window.HOUR: 3600, Window.DAY: 86_400, Window.MONTH: 2_592_000}
LARGEST = 999_999_999_999_999  # of a number in such a field


def tells_limits(view):
    """An async view that admits; what it answers, and what it refuses, says what is left."""

    @functools.wraps(view)
    async def telling(request, *args, **kwargs):
        with quotas.noted() as notes:
            try:
                response = await view(request, *args, **kwargs)
            except SandgateError as e:
                e.fields = fields(notes, timezone.now())
                raise
        for name, value in fields(notes, timezone.now()).items():
            response[name] = value
        return response

    return telling


def fields(notes: Iterable[quotas.Standing], now: datetime) -> dict[str, str]:
    """The fields; none where no such quota governs the caller."""
    last = {note.quota.pk: note for note in notes if note.quota.unit in UNITS}
    if not last:
        return {}
    tightest = min(last.values(), key=lambda note: (note.remaining, -_reset(note, now)))
    return {
        "RateLimit-Policy": ", ".join(_policy(note) for note in last.values()),
        "RateLimit": ", ".join(_left(note, now) for note in last.values()),
        "RateLimit-Limit": str(tightest.limit),
        "RateLimit-Remaining": str(tightest.remaining),
        "RateLimit-Reset": str(_reset(tightest, now)),
    }


def _policy(note: quotas.Standing) -> str:
    quota = note.quota
    window = f";w={SECONDS[Window(quota.window)]}" if quota.window in SECONDS else ""
    return f'"{_name(note)}";q={min(note.limit, LARGEST)};qu="{UNITS[Unit(quota.unit)]}"{window}'


def _left(note: quotas.Standing, now: datetime) -> str:
    resets = f";t={_reset(note, now)}" if note.resets_at else ""
    return f'"{_name(note)}";r={min(note.remaining, LARGEST)}{resets}'


def _name(note: quotas.Standing) -> str:
    return f"{note.quota.unit.replace('_', '-')}-{note.quota.window}-{note.quota.pk}"


def _reset(note: quotas.Standing, now: datetime) -> int:
    """Seconds until there is room again; of what has no window, until it is worth looking."""
    return max(1, int((note.resets_at - now).total_seconds())) if note.resets_at else quotas.LATER_SECONDS
