"""Who asks: teams, the people in them, their agents and keys."""

from __future__ import annotations

from django.contrib.auth.models import AbstractUser
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import Q
from django.utils import timezone

from executions import globs, network
from executions.models.base import IdField
from executions.states import Role, Scope


class User(AbstractUser):
    """A person. Programs are agents, with keys."""

    @property
    def calls_themselves(self) -> str:
        return self.get_full_name() or self.username


class Team(models.Model):
    """The tenant: nothing of one team is visible to another."""

    id = IdField(prefix="team")
    name = models.CharField(max_length=100, unique=True)
    time_zone = models.CharField(max_length=64, default="UTC", help_text="Where its days and months begin.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    def __str__(self) -> str:
        return self.name


class Membership(models.Model):
    """A person in a team, with a role."""

    team = models.ForeignKey(Team, models.CASCADE, related_name="memberships")
    user = models.ForeignKey(User, models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=12, choices=Role, default=Role.DEVELOPER)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["team", "user"], name="membership_once"),
            models.CheckConstraint(condition=Q(role__in=Role.values), name="membership_role_known"),
        ]

    def __str__(self) -> str:
        return f"{self.user} in {self.team}: {self.role}"


class Agent(models.Model):
    """A program that runs code, with what it may do and where. Each person has a personal one."""

    id = IdField(prefix="agt")
    team = models.ForeignKey(Team, models.PROTECT, related_name="agents")
    name = models.SlugField(max_length=64)
    person = models.ForeignKey(
        User, models.CASCADE, null=True, blank=True, related_name="agents", help_text="Whose personal agent this is."
    )
    description = models.CharField(max_length=300, blank=True)
    is_active = models.BooleanField(default=True, help_text="Off: its keys and sessions are refused.")
    route = models.JSONField(
        default=list, blank=True, help_text='Backend aliases in order, e.g. ["e2b", "local"]. Empty: the default route.'
    )
    isolation_floor = models.CharField(
        max_length=12,
        default="",
        blank=True,
        choices=[("none", "none"), ("reduced", "reduced"), ("namespaces", "namespaces"), ("microvm", "microvm")],
        help_text="Code of this agent never runs behind weaker walls than these. Empty: the installation's floor.",
    )
    template = models.ForeignKey(
        "Template", models.PROTECT, null=True, blank=True, help_text="What its sandboxes are made from."
    )
    stays_here = models.BooleanField(
        default=False,
        help_text="Its code and data never leave this machine: backends that are elsewhere are left out.",
    )
    languages = models.JSONField(default=list, blank=True, help_text="Allowed languages. Empty: every one there is.")
    tools = models.JSONField(default=list, blank=True, help_text="MCP tools it sees. Empty: all.")
    packages = models.JSONField(
        default=list, blank=True, help_text='Package names that may be installed. Empty: none. ["*"]: any.'
    )
    lock = models.ForeignKey(
        "PackageLock", models.PROTECT, null=True, blank=True, related_name="+", db_index=False,
        help_text="The packages that all its sandboxes have, beside their template's.",
    )  # fmt: skip
    network_allow = models.JSONField(
        default=list,
        blank=True,
        help_text='Hosts and addresses that its code may reach. Empty: none. ["*"]: every public one.',
    )
    timeout_seconds = models.PositiveIntegerField(default=60, help_text="Of one execution, when it does not say.")
    timeout_max_seconds = models.PositiveIntegerField(default=600, help_text="The most that it may ask for.")
    pause_after_seconds = models.PositiveIntegerField(
        null=True,
        blank=True,
        help_text="Its sessions are paused when nothing has run for so long. 0: never. Empty: as the installation does.",
    )
    keep_files = models.JSONField(
        null=True,
        blank=True,
        help_text='Kept as artifacts when a sandbox ends, e.g. ["outputs", "*.csv"]. []: nothing. '
        "Empty: outputs of sessions, nothing of single runs.",
    )
    artifact_days = models.PositiveSmallIntegerField(
        null=True, blank=True, help_text="How long its artifacts are kept. Empty: as long as the installation says."
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["team", "name"], name="agent_name_once_in_team"),
            models.UniqueConstraint(
                fields=["team", "person"], condition=Q(person__isnull=False), name="agent_personal_once"
            ),
            models.CheckConstraint(
                condition=Q(timeout_seconds__gte=1, timeout_max_seconds__gte=models.F("timeout_seconds")),
                name="agent_timeouts_ordered",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        super().clean()
        try:
            self.network_allow = network.normalised(self.network_allow)
        except ValueError as problem:
            raise ValidationError({"network_allow": str(problem)}) from None
        try:
            self.keep_files = None if self.keep_files is None else globs.normalised(self.keep_files)
        except (TypeError, ValueError) as problem:
            raise ValidationError({"keep_files": str(problem)}) from None


def default_scopes() -> list[str]:
    return [Scope.RUN.value, Scope.READ.value]


class ApiKey(models.Model):
    """A secret that authenticates a program; shown once, stored as an HMAC."""

    id = IdField(prefix="key")
    team = models.ForeignKey(Team, models.PROTECT, related_name="keys")
    agent = models.ForeignKey(
        Agent, models.PROTECT, null=True, blank=True, related_name="keys", help_text="Empty: a key of the whole team."
    )
    name = models.CharField(max_length=100)
    public = models.CharField(max_length=16, unique=True, editable=False, help_text="The part that is not secret.")
    digest = models.CharField(max_length=64, editable=False)
    scopes = models.JSONField(default=default_scopes)
    backend = models.CharField(
        max_length=40, blank=True, help_text='Bound to one backend: "scripted" makes a test key that costs nothing.'
    )
    allow_from = models.JSONField(
        default=list, blank=True, help_text='Networks that it may be sent from, e.g. ["10.0.0.0/8"]. Empty: any.'
    )
    created_by = models.ForeignKey(User, models.SET_NULL, null=True, blank=True, related_name="+")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.name} (sg_{self.public}…)"

    @property
    def has_secret(self) -> bool:
        """Not so where it stands for what a person's OAuth client does: that one shows tokens of its own."""
        return bool(self.digest)

    @property
    def is_live(self) -> bool:
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > timezone.now())

    def clean(self) -> None:
        super().clean()
        try:
            self.allow_from = network.cidrs(self.allow_from)
        except (TypeError, ValueError) as problem:
            raise ValidationError({"allow_from": str(problem)}) from None


class SignInLink(models.Model):
    """A link that signs one person in, once. Only its hash is stored."""

    digest = models.CharField(max_length=64, primary_key=True)
    user = models.ForeignKey(User, models.CASCADE, related_name="+")
    expires_at = models.DateTimeField()
    used_at = models.DateTimeField(null=True, blank=True)

    def __str__(self) -> str:
        return f"for {self.user}, until {self.expires_at:%Y-%m-%d %H:%M}"
