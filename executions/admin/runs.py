"""Executions, and what was written down while they ran."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import F, QuerySet
from django.db.models.functions import Substr
from django.http import HttpRequest, HttpResponse
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter, ChoicesDropdownFilter
from unfold.decorators import display
from unfold.paginator import InfinitePaginator

from executions import audit
from executions.admin import filters, levers, show, story
from executions.admin.base import LISTED, HistoryPage, RecordPage, caller_of
from executions.models import Artifact, Attempt, Event, Execution, Transition

HEAVY = ("code", "env", "files", "metadata", "error_value")


def is_list(request: HttpRequest) -> bool:
    return bool(request.resolver_match and (request.resolver_match.url_name or "").endswith("_changelist"))


@admin.register(Execution)
class ExecutionPage(HistoryPage):
    list_display = ["name", "badge", "agent_link", "says", "took", "cost", "age", "where", "who"]
    list_filter = [
        filters.OpenOrEnded,
        filters.Age,
        ("state", ChoicesDropdownFilter),
        filters.ByBackend,
        ("agent", AutocompleteSelectFilter),
        ("team", AutocompleteSelectFilter),
    ]
    list_select_related = ["agent", "actor", "key"]
    search_fields = ["id__startswith", "agent__name__startswith", "workflow__startswith", "step", "user", "request_id"]
    search_help_text = "Id, agent, workflow, step, end user or request id, from its beginning."
    ordering = ["-created_at", "-id"]
    actions = ["cancel"]
    actions_detail = ["cancel"]
    change_form_outer_before_template = "admin/execution.html"
    cancel = levers.pulls(levers.CANCEL)

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        found = super().get_queryset(request)
        if is_list(request):
            shown = found.defer(*HEAVY).annotate(head=Substr("code", 1, 300))
            return shown.prefetch_related("sandbox")  # joined, a search would read those of all that it looks at
        return found.select_related("team", "agent", "key", "actor", "sandbox", "parent")

    def newest(self, request: HttpRequest) -> dict[str, Any]:
        """Of one agent, one team or a time that is chosen: their newest."""
        of = Execution.objects.order_by("-created_at")
        for name in ("agent", "team"):
            if chosen := request.GET.get(f"{name}__id__exact"):
                of = of.filter(**{name: chosen})
                break
        if end := filters.until(request.GET.get("since")):
            of = of.filter(created_at__lt=end)
        edge = of.values_list("created_at", flat=True)[LISTED:].first()
        return {} if edge is None else {"created_at__gt": edge}

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        told = {"code", "env", "files", "error_value"}  # told above, or not to be shown
        every = [field.name for field in self.opts.concrete_fields if field.name not in told]
        return [("Everything that is stored", {"fields": every, "classes": ["collapse"]})]

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        execution = self.get_object(request, object_id)
        told = {}
        if execution and self.has_view_permission(request, execution):
            audit.seen("code", caller=caller_of(request, execution.team), of=execution)
            told = story.tell(execution)
        return super().change_view(request, object_id, form_url, {**(extra_context or {}), **told})

    @display(description="execution", ordering="id")
    def name(self, row: Execution) -> Any:
        return show.short(row.pk)

    @display(description="state", ordering="state")
    def badge(self, row: Execution) -> SafeString:
        return show.badge(row.state, row.error_code or row.error_name)

    @display(description="agent", ordering="agent__name")
    def agent_link(self, row: Execution) -> Any:
        return show.link(row.agent)

    @display(description="code")
    def says(self, row: Any) -> SafeString:
        return show.first_line(row.head)

    @display(description="backend", ordering="backend")
    def where(self, row: Execution) -> str:
        return row.backend or show.NONE

    @display(description="took", ordering=F("ended_at") - F("running_at"))
    def took(self, row: Execution) -> SafeString:
        return show.number(show.seconds(row.ended_at - row.running_at if row.ended_at and row.running_at else None))

    @display(description="cost", ordering="cost_nano_usd")
    def cost(self, row: Execution) -> SafeString:
        return show.cost(row.cost_nano_usd, row.sandbox)

    @display(description="who")
    def who(self, row: Execution) -> Any:
        return row.actor or (row.key.name if row.key else show.NONE)

    @display(description="age", ordering="created_at")
    def age(self, row: Execution) -> Any:
        return show.when(row.created_at)


@admin.register(Attempt)
class AttemptPage(HistoryPage):
    list_display = ["run", "number", "backend", "badge", "why", "took", "age"]
    list_display_links = ["number"]
    list_filter = [("outcome", ChoicesDropdownFilter), filters.ByBackend]
    search_fields = ["execution__id__startswith", "code"]
    search_help_text = "The execution's id, or the error's code."
    ordering = ["-id"]
    paginator = InfinitePaginator

    @display(description="execution")
    def run(self, row: Attempt) -> Any:
        return show.link_to("execution", row.execution_id)

    @display(description="outcome", ordering="outcome")
    def badge(self, row: Attempt) -> SafeString:
        return show.badge(row.outcome, row.code)

    @display(description="why")
    def why(self, row: Attempt) -> str:
        return row.reason[:120] or row.code or show.NONE

    @display(description="took")
    def took(self, row: Attempt) -> SafeString:
        return show.number(show.seconds(row.ended_at - row.started_at if row.ended_at else None))

    @display(description="age")
    def age(self, row: Attempt) -> Any:
        return show.when(row.started_at)


@admin.register(Event)
class EventPage(HistoryPage):
    list_display = ["run", "seq", "kind", "says", "age"]
    list_display_links = ["seq"]
    list_filter = [("kind", ChoicesDropdownFilter)]
    search_fields = ["execution__id__startswith"]
    search_help_text = "The execution's id."
    ordering = ["-id"]
    paginator = InfinitePaginator
    fields = ["run", "seq", "kind", "age", "whole"]
    readonly_fields = fields

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        if self.has_view_permission(request):
            audit.once("output_read", caller=caller_of(request, None), subject="the list of events")
        return super().changelist_view(request, extra_context)

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        event = self.get_object(request, object_id)
        if event and self.has_view_permission(request, event):
            audit.seen("output", caller=caller_of(request, event.execution.team), of=event.execution)
        return super().change_view(request, object_id, form_url, extra_context)

    @display(description="execution")
    def run(self, row: Event) -> Any:
        return show.link_to("execution", row.execution_id)

    @display(description="says")
    def says(self, row: Event) -> SafeString:
        return show.first_line(row.data.get("text") or row.data.get("value") or ", ".join(row.data.get("mime", {})))

    @display(description="data")
    def whole(self, row: Event) -> SafeString:
        text = row.data.get("text")
        return show.block(text if isinstance(text, str) else show.pretty(row.data))

    @display(description="age")
    def age(self, row: Event) -> Any:
        return show.when(row.at)


@admin.register(Artifact)
class ArtifactPage(RecordPage):
    list_display = ["name", "run", "mime", "size", "age"]
    search_fields = ["execution__id__startswith", "sandbox__id__startswith", "name__startswith", "sha256__startswith"]
    ordering = ["-id"]

    @display(description="of")
    def run(self, row: Artifact) -> Any:
        if row.execution_id:
            return show.link_to("execution", row.execution_id)
        return show.link_to("sandbox", row.sandbox_id)

    @display(description="size", ordering="size_bytes")
    def size(self, row: Artifact) -> SafeString:
        return show.number(show.size(row.size_bytes), f"{row.size_bytes:,} bytes")

    @display(description="age", ordering="created_at")
    def age(self, row: Artifact) -> Any:
        return show.when(row.created_at)


@admin.register(Transition)
class TransitionPage(HistoryPage):
    list_display = ["of", "step", "reason", "age"]
    list_display_links = ["step"]
    list_filter = [filters.SinceAt]
    search_fields = ["execution__id__startswith", "sandbox__id__startswith"]
    search_help_text = "The id of an execution or a sandbox."
    ordering = ["-id"]
    paginator = InfinitePaginator

    @display(description="row")
    def of(self, row: Transition) -> Any:
        if row.execution_id:
            return show.link_to("execution", row.execution_id)
        return show.link_to("sandbox", row.sandbox_id)

    @display(description="step")
    def step(self, row: Transition) -> SafeString:
        return show.step(row.before, row.after)

    @display(description="age")
    def age(self, row: Transition) -> Any:
        return show.when(row.at)
