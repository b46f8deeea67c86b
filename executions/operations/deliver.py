"""Webhooks' messages: made out of `Transition` rows, sent at least once, and of one execution one after the other.

Every process looks. A webhook's cursor moves by compare-and-set, together with the rows of what is to be sent; a message is
leased while it is sent, so that a process that dies leaves it to the next one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from datetime import timedelta
from typing import Any

from django.db import connection, transaction
from django.db.models import Exists, Max, OuterRef, Q, QuerySet
from django.utils import timezone

from executions import faults, metrics
from executions.hop import rows
from executions.models import Delivery, Transition, Webhook
from executions.operations import posting
from executions.sealing import opened
from executions.serializers.webhooks import message, message_id
from executions.states import DeliveryState

PURPOSE = "webhook"
TRIES_MOST = 10
FIRST_SECONDS, LONGEST_SECONDS = 5, 12 * 3600  # until the next try: 5 s, 20 s, 80 s, … together a day and a half
LEASE = timedelta(seconds=4 * posting.WHOLE_SECONDS)
AT_ONCE = 8  # messages of one webhook that one process sends at a time
STEPS = 500  # transitions that are looked at in one go
KEPT = {DeliveryState.DELIVERED: timedelta(days=3), DeliveryState.DEAD: timedelta(days=30)}
log = logging.getLogger(__name__)

_sending: dict[str, asyncio.Task[None]] = {}  # by webhook
_seen: tuple[int, frozenset[str]] = (0, frozenset())  # the last transition that was seen, and who might be behind it


async def look() -> list[asyncio.Task[None]]:
    """Make the messages that are due, and send them beside this; the tasks that do, one for each webhook."""
    for webhook_id in await rows(_due):
        if webhook_id not in _sending:
            task = _sending[webhook_id] = asyncio.create_task(_send_all(webhook_id))
            task.add_done_callback(lambda done, name=webhook_id: _sent(name, done))  # type: ignore[misc]
    return list(_sending.values())


async def stop() -> None:
    """Let go of what is being sent; its lease ends, and it is sent again."""
    for task in (tasks := list(_sending.values())):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _sent(webhook_id: str, task: asyncio.Task[None]) -> None:
    _sending.pop(webhook_id, None)
    if not task.cancelled() and (problem := task.exception()):
        log.error("webhook_failed", extra={"webhook_id": webhook_id}, exc_info=problem)


# What there is to tell


def _due() -> list[str]:
    """Make a row for each message of the steps since the last look; the webhooks that have something to be sent now."""
    if not (active := list(Webhook.objects.filter(is_active=True))):
        return []
    last = _settled()
    for webhook in active:
        while webhook.cursor < last and _advance(webhook, last):
            pass
    return list(_free().order_by("webhook").values_list("webhook", flat=True).distinct())


def _settled() -> int:
    """The transition up to which no earlier one can still appear.

    On PostgreSQL numbers are given before transactions end: what was seen counts when all that wrote into the table then have
    ended. Whoever writes into it holds its lock before a number is given, and until its rows can be seen.
    """
    global _seen
    newest = latest()
    if connection.vendor != "postgresql":
        return newest
    writing = _writers()
    if not writing:
        return newest
    last, writing_then = _seen
    if writing & writing_then:
        return 0
    _seen = (newest, writing)
    return last


def _writers() -> frozenset[str]:
    """Other transactions of this database that have written into the table of transitions and go on (PostgreSQL)."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT virtualtransaction FROM pg_locks WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted"
            " AND relation = %s::regclass AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            " AND pid IS DISTINCT FROM pg_backend_pid()",
            [Transition._meta.db_table],
        )
        return frozenset(row[0] for row in cursor.fetchall())


def latest() -> int:
    return Transition.objects.aggregate(last=Max("pk"))["last"] or 0


def _advance(webhook: Webhook, last: int) -> bool:
    """Move its cursor over the next steps; False where another process did."""
    steps = Transition.objects.filter(pk__gt=webhook.cursor, pk__lte=last, execution__team=webhook.team_id)
    if webhook.states:
        steps = steps.filter(after__in=webhook.states)
    found = list(steps.order_by("pk").values_list("pk", "execution_id")[:STEPS])
    to = found[-1][0] if len(found) == STEPS else last
    with transaction.atomic():
        if not Webhook.objects.filter(pk=webhook.pk, cursor=webhook.cursor, is_active=True).update(cursor=to):
            return False
        Delivery.objects.bulk_create(
            [Delivery(webhook=webhook, transition_id=step, execution_id=execution) for step, execution in found],
            ignore_conflicts=True,
        )
    webhook.cursor = to
    return True


