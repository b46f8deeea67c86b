"""The circuit breaker of each backend, shared by all processes: closed, open, half-open with one probe at a time.

Closed: sandboxes are asked for. FAILURES in a row, or a backend that asks for time (Retry-After), open it: nobody asks
until `retry_at`. Then one process claims the probe, for as long as its lease lasts; what the probe says closes it, or
opens it for longer. The row is the truth; each process reads it at most every SEEN_SECONDS, and writes only failures
and what follows from them. A backend whose sandboxes live on one machine has a row for each: what fails on another
says nothing of this one. Times are the application's clock; a clock that was set back delays nothing (`_due`).
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from datetime import datetime, timedelta

from django.conf import settings
from django.db.models import F, Q
from django.utils import timezone

from executions import backends
from executions.models import BackendState
from executions.states import BreakerState

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
FAILURES = 5
WAITS = (1, 2, 3)  # seconds before the first, second, … probe
RETRY_AFTER_MOST = 600  # seconds: whoever asks for more is asked again by then
SEEN_SECONDS = 0.25
LEASE = timedelta(seconds=10)  # of a probe, which ends itself before
SKEW = timedelta(seconds=5)  # by which clocks may differ before one counts as set back
UNATTENDED = timedelta(seconds=5)  # after which a probe that is due is not coming
DRILL_MOST = timedelta(minutes=10)
log = logging.getLogger(__name__)

_seen: tuple[float, dict[str, BackendState]] = (-math.inf, {})
_made: set[str] = set()  # where this process has made a sandbox since its last failure there


def look(*, again: bool = False) -> dict[str, BackendState]:
    """The rows of all backends that have one here, at most SEEN_SECONDS old; `again`: as they are now."""
    global _seen
    if again or time.monotonic() - _seen[0] > SEEN_SECONDS:
        rows = {row.alias: row for row in BackendState.objects.all()}
        here = {alias: rows.get(_name(alias)) for alias in {known.partition("@")[0] for known in rows}}
        _seen = (time.monotonic(), {alias: row for alias, row in here.items() if row is not None})
    return _seen[1]


def _name(alias: str) -> str:
    """Of the row in which processes of this machine look: `local@this-machine`, where each has sandboxes of its own."""
    has_node = backends.is_known(alias) and backends.get(alias).has_node
    return f"{alias}@{settings.NODE}" if has_node else alias


def seen(alias: str) -> BackendState:
    """What this process saw last, without a query: for code on the event loop."""
    return _seen[1].get(alias) or BackendState(alias=alias)


# What users are told


def outage(alias: str) -> str:
    """Why no sandbox is asked for at this backend now; empty where one is."""
    row = look().get(alias)
    return sentence(row) if row is not None and row.state != CLOSED else ""


def sentence(row: BackendState) -> str:
    """`out since 14:02 UTC (connection refused); next try in 4 s`."""
    now = timezone.now()
    if row.state == CLOSED or row.opened_at is None:
        return "takes sandboxes"
    since = f"{row.opened_at:%H:%M}" if now - row.opened_at < timedelta(hours=20) else f"{row.opened_at:%Y-%m-%d %H:%M}"
    tried = "it is being tried now" if row.state == HALF_OPEN else f"next try in {_wait(row, now)} s"
    return f"out since {since} UTC ({row.reason}); {tried}"


def retry_after(alias: str) -> int:
    """Seconds until the backend may take sandboxes again, at least 1."""
    row = look().get(alias)
    return _wait(row, timezone.now()) if row is not None and row.state == OPEN else 1


def _wait(row: BackendState, now: datetime) -> int:
    left = (row.retry_at - now).total_seconds() if row.retry_at else 0
    return min(RETRY_AFTER_MOST, max(1, math.ceil(left)))


def lets_one_through(alias: str) -> bool:
    """Whether this request is to be the probe: true for one every few seconds, where no process sees to probes."""
    now = timezone.now()
    overdue = BackendState.objects.filter(_due(now - UNATTENDED), alias=_name(alias))
    if now - UNATTENDED < (seen(alias).retry_at or now):
        return False
    through = overdue.update(state=OPEN, silent=True, retry_at=now, changed_at=now, probe_by="")  # `clear` may close it
    look(again=True)
    return through == 1


# What creations tell


def worked(alias: str) -> bool:
    """A sandbox was made. True where the row has to learn of it: call `clear` then."""
    _made.add(alias)
    row = seen(alias)
    return row.streak > 0 if row.state == CLOSED else row.state == OPEN and row.silent


def clear(alias: str) -> None:
    """A failure was one alone; and what is merely slow, not silent, is used again."""
    BackendState.objects.filter(alias=_name(alias), state=CLOSED, streak__gt=0).update(streak=0)
    _close(BackendState.objects.filter(alias=_name(alias), state=OPEN, silent=True), alias)
    look(again=True)


def failed(alias: str, why: str, *, began: datetime, retry_after: float = 0, silent: bool = False) -> None:
    """No sandbox could be made. What `began` before the breaker last closed tells of an outage that is over."""
    now = timezone.now()
    mine = BackendState.objects.filter(alias=_name(alias))
    until = now + timedelta(seconds=max(WAITS[0], min(retry_after, RETRY_AFTER_MOST)))
    row = seen(alias)
    if row.state != CLOSED:  # known already
        if retry_after:
            mine.filter(state=OPEN, retry_at__lt=until).update(retry_at=until)
        return
    BackendState.objects.bulk_create([BackendState(alias=_name(alias))], ignore_conflicts=True)
    streak = 1 if alias in _made else F("streak") + 1
    _made.discard(alias)
    now_known = {"reason": why[:200], "changed_at": now}
    closed = mine.filter(Q(closed_at=None) | Q(closed_at__lte=began), state=CLOSED)
    closed.update(streak=streak, **now_known)
    enough = Q() if retry_after else Q(streak__gte=FAILURES)
    opened = {"state": OPEN, "opened_at": now, "retry_at": until, "tries": 0, "silent": silent, **now_known}
    if closed.filter(enough).update(**opened):
        log.warning("breaker_opened", extra={"backend": alias, "reason": why[:200]})
    look(again=True)


# The probe


def _due(now: datetime) -> Q:
    """Rows that may be probed. One that was judged in the future stems from a clock that was set back since."""
    set_back = Q(changed_at__gt=now + SKEW)
    return Q(state=OPEN) & (Q(retry_at__lte=now) | set_back) | Q(state=HALF_OPEN) & (Q(probe_until__lte=now) | set_back)


def due(alias: str) -> bool:
    """Whether the probe of this backend may be claimed, as far as this process has seen; no query."""
    row, now = seen(alias), timezone.now()
    if row.state == CLOSED:
        return False
    until = row.retry_at if row.state == OPEN else row.probe_until
    return until is None or until <= now or row.changed_at is None or row.changed_at > now + SKEW


def claim(alias: str) -> str:
    """Take the one probe of this backend; its token, or empty where another has it or it is not due."""
    now, token = timezone.now(), secrets.token_hex(8)
    taken = BackendState.objects.filter(_due(now), alias=_name(alias)).update(
        state=HALF_OPEN, probe_by=token, probe_until=now + LEASE, changed_at=now
    )
    look(again=True)
    return token if taken else ""


def answered(alias: str, token: str, why: str, *, retry_after: float = 0) -> None:
    """What the probe said: empty closes the breaker. Nothing changes for one whose lease has gone to another."""
    now = timezone.now()
    mine = BackendState.objects.filter(alias=_name(alias), state=HALF_OPEN, probe_by=token)
    if not why:
        _close(mine, alias)
    elif (row := mine.first()) is not None:
        log.info("probe_failed", extra={"backend": alias, "reason": why[:200]})
        wait = max(WAITS[min(row.tries + 1, len(WAITS) - 1)], min(retry_after, RETRY_AFTER_MOST))
        mine.update(
            state=OPEN, tries=F("tries") + 1, reason=why[:200], probe_by="", changed_at=now,
            retry_at=now + timedelta(seconds=wait), silent=False,
        )  # fmt: skip
    look(again=True)


def _close(rows, alias: str) -> None:
    now = timezone.now()
    if rows.update(state=CLOSED, streak=0, tries=0, silent=False, probe_by="", closed_at=now, changed_at=now):
        log.warning("breaker_closed", extra={"backend": alias})


# The drill


def drill(alias: str, *, by: str, seconds: float) -> None:
    """Play an outage: until then nothing is made at this backend, by anybody. It ends by itself when nobody lifts it."""
    BackendState.objects.bulk_create([BackendState(alias=_name(alias))], ignore_conflicts=True)
    until = timezone.now() + min(timedelta(seconds=seconds), DRILL_MOST)
    BackendState.objects.filter(alias=_name(alias)).update(drill_by=by[:100], drill_until=until)
    look(again=True)


def lift(alias: str) -> None:
    BackendState.objects.filter(alias=_name(alias)).update(drill_by="", drill_until=None)
    look(again=True)


def drilled(alias: str) -> str:
    """The sentence of a drill that is on, as far as this process has seen; empty without one. No query."""
    row, now = seen(alias), timezone.now()
    on = row.drill_until is not None and now < row.drill_until <= now + DRILL_MOST
    return f"outage drill by {row.drill_by}" if on else ""
