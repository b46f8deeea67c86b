"""Take in a file of known vulnerabilities: OSV's JSON, one with a line for each, or a zip of them."""

from __future__ import annotations

from pathlib import Path

from django.core.management.base import BaseCommand, CommandError

from executions.packages import advisories


class Command(BaseCommand):
    help = "Import known vulnerabilities of packages from an OSV file (JSON, JSON lines or zip)."

    def add_arguments(self, parser) -> None:
        parser.add_argument("file", type=Path)

    def handle(self, *args, **options) -> None:
        try:
            held, gone = advisories.take(options["file"])
        except (OSError, ValueError) as problem:
            raise CommandError(str(problem)) from None
        self.stdout.write(f"{held} advisories taken in, {gone} withdrawn ones removed.")
