"""Whom the teams have told of their executions, and which messages nobody took."""

from __future__ import annotations

from typing import Any

from asgiref.sync import async_to_sync
from django.contrib import admin
from django.db import transaction
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import ChoicesDropdownFilter
from unfold.decorators import display
from unfold.paginator import InfinitePaginator

from executions.admin import show
from executions.admin.base import RecordPage, write_down
from executions.admin.levers import Lever, plural, pulls, shown_once
from executions.models import Delivery, Webhook
from executions.operations import webhooks
from executions.states import DeliveryState

ENDED = (DeliveryState.DEAD, DeliveryState.DELIVERED)


def _test(request: HttpRequest, found: list[Webhook], reason: str) -> str:
    told = []
    for webhook in found:
        tested = async_to_sync(webhooks.try_out)(webhook)
        write_down(request, "webhook_tested", webhook, after=tested.facts(), reason=reason)
        what = f"not taken: {tested.error}" if tested.error else f"taken, with {tested.status}"
        told.append(f"{webhook}: {what} ({tested.took_ms:.0f} ms).")
    return " ".join(told)


def _resend(request: HttpRequest, webhook: Webhook, letters: QuerySet[Delivery], reason: str) -> int:
    with transaction.atomic():
        if count := webhooks.revive(letters):
            write_down(request, "webhook_resent", webhook, after={"deliveries": count}, reason=reason)
    return count


def _resend_dead(request: HttpRequest, found: list[Webhook], reason: str) -> str:
    dead = Delivery.objects.filter(state=DeliveryState.DEAD)
    count = sum(_resend(request, webhook, dead.filter(webhook=webhook), reason) for webhook in found)
    return f"{plural(count, 'message')} will be sent again."


def _resend_these(request: HttpRequest, letters: list[Delivery], reason: str) -> str:
    found = Webhook.objects.in_bulk({letter.webhook_id for letter in letters})
    chosen = Delivery.objects.filter(pk__in=[letter.pk for letter in letters])
    count = sum(_resend(request, webhook, chosen.filter(webhook=webhook), reason) for webhook in found.values())
    return f"{plural(count, 'message')} will be sent again."


def _switch(on: bool) -> Any:
    def act(request: HttpRequest, found: list[Webhook], reason: str) -> str:
        switched = 0
        for webhook in found:
            with transaction.atomic():
                if webhooks.switch(webhook, on=on):
                    facts = {"before": {"is_active": not on}, "after": {"is_active": on}}
                    write_down(request, "webhook_changed", webhook, reason=reason, **facts)
                    switched += 1
        return f"{plural(switched, 'webhook')} switched {'on' if on else 'off'}."

    return act


@transaction.atomic
def _rotate(request: HttpRequest, found: list[Webhook], reason: str) -> HttpResponse:
    webhook = Webhook.objects.select_for_update().get(pk=found[0].pk)
    secret, facts = webhooks.renew(webhook)
    write_down(request, "webhook_changed", webhook, after=facts, reason=reason)
    return shown_once(
        request,
        title=f"New secret of {webhook}",
        secret=secret,
        says="Messages are signed with it from now on, and for an hour with the former one, too. It is not shown again.",
        back=show.page_of(webhook),
    )


def _waits(found: list[Webhook]) -> str:
    count = Delivery.objects.pending().filter(webhook__in=found).count()
    return f" {plural(count, 'message')} that {'waits' if count == 1 else 'wait'} will be sent." if count else ""


TEST = Lever(
    "test",
    "Send a test",
    "send",
    applies=lambda rows: rows,
    consequence=lambda rows: (
        f"One message of the type webhook.test goes to {plural(len(rows), 'webhook')} now, signed like all others. What comes "
        "back is shown; nothing of it is kept, and nothing is tried again."
    ),
    act=_test,
)
RESEND_DEAD = Lever(
    "resend_dead",
    "Resend dead ones",
    "replay",
    applies=lambda rows: rows.filter(is_active=True, deliveries__state=DeliveryState.DEAD).distinct(),
    consequence=lambda rows: (
        f"{plural(Delivery.objects.filter(webhook__in=rows, state=DeliveryState.DEAD).count(), 'dead message')} will be sent "
        "again, under the same ids and with all their tries. They come after what was delivered since."
    ),
    act=_resend_dead,
)
RESEND = Lever(
    "resend",
    "Send again",
    "replay",
    applies=lambda rows: rows.filter(state__in=ENDED),
    consequence=lambda rows: (
        f"{plural(len(rows), 'message')} will be sent again, under the same ids and with all their tries: whoever keeps the ids "
        "of what was worked on skips what was delivered before."
    ),
    act=_resend_these,
)
OFF = Lever(
    "switch_off",
    "Switch off",
    "pause",
    applies=lambda rows: rows.filter(is_active=True),
    consequence=lambda rows: (
        f"{plural(len(rows), 'webhook')} will be told nothing. Messages that wait go on waiting; of what happens meanwhile there "
        "will be none, also not later."
    ),
    act=_switch(False),
)
ON = Lever(
    "switch_on",
    "Switch on",
    "play_arrow",
    applies=lambda rows: rows.filter(is_active=False),
    consequence=lambda rows: f"{plural(len(rows), 'webhook')} will be told of what happens from now on.{_waits(rows)}",
    act=_switch(True),
)
ROTATE = Lever(
    "rotate",
    "New secret",
    "key",
    applies=lambda rows: rows,
    consequence=lambda rows: (
        "A new secret is shown once. Messages are signed with it from then on, and for an hour with the former one, too: whoever "
        "verifies them has to have the new one by then."
    ),
    act=_rotate,
)


