"""Webhooks of a team, made and changed by programs, each change in the audit; and what became of their messages."""

from __future__ import annotations

import base64
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import Count, Q, QuerySet
from django.utils import timezone

from executions import audit
from executions.errors import Conflict, Forbidden, Invalid, NotFound
from executions.hop import rows
from executions.keys import Caller
from executions.models import Delivery, Webhook
from executions.operations import deliver, posting
from executions.sealing import sealed
from executions.serializers.webhooks import WebhookChange, WebhookRequest
from executions.states import DeliveryState, Scope

MOST = 20  # of one team
OVERLAP_SECONDS = 3600  # for which the former secret signs, too


def webhooks_of(caller: Caller) -> QuerySet[Webhook]:
    """The team's webhooks, with the numbers of what is pending and dead. Raises Forbidden."""
    caller.needs(Scope.MANAGE)
    if caller.key is not None and caller.key.agent_id:
        raise caller.denied(Forbidden("A key of one agent has no webhooks; use a key of the team."))
    counts = {
        name: Count("deliveries", filter=Q(deliveries__state=state))
        for name, state in (("pending", DeliveryState.PENDING), ("dead", DeliveryState.DEAD))
    }
    return Webhook.objects.filter(team=caller.team).select_related("created_by").annotate(**counts)


def find_webhook(caller: Caller, webhook_id: str) -> Any:
    """Raises NotFound, also for another team's."""
    found = webhooks_of(caller).filter(pk=webhook_id).first()
    if found is None:
        raise NotFound(f"There is no webhook {webhook_id[:100]}.", field="webhook_id")
    return found


@transaction.atomic
def make_webhook(*, caller: Caller, asked: WebhookRequest) -> tuple[Webhook, str]:
    """A new webhook, told of what happens from now on, and its secret. Raises Forbidden, Invalid, Conflict."""
    if webhooks_of(caller).count() >= MOST:
        raise Conflict(f"This team has {MOST} webhooks, which is the most.")
    webhook = Webhook(team=caller.team, created_by=caller.person, cursor=deliver.latest())
    secret = _new_secret(webhook)
    _set(webhook, asked)
    webhook.save(force_insert=True)
    audit.record("webhook_made", caller=caller, subject=webhook.pk, after=audit.difference({}, audit.facts(webhook))[1])
    return webhook, secret


@transaction.atomic
def change_webhook(*, caller: Caller, webhook_id: str, asked: WebhookChange) -> Webhook:
    """Set what was sent. One that is switched on again is told of what happens from then on. Raises NotFound, Invalid."""
    webhook = _locked(caller, webhook_id)
    before = audit.facts(webhook)
    _set(webhook, asked)
    if webhook.is_active and not before["is_active"]:
        webhook.cursor = deliver.latest()
    webhook.save()
    was, is_now = audit.difference(before, audit.facts(webhook) | {"cursor": before["cursor"]})
    if was or is_now:
        audit.record("webhook_changed", caller=caller, subject=webhook.pk, before=was, after=is_now)
    return webhook


@transaction.atomic
def rotate_secret(*, caller: Caller, webhook_id: str, overlap_seconds: int = OVERLAP_SECONDS) -> tuple[Webhook, str]:
    """A new secret; messages are signed with it from now on, and for so long with the former one too. Raises NotFound."""
    webhook = _locked(caller, webhook_id)
    secret, facts = renew(webhook, overlap_seconds)
    audit.record("webhook_changed", caller=caller, subject=webhook.pk, after=facts, reason="a new secret")
    return webhook, secret


def renew(webhook: Webhook, overlap_seconds: int = OVERLAP_SECONDS) -> tuple[str, dict[str, Any]]:
    """A new secret for a row that is held, and what of it belongs into the audit."""
    webhook.former_secret, webhook.former_until = "", None
    if overlap_seconds:
        webhook.former_secret = webhook.secret
        webhook.former_until = timezone.now() + timedelta(seconds=overlap_seconds)
    secret = _new_secret(webhook)
    webhook.save(update_fields=["secret", "former_secret", "former_until"])
    return secret, {"secret": "", "former_until": webhook.former_until}


