"""What was written down: refusals, the audit, idempotency, packages, sign-in links."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter
from unfold.decorators import action, display

from executions import audit, operations
from executions.admin import filters, levers, show
from executions.admin.base import RecordPage, caller_of
from executions.models import AnswerRecord, AuditEvent, AuditHead, IdempotencyRecord, MetricTotal, Refusal, SignInLink
from executions.reports import exports


@admin.register(Refusal)
class RefusalPage(RecordPage):
    list_display = ["code", "detail", "count", "agent_link", "who", "age"]
    list_filter = [filters.SinceLast, ("agent", AutocompleteSelectFilter), ("team", AutocompleteSelectFilter)]
    list_select_related = ["agent", "key", "actor"]
    search_fields = ["code", "agent__name__startswith"]
    ordering = ["-last_at", "-id"]
    fields = readonly_fields = ["code", "detail", "count", "agent_link", "who", "first_at", "last_at", "whole"]

    @display(description="times", ordering="times")
    def count(self, row: Refusal) -> SafeString:
        return show.number(row.times)

    @display(description="agent", ordering="agent__name")
    def agent_link(self, row: Refusal) -> Any:
        return show.link(row.agent)

    @display(description="who")
    def who(self, row: Refusal) -> Any:
        return row.actor or row.key or show.NONE

    @display(description="last", ordering="last_at")
    def age(self, row: Refusal) -> Any:
        return show.when(row.last_at)

    @display(description="facts")
    def whole(self, row: Refusal) -> SafeString:
        return show.block(show.pretty(row.facts))


def _file(content: str, mime: str, ending: str) -> HttpResponse:
    response = HttpResponse(content, content_type=mime)
    response["Content-Disposition"] = f'attachment; filename="audit-{timezone.localdate()}.{ending}"'
    return response


@admin.register(AuditEvent)
class AuditPage(RecordPage):
    list_display = ["seq", "action", "of", "who", "why", "ip", "age"]
    list_display_links = ["seq", "action"]
    list_filter = [
        filters.SinceAt,
        filters.What,
        ("actor", AutocompleteSelectFilter),
        ("team", AutocompleteSelectFilter),
    ]
    list_select_related = ["actor", "key"]
    search_fields = ["action__startswith", "subject", "actor__username", "reason"]
    search_help_text = "What was done, to which id, by whom, or why."
    ordering = ["-seq"]
    fields = ["seq", "action", "of", "who", "why", "ip", "at", "changes", "undo", "follows", "hash"]
    readonly_fields = fields
    actions_list = ["verify", "export", "export_csv"]
    actions_detail = ["revert"]
    revert = levers.pulls(levers.REVERT)

    @action(description="Verify the chain", icon="verified", url_path="verify", permissions=["view"])
    def verify(self, request: HttpRequest) -> HttpResponse:
        found = audit.verify()
        if found.problem:
            messages.error(request, f"The chain is broken. {found.problem}")
        else:
            messages.info(request, f"The chain is whole: {found.length} events, the last hash {found.digest[:16]}…")
        return redirect(show.rows_of("auditevent"))

    @action(description="Export", icon="download", url_path="export", permissions=["view"])
    def export(self, request: HttpRequest) -> HttpResponse:
        audit.record("audit_exported", caller=caller_of(request, None))
        return _file("".join(audit.export()), "application/jsonl", "jsonl")

    @action(description="Export as CSV", icon="table", url_path="export-csv", permissions=["view"])
    def export_csv(self, request: HttpRequest) -> HttpResponse:
        audit.record("audit_exported", caller=caller_of(request, None), after={"format": "csv"})
        return _file(exports.as_csv(audit.cells(), audit.COLUMNS), "text/csv; charset=utf-8", "csv")

    @display(description="to", ordering="subject")
    def of(self, row: AuditEvent) -> Any:
        return show.mono(row.subject)

    @display(description="who")
    def who(self, row: AuditEvent) -> Any:
        return row.actor or row.key or ("somebody" if row.ip else "the product")

    @display(description="reason")
    def why(self, row: AuditEvent) -> str:
        return row.reason or show.NONE

    @display(description="age", ordering="at")
    def age(self, row: AuditEvent) -> Any:
        return show.when(row.at)

    @display(description="before and after")
    def changes(self, row: AuditEvent) -> Any:
        """A table of what differs, or what there is."""
        sides = [
            side if isinstance(side, dict) else {} if side is None else {"": side} for side in (row.before, row.after)
        ]
        names = list(dict.fromkeys([*sides[0], *sides[1]]))
        if not names:
            return show.NONE
        cells = ([side.get(name) for side in sides] for name in names)
        lines = [
            (name, *(show.NONE if value is None else show.mono(show.short_json(value)) for value in pair))
            for name, pair in zip(names, cells, strict=True)
        ]
        return show.table(["What", "Before", "After"], lines)

    @display(description="hash of the event before it")
    def follows(self, row: AuditEvent) -> Any:
        return show.whole_hash(row.previous)

    @display(description="hash of this and that")
    def hash(self, row: AuditEvent) -> Any:
        return show.whole_hash(row.digest)

    @display(description="taking it back")
    def undo(self, row: AuditEvent) -> str:
        return operations.why_not(row) or "Can be taken back: the button is above."


@admin.register(IdempotencyRecord)
class IdempotencyPage(RecordPage):
    list_display = ["token", "agent_link", "answered", "age"]
    list_select_related = ["agent"]
    search_fields = ["token__startswith", "execution__id__startswith"]
    ordering = ["-id"]

    @display(description="agent", ordering="agent__name")
    def agent_link(self, row: IdempotencyRecord) -> Any:
        return show.link(row.agent)

    @display(description="answered with")
    def answered(self, row: IdempotencyRecord) -> Any:
        if row.execution_id:
            return show.link_to("execution", row.execution_id)
        return show.link_to("sandbox", row.sandbox_id)

    @display(description="age", ordering="created_at")
    def age(self, row: IdempotencyRecord) -> Any:
        return show.when(row.created_at)


@admin.register(AnswerRecord)
class AnswerPage(RecordPage):
    list_display = ["token", "key_link", "answered", "age"]
    list_select_related = ["key"]
    search_fields = ["token__startswith"]
    ordering = ["-id"]
    exclude = ["body"]  # the caller's matter

    @display(description="key", ordering="key__name")
    def key_link(self, row: AnswerRecord) -> Any:
        return show.link(row.key)

    @display(description="answered with", ordering="status")
    def answered(self, row: AnswerRecord) -> Any:
        return row.status or "nothing yet"

    @display(description="age", ordering="created_at")
    def age(self, row: AnswerRecord) -> Any:
        return show.when(row.created_at)


@admin.register(SignInLink)
class SignInLinkPage(RecordPage):
    """The list alone: a link's own page would have its hash in the address."""

    list_display = ["user", "badge", "until", "used"]
    list_display_links = None
    list_select_related = ["user"]
    ordering = ["-expires_at"]

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return obj is None and super().has_view_permission(request)

    @display(description="standing")
    def badge(self, row: SignInLink) -> SafeString:
        if row.used_at:
            return show.badge("used", "It signs nobody in any more.")
        return show.badge("live" if row.expires_at > timezone.now() else "expired")

    @display(description="until", ordering="expires_at")
    def until(self, row: SignInLink) -> Any:
        return show.when(row.expires_at)

    @display(description="used", ordering="used_at")
    def used(self, row: SignInLink) -> Any:
        return show.when(row.used_at)


@admin.register(MetricTotal)
class MetricTotalPage(RecordPage):
    list_display = ["name", "labels", "part", "value", "age"]
    search_fields = ["name__startswith", "labels"]
    ordering = ["name", "labels", "id"]

    @display(description="age", ordering="at")
    def age(self, row: MetricTotal) -> Any:
        return show.when(row.at)


@admin.register(AuditHead)
class AuditHeadPage(RecordPage):
    list_display = ["seq", "digest"]
