"""What may be imported: policies, the inbox of what waits for a person, advisories, locks, and which runs had what."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter, ChoicesDropdownFilter
from unfold.decorators import display

from executions.admin import filters, levers, show
from executions.admin.base import ConfigurationPage, RecordPage, caller_of
from executions.admin.levers import Lever, plural
from executions.errors import Conflict
from executions.models import Advisory, Approval, Package, PackageLock, PackagePolicy
from executions.operations import approvals
from executions.packages.history import runs_with
from executions.states import ApprovalState

UNKNOWN = "unknown"
RUNS_SHOWN = 20


def _settle(approve: bool) -> Any:
    def act(request: HttpRequest, waiting: list[Approval], reason: str) -> str:
        done, said = 0, []
        for approval in waiting:
            try:
                approvals.settle(approval, caller=caller_of(request, approval.team), approve=approve, reason=reason)
                done += 1
            except Conflict as no:
                said.append(f"{approval.pk}: {no.detail}")
        return " ".join([f"{plural(done, 'request')} {'approved' if approve else 'denied'}.", *said])

    return act


def _pending(rows: QuerySet) -> QuerySet:
    return rows.filter(state=ApprovalState.PENDING)


APPROVE = Lever(
    "approve",
    "Approve",
    "check",
    applies=_pending,
    consequence=lambda rows: (
        "Exactly these wheels may be installed by the agent that asked, from now on: "
        + "; ".join(", ".join(f"{pin['name']} {pin['version']}" for pin in row.pins) for row in rows[:10])
        + ". It gets them when it asks again."
    ),
    act=_settle(True),
)
DENY = Lever(
    "deny",
    "Deny",
    "block",
    applies=_pending,
    consequence=lambda rows: (
        f"{plural(len(rows), 'request')} will be answered with package_denied and your reason, now and later."
    ),
    act=_settle(False),
)


def known(advisories: list[str] | None) -> str:
    return UNKNOWN if advisories is None else ", ".join(advisories) or "none known"


@admin.register(Approval)
class ApprovalPage(RecordPage):
    list_display = ["what", "badge", "agent_link", "into", "why", "asked_by", "age"]
    list_filter = [("state", ChoicesDropdownFilter), ("agent", AutocompleteSelectFilter)]
    list_select_related = ["agent"]
    search_fields = ["id__startswith", "agent__name__startswith"]
    ordering = ["-id"]
    actions = ["approve", "deny"]
    actions_detail = ["approve", "deny"]
    approve = levers.pulls(APPROVE)
    deny = levers.pulls(DENY)
    fields = readonly_fields = [
        "what",
        "badge",
        "why",
        "tree",
        "agent_link",
        "into",
        "asked_by",
        "age",
        "decided_by",
        "decided_at",
        "reason",
    ]

    @display(description="packages")
    def what(self, row: Approval) -> str:
        return ", ".join(row.asked)[:100]

    @display(description="state", ordering="state")
    def badge(self, row: Approval) -> SafeString:
        return show.badge(row.state, row.reason)

    @display(description="agent", ordering="agent__name")
    def agent_link(self, row: Approval) -> Any:
        return show.link(row.agent)

    @display(description="into")
    def into(self, row: Approval) -> Any:
        return show.link_to("sandbox", row.sandbox_id) if row.sandbox_id else "the agent's lock"

    @display(description="asked by")
    def asked_by(self, row: Approval) -> Any:
        if row.execution_id:
            return show.link_to("execution", row.execution_id)
        return show.link_to("apikey", row.key_id) if row.key_id else show.NONE

    @display(description="all that would be installed")
    def tree(self, row: Approval) -> SafeString:
        heads = ["package", "needed by", "size", "licence", "published", "vulnerabilities", "verdict"]
        lines = [
            [
                f"{pin['name']} {pin['version']}",
                ", ".join(pin["needed_by"]) or "asked for",
                show.size(pin["size_bytes"]) if pin["size_bytes"] is not None else UNKNOWN,
                pin["licence"] or UNKNOWN,
                (pin["published_at"] or UNKNOWN)[:10],
                known(pin["advisories"]),
                f"{pin['answer']}: {pin['reason']}",
            ]
            for pin in row.pins
        ]
        return show.table(heads, lines)

    @display(description="age", ordering="created_at")
    def age(self, row: Approval) -> Any:
        return show.when(row.created_at)


@admin.register(PackagePolicy)
class PolicyPage(ConfigurationPage):
    list_display = ["__str__", "team", "agent", "allowed", "asked", "denied", "licensed"]
    list_filter = [("team", AutocompleteSelectFilter)]
    list_select_related = ["team", "agent"]
    autocomplete_fields = ["team", "agent"]
    ordering = ["team__name", "agent__name", "id"]
    fieldsets = [
        (None, {"fields": ["team", "agent"]}),
        ("By name and version", {"fields": ["allow", "ask", "deny", "private"]}),
        ("By what is known", {"fields": ["licences", "most_bytes", "least_age_days", "vulnerable", "lookalike", "unknown"]}),
    ]  # fmt: skip

    @display(description="allow")
    def allowed(self, row: PackagePolicy) -> SafeString:
        return show.chips(row.allow, "none")

    @display(description="ask a person")
    def asked(self, row: PackagePolicy) -> SafeString:
        return show.chips(row.ask, "never")

    @display(description="deny")
    def denied(self, row: PackagePolicy) -> SafeString:
        return show.chips(row.deny, "none")

    @display(description="licences")
    def licensed(self, row: PackagePolicy) -> SafeString:
        return show.chips(row.licences, "any")


@admin.register(Advisory)
class AdvisoryPage(RecordPage):
    list_display = ["identifier", "package", "summary", "severity", "changed", "imported"]
    search_fields = ["package__startswith", "identifier__startswith"]
    ordering = ["-modified_at", "-id"]

    @display(description="changed", ordering="modified_at")
    def changed(self, row: Advisory) -> Any:
        return show.when(row.modified_at)

    @display(description="imported", ordering="imported_at")
    def imported(self, row: Advisory) -> Any:
        return show.when(row.imported_at)


@admin.register(PackageLock)
class LockPage(RecordPage):
    list_display = ["named", "agent_link", "python", "asks", "holds", "age"]
    list_filter = [("agent", AutocompleteSelectFilter)]
    list_select_related = ["agent"]
    search_fields = ["digest__startswith", "id__startswith"]
    ordering = ["-id"]
    fields = readonly_fields = ["agent_link", "digest", "python", "asks", "pinned", "age"]

    @display(description="lock")
    def named(self, row: PackageLock) -> Any:
        return show.mono(row.digest[:12])

    @display(description="agent", ordering="agent__name")
    def agent_link(self, row: PackageLock) -> Any:
        return show.link(row.agent)

    @display(description="asked for")
    def asks(self, row: PackageLock) -> SafeString:
        return show.chips(row.asked, "nothing")

    @display(description="packages")
    def holds(self, row: PackageLock) -> SafeString:
        return show.number(len(row.pins))

    @display(description="what its sandboxes import from")
    def pinned(self, row: PackageLock) -> SafeString:
        lines = [
            [pin["name"], pin["version"], show.size(pin["size_bytes"]), show.mono(pin["sha256"])] for pin in row.pins
        ]
        return show.table(["package", "version", "size", "SHA-256"], lines)

    @display(description="age", ordering="created_at")
    def age(self, row: PackageLock) -> Any:
        return show.when(row.created_at)


@admin.register(Package)
class PackagePage(RecordPage):
    list_display = [
        "name",
        "version",
        "badge",
        "reason",
        "agent_link",
        "machine",
        "size",
        "licensed",
        "vulnerable",
        "age",
    ]
    list_filter = [filters.SinceAt, ("verdict", ChoicesDropdownFilter), ("agent", AutocompleteSelectFilter)]
    list_select_related = ["agent"]
    search_fields = ["name__startswith"]
    ordering = ["-id"]
    fields = readonly_fields = [
        "name", "version", "badge", "reason", "requested", "agent_link", "machine", "lock_link", "asked_by", "sha256", "size", "licensed",
        "vulnerable", "age", "had",
    ]  # fmt: skip

    @display(description="verdict", ordering="verdict")
    def badge(self, row: Package) -> SafeString:
        return show.badge(row.verdict, row.reason)

    @display(description="agent", ordering="agent__name")
    def agent_link(self, row: Package) -> Any:
        return show.link(row.agent)

    @display(description="sandbox")
    def machine(self, row: Package) -> Any:
        return show.link_to("sandbox", row.sandbox_id)

    @display(description="lock")
    def lock_link(self, row: Package) -> Any:
        return show.link_to("packagelock", row.lock_id)

    @display(description="asked by")
    def asked_by(self, row: Package) -> Any:
        return show.link_to("execution", row.execution_id) if row.execution_id else show.link_to("apikey", row.key_id)

    @display(description="size", ordering="size_bytes")
    def size(self, row: Package) -> SafeString:
        return show.number(show.size(row.size_bytes))

    @display(description="licence", ordering="licence")
    def licensed(self, row: Package) -> str:
        return row.licence or UNKNOWN

    @display(description="vulnerabilities")
    def vulnerable(self, row: Package) -> str:
        return known(row.advisories)

    @display(description="age")
    def age(self, row: Package) -> Any:
        return show.when(row.at)

    @display(description="which runs had this version?")
    def had(self, row: Package) -> Any:
        if not row.version:
            return show.NONE
        found = runs_with(row.team, row.name, row.version).select_related("agent").defer("code")
        shown = [
            [show.link(run), run.agent.name, show.badge(run.state), show.when(run.created_at)]
            for run in found[:RUNS_SHOWN]
        ]
        more = found.count() - len(shown)
        rest = format_html("<p>and {} more</p>", more) if more > 0 else ""
        return format_html("{}{}", show.table(["run", "agent", "state", "age"], shown), rest) if shown else "none"
