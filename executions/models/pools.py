"""Warm pools: sandboxes that are booted before anybody asks, and what their waiting costs."""

from __future__ import annotations

from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q
from django.utils import timezone

from executions import network
from executions.models.base import IdField
from executions.models.sandboxes import Sandbox, Template
from executions.models.teams import Agent
from executions.states import PoolTarget

KIND = ["backend", "template", "memory_mib", "network_allow"]


class Pool(models.Model):
    """Sandboxes of one kind on one backend that are kept ready. What they cost while they wait, its own account pays."""

    id = IdField(prefix="pool")
    backend = models.CharField(max_length=40, help_text="An alias of settings.SANDBOXES.")
    template = models.ForeignKey(Template, models.PROTECT, related_name="+")
    memory_mib = models.PositiveIntegerField("memory, MiB", default=0, help_text="0: as the template has.")
    network_allow = models.JSONField(
        "network", default=list, blank=True, help_text="Claimed only by requests with exactly these rules. Empty: off."
    )
    packages_of = models.ForeignKey(
        Agent, models.PROTECT, null=True, blank=True, related_name="+", verbose_name="packages of",
        help_text="An agent: its package lock is in them, and only it takes them. Empty: for all agents without a lock.",
    )  # fmt: skip
    is_enabled = models.BooleanField("enabled", default=True, help_text="Off: what is ready is let go of.")
    follows = models.CharField(max_length=8, choices=PoolTarget, default=PoolTarget.FIXED)
    target = models.PositiveSmallIntegerField(
        default=0, help_text="Ready or booting at any time; the least of a forecast. 0: none."
    )
    at_most = models.PositiveSmallIntegerField(default=20, help_text="The most that a forecast keeps ready.")
    hours = models.JSONField(
        default=list,
        blank=True,
        help_text="By the hour: 24 numbers, the first from midnight in the installation's zone.",
    )
    zero_after_seconds = models.PositiveIntegerField(
        default=0, help_text="Without a request for so long, nothing is kept ready until the next one. 0: never."
    )
    lifetime_seconds = models.PositiveIntegerField(
        default=900, help_text="A sandbox that nobody claimed is replaced after this long, before its provider ends it."
    )
    agent = models.OneToOneField(
        Agent, models.PROTECT, null=True, blank=True, editable=False, related_name="pool", help_text="Its account."
    )
    wished_at = models.DateTimeField(
        null=True, blank=True, editable=False, help_text="When somebody was last seen who may soon run something."
    )
    failures = models.PositiveSmallIntegerField(default=0, editable=False, help_text="Boots in a row that failed.")
    retry_at = models.DateTimeField(null=True, blank=True, editable=False)
    trouble = models.CharField(
        max_length=500, blank=True, editable=False, help_text="Why it holds less than it should."
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=KIND,
                condition=Q(packages_of=None),
                name="pool_once_of_a_kind",
                violation_error_message="There is a pool of this kind already.",
            ),
            models.UniqueConstraint(
                fields=[*KIND, "packages_of"],
                name="pool_once_of_a_kind_of_agent",
                violation_error_message="There is a pool of this kind already.",
            ),
            models.CheckConstraint(condition=Q(follows__in=PoolTarget.values), name="pool_follows_known"),
            models.CheckConstraint(condition=Q(lifetime_seconds__gte=180), name="pool_lifetime_sane"),
        ]

    def __str__(self) -> str:
        return f"{self.template} on {self.backend}"

    def clean(self) -> None:
        super().clean()
        wrong: dict[str, str] = {}
        try:
            self.network_allow = network.normalised(self.network_allow)
        except ValueError as problem:
            wrong["network_allow"] = str(problem)
        hours = self.hours or []
        if hours and (len(hours) != 24 or not all(isinstance(n, int) and 0 <= n <= 1000 for n in hours)):
            wrong["hours"] = "24 numbers between 0 and 1000."
        if self.follows == PoolTarget.HOURS and not hours:
            wrong["hours"] = "Say how many by the hour: 24 numbers."
        if self.lifetime_seconds is not None and self.lifetime_seconds < 180:
            wrong["lifetime_seconds"] = "At least 180: the last 90 s overlap with its successor."
        if wrong:
            raise ValidationError(wrong)


class Claim(models.Model):
    """A sandbox taken out of a pool, and what its time there has cost the pool; open until the provider can bill no more of it."""

    sandbox = models.OneToOneField(Sandbox, models.PROTECT, primary_key=True, related_name="claim")
    pool = models.ForeignKey(Pool, models.PROTECT, related_name="claims", db_index=False)
    at = models.DateTimeField(default=timezone.now)
    took_us = models.PositiveIntegerField(help_text="From the question to the sandbox, within the admission.")
    reserved_nano_usd = models.BigIntegerField(help_text="On the pool's account, until it is settled.")
    reserved_on = models.JSONField(default=list, blank=True)
    spent_nano_usd = models.BigIntegerField(
        null=True, blank=True, help_text="Of boot and waiting; empty until settled."
    )

    class Meta:
        indexes = [
            models.Index(fields=["pool", "-at"], name="claim_of_pool"),
            models.Index(fields=["at"], condition=Q(spent_nano_usd__isnull=True), name="claim_open"),
        ]
        constraints = [
            models.CheckConstraint(condition=Q(reserved_nano_usd__gte=0), name="claim_reserved_not_negative")
        ]

    def __str__(self) -> str:
        return self.sandbox_id
