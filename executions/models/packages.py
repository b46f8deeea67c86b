"""What may be installed, what was found out about it, who decided, and what an agent's sandboxes import from."""

from __future__ import annotations

from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q
from django.utils import timezone

from executions import requirements
from executions.models.base import IdField
from executions.models.executions import Execution
from executions.models.sandboxes import Sandbox
from executions.models.teams import Agent, ApiKey, Team, User
from executions.states import Answer, ApprovalState


def everything() -> list[str]:
    return ["*"]


class PackagePolicy(models.Model):
    """The rules of a team for packages, or of one of its agents beside them; the stricter answer holds."""

    team = models.ForeignKey(Team, models.CASCADE, related_name="package_policies")
    agent = models.ForeignKey(
        Agent,
        models.CASCADE,
        null=True,
        blank=True,
        related_name="package_policies",
        help_text="Empty: all its agents.",
    )
    allow = models.JSONField(
        default=everything, blank=True, help_text='Requirements such as "pandas>=2". ["*"]: any. Empty: none.'
    )
    ask = models.JSONField(default=list, blank=True, help_text='Requirements that a person approves. ["*"]: every one.')
    deny = models.JSONField(default=list, blank=True, help_text='Requirements that are never installed: "left-pad<2".')
    licences = models.JSONField(
        default=list, blank=True, help_text='Licences that may be used, such as "MIT" or "BSD-*". Empty: any.'
    )
    private = models.JSONField(
        default=list, blank=True, help_text='Names that only the private index may give: ["acme-*"].'
    )
    most_bytes = models.BigIntegerField(null=True, blank=True, help_text="Of one wheel. Empty: any size.")
    least_age_days = models.PositiveSmallIntegerField(
        default=0, help_text="For which a version has been published, so that others have seen it before."
    )
    vulnerable = models.CharField(max_length=5, choices=Answer, default=Answer.DENY)
    lookalike = models.CharField(
        max_length=5, choices=Answer, default=Answer.ASK, help_text="A name that is almost a popular one."
    )
    unknown = models.CharField(
        max_length=5, choices=Answer, default=Answer.ASK, help_text="Where a rule asks for what nobody knows."
    )

    class Meta:
        verbose_name_plural = "package policies"
        constraints = [
            models.UniqueConstraint(
                fields=["team"], condition=Q(agent__isnull=True), name="package_policy_once_for_team"
            ),
            models.UniqueConstraint(
                fields=["agent"], condition=Q(agent__isnull=False), name="package_policy_once_for_agent"
            ),
        ]

    def __str__(self) -> str:
        return f"Packages of {self.agent or self.team}"

    def clean(self) -> None:
        super().clean()
        for field in ("allow", "ask", "deny"):
            try:
                setattr(self, field, requirements.entries(getattr(self, field)))
            except ValueError as problem:
                raise ValidationError({field: str(problem)}) from None
        for field in ("licences", "private"):
            if not isinstance(value := getattr(self, field), list) or not all(isinstance(v, str) for v in value):
                raise ValidationError({field: "A list of texts."})
        if self.agent is not None and self.agent.team_id != self.team_id:
            raise ValidationError({"agent": f"It belongs to team {self.agent.team}."})


class Advisory(models.Model):
    """A known vulnerability of one package, as an OSV file told it."""

    identifier = models.CharField(max_length=80)
    package = models.CharField(max_length=200)
    summary = models.CharField(max_length=300, blank=True)
    severity = models.CharField(max_length=120, blank=True)
    affected = models.JSONField(default=list, help_text="OSV's versions and ranges of this package.")
    modified_at = models.DateTimeField(help_text="When its authors last changed it.")
    told_at = models.DateTimeField(help_text="The newest change in the file that it came with.")
    imported_at = models.DateTimeField(default=timezone.now)

    class Meta:
        verbose_name_plural = "advisories"
        constraints = [models.UniqueConstraint(fields=["package", "identifier"], name="advisory_once")]

    def __str__(self) -> str:
        return f"{self.identifier} ({self.package})"


class PackageLock(models.Model):
    """The resolved set that an agent's sandboxes import from; never changed, the next one takes its place."""

    id = IdField(prefix="lck")
    agent = models.ForeignKey(Agent, models.PROTECT, related_name="locks")
    digest = models.CharField(max_length=64, help_text="SHA-256 of names, versions and wheels: the lock_hash.")
    python = models.CharField(max_length=8)
    asked = models.JSONField(default=list, help_text="What was asked for by name, now and before.")
    pins = models.JSONField(default=list, help_text="Name, version, wheel, sha256, url and size of each.")
    key = models.ForeignKey(ApiKey, models.PROTECT, null=True, related_name="+")
    actor = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["agent", "digest"], name="package_lock_once")]

    def __str__(self) -> str:
        return f"{self.digest[:12]} of {self.agent}"

    @property
    def versions(self) -> dict[str, str]:
        return {pin["name"]: pin["version"] for pin in self.pins}


class Approval(models.Model):
    """Packages that wait for a person's word, with all that is known about them."""

    id = IdField(prefix="apr")
    team = models.ForeignKey(Team, models.PROTECT, related_name="approvals")
    agent = models.ForeignKey(Agent, models.PROTECT, related_name="approvals")
    sandbox = models.ForeignKey(Sandbox, models.PROTECT, null=True, related_name="+", help_text="Empty: for its lock.")
    execution = models.ForeignKey(Execution, models.PROTECT, null=True, related_name="+", db_index=False)
    key = models.ForeignKey(ApiKey, models.PROTECT, null=True, related_name="+")
    actor = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    state = models.CharField(max_length=8, choices=ApprovalState, default=ApprovalState.PENDING)
    asked = models.JSONField(default=list)
    pins = models.JSONField(default=list, help_text="The whole tree: what each is, needs and is known for.")
    why = models.CharField(max_length=500)
    roll = models.CharField(max_length=64, editable=False, help_text="Hash of the agent and the exact pins.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    decided_at = models.DateTimeField(null=True)
    decided_by = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    reason = models.CharField(max_length=200, blank=True)

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(state__in=ApprovalState.values), name="approval_state_known"),
            models.UniqueConstraint(fields=["roll"], condition=Q(state="pending"), name="approval_pending_once"),
        ]
        indexes = [models.Index(fields=["agent", "roll"], name="approval_of_pins")]

    def __str__(self) -> str:
        return f"{', '.join(self.asked)} for {self.agent}"[:120]
