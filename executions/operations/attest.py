"""Try the whole hostile suite on a backend and keep the scorecard."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from django.conf import settings

from executions import attacks, backends
from executions.attacks import Arena, Finding
from executions.errors import Invalid
from executions.hop import rows
from executions.models import Attestation

SECRET_WORDS = ("KEY", "SECRET", "TOKEN", "PASSWORD")


async def attest(*, alias: str, only: str = "", hear: Callable[[Finding], None] = lambda finding: None) -> Attestation:
    """Try every attack (or those of one group or name) on this backend, one after another; `hear` is told each verdict.

    A partial attestation is not stored. The sandboxes are the operator's, beside quotas and ledger. Raises Invalid, BackendError.
    """
    if alias not in backends.aliases():
        raise Invalid(f"There is no backend {alias!r}; there are {', '.join(backends.aliases())}.", field="backend")
    chosen = [(group, a) for group, members in attacks.GROUPS.items() for a in members if only in ("", a.name, group)]
    if not chosen:
        raise Invalid(f"There is no attack or group {only!r}.", field="only")
    backend, began, findings = backends.get(alias), time.monotonic(), []
    async with Arena(
        backend, template=backend.template_name("default", ""), secrets_=secrets_of_the_service()
    ) as arena:
        for group, attack in chosen:
            findings.append(await arena.try_(attack, group))
            hear(findings[-1])
    counts = Counter(finding.verdict for finding in findings)
    attestation = Attestation(
        backend=alias,
        isolation=arena.isolation,
        walls=arena.walls,
        cases=[asdict(finding) for finding in findings],
        blocked=counts["blocked"],
        open=counts["open"],
        skipped=counts["skipped"],
        took_seconds=round(time.monotonic() - began, 1),
    )
    if not only:
        await rows(attestation.save)
    return attestation


def secrets_of_the_service() -> tuple[str, ...]:
    """What no sandbox may ever say; compared here, never sent there."""
    named = [value for name, value in os.environ.items() if any(word in name.upper() for word in SECRET_WORDS)]
    password = settings.DATABASES["default"].get("PASSWORD", "")
    return tuple({settings.SECRET_KEY, settings.E2B_API_KEY, password, *named} - {""})


def last_attestations() -> dict[str, dict[str, Any]]:
    """Of each backend that was ever attested: when, and how many attacks were blocked, open and skipped."""
    found: dict[str, dict[str, Any]] = {}
    for alias in backends.aliases():
        rows_of = Attestation.objects.filter(backend=alias).order_by("-at")
        if last := rows_of.values("at", "blocked", "open", "skipped").first():
            found[alias] = dict(last)
    return found
