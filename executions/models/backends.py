"""What all processes know of the backends: rows of their own, as a backend itself knows no rows."""

from __future__ import annotations

from django.db import models

from executions.states import BreakerState


class BackendState(models.Model):
    """One backend's circuit breaker, its drill, and the pace at which sandboxes are made there. No row: nothing to know."""

    alias = models.CharField(
        max_length=110, primary_key=True, help_text="`alias@machine` where sandboxes live on one machine each."
    )
    state = models.CharField(max_length=9, choices=BreakerState, default=BreakerState.CLOSED, editable=False)
    streak = models.PositiveIntegerField(default=0, help_text="Failures since a sandbox was last made there.")
    reason = models.CharField(max_length=200, blank=True, help_text="What the latest failure said.")
    silent = models.BooleanField(default=False, help_text="Opened because nothing had answered in time.")
    tries = models.PositiveIntegerField(default=0, help_text="Probes that failed since it opened.")
    opened_at = models.DateTimeField(null=True, blank=True)
    closed_at = models.DateTimeField(null=True, blank=True)
    changed_at = models.DateTimeField(null=True, blank=True, help_text="When somebody last judged or tried it.")
    retry_at = models.DateTimeField(null=True, blank=True)
    probe_by = models.CharField(max_length=32, blank=True, help_text="Whose probe is under way.")
    probe_until = models.DateTimeField(null=True, blank=True, help_text="The end of its lease.")
    drill_by = models.CharField(max_length=100, blank=True, help_text="Who plays an outage here.")
    drill_until = models.DateTimeField(null=True, blank=True)
    creations = models.JSONField(default=list, blank=True, help_text="The latest ones, in seconds of the epoch.")

    class Meta:
        constraints = [
            models.CheckConstraint(condition=models.Q(state__in=BreakerState.values), name="backend_state_known")
        ]

    def __str__(self) -> str:
        return f"{self.alias}: {self.state}"
