"""Cancellation is an intention, then an event."""

from __future__ import annotations

from django.utils import timezone

from executions.keys import Caller
from executions.models import Execution


def request_cancel(*, execution: Execution, caller: Caller | None = None, reason: str = "") -> bool:
    """Write the intention down; False when the execution has already ended. Whoever runs it stops it within a second."""
    who = reason or (f"by {caller.person or caller.agent}" if caller else "")
    wanted = Execution.objects.open().filter(pk=execution.pk, cancel_requested_at__isnull=True)
    asked = wanted.update(cancel_requested_at=timezone.now(), cancel_reason=who[:200])
    execution.refresh_from_db(fields=["cancel_requested_at", "cancel_reason", "state", "ended_at"])
    return bool(asked) or execution.is_open