def switch(webhook: Webhook, *, on: bool) -> bool:
    """Whether it was the other way before. One that is switched on is told of what happens from then on."""
    fields = {"is_active": on} | ({"cursor": deliver.latest()} if on else {})
    return bool(Webhook.objects.filter(pk=webhook.pk, is_active=not on).update(**fields))


@dataclass(frozen=True, slots=True)
class Tested:
    """What became of a message that was sent to be looked at."""

    message_id: str
    status: int | None
    error: str
    took_ms: float

    def facts(self) -> dict[str, Any]:
        """For the audit."""
        return {"message": self.message_id, "status": self.status, "error": self.error}


async def send_test(*, caller: Caller, webhook_id: str) -> Tested:
    """Send one message of the type webhook.test now, once, also where the webhook is off. Raises NotFound."""
    webhook = await rows(find_webhook, caller, webhook_id)
    tested = await try_out(webhook)
    await rows(audit.record, "webhook_tested", caller=caller, subject=webhook.pk, after=tested.facts())
    return tested


async def try_out(webhook: Webhook) -> Tested:
    """The same for a row that is at hand."""
    name, began = f"test_{secrets.token_hex(10)}", time.perf_counter()
    content = {"type": "webhook.test", "timestamp": timezone.now().isoformat(), "data": {"webhook_id": webhook.pk}}
    status: int | None
    try:
        status, error = await deliver.post(webhook, name, content), ""
    except posting.NotSent as problem:
        status, error = problem.status, str(problem)
    return Tested(name, status, error, (time.perf_counter() - began) * 1000)


@transaction.atomic
def remove_webhook(*, caller: Caller, webhook_id: str) -> None:
    """It is told nothing more, and what became of its messages is forgotten. Raises NotFound."""
    webhook = _locked(caller, webhook_id)
    before = audit.difference(audit.facts(webhook), {})[0]
    audit.record("webhook_deleted", caller=caller, subject=webhook.pk, before=before)
    webhook.delete()


def deliveries_of(caller: Caller, webhook_id: str) -> QuerySet[Delivery]:
    """What was and is to be sent, newest first. Raises NotFound."""
    found = Delivery.objects.filter(webhook=find_webhook(caller, webhook_id))
    return found.select_related("transition").order_by("-transition")


@transaction.atomic
def resend(*, caller: Caller, webhook_id: str, delivery_id: str) -> Delivery:
    """Send one again, under the same id: now, with all its tries. One that is pending is tried at once. Raises NotFound."""
    _locked(caller, webhook_id)
    found = deliveries_of(caller, webhook_id).filter(pk=delivery_id)
    if not found.exists():
        raise NotFound(f"There is no delivery {delivery_id[:100]}.", field="delivery_id")
    if revive(Delivery.objects.filter(pk=delivery_id)):
        audit.record("webhook_resent", caller=caller, subject=webhook_id, after={"delivery": delivery_id})
    return found.get()


def revive(deliveries: QuerySet[Delivery]) -> int:
    """Let them be sent now, with all their tries, but for those that are being sent. Returns how many."""
    now = timezone.now()
    return deliveries.exclude(leased_until__gt=now).update(
        state=DeliveryState.PENDING, tries=0, next_at=now, ended_at=None, leased_until=None
    )


def _locked(caller: Caller, webhook_id: str) -> Webhook:
    return Webhook.objects.select_for_update().get(pk=find_webhook(caller, webhook_id).pk)


def _new_secret(webhook: Webhook) -> str:
    secret = posting.SECRET + base64.b64encode(secrets.token_bytes(32)).decode()
    webhook.secret = sealed(secret, deliver.PURPOSE)
    return secret


def _set(webhook: Webhook, asked: WebhookChange) -> None:
    for name, value in asked.model_dump(mode="json", exclude_unset=True).items():
        if value is not None:
            setattr(webhook, name, value)
    try:
        posting.checked(webhook.url)
    except ValueError as problem:
        raise Invalid(f"url: {problem}", field="url") from None
