"""Agents with all that governs them, and their keys."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib import admin
from django.db.models import Count, OuterRef, Q, QuerySet, Subquery, Sum
from django.db.models.functions import Coalesce
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.admin import TabularInline
from unfold.contrib.filters.admin import AutocompleteSelectFilter, BooleanRadioFilter
from unfold.decorators import display
from unfold.views import ChangeList

from executions import keys
from executions.admin import ceilings, filters, levers, show
from executions.admin.base import ConfigurationPage, RecordInline
from executions.admin.forms import AgentForm, KeyForm, QuotaForm
from executions.admin.runs import HEAVY, is_list
from executions.models import Agent, ApiKey, CostTotal, Execution, Quota, Refusal
from executions.reports import spend


def spent_today(owner: str) -> Any:
    """What each row of a list has spent today, as far as it is added up, as one subquery."""
    whose = {"team": OuterRef("pk")} if owner == "team" else {"team": OuterRef("team"), owner: OuterRef("pk")}
    today = {"grain": CostTotal.DAY, "by": CostTotal.ALL, "day": timezone.localdate()}
    own = CostTotal.objects.filter(**whose, **today).values(owner)
    return Coalesce(Subquery(own.annotate(total=Sum("cost_nano_usd")).values("total")), 0)


def open_runs(owner: str) -> Any:
    own = Execution.objects.open().filter(**{owner: OuterRef("pk")}).values(owner)
    return Coalesce(Subquery(own.annotate(total=Count("pk")).values("total")), 0)


class NowList(ChangeList):
    """Agents or teams, with what they run and have spent today: looked up for those shown, and for all only to sort by it."""

    root_queryset: Any
    result_list: Any

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet:
        owner = str(self.opts.model_name)
        if self.params.get("o"):
            self.root_queryset = self.root_queryset.annotate(open_runs=open_runs(owner), today=spent_today(owner))
        return super().get_queryset(request, exclude_parameters)

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        owner, shown = str(self.opts.model_name), list(self.result_list)
        of_them = {f"{owner}__in": [row.pk for row in shown]}
        today = {"grain": CostTotal.DAY, "by": CostTotal.ALL, "day": timezone.localdate()}
        runs = Execution.objects.open().filter(**of_them).order_by().values_list(owner)
        totals = CostTotal.objects.filter(**of_them, **today).order_by().values_list(owner)
        running, spent = dict(runs.annotate(Count("pk"))), dict(totals.annotate(Sum("cost_nano_usd")))
        for row in shown:
            row.open_runs, row.today = running.get(row.pk, 0), spent.get(row.pk, 0)
        self.result_list = shown


class Ceilings(TabularInline):
    """A row's quotas, each with how full it is."""

    model = Quota
    form = QuotaForm
    extra = 0
    hide_title = True
    fields = ["unit", "window", "limit", "now"]
    readonly_fields = ["now"]
    verbose_name_plural = "quotas and budgets"

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        return super().get_queryset(request).select_related("team", "agent__team", "key__team").order_by("unit", "id")

    @display(description="used and reserved")
    def now(self, row: Quota) -> Any:
        return ceilings.gauge(row) if row.pk else show.NONE


class Keys(RecordInline):
    model = ApiKey
    hide_title = True
    fields = readonly_fields = ["named", "public_part", "may", "standing", "expires_at"]
    verbose_name_plural = "keys"
    ordering = ["-created_at"]

    @display(description="name")
    def named(self, row: ApiKey) -> Any:
        return show.link(row, row.name)

    @display(description="begins with")
    def public_part(self, row: ApiKey) -> Any:
        return show.mono(f"sg_{row.public}…")

    @display(description="may")
    def may(self, row: ApiKey) -> SafeString:
        return show.chips(row.scopes, "nothing")

    @display(description="standing")
    def standing(self, row: ApiKey) -> SafeString:
        return standing(row)


