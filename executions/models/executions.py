"""What ran: executions, their attempts, journal and artifacts."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils import timezone

from executions.models.base import HasLifecycle, IdField
from executions.models.sandboxes import Sandbox
from executions.models.teams import Agent, ApiKey, Team, User
from executions.states import EXECUTION_ENDED, EXECUTION_NEXT, AttemptOutcome, EgressVerdict, EventKind, ExecutionState


class ExecutionQuerySet(models.QuerySet):
    def open(self):
        return self.filter(ended_at__isnull=True)  # a partial index needs a condition without parameters


class Execution(HasLifecycle):
    """One request to run one piece of code, from admission to the bill."""

    NEXT, ENDED, SUBJECT = EXECUTION_NEXT, EXECUTION_ENDED, "execution"

    id = IdField(prefix="exe")
    team = models.ForeignKey(Team, models.PROTECT, related_name="executions", db_index=False)
    agent = models.ForeignKey(Agent, models.PROTECT, related_name="executions", db_index=False)
    key = models.ForeignKey(ApiKey, models.PROTECT, null=True, blank=True, related_name="executions", db_index=False)
    actor = models.ForeignKey(User, models.PROTECT, null=True, blank=True, related_name="executions", db_index=False)
    sandbox = models.ForeignKey(
        Sandbox, models.PROTECT, null=True, blank=True, related_name="executions", db_index=False
    )
    state = models.CharField(max_length=10, choices=ExecutionState, default=ExecutionState.QUEUED, editable=False)
    language = models.CharField(max_length=12, default="python")
    code = models.TextField()
    code_sha256 = models.CharField(max_length=64)
    context = models.CharField(max_length=64, blank=True)
    command = models.BooleanField(default=False, help_text="A command line for bash instead of a cell.")
    env = models.JSONField(default=dict, blank=True)
    files = models.JSONField(default=dict, blank=True, help_text="Written before the code runs: path to base64.")
    timeout_seconds = models.PositiveIntegerField(default=60)
    limits = models.JSONField(
        default=dict, blank=True, help_text="Asked for below the usual: memory_mib, cpu_seconds, output_bytes, results."
    )
    keep_files = models.JSONField(default=list, blank=True, help_text="Folders and globs that are kept at its end.")
    kept_said = models.CharField(max_length=300, blank=True, help_text="What was kept at its end, or why not.")
    route = models.JSONField(default=list, help_text="The backends that may run it, in order.")
    cancel_on_disconnect = models.BooleanField(default=False)
    user = models.CharField(max_length=200, blank=True, help_text="The caller's own end user.")
    workflow = models.CharField(max_length=100, blank=True)
    step = models.CharField(max_length=100, blank=True)
    parent = models.ForeignKey("self", models.SET_NULL, null=True, blank=True, related_name="children")
    metadata = models.JSONField(default=dict, blank=True)
    door = models.CharField(max_length=10, blank=True, help_text="rest, mcp, console or gateway.")
    ip = models.GenericIPAddressField(null=True, blank=True)
    request_id = models.CharField(max_length=40, blank=True)
    trace_id = models.CharField(max_length=32, blank=True)
    backend = models.CharField(max_length=40, blank=True)
    execution_count = models.PositiveIntegerField(null=True, blank=True)
    error_code = models.CharField(max_length=40, blank=True)
    error_name = models.CharField(max_length=200, blank=True)
    error_value = models.TextField(blank=True)
    cancel_requested_at = models.DateTimeField(null=True, blank=True)
    cancel_reason = models.CharField(max_length=200, blank=True)
    max_cost_nano_usd = models.BigIntegerField(null=True, blank=True, help_text="The most that it may cost.")
    wish = models.JSONField(default=dict, blank=True, editable=False, help_text="What it needs to start.")
    waits_for = models.CharField(max_length=300, blank=True, help_text="Why it was not started at once.")
    waits_until = models.DateTimeField(null=True, blank=True, help_text="Not started by then, it is refused.")
    heartbeat_at = models.DateTimeField(null=True, blank=True, help_text="The runner's sign of life.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    started_at = models.DateTimeField(null=True, blank=True)
    running_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    cpu_us = models.BigIntegerField(null=True, blank=True)
    peak_memory_bytes = models.BigIntegerField(null=True, blank=True)
    output_bytes = models.BigIntegerField(default=0)
    cost_nano_usd = models.BigIntegerField(null=True, blank=True)

    objects = ExecutionQuerySet.as_manager()

    tried: list[Attempt] = []  # of the admission, in memory only: spares a query in the process that runs it
    replayed = False  # the answer to a repeated Idempotency-Key

    class Meta:
        # Without the second column SQLite takes a wider index and reads the team's whole history for a count.
        indexes = [
            models.Index(
                fields=["team", "ended_at"], condition=Q(ended_at__isnull=True), name="execution_open_of_team"
            ),
            models.Index(
                fields=["agent", "ended_at"], condition=Q(ended_at__isnull=True), name="execution_open_of_agent"
            ),
            models.Index(fields=["key", "ended_at"], condition=Q(ended_at__isnull=True), name="execution_open_of_key"),
            models.Index(fields=["agent", "-created_at"], name="execution_of_agent"),
            models.Index(fields=["heartbeat_at"], condition=Q(ended_at__isnull=True), name="execution_open"),
            models.Index(fields=["created_at"], condition=Q(state="queued"), name="execution_waiting"),
            models.Index(fields=["team", "-created_at", "-id"], name="execution_of_team"),
            models.Index(fields=["created_at"], name="execution_by_time"),
            models.Index(fields=["sandbox", "created_at"], name="execution_in_sandbox"),
            models.Index(  # a workflow's list, in its order; costs nothing without the label
                fields=["team", "workflow", "-created_at", "-id"],
                condition=~Q(workflow=""),
                name="execution_of_workflow",
            ),
        ]
        constraints = [
            models.CheckConstraint(condition=Q(state__in=ExecutionState.values), name="execution_state_known"),
            models.CheckConstraint(
                condition=Q(state__in=sorted(EXECUTION_ENDED), ended_at__isnull=False)
                | ~Q(state__in=sorted(EXECUTION_ENDED)) & Q(ended_at__isnull=True),
                name="execution_ended_has_end",
            ),
            models.CheckConstraint(condition=Q(timeout_seconds__gte=1), name="execution_timeout_positive"),
        ]

    def __str__(self) -> str:
        return self.id

    @property
    def is_open(self) -> bool:
        return self.ended_at is None

    @property
    def waits(self) -> bool:
        """Whether nobody runs it yet, as there was no room."""
        return self.state == ExecutionState.QUEUED

    @property
    def is_unclaimed(self) -> bool:
        """Whether no process runs it yet: it waits, or was left for whichever process is first."""
        return self.ended_at is None and self.heartbeat_at is None


class Attempt(models.Model):
    """One try of an execution on one backend."""

    execution = models.ForeignKey(Execution, models.CASCADE, related_name="attempts", db_index=False)
    number = models.PositiveSmallIntegerField()
    backend = models.CharField(max_length=40)
    sandbox = models.ForeignKey(Sandbox, models.PROTECT, null=True, blank=True, related_name="attempts")
    outcome = models.CharField(max_length=12, choices=AttemptOutcome, default=AttemptOutcome.OPEN)
    code = models.CharField(max_length=40, blank=True)
    reason = models.CharField(max_length=500, blank=True)
    started_at = models.DateTimeField(default=timezone.now)
    ended_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["execution", "number"]
        constraints = [models.UniqueConstraint(fields=["execution", "number"], name="attempt_number_once")]

    def __str__(self) -> str:
        return f"{self.number} on {self.backend}: {self.outcome}"


class Event(models.Model):
    """One entry of an execution's journal."""

    execution = models.ForeignKey(Execution, models.CASCADE, related_name="events", db_index=False)
    seq = models.PositiveIntegerField()
    kind = models.CharField(max_length=10, choices=EventKind)
    data = models.JSONField(default=dict)
    at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["execution", "seq"]
        constraints = [models.UniqueConstraint(fields=["execution", "seq"], name="event_seq_once")]

    def __str__(self) -> str:
        return f"{self.seq} {self.kind}"


