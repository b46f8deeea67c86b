"""What was added up for the cost reports, and what providers say that they bill."""

from __future__ import annotations

from django.db import models
from django.db.models import Q

from executions.models.money import Usage
from executions.models.teams import Agent, Team


class CostTotal(models.Model):
    """Sandbox time of one kind in one UTC hour or one day of the team, added up over the usage rows that it touches."""

    HOUR, DAY = "hour", "day"
    ALL, USER, WORKFLOW = "", "user", "workflow"

    grain = models.CharField(max_length=4, choices=[(g, g) for g in (HOUR, DAY)])
    by = models.CharField(max_length=8, blank=True, help_text="Empty: of all. Else told apart by this label as well.")
    label = models.CharField(max_length=200, blank=True, help_text="The end user, or the workflow.")
    day = models.DateField(help_text="The team's day; of an hour the UTC day.")
    start_at = models.DateTimeField(help_text="When the hour or the day began.")
    team = models.ForeignKey(Team, models.CASCADE, related_name="+", db_index=False)
    agent = models.ForeignKey(Agent, models.CASCADE, related_name="+", db_index=False)
    backend = models.CharField(max_length=40)
    kind = models.CharField(max_length=4, choices=[(k, k) for k in (Usage.RUN, Usage.BOOT, Usage.IDLE, Usage.POOL)])
    language = models.CharField(max_length=12, blank=True, help_text="Empty where nothing ran: idle and pool.")
    cpu_count = models.PositiveSmallIntegerField()
    memory_mib = models.PositiveIntegerField()
    is_priced = models.BooleanField(help_text="Off: no rate was known, and the ceiling rate was charged.")
    stretches = models.BigIntegerField(help_text="Usage rows that ended in it.")
    duration_us = models.BigIntegerField()
    cost_nano_usd = models.BigIntegerField()

    KEY = (
        "grain", "by", "day", "team", "label", "start_at", "agent", "backend", "kind", "language", "cpu_count",
        "memory_mib", "is_priced",
    )  # fmt: skip
    SUMS = ("stretches", "duration_us", "cost_nano_usd")

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=[
                    "grain", "by", "day", "team", "label", "start_at", "agent", "backend", "kind", "language",
                    "cpu_count", "memory_mib", "is_priced",
                ],
                name="cost_total_once",
            )
        ]  # fmt: skip
        indexes = [models.Index(fields=["team", "grain", "by", "day"], name="cost_total_of_team")]

    def __str__(self) -> str:
        return f"{self.day} {self.backend} {self.kind}"


class ProviderCharge(models.Model):
    """What a provider says that one day cost, or one sandbox on that day: the other side of the reconciliation."""

    backend = models.CharField(max_length=40, help_text="The alias that it is the bill of.")
    day = models.DateField(help_text="UTC.")
    sandbox = models.CharField(max_length=100, blank=True, help_text="The provider's id, where the bill names it.")
    nano_usd = models.BigIntegerField()
    source = models.CharField(max_length=200, help_text="The file that it came from.")
    imported_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["backend", "day", "sandbox"], name="provider_charge_once"),
            models.CheckConstraint(condition=~Q(backend=""), name="provider_charge_has_backend"),
        ]

    def __str__(self) -> str:
        return f"{self.backend} {self.day}"
