"""The scorecard of a backend: every attack of the hostile suite, tried for real."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from executions import backends, operations
from executions.attacks import Finding
from executions.errors import SandgateError
from executions.models import Attestation


class Command(BaseCommand):
    help = "Attack a backend's sandboxes in every way of the hostile suite and say what was blocked; the scorecard is kept."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("backend", nargs="?", default="local", help="its alias in SANDBOXES; default: local")
        parser.add_argument(
            "--only", default="", metavar="CASE", help="one case or one group; the scorecard is not kept"
        )
        parser.add_argument("--json", action="store_true", help="the whole scorecard as JSON")

    def handle(self, *, backend: str, only: str, json: bool, **options: Any) -> None:
        try:
            attestation = asyncio.run(self.attested(backend, only, quiet=json))
        except SandgateError as e:
            raise CommandError(" ".join(filter(None, [e.detail, e.remedy]))) from None
        self.stdout.write(as_json(attestation) if json else summary(attestation))
        if attestation.open:
            sys.exit(1)

    async def attested(self, alias: str, only: str, *, quiet: bool) -> Attestation:
        try:
            return await operations.attest(alias=alias, only=only, hear=(lambda finding: None) if quiet else self.tell)
        finally:
            await backends.close_all()

    def tell(self, finding: Finding) -> None:
        self.stdout.write(
            f"{finding.verdict:<8} {finding.wall:<14} {finding.group:<11} {finding.case:<28} {finding.seen[:110]}"
        )


def summary(attestation: Attestation) -> str:
    missing = [f"  missing: {wall}: {said}" for wall, said in attestation.walls.items() if said is not True]
    return "\n".join(
        [f"\n{attestation} in {attestation.took_seconds:.0f} s, isolation: {attestation.isolation}", *missing]
    )


def as_json(attestation: Attestation) -> str:
    names = ("backend", "isolation", "blocked", "open", "skipped", "took_seconds", "walls", "cases")
    facts = {name: getattr(attestation, name) for name in names}
    return json.dumps({**facts, "at": attestation.at.isoformat()}, indent=1)
