"""Where code runs: templates and sandboxes. A session is a sandbox that is kept."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone

from executions.errors import Elsewhere, SandboxLost
from executions.models.base import HasLifecycle, IdField
from executions.models.teams import Agent, ApiKey, Team, User
from executions.states import SANDBOX_ENDED, SANDBOX_NEXT, EndReason, SandboxState


class Template(models.Model):
    """What a sandbox is made from."""

    name = models.SlugField(max_length=64, unique=True)
    description = models.CharField(max_length=300, blank=True)
    languages = models.JSONField(default=list, blank=True)
    cpu_count = models.PositiveSmallIntegerField(default=1)
    memory_mib = models.PositiveIntegerField(default=512)
    disk_mib = models.PositiveIntegerField(default=512)
    env = models.JSONField(default=dict, blank=True, help_text="Environment variables of every sandbox; never secrets.")
    e2b_template = models.CharField(max_length=100, blank=True, help_text="E2B's id; empty: code-interpreter-v1.")
    packages = models.JSONField(
        default=list, blank=True, help_text="Requirements beside the shipped ones, such as emoji>=2; wheels only."
    )
    files = models.JSONField(default=dict, blank=True, help_text="Path to text: what every fresh sandbox finds.")
    start_command = models.TextField(
        blank=True, help_text="Run once in each fresh sandbox before it is handed out, for at most 30 s."
    )
    warm = models.BooleanField(default=True, help_text="Kept ready on this machine; off: warmed up on demand.")
    build = models.PositiveIntegerField(default=0, editable=False, help_text="Raised to have it built anew.")
    is_active = models.BooleanField(default=True)

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(cpu_count__gte=1, memory_mib__gte=64, disk_mib__gte=16), name="template_sizes_sane"
            )
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def own_content(self) -> str:
        """What it holds that another provider's standard template does not; empty where there is nothing."""
        held = {"packages": self.packages, "files": self.files, "a start command": self.start_command}
        return ", ".join(name for name, value in held.items() if value)


class SandboxQuerySet(models.QuerySet):
    def open(self):
        return self.filter(ended_at__isnull=True)  # a partial index needs a condition without parameters

    def sessions(self):
        return self.filter(kept=True)

    def here(self):
        """Those that a process on this machine reaches."""
        return self.filter(node__in=["", settings.NODE])