# Sending


def _free(webhook_id: str | None = None) -> QuerySet[Delivery]:
    """What may be sent now: nothing of an execution of which something earlier, or under way, is not."""
    now = timezone.now()
    pending = Delivery.objects.pending()
    same = pending.filter(webhook=OuterRef("webhook"), execution=OuterRef("execution"))
    before = same.filter(Q(transition__lt=OuterRef("transition")) | Q(leased_until__gt=now))
    found = pending.filter(next_at__lte=now, webhook__is_active=True)
    if webhook_id is not None:
        found = found.filter(webhook=webhook_id)
    return found.exclude(leased_until__gt=now).exclude(Exists(before))


@transaction.atomic
def _lease(webhook_id: str) -> list[Delivery]:
    """The next messages, ours until the lease ends. The webhook's row is held meanwhile: nobody leases beside this."""
    webhook = Webhook.objects.select_for_update().filter(pk=webhook_id, is_active=True).first()
    if webhook is None:
        return []
    related = ("transition__execution__agent", "transition__execution__sandbox", "transition__execution__actor")
    found = list(_free(webhook_id).select_related(*related).order_by("transition")[:AT_ONCE])
    for delivery in found:
        delivery.webhook = webhook
        delivery.tries, delivery.leased_until = delivery.tries + 1, timezone.now() + LEASE
    Delivery.objects.bulk_update(found, ["tries", "leased_until"])
    return found


async def _send_all(webhook_id: str) -> None:
    while leased := await rows(_lease, webhook_id):
        await asyncio.gather(*map(_send, leased))


async def _send(delivery: Delivery) -> None:
    try:
        status = await post(delivery.webhook, message_id(delivery.transition), message(delivery.transition))
    except posting.NotSent as problem:
        await rows(_failed, delivery, str(problem), problem.status)
    else:
        faults.point("webhook_sent")
        ended = {"state": DeliveryState.DELIVERED, "ended_at": timezone.now(), "status": status, "error": ""}
        await rows(_settle, delivery, "delivered", **ended)


async def post(webhook: Webhook, name: str, content: dict[str, Any]) -> int:
    """Sign one message and send it: the status of the answer. Raises NotSent."""
    body, timestamp = json.dumps(content, separators=(",", ":")).encode(), str(int(time.time()))
    sealed = [webhook.secret]
    if webhook.former_until is not None and webhook.former_until > timezone.now():
        sealed.append(webhook.former_secret)
    secret, *former = [opened(one, PURPOSE) for one in sealed]
    if secret is None:
        raise posting.NotSent("Its secret was sealed under another SECRET_KEY: give the webhook a new one (rotate).")
    signed = [posting.signature(one, name, timestamp, body) for one in (secret, *former) if one is not None]
    told = {"webhook-id": name, "webhook-timestamp": timestamp, "webhook-signature": " ".join(signed)}
    return await posting.post(webhook.url, told, body)


def _failed(delivery: Delivery, said: str, status: int | None) -> None:
    facts = {"status": status, "error": said.encode(errors="replace").decode().replace("\x00", " ")[:300]}
    if delivery.tries >= TRIES_MOST:
        _settle(delivery, "dead", state=DeliveryState.DEAD, ended_at=timezone.now(), **facts)
        log.warning("webhook_dead_letter", extra={"webhook_id": delivery.webhook_id, "delivery_id": delivery.pk})
        return
    pause = min(FIRST_SECONDS * 4 ** (delivery.tries - 1), LONGEST_SECONDS) * random.uniform(1, 1.1)
    _settle(delivery, "failed", next_at=timezone.now() + timedelta(seconds=pause), **facts)


def _settle(delivery: Delivery, outcome: str, **fields: Any) -> None:
    """Write down what became of this very try; a later one, of another process, is not touched."""
    ours = Delivery.objects.filter(pk=delivery.pk, state=DeliveryState.PENDING, tries=delivery.tries)
    if ours.update(leased_until=None, **fields):
        metrics.add("sandgate_webhook_deliveries_total", outcome)


def prune() -> int:
    """Forget messages that ended long ago, and secrets that sign no more. Returns how many messages."""
    Webhook.objects.filter(former_until__lt=timezone.now()).update(former_secret="", former_until=None)
    old = Q()
    for state, kept in KEPT.items():
        old |= Q(state=state, ended_at__lt=timezone.now() - kept)
    return Delivery.objects.filter(old).delete()[0]
