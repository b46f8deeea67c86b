"""Whether all that must be true is true."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from django.core.management.base import BaseCommand
from django.db import DatabaseError, connection
from django.utils import timezone

from executions import backends, operations
from executions.invariants import Check
from executions.management import boot


class Command(BaseCommand):
    help = "Check quotas, reservations, ledger, histories, audit chain, kept files and leaks; name the first wrong row of each."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("--json", action="store_true", help="the checks as JSON, with up to 20 wrong rows of each")

    def handle(self, **options: Any) -> None:
        try:
            checks = asyncio.run(verified())
        except DatabaseError as e:
            name, words = connection.settings_dict["NAME"], str(e).strip().partition("\n")[0]
            boot.unable(
                f"The database {name} cannot be checked: {words}",
                "see that DATABASE_URL or SANDGATE_DATA names the one that is served; manage.py migrate makes its tables",
                code=2,
            )
        self.stdout.write(as_json(checks) if options["json"] else text(checks))
        if any(check.wrong for check in checks):
            sys.exit(1)


async def verified() -> list[Check]:
    try:
        return await operations.verify()
    finally:
        await backends.close_all()


def as_json(checks: list[Check]) -> str:
    ok = not any(check.wrong for check in checks)
    told = {"ok": ok, "at": timezone.now().isoformat(), "checks": [check.as_dict() for check in checks]}
    return json.dumps(told, indent=1, default=str)


def text(checks: list[Check]) -> str:
    """A line for each check, as a person reads it."""
    lines = []
    for check in checks:
        lines.append(f"{'!!' if check.wrong else 'ok'}  {check.name:<13} {check.promise}")
        if check.wrong:
            more = len(check.wrong) - 1
            lines.append(f"{'':18}→ {check.wrong[0]}{f' And {more} more: --json names them.' if more else ''}")
        if check.note:
            lines.append(f"{'':18}({check.note})")
    return "\n".join(lines)