class Sandbox(HasLifecycle):
    """One isolated machine on one backend, leased once. The row is the lease, and is inserted before the backend is asked."""

    NEXT, ENDED, SUBJECT = SANDBOX_NEXT, SANDBOX_ENDED, "sandbox"

    id = IdField(prefix="sbx")
    team = models.ForeignKey(Team, models.PROTECT, related_name="sandboxes", db_index=False)
    agent = models.ForeignKey(Agent, models.PROTECT, related_name="sandboxes", db_index=False)
    key = models.ForeignKey(ApiKey, models.PROTECT, null=True, blank=True, related_name="+", db_index=False)
    actor = models.ForeignKey(User, models.PROTECT, null=True, blank=True, related_name="+", db_index=False)
    template = models.ForeignKey(Template, models.PROTECT, related_name="+", db_index=False)
    backend = models.CharField(max_length=40)
    node = models.CharField(
        max_length=60, blank=True, editable=False, help_text="The machine it lives on; empty: any process reaches it."
    )
    isolation = models.CharField(max_length=12, default="none")
    handle = models.JSONField(null=True, blank=True, editable=False)
    state = models.CharField(max_length=10, choices=SandboxState, default=SandboxState.BOOTING, editable=False)
    kept = models.BooleanField(default=False, help_text="A session: state persists between executions.")
    pool = models.ForeignKey(
        "Pool", models.PROTECT, null=True, blank=True, related_name="sandboxes", db_index=False,
        help_text="The pool that made it, or that had none ready for its caller.",
    )  # fmt: skip
    made_of = models.CharField(
        max_length=16, blank=True, editable=False, help_text="Made by the pool: hash of what it was made from."
    )
    lock = models.ForeignKey(
        "PackageLock", models.PROTECT, null=True, blank=True, related_name="sandboxes", db_index=False,
        help_text="The packages of its agent that it was made with.",
    )  # fmt: skip
    name = models.CharField(max_length=100, blank=True)
    metadata = models.JSONField(default=dict, blank=True)
    env = models.JSONField(default=dict, blank=True)
    network_allow = models.JSONField(default=list, blank=True, help_text="The rules of its network; empty: off.")
    cpu_count = models.PositiveSmallIntegerField(default=1)
    memory_mib = models.PositiveIntegerField(default=512)
    idle_timeout_seconds = models.PositiveIntegerField(default=300)
    pause_after_seconds = models.PositiveIntegerField(
        default=0, help_text="Paused when nothing has run in it for so long; 0: never."
    )
    stays_paused = models.BooleanField(default=False, help_text="Paused on request: it does not end idle.")
    turning_until = models.DateTimeField(
        null=True, blank=True, help_text="Until then one process pauses it, resumes it or keeps its files."
    )
    keep_files = models.JSONField(default=list, blank=True, help_text="Folders and globs that are kept at its end.")
    collected_at = models.DateTimeField(null=True, blank=True, help_text="When its files had been kept.")
    kept_said = models.CharField(max_length=300, blank=True, help_text="What was kept at its end, or why not.")
    leased_until = models.DateTimeField(help_text="Its absolute end; the provider's own timeout is never later.")
    last_used_at = models.DateTimeField(default=timezone.now)
    reserved_nano_usd = models.BigIntegerField(default=0, help_text="What it may still cost, set aside.")
    reserved_on = models.JSONField(default=list, blank=True, help_text="The budgets that hold the reservation.")
    spent_nano_usd = models.BigIntegerField(default=0)
    metered_until = models.DateTimeField(null=True, blank=True, help_text="Up to here its time is in the ledger.")
    rate_nano_usd_per_second = models.BigIntegerField(default=0)
    is_priced = models.BooleanField(default=True, help_text="Off: no rate was known, and the ceiling rate is charged.")
    end_reason = models.CharField(max_length=10, choices=EndReason, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    ready_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)

    objects = SandboxQuerySet.as_manager()

    replayed = False  # the answer to a repeated Idempotency-Key

    class Meta:
        verbose_name_plural = "sandboxes"
        indexes = [
            models.Index(fields=["leased_until"], condition=Q(ended_at__isnull=True), name="sandbox_open"),
            models.Index(fields=["team", "-created_at"], name="sandbox_of_team"),
            models.Index(fields=["team", "-created_at"], condition=Q(kept=True), name="session_of_team"),
            models.Index(fields=["pool", "state"], condition=Q(ended_at__isnull=True), name="sandbox_open_of_pool"),
            models.Index(fields=["pool", "created_at"], condition=Q(pool__isnull=False), name="sandbox_of_pool"),
            models.Index(fields=["team", "ended_at"], condition=Q(ended_at__isnull=True), name="sandbox_open_of_team"),
            models.Index(
                fields=["agent", "ended_at"], condition=Q(ended_at__isnull=True), name="sandbox_open_of_agent"
            ),
            models.Index(fields=["key", "ended_at"], condition=Q(ended_at__isnull=True), name="sandbox_open_of_key"),
        ]
        constraints = [
            models.CheckConstraint(condition=Q(state__in=SandboxState.values), name="sandbox_state_known"),
            models.CheckConstraint(condition=Q(reserved_nano_usd__gte=0), name="sandbox_reserved_not_negative"),
            models.CheckConstraint(
                condition=Q(state="gone", ended_at__isnull=False) | ~Q(state="gone") & Q(ended_at__isnull=True),
                name="sandbox_gone_has_end",
            ),
        ]

    def __str__(self) -> str:
        return self.id

    @property
    def waits(self) -> bool:
        """Still in its pool: nobody has had it yet."""
        return bool(self.made_of) and self.state in (SandboxState.BOOTING, SandboxState.IDLE)

    @property
    def is_here(self) -> bool:
        """Whether a process on this machine reaches it."""
        return self.node in ("", settings.NODE)

    def must_be_here(self) -> None:
        """Raises Elsewhere where no process on this machine reaches it."""
        if not self.is_here:
            raise Elsewhere(f"The session lives on machine {self.node}, and this is {settings.NODE}.", node=self.node)

    @property
    def machine(self) -> dict[str, Any]:
        """The backend's handle. Raises Elsewhere on another machine, SandboxLost before the boot has given one."""
        self.must_be_here()
        if self.handle is None:
            raise SandboxLost("The sandbox is still starting, or never did.")
        return self.handle

    @property
    def grace_seconds(self) -> int:
        """How much longer than `leased_until` the provider is asked for: its files are kept then."""
        return settings.KEEP_GRACE_SECONDS if self.kept and self.keep_files else 0

    @property
    def provider_name(self) -> str:
        """Our id as the backends carry it: lowercase letters and digits only."""
        return self.id.replace("_", "")