def standing(key: ApiKey) -> SafeString:
    if key.revoked_at:
        return show.badge("revoked", f"{key.revoked_at:%Y-%m-%d %H:%M} UTC")
    return show.badge("live" if key.is_live else "expired")


@admin.register(Agent)
class AgentPage(ConfigurationPage):
    form = AgentForm
    list_display = ["name", "team", "of_person", "badge", "goes", "floor", "made_from", "keys_live", "running", "today"]
    list_filter = [
        ("is_active", BooleanRadioFilter),
        ("team", AutocompleteSelectFilter),
        ("template", AutocompleteSelectFilter),
    ]
    list_select_related = ["team", "template", "person"]
    search_fields = ["name__startswith", "id__startswith", "team__name__startswith", "person__username__startswith"]
    search_help_text = "Name, id, team or person, from its beginning."
    autocomplete_fields = ["team", "person", "template"]
    ordering = ["team__name", "name"]
    actions = ["switch_off", "switch_on"]
    actions_detail = ["switch_off", "switch_on"]
    switch_off = levers.pulls(levers.SWITCH_OFF)
    switch_on = levers.pulls(levers.SWITCH_ON)
    inlines = [Ceilings, Keys]
    change_form_outer_before_template = "admin/agent.html"
    fieldsets = [
        (None, {"fields": [("name", "team"), "description", "person"]}),
        ("Where its code runs", {"fields": ["route", "isolation_floor", "stays_here", "template"]}),
        (
            "What it may do",
            {"fields": ["languages", "tools", "packages", "network_allow", ("timeout_seconds", "timeout_max_seconds")]},
        ),
        ("Its sessions and files", {"fields": ["pause_after_seconds", "keep_files", "artifact_days"]}),
    ]

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return NowList

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["team", "person"] if obj else ["person"]

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """Personal agents are made when their person first needs one, never by hand."""
        if obj and obj.person_id:
            return self.fieldsets
        return [(None, {"fields": [("name", "team"), "description"]}), *self.fieldsets[1:]]

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        found = super().get_queryset(request)
        if not is_list(request):
            return found
        live = Q(keys__revoked_at=None) & (Q(keys__expires_at=None) | Q(keys__expires_at__gt=timezone.now()))
        return found.annotate(
            live=Count("keys", filter=live, distinct=True),
        )

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        hour, agent = filters.PERIODS["hour"][1], Agent.objects.filter(pk=object_id).first()
        refused = Refusal.objects.filter(agent=object_id, last_at__gte=timezone.now() - hour)
        now = {
            "today": spend.today(agent=agent) if agent else 0,
            "running": Execution.objects.open().filter(agent=object_id).count(),
            "refused": refused.aggregate(times=Sum("times"))["times"] or 0,
            "recent": Execution.objects.filter(agent=object_id)
            .select_related("sandbox")
            .defer(*HEAVY)
            .order_by("-created_at")[:8],
            "runs_link": show.rows_of("execution", agent__id__exact=object_id),
            "running_link": show.rows_of("execution", agent__id__exact=object_id, open="yes"),
            "refused_link": show.rows_of("refusal", agent__id__exact=object_id, since="hour"),
            "cost_link": f"{show.rows_of('usage')}costs/?agent={object_id}",
            "denied_link": f"{show.rows_of('egress')}?verdict__exact=denied&sandbox__agent__id__exact={object_id}",
            "key_link": f"{show.rows_of('apikey')}add/?agent={object_id}",
        }
        return super().change_view(request, object_id, form_url, {**(extra_context or {}), "now": now})

    @display(description="person")
    def of_person(self, row: Agent) -> str:
        return row.person.calls_themselves if row.person else show.NONE

    @display(description="state", ordering="is_active")
    def badge(self, row: Agent) -> SafeString:
        return show.badge("on" if row.is_active else "off")

    @display(description="route")
    def goes(self, row: Agent) -> SafeString:
        return show.chips(row.route, "default")

    @display(description="floor", ordering="isolation_floor")
    def floor(self, row: Agent) -> str:
        return row.isolation_floor or f"{settings.ISOLATION_FLOOR} (all)"

    @display(description="template", ordering="template__name")
    def made_from(self, row: Agent) -> str:
        return row.template.name if row.template else "default"

    @display(description="live keys", ordering="live")
    def keys_live(self, row: Any) -> SafeString:
        return show.number(row.live)

    @display(description="running", ordering="open_runs")
    def running(self, row: Any) -> SafeString:
        return show.number(row.open_runs)

    @display(description="spend today", ordering="today")
    def today(self, row: Any) -> SafeString:
        return show.money(row.today)


