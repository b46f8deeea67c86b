"""Webhooks, their deliveries, and the messages themselves."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from executions.models import Delivery, Transition, Webhook
from executions.serializers.requests import Accepted
from executions.serializers.shapes import ExecutionShape, execution_head
from executions.states import EXECUTION_ENDED, ExecutionState

NOT_SENT = {
    "code", "results", "mains", "logs", "error", "truncated", "detail", "attempts", "fell_back", "egress", "queue", "last_seq",
    "kept", "limits_reached",
}  # fmt: skip
LATER = ("started_at", "running_at", "ended_at")


class WebhookChange(Accepted):
    """What is left out stays as it is."""

    url: str | None = Field(None, description="https://…; http:// only within allowed networks.", max_length=500)
    description: str | None = Field(None, max_length=300)
    states: list[ExecutionState] | None = Field(
        None, description="It is told when an execution comes into one of them; []: every one.", max_length=8
    )
    is_active: bool | None = Field(None, description="false: nothing is sent, nor later what happens meanwhile.")


class WebhookRequest(WebhookChange):
    """An address that is told of the team's executions."""

    url: str = Field(description="https://…; http:// only within allowed networks.", min_length=1, max_length=500)


class WebhookRotateRequest(Accepted):
    """A new secret beside the former one, with which messages are signed for a while longer, too."""

    overlap_seconds: int = Field(
        3600, ge=0, le=2_592_000, description="How long messages carry both signatures; 0: the new one alone."
    )


class WebhookTestShape(BaseModel):
    """What became of a test message: sent once, now."""

    message_id: str
    status: int | None = Field(description="What it was answered with; null where nobody answered.")
    error: str = Field(description="Why it counts as not taken; empty where it was.")
    took_ms: float


class WebhookShape(BaseModel):
    id: str
    url: str
    description: str
    states: list[str]
    is_active: bool
    pending: int = Field(description="Messages that are yet to be delivered.")
    dead: int = Field(description="Messages that were tried often enough.")
    former_secret_until: datetime | None = Field(
        description="Until when messages are signed with the former secret, too."
    )
    created_by: str | None
    created_at: datetime


class MadeWebhookShape(WebhookShape):
    secret: str | None = Field(description="whsec_…, to verify signatures with. Shown once; null in a repeated answer.")


class DeliveryShape(BaseModel):
    """One message, and what became of it."""

    id: str
    message_id: str = Field(description="Its webhook-id, the same at every try.")
    execution_id: str
    execution_state: str = Field(description="What it tells.")
    state: str = Field(description="pending, delivered or dead")
    tries: int
    status: int | None = Field(description="What the last try was answered with.")
    error: str
    next_at: datetime | None = Field(description="Not sent before; null once it has ended.")
    created_at: datetime
    ended_at: datetime | None


def webhook_shape(webhook: Webhook, pending: int = 0, dead: int = 0) -> WebhookShape:
    return WebhookShape(
        id=webhook.pk,
        url=webhook.url,
        description=webhook.description,
        states=webhook.states,
        is_active=webhook.is_active,
        pending=pending,
        dead=dead,
        former_secret_until=webhook.former_until,
        created_by=webhook.created_by.get_username() if webhook.created_by else None,
        created_at=webhook.created_at,
    )


def delivery_shape(delivery: Delivery) -> DeliveryShape:
    return DeliveryShape(
        id=delivery.pk,
        message_id=message_id(delivery.transition),
        execution_id=delivery.execution_id,
        execution_state=delivery.transition.after,
        state=delivery.state,
        tries=delivery.tries,
        status=delivery.status,
        error=delivery.error,
        next_at=None if delivery.ended_at else delivery.next_at,
        created_at=delivery.created_at,
        ended_at=delivery.ended_at,
    )


def message_id(transition: Transition) -> str:
    return f"trn_{transition.pk}"


def message(transition: Transition) -> dict[str, Any]:
    """The execution as it was with this step: as GET /executions/{id} shows it, without its code and output.

    The same at every try, whatever has happened since.
    """
    assert transition.execution is not None
    head = execution_head(transition.execution)
    head.state = transition.after
    for name in LATER:
        if (at := getattr(head, name)) and at > transition.at:
            setattr(head, name, None)
    if transition.after not in EXECUTION_ENDED:
        fresh = ExecutionShape.model_fields
        for name in ("cost_nano_usd", "unpriced_charged_nano_usd", "error_code", "exit_code"):
            setattr(head, name, fresh[name].default)
        head.cost_usd = ""
    head.usage = head.usage if transition.after in EXECUTION_ENDED else type(head.usage)()
    return {
        "type": f"execution.{transition.after}",
        "timestamp": transition.at.isoformat(),
        "data": head.model_dump(mode="json", exclude=NOT_SENT),
    }
