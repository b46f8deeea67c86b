"""Warm pools: what each holds, how often it had one ready, what waiting costs, and what became of each claim."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django import forms
from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import BooleanRadioFilter, ChoicesDropdownFilter
from unfold.decorators import display
from unfold.paginator import InfinitePaginator
from unfold.views import ChangeList
from unfold.widgets import UnfoldAdminDecimalFieldWidget, UnfoldAdminSelectWidget

from executions import costs, demand, pool
from executions.admin import ceilings, filters, show
from executions.admin.base import ConfigurationPage, RecordPage
from executions.admin.forms import Names, backend_choices
from executions.models import Claim, Pool
from executions.states import PoolTarget

DAY = 86_400


class Numbers(Names):
    """Whole numbers, typed with commas; equal ones stay."""

    def to_python(self, value: Any) -> Any:
        if isinstance(value, list):
            return value
        try:
            return [int(word) for word in (value or "").replace(",", " ").split()]
        except ValueError:
            raise forms.ValidationError("Whole numbers, with commas.") from None


class PoolForm(forms.ModelForm):
    backend = forms.ChoiceField(choices=backend_choices, widget=UnfoldAdminSelectWidget)
    network_allow = Names(label="Network", help_text="Only requests with exactly these rules are served. Empty: off.")
    hours = Numbers(
        label="By the hour", help_text="24 numbers, with commas, the first from midnight; for a target by the hour."
    )
    dollars_a_day = forms.DecimalField(
        required=False,
        min_value=0,
        max_digits=12,
        decimal_places=6,
        widget=UnfoldAdminDecimalFieldWidget,
        help_text="What boots and waiting may cost a day, a quota of the pool's own. Empty: no ceiling of its own.",
    )

    class Meta:
        model = Pool
        fields = "__all__"  # noqa: DJ007

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk and (found := pool.budget(self.instance)):
            self.initial["dollars_a_day"] = (Decimal(found.limit) / costs.NANO).normalize()


class PoolList(ChangeList):
    result_list: Any

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.result_list = list(self.result_list)
        standings = demand.standings(self.result_list)
        for row in self.result_list:
            row.now = standings[row.pk]


def standing(row: Any) -> demand.Standing:
    if not hasattr(row, "now"):
        row.now = demand.standings([row])[row.pk]
    return row.now


@admin.register(Pool)
class PoolPage(ConfigurationPage):
    form = PoolForm
    list_display = ["label", "badge", "aim", "ready", "booting", "hit_rate", "claim_p95", "idle_cost", "trouble"]
    list_filter = [filters.ByBackend, ("is_enabled", BooleanRadioFilter)]
    list_select_related = ["template", "packages_of"]
    autocomplete_fields = ["packages_of"]
    search_fields = ["template__name", "backend"]
    ordering = ["backend", "template__name", "pk"]
    readonly_fields = [
        "holds", "ready", "booting", "hit_rate", "claims_took", "idle_cost", "full_cost", "spent_today", "trouble",
    ]  # fmt: skip
    fieldsets = [
        (None, {"fields": [("backend", "template"), ("memory_mib", "network_allow"), "packages_of", "is_enabled"]}),
        (
            "How many",
            {"fields": ["follows", ("target", "at_most"), "hours", ("zero_after_seconds", "lifetime_seconds")]},
        ),
        ("What it may cost", {"fields": ["dollars_a_day"]}),
        ("Now", {"fields": [("holds", "ready", "booting"), ("hit_rate", "claims_took"), "trouble"]}),
        ("Money", {"fields": [("idle_cost", "full_cost", "spent_today")]}),
    ]

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return PoolList

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        return self.fieldsets if obj else self.fieldsets[:3]

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False  # its sandboxes and claims name it: it is switched off

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        if "dollars_a_day" in form.changed_data or not change:
            dollars = form.cleaned_data["dollars_a_day"]
            pool.allow(obj, None if dollars is None else int(dollars * costs.NANO))

    @display(description="pool", ordering="template__name")
    def label(self, row: Pool) -> str:
        size = f", {row.memory_mib:,} MiB" if row.memory_mib else ""
        network = f", network {', '.join(row.network_allow)}" if row.network_allow else ""
        packages = f", packages of {row.packages_of.name}" if row.packages_of else ""
        return f"{row}{size}{network}{packages}"

    @display(description="enabled", ordering="is_enabled")
    def badge(self, row: Pool) -> SafeString:
        return show.badge("on" if row.is_enabled else "off")

    @display(description="target", ordering="target")
    def aim(self, row: Pool) -> SafeString:
        words = {
            PoolTarget.FORECAST: f"{row.target} to {row.at_most}, by forecast",
            PoolTarget.HOURS: "by the hour",
        }
        return show.number(words.get(PoolTarget(row.follows), row.target))

    @display(description="wanted now")
    def holds(self, row: Pool) -> SafeString:
        return show.number(demand.wanted(row, timezone.now()))

    @display(description="ready")
    def ready(self, row: Pool) -> SafeString:
        return show.number(standing(row).ready)

    @display(description="booting")
    def booting(self, row: Pool) -> SafeString:
        return show.number(standing(row).booting)

    @display(description="hits, last hour")
    def hit_rate(self, row: Pool) -> SafeString:
        now = standing(row)
        if now.hit_rate is None:
            return show.number(None, "Nobody has asked in the last hour.")
        return show.number(f"{now.hit_rate:.1%}", f"{now.hits:,} of {now.hits + now.misses:,}")

    @display(description="claim, p95")
    def claim_p95(self, row: Pool) -> SafeString:
        return show.number(_ms(standing(row).claim_p95_ms), "Within the admission, in the last hour.")

    @display(description="claims took, p50 and p95")
    def claims_took(self, row: Pool) -> str:
        now = standing(row)
        return f"{_ms(now.claim_p50_ms)} and {_ms(now.claim_p95_ms)}"

    @display(description="waiting costs a day")
    def idle_cost(self, row: Pool) -> SafeString:
        return show.money(standing(row).idle_nano_usd_per_day)

    @display(description="when it is full")
    def full_cost(self, row: Pool) -> SafeString:
        memory_mib = row.memory_mib or row.template.memory_mib
        now = timezone.now()
        price = costs.price(row.backend, cpu_count=row.template.cpu_count, memory_mib=memory_mib, at=now)
        if not price.is_known:
            return show.number("unpriced", "No rate is known: budgets are charged the ceiling rate")
        return show.money(price.nano_usd_per_second * DAY * demand.wanted(row, now))

    @display(description="of its budget today")
    def spent_today(self, row: Pool) -> Any:
        found = pool.budget(row)
        return ceilings.gauge(found) if found else "no ceiling of its own"


def _ms(value: float | None) -> str:
    return show.NONE if value is None else f"{value:.1f} ms"


@admin.register(Claim)
class ClaimPage(RecordPage):
    list_display = ["machine", "pool_link", "took", "spent", "badge", "age"]
    list_filter = [filters.SinceAt, ("pool__backend", ChoicesDropdownFilter)]
    list_select_related = ["pool__template"]
    search_fields = ["sandbox__id__startswith"]
    search_help_text = "The id of a sandbox."
    ordering = ["-at"]
    paginator = InfinitePaginator
    fields = readonly_fields = ["machine", "pool_link", "took", "spent", "reserved", "badge", "age"]

    def get_queryset(self, request: HttpRequest) -> QuerySet:
        return super().get_queryset(request).select_related("pool__template")

    @display(description="sandbox")
    def machine(self, row: Claim) -> Any:
        return show.link_to("sandbox", row.sandbox_id)

    @display(description="pool")
    def pool_link(self, row: Claim) -> Any:
        return show.link(row.pool)

    @display(description="the claim took", ordering="took_us")
    def took(self, row: Claim) -> SafeString:
        return show.number(_ms(row.took_us / 1000))

    @display(description="boot and waiting cost", ordering="spent_nano_usd")
    def spent(self, row: Claim) -> SafeString:
        return show.money(row.spent_nano_usd)

    @display(description="reserved by the pool")
    def reserved(self, row: Claim) -> SafeString:
        return show.money(row.reserved_nano_usd)

    @display(description="account")
    def badge(self, row: Claim) -> SafeString:
        if row.spent_nano_usd is None:
            return show.badge("open", "Settled when the sandbox has ended, or its provider knows the lease.")
        return show.badge("settled")

    @display(description="claimed", ordering="at")
    def age(self, row: Claim) -> Any:
        return show.when(row.at)
