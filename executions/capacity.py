"""What a backend's plan allows: sandboxes made a second, and alive at once, counted over all processes.

OPTIONS of an alias: CREATIONS_PER_SECOND and CONCURRENCY. Neither is set by default: the provider knows its plan.
"""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.utils import timezone

from executions import backends
from executions.models import BackendState, Sandbox
from executions.states import SandboxState

RETRY_SECONDS = 1  # by then the pace has room again, and a sandbox may have ended


class Full(Exception):
    """No room at this backend now: try the next one, or later."""


def room(alias: str) -> str:
    """Take one creation at this backend, or say why its plan has no room for it now; empty where it had.

    Call it in the transaction that inserts the sandbox: until it ends nobody else is let in here, and a rollback gives
    the creation back.
    """
    options = backends.configuration(alias).get("OPTIONS", {})
    pace, most = options.get("CREATIONS_PER_SECOND") or 0, options.get("CONCURRENCY") or 0
    if not pace and not most:
        return ""
    try:
        with transaction.atomic():  # a row without room is let go of at once: routes name backends in any order
            _take(_locked(alias), pace, most)
    except Full as full:
        return str(full)
    return ""


def _locked(alias: str) -> Any:
    rows = BackendState.objects.select_for_update()  # SQLite's transaction is alone already
    row = rows.filter(alias=alias).first()
    if row is None:
        BackendState.objects.bulk_create([BackendState(alias=alias)], ignore_conflicts=True)
        row = rows.get(alias=alias)
    return row


def _alive(alias: str) -> int:
    """What the provider counts: all but the paused, those included whose end it has not confirmed."""
    return Sandbox.objects.open().filter(backend=alias).exclude(state=SandboxState.PAUSED).count()


def _take(row: BackendState, pace: float, most: int) -> None:
    """One of the `pace` creations of any one second; of a slower pace, one in 1/pace seconds. Raises Full."""
    if most and (alive := _alive(row.alias)) >= most:
        raise Full(f"has {alive} of the {most} sandboxes that its plan allows at once")
    if not pace:
        return
    now = timezone.now().timestamp()
    count = max(1, int(pace))
    recent = [at for at in row.creations if now - count / pace < at <= now]
    if len(recent) >= count:
        raise Full(f"makes {pace:g} sandboxes a second by its plan, and has just made as many")
    BackendState.objects.filter(alias=row.alias).update(creations=[*recent, now])
