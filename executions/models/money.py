"""What may be used and what it costs. Money is an integer of nano-dollars."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils import timezone

from executions.models.executions import Execution
from executions.models.sandboxes import Sandbox
from executions.models.teams import Agent, ApiKey, Team
from executions.states import Unit, WhenExhausted, Window


class Quota(models.Model):
    """A ceiling. A budget is the quota whose unit is nano_usd.

    Whose it is: the key's, else the agent's, else the team's; with none of the three it is global. One with `each` holds
    for every end user or every agent of theirs separately: each has a row of its own, made when it is first needed.
    """

    USER, AGENT = "user", "agent"

    team = models.ForeignKey(Team, models.CASCADE, null=True, blank=True, related_name="quotas")
    agent = models.ForeignKey(Agent, models.CASCADE, null=True, blank=True, related_name="quotas")
    key = models.ForeignKey(ApiKey, models.CASCADE, null=True, blank=True, related_name="quotas")
    user = models.CharField(max_length=200, blank=True, help_text="Only what runs for this end user of the caller's.")
    workflow = models.CharField(max_length=100, blank=True, help_text="Only what runs in this workflow.")
    backend = models.CharField(max_length=40, blank=True, help_text="Only what runs on this alias.")
    each = models.CharField(
        max_length=5,
        blank=True,
        choices=[(USER, "each end user"), (AGENT, "each agent")],
        help_text="The limit is that of every one of them separately.",
    )
    parent = models.ForeignKey("self", models.CASCADE, null=True, blank=True, editable=False, related_name="children")
    of_whom = models.CharField(max_length=250, blank=True, editable=False, help_text="Which one of `each` it is for.")
    unit = models.CharField(max_length=24, choices=Unit)
    window = models.CharField(max_length=8, choices=Window, default=Window.TOTAL)
    limit = models.BigIntegerField(
        help_text="Nano-dollars for a budget: 5000000000 is $5; microseconds for compute time."
    )
    used = models.BigIntegerField(default=0, editable=False)
    reserved = models.BigIntegerField(default=0, editable=False)
    window_started_at = models.DateTimeField(default=timezone.now, editable=False)
    soft_percent = models.PositiveSmallIntegerField(
        default=80, help_text="From this part of the limit on it is shown as nearly exhausted."
    )
    when_exhausted = models.CharField(max_length=6, choices=WhenExhausted, default=WhenExhausted.REFUSE)
    max_wait_seconds = models.PositiveIntegerField(default=60, help_text="For those that wait; then they are refused.")
    raised_by = models.BigIntegerField(default=0, help_text="On top of the limit, until the moment below.")
    raised_until = models.DateTimeField(null=True, blank=True)
    raised_why = models.CharField(max_length=200, blank=True, help_text="Who wanted it, and for what.")

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(unit__in=Unit.values), name="quota_unit_known"),
            models.CheckConstraint(condition=Q(window__in=Window.values), name="quota_window_known"),
            models.CheckConstraint(condition=Q(limit__gte=0, used__gte=0, reserved__gte=0), name="quota_not_negative"),
            models.CheckConstraint(
                condition=Q(user="", workflow="")
                | Q(unit__in=["executions", "concurrent_executions", "creations", "nano_usd"]),
                name="quota_narrowed_where_known",
            ),
            models.CheckConstraint(
                condition=Q(raised_by=0) | Q(raised_by__gt=0, raised_until__isnull=False), name="quota_raise_ends"
            ),
            models.CheckConstraint(condition=Q(soft_percent__lte=100), name="quota_soft_below_limit"),
            models.UniqueConstraint(
                fields=["parent", "of_whom"], condition=Q(parent__isnull=False), name="quota_once_of_each"
            ),
            models.CheckConstraint(
                condition=Q(each="")
                | Q(each="agent", agent=None, key=None)
                | Q(each="user", user="", unit__in=["executions", "concurrent_executions", "creations", "nano_usd"]),
                name="quota_each_told_apart",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.scope_name}: {self.get_unit_display()} per {self.window}"

    @property
    def is_global(self) -> bool:
        return self.team_id is None and self.agent_id is None and self.key_id is None

    @property
    def scope_name(self) -> str:
        owner = self.key or self.agent or self.team
        whose = f"{owner._meta.verbose_name} {owner}" if owner else "everybody"
        each = [f"each {'end user' if self.each == self.USER else self.each}"] if self.each else []
        narrowed = [f"{name} {value}" for name in ("user", "workflow", "backend") if (value := getattr(self, name))]
        return ", ".join([whose, *each, *narrowed])


class LedgerEntry(models.Model):
    """One movement of money: set aside, given back, or spent, against one budget or against none."""

    RESERVE, RELEASE, SPEND = "reserve", "release", "spend"

    team = models.ForeignKey(Team, models.PROTECT, related_name="+", db_index=False)
    quota = models.ForeignKey(  # never changed, also when the budget is deleted
        Quota, models.DO_NOTHING, null=True, related_name="entries", db_index=False, db_constraint=False
    )
    sandbox = models.ForeignKey(Sandbox, models.PROTECT, related_name="ledger")
    execution = models.ForeignKey(Execution, models.PROTECT, null=True, related_name="ledger")
    kind = models.CharField(max_length=8, choices=[(k, k) for k in (RESERVE, RELEASE, SPEND)])
    amount_nano_usd = models.BigIntegerField()
    at = models.DateTimeField(default=timezone.now)

    class Meta:
        verbose_name_plural = "ledger entries"
        indexes = [models.Index(fields=["quota", "at"], name="ledger_of_quota")]
        constraints = [models.CheckConstraint(condition=Q(amount_nano_usd__gte=0), name="ledger_not_negative")]

    def __str__(self) -> str:
        return f"{self.kind} {self.amount_nano_usd}"


class Usage(models.Model):
    """What was metered: a stretch of a sandbox's allocated time, with the rate copied in."""

    RUN, BOOT, IDLE, POOL = "run", "boot", "idle", "pool"  # pool: ready, and claimed by nobody

    team = models.ForeignKey(Team, models.PROTECT, related_name="+", db_index=False)
    agent = models.ForeignKey(Agent, models.PROTECT, related_name="+", db_index=False)
    sandbox = models.ForeignKey(Sandbox, models.PROTECT, related_name="usage")
    execution = models.ForeignKey(Execution, models.PROTECT, null=True, related_name="usage")
    backend = models.CharField(max_length=40)
    kind = models.CharField(max_length=4, choices=[(k, k) for k in (RUN, BOOT, IDLE, POOL)])
    duration_us = models.BigIntegerField()
    rate_nano_usd_per_second = models.BigIntegerField()
    cost_nano_usd = models.BigIntegerField()
    at = models.DateTimeField(default=timezone.now)
    is_counted = models.BooleanField(
        default=False, editable=False, help_text="It is in the totals of the cost reports."
    )

    class Meta:
        verbose_name_plural = "usage"
        indexes = [
            models.Index(fields=["at", "team"], name="usage_by_time"),
            models.Index(fields=["id"], condition=Q(is_counted=False), name="usage_not_counted"),
        ]
        constraints = [
            models.CheckConstraint(condition=Q(duration_us__gte=0, cost_nano_usd__gte=0), name="usage_not_negative")
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.duration_us} µs"


class Rate(models.Model):
    """What a second of something costs on a backend, or what stands whether it is used or not; with validity."""

    VCPU, GIB, HOUR, MONTH = "vcpu_second", "gib_second", "hour", "month"

    backend = models.CharField(max_length=40, help_text="An alias of settings.SANDBOXES.")
    meter = models.CharField(
        max_length=12,
        choices=[
            (VCPU, "vCPU-second"),
            (GIB, "GiB-second of memory"),
            (HOUR, "the machine itself, an hour"),
            (MONTH, "the plan itself, a month"),
        ],
    )
    nano_usd = models.BigIntegerField()
    valid_from = models.DateTimeField(default=timezone.now)
    valid_to = models.DateTimeField(null=True, blank=True)
    source = models.CharField(max_length=200, blank=True, help_text="Where the price was published.")

    class Meta:
        constraints = [models.CheckConstraint(condition=Q(nano_usd__gte=0), name="rate_not_negative")]

    def __str__(self) -> str:
        return f"{self.backend} {self.meter}: {self.nano_usd} nano-dollars"