@admin.register(ApiKey)
class KeyPage(ConfigurationPage):
    """Made by `keys.make_key`, ended by revoking: what it did stays attributable, so no key is deleted."""

    form = KeyForm
    list_display = ["name", "public_part", "team", "acts_as", "may", "bound", "badge", "expires", "age"]
    list_filter = [filters.KeyStanding, ("team", AutocompleteSelectFilter), ("agent", AutocompleteSelectFilter)]
    list_select_related = ["team", "agent"]
    search_fields = ["name__startswith", "public__startswith", "id__startswith", "agent__name__startswith"]
    search_help_text = "Name, the 16 letters behind sg_, agent or id, from its beginning."
    autocomplete_fields = ["team", "agent"]
    ordering = ["-created_at", "-id"]
    actions = ["revoke"]
    actions_detail = ["revoke"]
    revoke = levers.pulls(levers.REVOKE)
    inlines = [Ceilings]

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        own = (None, {"fields": ["name", "team", "agent", "scopes", "backend", "allow_from", "expires_at"]})
        return [own, ("Now", {"fields": ["public_part", "badge", "created_by", "created_at"]})] if obj else [own]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return ["team", "agent", "public_part", "badge", "created_by", "created_at"] if obj else []

    def get_inlines(self, request: HttpRequest, obj: Any) -> Any:
        return self.inlines if obj else []

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        found = super().get_changeform_initial_data(request)
        if agent := Agent.objects.filter(pk=found.get("agent", "")).first():
            found["team"] = agent.team_id
        return found

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        if change:
            return super().save_model(request, obj, form, change)
        fields = ("team", "agent", "name", "scopes", "backend", "allow_from", "expires_at")
        chosen = {name: form.cleaned_data[name] for name in fields}
        made, token = keys.make_key(**chosen, created_by=request.user)
        obj.__dict__.update(made.__dict__)
        request.token = token  # type: ignore[attr-defined]

    def response_add(self, request: HttpRequest, obj: ApiKey, post_url_continue: Any = None) -> HttpResponse:
        return levers.shown_once(
            request,
            title=f"Key {obj.name}",
            secret=request.token,  # type: ignore[attr-defined]
            says="Copy it now: only its hash is stored, and it is not shown again.",
            back=show.page_of(obj),
        )

    @display(description="begins with", ordering="public")
    def public_part(self, row: ApiKey) -> Any:
        return show.mono(f"sg_{row.public}…")

    @display(description="acts as", ordering="agent__name")
    def acts_as(self, row: ApiKey) -> Any:
        return show.link(row.agent) if row.agent else "any agent of the team"

    @display(description="may")
    def may(self, row: ApiKey) -> SafeString:
        return show.chips(row.scopes, "nothing")

    @display(description="backend", ordering="backend")
    def bound(self, row: ApiKey) -> str:
        return row.backend or "any"

    @display(description="standing")
    def badge(self, row: ApiKey) -> SafeString:
        return standing(row)

    @display(description="expires", ordering="expires_at")
    def expires(self, row: ApiKey) -> Any:
        return show.when(row.expires_at) if row.expires_at else "never"

    @display(description="age", ordering="created_at")
    def age(self, row: ApiKey) -> Any:
        return show.when(row.created_at)
