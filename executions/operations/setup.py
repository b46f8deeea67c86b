"""The first start: rows without which nothing runs."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime

from django.conf import settings
from django.db import transaction

from executions import audit, keys
from executions.costs import NANO
from executions.models import Agent, Membership, Quota, Rate, Team, Template, User
from executions.states import Role, Scope, Unit, Window

# E2B's published prices per allocated second, and its Hobby plan's fee, which is none (reports/spend.py has the plans);
# the machine's own is an estimate of what such a core costs to keep ($0.01 an hour, $0.002 a GiB-hour), to be edited
# in the admin.
RATES = {
    "e2b": {Rate.VCPU: 14_000, Rate.GIB: 4_500, Rate.MONTH: 0},
    "local": {Rate.VCPU: 2_778, Rate.GIB: 556},
    "scripted": {Rate.VCPU: 0, Rate.GIB: 0},
}
SOURCES = {
    "e2b": "e2b.dev/docs/faq/calculate-sandbox-price, Hobby plan, November 2026",
    "local": "estimate: edit it",
    "scripted": "nothing runs there",
}


@dataclass(frozen=True, slots=True)
class FirstStart:
    """What is shown once: the key's token and the path that signs the first operator in."""

    token: str
    sign_in_path: str
    agent: str
    team: str


@transaction.atomic(durable=True)
def first_start() -> FirstStart | None:
    """Make the first team, operator, agent, key, template, rates and ceilings; None when there is a team already."""
    if Team.objects.exists():
        return None
    seed()
    team = Team.objects.create(name="Home", time_zone=settings.TIME_ZONE)
    operator = User.objects.create_superuser("operator", password=secrets.token_urlsafe(32))
    Membership.objects.create(team=team, user=operator, role=Role.OWNER)
    agent = Agent.objects.create(
        team=team,
        name="first",
        description="The agent of the first key.",
        packages=["*"],
        template=Template.objects.get(name="default"),
    )
    Quota.objects.create(team=team, unit=Unit.NANO_USD, window=Window.DAY, limit=5 * NANO)
    Quota.objects.create(team=team, unit=Unit.CONCURRENT_EXECUTIONS, window=Window.TOTAL, limit=64)
    Quota.objects.create(team=team, unit=Unit.CONCURRENT_SANDBOXES, window=Window.TOTAL, limit=64)
    key, token = keys.make_key(team=team, agent=agent, name="first key", scopes=[Scope.RUN, Scope.READ])
    audit.record("key_made", subject=key.pk, after={"name": key.name, "agent": agent.name}, reason="the first start")
    return FirstStart(token, keys.make_sign_in_link(operator), agent.name, team.name)


def seed() -> None:
    """The default template and the rates known at release; what an operator has changed stays as it is."""
    Template.objects.get_or_create(
        name="default",
        defaults={
            "description": "Python with the data stack: numpy, pandas, matplotlib, scipy, scikit-learn, seaborn, sympy.",
            "languages": ["python", "bash", "javascript", "typescript"],
            "memory_mib": 1024,
            "disk_mib": 1024,
        },
    )
    for alias, prices in RATES.items():
        for meter, nano_usd in prices.items():
            Rate.objects.get_or_create(
                backend=alias,
                meter=meter,
                defaults={
                    "nano_usd": nano_usd,
                    "valid_from": datetime(2026, 11, 1, tzinfo=UTC),
                    "source": SOURCES[alias],
                },
            )
