"""Whom a team has told of its executions: an address, and what became of each message to it."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils import timezone

from executions.models.base import IdField
from executions.models.executions import Execution
from executions.models.records import Transition
from executions.models.teams import Team, User
from executions.states import DeliveryState


class Webhook(models.Model):
    """An address that is told of a team's executions, each step once or more; `cursor` is the last step that was looked at."""

    id = IdField(prefix="whk")
    team = models.ForeignKey(Team, models.CASCADE, related_name="webhooks")
    url = models.CharField(max_length=500)
    description = models.CharField(max_length=300, blank=True)
    states = models.JSONField(default=list, blank=True, help_text="States that it is told of. Empty: every one.")
    is_active = models.BooleanField(default=True, help_text="Off: nothing is sent, and what happens meanwhile is not.")
    secret = models.TextField(editable=False, help_text="Sealed under the installation's own secret.")
    former_secret = models.TextField(
        blank=True, editable=False, help_text="Sealed, too: signed with beside the new one."
    )
    former_until = models.DateTimeField(null=True, editable=False)
    cursor = models.BigIntegerField(default=0, editable=False)
    created_by = models.ForeignKey(User, models.SET_NULL, null=True, blank=True, related_name="+")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    def __str__(self) -> str:
        return self.url


class DeliveryQuerySet(models.QuerySet):
    def pending(self) -> DeliveryQuerySet:
        # a partial index needs a condition without parameters, which the state would be
        return self.filter(ended_at__isnull=True, state=DeliveryState.PENDING)


class Delivery(models.Model):
    """One message: a step of an execution, to one webhook. Pending until it is taken, or tried often enough."""

    id = IdField(prefix="dlv")
    webhook = models.ForeignKey(Webhook, models.CASCADE, related_name="deliveries")
    execution = models.ForeignKey(Execution, models.CASCADE, related_name="+")
    transition = models.ForeignKey(Transition, models.CASCADE, related_name="+", db_index=False)
    state = models.CharField(max_length=10, choices=DeliveryState, default=DeliveryState.PENDING)
    tries = models.PositiveSmallIntegerField(default=0)
    next_at = models.DateTimeField(default=timezone.now, help_text="Not sent before.")
    leased_until = models.DateTimeField(null=True, help_text="Until when a process is sending it.")
    status = models.PositiveSmallIntegerField(null=True, help_text="What the last try was answered with.")
    error = models.CharField(max_length=300, blank=True, help_text="Why the last try failed.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    ended_at = models.DateTimeField(null=True)

    objects = DeliveryQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "deliveries"
        constraints = [
            models.UniqueConstraint(fields=["transition", "webhook"], name="delivery_once"),
            models.CheckConstraint(condition=Q(state__in=DeliveryState.values), name="delivery_state_known"),
        ]
        indexes = [
            models.Index(fields=["webhook", "next_at"], condition=Q(ended_at__isnull=True), name="delivery_open")
        ]

    def __str__(self) -> str:
        return f"{self.transition_id} → {self.webhook_id}"
