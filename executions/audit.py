"""What people and programs did to configuration, keys, sign-ins and levers."""

from __future__ import annotations

from typing import Any

from executions.keys import Caller
from executions.models import AuditEvent


def record(
    action: str,
    *,
    caller: Caller | None = None,
    actor: Any = None,
    subject: str = "",
    before: Any = None,
    after: Any = None,
    reason: str = "",
) -> None:
    """Write one event down. Secrets never belong into `before` or `after`."""
    AuditEvent.objects.create(
        team=caller.team if caller else None,
        actor=caller.person if caller else actor,
        key=caller.key if caller else None,
        ip=caller.ip if caller else None,
        action=action,
        subject=subject[:80],
        before=before,
        after=after,
        reason=reason[:200],
    )