class Egress(models.Model):
    """One connection out of a sandbox as the proxy saw it, or one refusal and how often it was repeated."""

    sandbox = models.ForeignKey(Sandbox, models.CASCADE, related_name="egress")
    execution = models.ForeignKey(Execution, models.CASCADE, null=True, blank=True, related_name="egress")
    number = models.PositiveIntegerField()
    host = models.CharField(max_length=255, blank=True)
    port = models.PositiveIntegerField()
    address = models.CharField(max_length=45, blank=True)
    verdict = models.CharField(max_length=8, choices=EgressVerdict)
    reason = models.CharField(max_length=300, blank=True)
    bytes_out = models.BigIntegerField(default=0)
    bytes_in = models.BigIntegerField(default=0)
    times = models.PositiveIntegerField(default=1)
    at = models.DateTimeField(default=timezone.now)

    class Meta:
        verbose_name_plural = "egress"
        constraints = [models.UniqueConstraint(fields=["sandbox", "number"], name="egress_number_once")]

    def __str__(self) -> str:
        return f"{self.host}:{self.port} {self.verdict}"


class Artifact(models.Model):
    """A file that is kept after its sandbox is gone: of one run, or of a session. Its content lies in the store, once."""

    id = IdField(prefix="art")
    team = models.ForeignKey(Team, models.PROTECT, related_name="artifacts")
    sandbox = models.ForeignKey(Sandbox, models.CASCADE, related_name="artifacts")
    execution = models.ForeignKey(
        Execution, models.CASCADE, null=True, blank=True, related_name="artifacts", db_index=False
    )
    name = models.CharField(max_length=500, help_text="Its path below /home/user, or where it lay elsewhere.")
    mime = models.CharField(max_length=100)
    size_bytes = models.BigIntegerField()
    sha256 = models.CharField(max_length=64, db_index=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    expires_at = models.DateTimeField(db_index=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["execution", "name"], condition=Q(execution__isnull=False), name="artifact_once_of_execution"
            ),
            models.UniqueConstraint(
                fields=["sandbox", "name"], condition=Q(execution__isnull=True), name="artifact_once_of_session"
            ),
        ]

    def __str__(self) -> str:
        return self.name
