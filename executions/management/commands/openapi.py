"""Write docs/openapi.json, or with --check say whether it is what the product serves."""

from __future__ import annotations

from pathlib import Path

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from executions.api import openapi


class Command(BaseCommand):
    help = __doc__ or ""

    def add_arguments(self, parser):
        parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where it differs")

    def handle(self, *args, check: bool = False, **options):
        path, text = Path(settings.BASE_DIR) / "docs" / "openapi.json", openapi.text()
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            raise CommandError("docs/openapi.json is not what is served: run manage.py openapi and commit it.")