@admin.register(Webhook)
class WebhookPage(RecordPage):
    """Made and changed over REST, where the secret is shown once."""

    list_display = ["url", "team", "told_of", "badge", "waiting", "dead", "age"]
    list_filter = ["is_active"]
    list_select_related = ["team"]
    search_fields = ["url", "id__startswith"]
    ordering = ["-created_at"]
    actions = ["test", "resend_dead", "switch_off", "switch_on"]
    actions_detail = ["test", "resend_dead", "switch_off", "switch_on", "rotate"]
    test = pulls(TEST)
    resend_dead = pulls(RESEND_DEAD)
    switch_off = pulls(OFF)
    switch_on = pulls(ON)
    rotate = pulls(ROTATE)
    fields = readonly_fields = [
        "url", "team", "description", "told_of", "badge", "waiting", "dead", "last_answer", "former", "created_by", "age",
    ]  # fmt: skip

    def get_queryset(self, request: HttpRequest) -> QuerySet[Webhook]:
        counts = {
            "n_pending": Q(deliveries__ended_at=None, deliveries__state=DeliveryState.PENDING),
            "n_dead": Q(deliveries__state=DeliveryState.DEAD),
        }
        counted = {name: Count("deliveries", filter=condition) for name, condition in counts.items()}
        return super().get_queryset(request).annotate(**counted)

    @display(description="told of")
    def told_of(self, row: Webhook) -> SafeString:
        return show.chips(row.states, "every state")

    @display(description="state", ordering="is_active")
    def badge(self, row: Webhook) -> SafeString:
        return show.badge("on" if row.is_active else "off")

    @display(description="waiting", ordering="n_pending")
    def waiting(self, row: Any) -> Any:
        return self._letters(row, row.n_pending, DeliveryState.PENDING)

    @display(description="dead", ordering="n_dead")
    def dead(self, row: Any) -> Any:
        return self._letters(row, row.n_dead, DeliveryState.DEAD)

    @staticmethod
    def _letters(row: Webhook, count: int, state: DeliveryState) -> Any:
        if not count:
            return show.number(0)
        href = show.rows_of("delivery", q=row.pk, state__exact=state)
        return format_html('<a class="sg-link sg-num" href="{}">{}</a>', href, f"{count:,}")

    @display(description="last try")
    def last_answer(self, row: Webhook) -> Any:
        last = row.deliveries.exclude(tries=0).order_by("-pk").first()
        return format_html("{} {}", show.badge(last.state), last.error or last.status) if last else show.NONE

    @display(description="former secret signs until")
    def former(self, row: Webhook) -> Any:
        return show.when(row.former_until)

    @display(description="age", ordering="created_at")
    def age(self, row: Webhook) -> Any:
        return show.when(row.created_at)


@admin.register(Delivery)
class DeliveryPage(RecordPage):
    list_display = ["run", "told", "where", "badge", "tries", "status", "error", "age"]
    list_filter = [("state", ChoicesDropdownFilter)]
    list_select_related = ["webhook", "transition"]
    search_fields = ["id__startswith", "execution__id__startswith", "webhook__id__startswith"]
    search_help_text = "The id of a delivery, an execution or a webhook, from its beginning."
    ordering = ["-transition_id"]
    paginator = InfinitePaginator
    actions = ["resend"]
    actions_detail = ["resend"]
    resend = pulls(RESEND)
    fields = readonly_fields = [
        "run",
        "told",
        "where",
        "badge",
        "tries",
        "status",
        "error",
        "next_at",
        "age",
        "ended_at",
    ]

    @display(description="execution")
    def run(self, row: Delivery) -> Any:
        return show.link_to("execution", row.execution_id)

    @display(description="tells")
    def told(self, row: Delivery) -> Any:
        return show.badge(row.transition.after)

    @display(description="to")
    def where(self, row: Delivery) -> Any:
        return show.link_to("webhook", row.webhook_id, row.webhook.url[:60])

    @display(description="state", ordering="state")
    def badge(self, row: Delivery) -> SafeString:
        return show.badge(row.state, row.error)

    @display(description="age", ordering="created_at")
    def age(self, row: Delivery) -> Any:
        return show.when(row.created_at)
