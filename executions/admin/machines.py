"""Sandboxes and what they are made from."""

from __future__ import annotations

from typing import Any

from asgiref.sync import async_to_sync
from django.contrib import admin
from django.db.models import QuerySet
from django.db.models.functions import Substr
from django.http import HttpRequest
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter, BooleanRadioFilter, ChoicesDropdownFilter
from unfold.decorators import display

from executions import breaker, operations
from executions.admin import filters, levers, show
from executions.admin.base import ConfigurationPage, HistoryPage, RecordInline, RecordPage
from executions.admin.forms import TemplateForm
from executions.admin.runs import HEAVY, is_list
from executions.models import Attestation, BackendState, Execution, Sandbox, Template
from executions.states import BreakerState


class RunsInside(RecordInline):
    model = Execution
    hide_title = True
    fields = readonly_fields = ["run", "badge", "says", "took", "cost", "age"]
    verbose_name_plural = "executions in it"
    ordering = ["-id"]
    per_page = 20

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        return (
            super().get_queryset(request).select_related("sandbox").defer(*HEAVY).annotate(head=Substr("code", 1, 300))
        )

    @display(description="execution")
    def run(self, row: Execution) -> Any:
        return show.link(row)

    @display(description="state")
    def badge(self, row: Execution) -> SafeString:
        return show.badge(row.state, row.error_code or row.error_name)

    @display(description="code")
    def says(self, row: Any) -> SafeString:
        return show.first_line(row.head)

    @display(description="took")
    def took(self, row: Execution) -> SafeString:
        return show.number(show.seconds(row.ended_at - row.running_at if row.ended_at and row.running_at else None))

    @display(description="cost")
    def cost(self, row: Execution) -> SafeString:
        return show.cost(row.cost_nano_usd, row.sandbox)

    @display(description="age")
    def age(self, row: Execution) -> Any:
        return show.when(row.created_at)


@admin.register(Sandbox)
class SandboxPage(HistoryPage):
    list_display = ["label", "badge", "agent_link", "backend", "isolation", "ends", "reserved", "spent", "age"]
    list_filter = [
        filters.OpenOrEnded,
        filters.Since,
        ("state", ChoicesDropdownFilter),
        ("kept", BooleanRadioFilter),
        filters.ByBackend,
        ("agent", AutocompleteSelectFilter),
    ]
    list_select_related = ["agent"]
    search_fields = ["id__startswith", "agent__name__startswith", "name__startswith"]
    search_help_text = "Id, agent, or the session's name, from its beginning."
    ordering = ["-id"]
    actions = ["kill", "pause", "resume"]
    actions_detail = ["kill", "pause", "resume"]
    inlines = [RunsInside]
    kill = levers.pulls(levers.KILL)
    pause = levers.pulls(levers.PAUSE)
    resume = levers.pulls(levers.RESUME)
    fieldsets = [
        (None, {"fields": ["full_id", "badge", "kept", "name", "team", "agent", "who", "template"]}),
        ("Machine", {"fields": ["backend", "isolation", "network", "cpu_count", "memory_mib", "env_names", "machine"]}),
        (
            "Time",
            {
                "fields": [
                    "created_at",
                    "ready_at",
                    "last_used_at",
                    "idle_timeout_seconds",
                    "pause_after_seconds",
                    "stays_paused",
                    "ends",
                    "ended_at",
                    "end_reason",
                ]
            },
        ),
        ("Files", {"fields": ["patterns", "kept_said", "artifact_list"]}),
        ("Money", {"fields": ["rate", "reserved", "spent", "metered_until"]}),
    ]

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        found = super().get_queryset(request)
        return found.defer("metadata", "env", "handle") if is_list(request) else found

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [name for _, part in self.fieldsets for name in part["fields"]]

    @display(description="network")
    def network(self, row: Sandbox) -> SafeString:
        return show.chips(row.network_allow, "off")

    @display(description="kept at its end")
    def patterns(self, row: Sandbox) -> SafeString:
        return show.chips(row.keep_files, "nothing")

    @display(description="artifacts")
    def artifact_list(self, row: Sandbox) -> Any:
        kept = [
            (a.name, a.mime, show.size(a.size_bytes), show.when(a.expires_at)) for a in row.artifacts.order_by("name")
        ]
        return show.table(("name", "type", "size", "kept until"), kept[:200]) if kept else show.NONE

    @display(description="sandbox", ordering="id")
    def label(self, row: Sandbox) -> Any:
        return show.short(row.pk) if not row.name else f"{row.name[:40]}"

    @display(description="id")
    def full_id(self, row: Sandbox) -> Any:
        return show.mono(row.pk)

    @display(description="state", ordering="state")
    def badge(self, row: Sandbox) -> SafeString:
        return show.badge(row.state, row.end_reason)

    @display(description="agent", ordering="agent__name")
    def agent_link(self, row: Sandbox) -> Any:
        return show.link(row.agent)

    @display(description="who")
    def who(self, row: Sandbox) -> Any:
        return row.actor or row.key or show.NONE

    @display(description="ends", ordering="leased_until")
    def ends(self, row: Sandbox) -> Any:
        return show.when(row.leased_until) if row.ended_at is None else f"ended: {row.end_reason or 'finished'}"

    @display(description="reserved", ordering="reserved_nano_usd")
    def reserved(self, row: Sandbox) -> SafeString:
        return show.money(row.reserved_nano_usd)

    @display(description="spent", ordering="spent_nano_usd")
    def spent(self, row: Sandbox) -> SafeString:
        return show.cost(row.spent_nano_usd, row)

    @display(description="a second costs")
    def rate(self, row: Sandbox) -> SafeString:
        return show.money(row.rate_nano_usd_per_second)

    @display(description="age", ordering="created_at")
    def age(self, row: Sandbox) -> Any:
        return show.when(row.created_at)

    @display(description="environment")
    def env_names(self, row: Sandbox) -> SafeString:
        return show.chips(sorted(row.env), "none")

    @display(description="at the backend")
    def machine(self, row: Sandbox) -> SafeString:
        return show.mono((row.handle or {}).get("sandbox_id", show.NONE))  # type: ignore[return-value]


