"""An outage, played on the running system, and its report."""

from __future__ import annotations

import asyncio
import getpass
import json
import signal
import sys
from contextlib import suppress
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from executions import backends, operations
from executions.errors import SandgateError
from executions.operations.drill import Report


class Command(BaseCommand):
    help = "Play an outage of one backend on the running system: what moved, what was refused and why, leaks, time to recover."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("--alias", default="e2b", help="whose outage is played; default: e2b")
        parser.add_argument("--seconds", type=float, default=20, help="how long, at most 600; default: 20")
        parser.add_argument("--json", action="store_true", help="the report as JSON")

    def handle(self, *, alias: str, seconds: float, json: bool, **options: Any) -> None:
        try:
            report = asyncio.run(self.drilled(alias, seconds, quiet=json))
        except SandgateError as e:
            raise CommandError(e.detail) from None
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise CommandError("Stopped; the outage is lifted.") from None
        self.stdout.write(as_json(report) if json else text(report))
        if not report.passed:
            sys.exit(1)

    async def drilled(self, alias: str, seconds: float, *, quiet: bool) -> Report:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        hear = (lambda line: None) if quiet else self.tell
        try:
            return await operations.outage_drill(alias=alias, seconds=seconds, by=_user(), hear=hear)
        finally:
            await backends.close_all()

    def tell(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()


def _user() -> str:
    with suppress(KeyError, OSError):
        return getpass.getuser()
    return "manage.py"


def as_json(report: Report) -> str:
    return json.dumps(report.as_dict(), indent=1, default=str)


def text(report: Report) -> str:
    """The report as a person reads it."""

    def after(seconds: float | None, otherwise: str) -> str:
        return otherwise if seconds is None else f"{seconds:.2f} s"

    moved = ", ".join(f"{count} to {alias}" for alias, count in report.moved.items()) or "nothing"
    lines = [
        f"\nOutage drill of {report.alias}, {report.began_at:%Y-%m-%d %H:%M:%S} UTC",
        f"  breaker open after    {after(report.opened_after_seconds, 'never: too little ran that would have gone there')}",
        f"  closed again after    {after(report.recovered_after_seconds, 'not within 30 s')}",
        f"  a run there after     {after(report.served_again_after_seconds, 'none came')}",
        f"  admitted meanwhile    {report.executions} ({', '.join(f'{n} {state}' for state, n in report.states.items()) or 'none'})",
        f"  moved                 {moved}",
        f"  stayed in sessions    {report.stayed}",
        f"  not served            {len(report.not_served)}{': ' + ', '.join(report.not_served[:5]) if report.not_served else ''}",
        f"  ran twice             {len(report.ran_twice)}{': ' + ', '.join(report.ran_twice[:5]) if report.ran_twice else ''}",
        f"  refused               {sum(report.refused.values())}",
        *(f"    {count} × {why}" for why, count in report.refused.items()),
        f"  leaked at a backend   {_leaks(report.leaked_there)}",
        f"  leaked here           {_leaks(report.leaked_here)}",
        "Passed." if report.passed else "Not passed.",
    ]
    return "\n".join(lines)


def _leaks(found: dict[str, list[str]]) -> str:
    return "; ".join(f"{alias}: {', '.join(names)}" for alias, names in found.items()) or "none"
