"""Whom the teams have told of their executions, and which messages nobody took."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import ChoicesDropdownFilter
from unfold.decorators import display
from unfold.paginator import InfinitePaginator

from executions.admin import show
from executions.admin.base import RecordPage
from executions.models import Delivery, Webhook


@admin.register(Webhook)
class WebhookPage(RecordPage):
    """Made and changed over REST, where the secret is shown once."""

    list_display = ["url", "team", "told_of", "badge", "age"]
    list_filter = ["is_active"]
    list_select_related = ["team"]
    search_fields = ["url", "id__startswith"]
    ordering = ["-created_at"]
    fields = readonly_fields = ["url", "team", "description", "told_of", "badge", "messages", "created_by", "age"]

    @display(description="told of")
    def told_of(self, row: Webhook) -> SafeString:
        return show.chips(row.states, "every state")

    @display(description="state", ordering="is_active")
    def badge(self, row: Webhook) -> SafeString:
        return show.badge("on" if row.is_active else "off")

    @display(description="messages")
    def messages(self, row: Webhook) -> Any:
        return show.mono(row.deliveries.count())

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
    ordering = ["-id"]
    paginator = InfinitePaginator
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