@admin.register(Template)
class TemplatePage(ConfigurationPage):
    form = TemplateForm
    list_display = ["name", "description", "speaks", "cpus", "memory", "disk", "at_e2b", "badge"]
    search_fields = ["name"]
    list_filter = [("is_active", BooleanRadioFilter)]
    ordering = ["name"]
    readonly_fields = ["now"]
    actions = ["rebuild"]
    actions_detail = ["rebuild"]
    rebuild = levers.pulls(levers.REBUILD)
    fieldsets = [
        (None, {"fields": ["name", "description", "is_active", "now"]}),
        ("What is in it", {"fields": ["languages", "packages", "files", "start_command", "env"]}),
        ("Where it is made", {"fields": ["warm", "e2b_template"]}),
        ("Size", {"fields": [("cpu_count", "memory_mib", "disk_mib")]}),
    ]

    @display(description="now, at each backend")
    def now(self, row: Template) -> Any:
        """Asked when the page is shown; why something is broken stands below in full."""
        if row.pk is None:
            return "not saved yet"
        if not row.is_active:
            return "switched off: it is made nowhere"
        told = async_to_sync(operations.template_states)([row])[0]["backends"]
        lines = [f"{alias}: {state['state']}" for alias, state in told.items()]
        return show.block(
            "\n".join(f"{line}  {state['detail']}".rstrip() for line, state in zip(lines, told.values(), strict=True))
        )

    @display(description="languages")
    def speaks(self, row: Template) -> SafeString:
        return show.chips(row.languages, "none named")

    @display(description="vCPU", ordering="cpu_count")
    def cpus(self, row: Template) -> SafeString:
        return show.number(row.cpu_count)

    @display(description="memory", ordering="memory_mib")
    def memory(self, row: Template) -> SafeString:
        return show.number(f"{row.memory_mib:,} MiB")

    @display(description="disk", ordering="disk_mib")
    def disk(self, row: Template) -> SafeString:
        return show.number(f"{row.disk_mib:,} MiB")

    @display(description="at E2B")
    def at_e2b(self, row: Template) -> Any:
        return show.mono(row.e2b_template or "code-interpreter-v1")

    @display(description="offered", ordering="is_active")
    def badge(self, row: Template) -> SafeString:
        return show.badge("on" if row.is_active else "off")


@admin.register(BackendState)
class BackendStatePage(RecordPage):
    """Circuit breakers: whether sandboxes are asked for at a backend, and when it is tried again."""

    list_display = ["alias", "badge", "reason", "streak", "since", "until", "drill_by"]
    ordering = ["alias"]
    fields = readonly_fields = ["alias", "badge", "says", "reason", "streak", "tries", "since", "until", "drill_by"]

    @display(description="breaker", ordering="state")
    def badge(self, row: BackendState) -> SafeString:
        return show.badge("up" if row.state == BreakerState.CLOSED else "out", row.get_state_display())

    @display(description="now")
    def says(self, row: BackendState) -> str:
        return breaker.sentence(row)

    @display(description="last out", ordering="opened_at")
    def since(self, row: BackendState) -> Any:
        return show.when(row.opened_at) if row.opened_at else show.NONE

    @display(description="well again", ordering="closed_at")
    def until(self, row: BackendState) -> Any:
        return show.when(row.closed_at) if row.closed_at and row.state == BreakerState.CLOSED else show.NONE


@admin.register(Attestation)
class AttestationPage(RecordPage):
    """Scorecards of the hostile suite; `manage.py attest` makes them."""

    list_display = ["backend", "badge", "isolation", "blocked", "open", "skipped", "age"]
    list_filter = [filters.SinceAt, filters.ByBackend]
    ordering = ["-at"]
    fields = readonly_fields = ["backend", "badge", "isolation", "age", "took", "standing", "scorecard"]

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        found = super().get_queryset(request)
        return found.defer("cases", "walls") if is_list(request) else found

    @display(description="verdict", ordering="open")
    def badge(self, row: Attestation) -> SafeString:
        return show.badge("holes" if row.open else "whole", str(row))

    @display(description="at", ordering="at")
    def age(self, row: Attestation) -> Any:
        return show.when(row.at)

    @display(description="took")
    def took(self, row: Attestation) -> SafeString:
        return show.number(show.seconds(row.took_seconds))

    @display(description="walls")
    def standing(self, row: Attestation) -> SafeString:
        return show.table(
            ("wall", "state"), [(wall, "stands" if said is True else said) for wall, said in row.walls.items()]
        )

    @display(description="cases")
    def scorecard(self, row: Attestation) -> SafeString:
        cases = sorted(row.cases, key=lambda case: ("open", "skipped", "blocked").index(case["verdict"]))
        told = [
            (
                show.badge("hole" if c["verdict"] == "open" else c["verdict"]),
                c["group"],
                c["case"],
                c["wall"],
                c["seen"],
                show.seconds(c["seconds"]),
            )
            for c in cases
        ]
        return show.table(("verdict", "group", "case", "wall", "seen", "took"), told)
