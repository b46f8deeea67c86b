"""A one-time link for whoever cannot sign in."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from executions import audit, keys
from executions.models import User


class Command(BaseCommand):
    help = "Print a link that signs a person in, once, within the hour."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("username", nargs="?", help="default: the first operator")

    def handle(self, *, username: str | None = None, **options: Any) -> None:
        people = User.objects.filter(is_active=True).order_by("pk")
        user = people.filter(username=username).first() if username else people.filter(is_superuser=True).first()
        if user is None:
            known = (
                ", ".join(people.values_list("username", flat=True)[:20])
                or "nobody; python manage.py serve makes the first"
            )
            raise CommandError(f"There is no such person. Known: {known}.")
        link = settings.PUBLIC_URL + keys.make_sign_in_link(user)
        audit.record("sign_in_link_made", subject=f"user {user.pk}", reason="by the command line")
        self.stdout.write(link)
