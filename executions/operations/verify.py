"""Whether all that must be true is true: of the rows in one snapshot, and between them and what each provider lists."""

from __future__ import annotations

import asyncio
import time

from django.utils import timezone

from executions import backends, invariants, metrics
from executions.costs import usd
from executions.errors import BackendError
from executions.hop import rows
from executions.invariants import Check, Wrong
from executions.models import Sandbox
from executions.operations.reap import SETTLED
from executions.states import SandboxState


async def verify() -> list[Check]:
    """All checks, whose rows need no pause of the system; when it was last done and how many failed is kept as metrics."""
    checks = [*await rows(invariants.verify), await leaks()]
    metrics.note("sandgate_verified_timestamp_seconds", value=time.time())
    metrics.note("sandgate_verify_failed_checks", value=sum(bool(check.wrong) for check in checks))
    await rows(metrics.flush)
    return checks


async def leaks() -> Check:
    """What a provider lists although its row had ended before it was asked."""
    check = Check("leaks", "No provider has a sandbox whose row has ended.")
    notes = await asyncio.gather(*(_compared(alias, check) for alias in backends.aliases()))
    check.note = " ".join(filter(None, [*notes, await rows(_unconfirmed)]))
    return check


async def _compared(alias: str, check: Check) -> str:
    if backends.get(alias).isolation == "simulated":  # its machines are in the memory of whoever made them
        return ""
    asked_at = timezone.now()
    try:
        listed = {item.sandbox_id for item in await backends.get(alias).list() if item.sandbox_id.startswith("sbx")}
    except (BackendError, OSError, TimeoutError) as e:
        return f"{alias} could not be asked ({e})."
    known = await rows(_known, listed)
    for _, sandbox in sorted(known.items()):
        if sandbox.ended_at and sandbox.ended_at < asked_at - SETTLED:
            check.wrong.append(
                Wrong("sandbox", sandbox.pk, f"its end at {alias}", f"alive there, {sandbox.state} here")
            )
    strangers = len(listed - known.keys())
    return f"{alias} has {strangers} that no row knows: another installation's, and left alone." if strangers else ""


def _known(names: set[str]) -> dict[str, Sandbox]:
    ids = [name.replace("sbx", "sbx_", 1) for name in names]
    return {sandbox.provider_name: sandbox for sandbox in Sandbox.objects.filter(pk__in=ids)}


def _unconfirmed() -> str:
    retiring = Sandbox.objects.open().filter(state=SandboxState.RETIRING)
    held = [sandbox.reserved_nano_usd for sandbox in retiring]
    return f"Not confirmed yet: {len(held)} of the kills, which may still cost {usd(sum(held))}." if held else ""
