"""What operators' monitoring reads: counted here in memory, added up in the database, told as Prometheus text by `page`.

The totals are of the whole system, whichever process counted: a worker needs no port, a load balancer may pick any
server, and a restart loses nothing but the last seconds of a process that was killed.
"""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.utils import timezone

from executions.errors import BackendError
from executions.metrics.families import BUCKETS, REASONS, SUM
from executions.models import Execution
from executions.states import AttemptOutcome

AT_ONCE = 200  # rows of one statement
PARTS = [*(f"{bound:g}" for bound in BUCKETS), "+Inf"]

Key = tuple[str, tuple[str, ...], str]  # name, values of its labels, part of a histogram

_lock = threading.Lock()
_added: defaultdict[Key, float] = defaultdict(float)  # not in the database yet
_latest: dict[Key, float] = {}


def add(name: str, *labels: str, by: float = 1) -> None:
    """Add to a counter."""
    with _lock:
        _added[name, labels, ""] += by


def observe(name: str, *labels: str, seconds: float) -> None:
    """Put one duration into a histogram."""
    part = PARTS[bisect_left(BUCKETS, seconds)]
    with _lock:
        _added[name, labels, part] += 1
        _added[name, labels, SUM] += max(0, seconds)


def note(name: str, *labels: str, value: float) -> None:
    """Set a gauge that only this process knows just now."""
    with _lock:
        _latest[name, labels, ""] = value


# What happened, in the product's own words


def ended(execution: Execution) -> None:
    """An execution has reached its end, and that is committed."""
    backend, ended_at = _alias(execution.backend), execution.ended_at
    assert ended_at is not None
    add("sandgate_executions_total", backend, str(execution.state), _reason(execution.error_code))
    if execution.cost_nano_usd:
        is_priced = execution.sandbox is None or execution.sandbox.is_priced
        if is_priced:
            add("sandgate_cost_nano_usd_total", backend, by=execution.cost_nano_usd)
        else:
            add("sandgate_unpriced_charged_nano_usd_total", backend, by=execution.cost_nano_usd)
    for attempt in execution.tried:
        if attempt.outcome in (AttemptOutcome.UNAVAILABLE, AttemptOutcome.LOST):
            add("sandgate_backend_failures_total", _alias(attempt.backend), _reason(attempt.code))
    started, running = execution.started_at, execution.running_at
    _between("sandgate_execution_queue_seconds", backend, execution.created_at, started)
    _between("sandgate_execution_start_seconds", backend, started, running)
    _between("sandgate_execution_run_seconds", backend, running, ended_at)
    _between("sandgate_execution_total_seconds", backend, execution.created_at, ended_at)


def refused(code: str) -> None:
    add("sandgate_refusals_total", _reason(code))


@contextmanager
def asking(verb: str, backend: str) -> Iterator[None]:
    """Time and count what a backend is asked for: `create` or `kill`."""
    began, outcome = time.monotonic(), "interrupted"
    try:
        yield
        outcome = "ok"
        observe(f"sandgate_sandbox_{verb}_seconds", _alias(backend), seconds=time.monotonic() - began)
    except (BackendError, OSError) as e:
        outcome = _reason(getattr(e, "code", "internal"))
        raise
    finally:
        add(f"sandgate_sandbox_{verb}s_total", _alias(backend), outcome)


def _between(name: str, backend: str, since: datetime | None, until: datetime | None) -> None:
    if since is not None and until is not None:
        observe(name, backend, seconds=(until - since).total_seconds())


def _alias(backend: str) -> str:
    return backend if backend in settings.SANDBOXES else "other"


def _reason(code: str) -> str:
    return code if code in REASONS else "other"


# Adding up


def flush() -> None:
    """Add what this process has counted to the totals; what cannot be written now is kept for the next time."""
    global _added, _latest
    with _lock:
        added, latest = _added, _latest
        _added, _latest = defaultdict(float), {}
    if not added and not latest:
        return
    try:
        with transaction.atomic(durable=True):
            _write(added, "executions_metrictotal.value + excluded.value")
            _write(latest, "excluded.value")
    except BaseException:
        with _lock:
            for key, value in added.items():
                _added[key] += value
            _latest = latest | _latest
        raise


def _write(values: dict[Key, float], merged: str) -> None:
    now = connection.ops.adapt_datetimefield_value(timezone.now())
    rows = [(*_columns(key), values[key], now) for key in sorted(values)]  # in one order: two never wait for each other
    for start in range(0, len(rows), AT_ONCE):
        batch = rows[start : start + AT_ONCE]
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO executions_metrictotal (name, labels, part, value, at) VALUES "
                + ", ".join(["(%s, %s, %s, %s, %s)"] * len(batch))
                + f" ON CONFLICT (name, labels, part) DO UPDATE SET value = {merged}, at = excluded.at",
                [column for row in batch for column in row],
            )


def _columns(key: Key) -> Sequence[Any]:
    name, labels, part = key
    return name, json.dumps(labels), part
