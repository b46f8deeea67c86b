"""What was written down: transitions, refusals, idempotency, audit, packages, attestations."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils import timezone

from executions.models.executions import Execution
from executions.models.sandboxes import Sandbox
from executions.models.teams import Agent, ApiKey, Team, User
from executions.states import Verdict


class Transition(models.Model):
    """One step of an execution or a sandbox: history, source of metrics and outbox at once."""

    execution = models.ForeignKey(Execution, models.CASCADE, null=True, related_name="transitions")
    sandbox = models.ForeignKey(Sandbox, models.CASCADE, null=True, related_name="transitions")
    before = models.CharField(max_length=10, blank=True)
    after = models.CharField(max_length=10)
    reason = models.CharField(max_length=200, blank=True)
    at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(execution__isnull=False, sandbox__isnull=True)
                | Q(execution__isnull=True, sandbox__isnull=False),
                name="transition_of_one_row",
            )
        ]

    def __str__(self) -> str:
        return f"{self.before or 'new'} → {self.after}"


class Refusal(models.Model):
    """An admission that was denied, and why; repeats within an hour are counted, not stored again."""

    team = models.ForeignKey(Team, models.CASCADE, related_name="refusals")
    agent = models.ForeignKey(Agent, models.CASCADE, null=True, related_name="refusals")
    key = models.ForeignKey(ApiKey, models.CASCADE, null=True, related_name="refusals")
    actor = models.ForeignKey(User, models.CASCADE, null=True, related_name="+")
    code = models.CharField(max_length=40)
    detail = models.CharField(max_length=500)
    facts = models.JSONField(default=dict)
    roll = models.CharField(max_length=64, unique=True, editable=False, help_text="Hash of who, code and hour.")
    times = models.PositiveIntegerField(default=1)
    first_at = models.DateTimeField(default=timezone.now)
    last_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"{self.code} × {self.times}"


class IdempotencyRecord(models.Model):
    """The promise that a repeated request is answered with the first one's execution, never run again."""

    agent = models.ForeignKey(Agent, models.CASCADE, related_name="+")
    token = models.CharField(max_length=255)
    fingerprint = models.CharField(max_length=64)
    execution = models.ForeignKey(Execution, models.CASCADE, null=True, related_name="+")
    sandbox = models.ForeignKey(Sandbox, models.CASCADE, null=True, related_name="+")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["agent", "token"], name="idempotency_once")]

    def __str__(self) -> str:
        return self.token


class AnswerRecord(models.Model):
    """What a write was answered with, so that its repetition under the same Idempotency-Key does nothing again.

    For writes that make no execution and no session: those have IdempotencyRecord, in their own transaction.
    """

    key = models.ForeignKey(ApiKey, models.CASCADE, related_name="+", db_index=False)
    token = models.CharField(max_length=255)
    fingerprint = models.CharField(max_length=64)
    status = models.PositiveSmallIntegerField(null=True, help_text="Empty: under way, or its process died.")
    body = models.TextField(blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["key", "token"], name="answer_once")]

    def __str__(self) -> str:
        return self.token


class AuditEvent(models.Model):
    """What a person or a program did to configuration, keys, sign-ins and levers, with before and after.

    Triggers refuse to change or delete one. Written by audit.record alone.
    """

    seq = models.BigIntegerField("number", unique=True, editable=False)
    previous = models.CharField(max_length=64, blank=True, editable=False, help_text="The hash of the event before it.")
    digest = models.CharField("hash", max_length=64, editable=False, help_text="Of its content and the hash before it.")
    team = models.ForeignKey(Team, models.PROTECT, null=True, related_name="+")
    actor = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    key = models.ForeignKey(ApiKey, models.PROTECT, null=True, related_name="+")
    action = models.CharField(max_length=40)
    subject = models.CharField(max_length=80, blank=True)
    before = models.JSONField(null=True)
    after = models.JSONField(null=True)
    reason = models.CharField(max_length=200, blank=True)
    ip = models.GenericIPAddressField(null=True)
    at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"{self.action} {self.subject}"


class AuditHead(models.Model):
    """The last link of the audit's chain; whoever adds one holds this row."""

    seq = models.BigIntegerField()
    digest = models.CharField(max_length=64)

    def __str__(self) -> str:
        return f"event {self.seq}"


class Package(models.Model):
    """A package that was asked for, what was decided, and where it went."""

    team = models.ForeignKey(Team, models.PROTECT, related_name="packages")
    agent = models.ForeignKey(Agent, models.PROTECT, related_name="installed")
    sandbox = models.ForeignKey(Sandbox, models.PROTECT, null=True, related_name="packages")
    key = models.ForeignKey(ApiKey, models.PROTECT, null=True, related_name="+")
    actor = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    name = models.CharField(max_length=200)
    version = models.CharField(max_length=100, blank=True)
    sha256 = models.CharField(max_length=64, blank=True)
    size_bytes = models.BigIntegerField(null=True)
    verdict = models.CharField(max_length=8, choices=Verdict)
    reason = models.CharField(max_length=300, blank=True)
    requested = models.BooleanField(default=True, help_text="Asked for by name, not pulled in by another.")
    lock = models.ForeignKey(
        "PackageLock", models.PROTECT, null=True, related_name="packages", help_text="It went into this lock."
    )
    execution = models.ForeignKey(
        Execution, models.PROTECT, null=True, related_name="packages", help_text="The run whose code asked for it."
    )
    licence = models.CharField(max_length=200, blank=True, help_text="Empty: unknown.")
    advisories = models.JSONField(null=True, help_text="Known vulnerabilities of this version; null: unknown.")
    at = models.DateTimeField(default=timezone.now)

    class Meta:
        indexes = [models.Index(fields=["name", "version"], name="package_by_version")]

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


class Attestation(models.Model):
    """What became of every attack of the hostile suite on one backend, on one day."""

    backend = models.CharField(max_length=40)
    isolation = models.CharField(max_length=12, blank=True)
    walls = models.JSONField(default=dict, help_text="Each wall: true, or the sentence that says what is missing.")
    cases = models.JSONField(default=list, help_text="Each attack: group, case, wall, verdict, seen, seconds.")
    blocked = models.PositiveIntegerField(default=0)
    open = models.PositiveIntegerField(default=0)
    skipped = models.PositiveIntegerField(default=0)
    took_seconds = models.FloatField(default=0)
    at = models.DateTimeField(default=timezone.now)

    class Meta:
        indexes = [models.Index(fields=["backend", "-at"], name="attestation_last")]

    def __str__(self) -> str:
        return f"{self.backend}: {self.blocked} blocked, {self.open} open, {self.skipped} skipped"


class MetricTotal(models.Model):
    """A metric of one set of labels, added up over all processes; docs/metrics.md has the names."""

    name = models.CharField(max_length=80)
    labels = models.CharField(max_length=200, help_text="The values of its labels, in order, as JSON.")
    part = models.CharField(max_length=8, blank=True, help_text="Of a histogram: the bucket's bound, or sum.")
    value = models.FloatField(default=0)
    at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["name", "labels", "part"], name="metric_total_once")]

    def __str__(self) -> str:
        return f"{self.name} {self.labels} {self.part}".strip()
