"""Ceilings, prices, and every movement of money."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter, ChoicesDropdownFilter
from unfold.decorators import display
from unfold.paginator import InfinitePaginator
from unfold.views import ChangeList

from executions import ledger, quotas
from executions.admin import ceilings, filters, show
from executions.admin.base import ConfigurationPage, HistoryPage, RecordPage
from executions.admin.costs import reconciliation, report
from executions.admin.forms import QuotaForm, RateForm
from executions.models import CostTotal, LedgerEntry, ProviderCharge, Quota, Rate, Usage


class QuotaList(ChangeList):
    result_list: Any

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.result_list: Any = ceilings.with_use(self.result_list)


@admin.register(Quota)
class QuotaPage(ConfigurationPage):
    form = QuotaForm
    list_display = ["whose", "counts", "now", "top", "began"]
    list_filter = [
        ("unit", ChoicesDropdownFilter),
        ("window", ChoicesDropdownFilter),
        ("each", ChoicesDropdownFilter),
        ("team", AutocompleteSelectFilter),
        ("agent", AutocompleteSelectFilter),
    ]
    list_select_related = ["team", "agent__team", "key__team", "parent"]
    search_fields = ["team__name", "agent__name", "key__name", "user"]
    autocomplete_fields = ["team", "agent", "key"]
    ordering = ["team__name", "agent__name", "key__name", "unit"]
    fieldsets = [
        (
            "Whose",
            {
                "fields": ["team", "agent", "key", "each", ("user", "workflow", "backend")],
                "description": "One of team, agent and key; with none of them it holds for everybody. With `each`, every "
                "agent or end user of theirs has the whole limit. End user, workflow and backend narrow it to what runs for, "
                "in or on them.",
            },
        ),
        ("How much", {"fields": ["unit", "window", "limit", "soft_percent"]}),
        ("When it is exhausted", {"fields": ["when_exhausted", "max_wait_seconds"]}),
        ("Raised for a while", {"fields": ["raised_by", "raised_until", "raised_why"]}),
        ("Now", {"fields": ["now", "began"]}),
    ]
    readonly_fields = ["now", "began"]

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return QuotaList

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        return self.fieldsets if obj else self.fieldsets[:3]

    @display(description="whose")
    def whose(self, row: Quota) -> str:
        return row.scope_name

    @display(description="counts", ordering="unit")
    def counts(self, row: Quota) -> str:
        return ceilings.what(row)

    @display(description="used and reserved")
    def now(self, row: Quota) -> SafeString:
        return ceilings.gauge(row)

    @display(description="limit", ordering="limit")
    def top(self, row: Quota) -> SafeString:
        limit = quotas.ceiling(row)
        return show.number(ceilings.amount(row, limit), f"{limit:,}")

    @display(description="window began", ordering="window_started_at")
    def began(self, row: Quota) -> Any:
        return show.when(row.window_started_at)


@admin.register(Rate)
class RatePage(ConfigurationPage):
    form = RateForm
    list_display = ["backend", "meter", "price", "an_hour", "badge", "begins", "ends", "source"]
    list_filter = [filters.ByBackend]
    ordering = ["backend", "meter", "-valid_from"]
    fieldsets = [(None, {"fields": ["backend", "meter", "nano_usd", "valid_from", "valid_to", "source"]})]

    @display(description="a second", ordering="nano_usd")
    def price(self, row: Rate) -> SafeString:
        return show.money(row.nano_usd)

    @display(description="an hour", ordering="nano_usd")
    def an_hour(self, row: Rate) -> SafeString:
        return show.money(row.nano_usd * 3600)

    @display(description="from", ordering="valid_from")
    def begins(self, row: Rate) -> Any:
        return show.when(row.valid_from)

    @display(description="until", ordering="valid_to")
    def ends(self, row: Rate) -> Any:
        return show.when(row.valid_to)

    @display(description="now")
    def badge(self, row: Rate) -> SafeString:
        now = timezone.now()
        if row.valid_from > now:
            return show.badge("pending", "Its time is still to come.")
        return show.badge("expired" if row.valid_to and row.valid_to <= now else "live")


@admin.register(LedgerEntry)
class LedgerPage(HistoryPage):
    list_display = ["id", "kind", "amount", "gives", "receives", "budget", "machine", "run", "age"]
    list_filter = [filters.SinceAt, ("kind", ChoicesDropdownFilter), ("team", AutocompleteSelectFilter)]
    list_select_related = ["quota__team", "quota__agent", "quota__key"]
    search_fields = ["sandbox__id__startswith", "execution__id__startswith"]
    search_help_text = "The id of a sandbox or an execution."
    ordering = ["-id"]
    paginator = InfinitePaginator

    @display(description="amount", ordering="amount_nano_usd")
    def amount(self, row: LedgerEntry) -> SafeString:
        return show.money(row.amount_nano_usd)

    @display(description="from")
    def gives(self, row: LedgerEntry) -> str:
        return ledger.SIDES[row.kind][0]

    @display(description="to")
    def receives(self, row: LedgerEntry) -> str:
        return ledger.SIDES[row.kind][1]

    @display(description="budget")
    def budget(self, row: LedgerEntry) -> Any:
        return show.link(row.quota) if row.quota else "no budget"

    @display(description="sandbox")
    def machine(self, row: LedgerEntry) -> Any:
        return show.link_to("sandbox", row.sandbox_id)

    @display(description="execution")
    def run(self, row: LedgerEntry) -> Any:
        return show.link_to("execution", row.execution_id)

    @display(description="age")
    def age(self, row: LedgerEntry) -> Any:
        return show.when(row.at)


@admin.register(Usage)
class UsagePage(HistoryPage):
    list_display = ["id", "kind", "agent_link", "backend", "lasted", "price", "cost", "machine", "run", "age"]
    list_filter = [
        filters.SinceAt,
        ("kind", ChoicesDropdownFilter),
        filters.ByBackend,
        ("agent", AutocompleteSelectFilter),
        ("team", AutocompleteSelectFilter),
    ]
    list_select_related = ["agent", "sandbox"]
    search_fields = ["sandbox__id__startswith", "execution__id__startswith"]
    search_help_text = "The id of a sandbox or an execution."
    ordering = ["-id"]
    paginator = InfinitePaginator
    custom_urls = (
        ("costs/", "executions_usage_costs", report),
        ("costs/bills/", "executions_usage_bills", reconciliation),
    )

    @display(description="agent", ordering="agent__name")
    def agent_link(self, row: Usage) -> Any:
        return show.link(row.agent)

    @display(description="lasted", ordering="duration_us")
    def lasted(self, row: Usage) -> SafeString:
        return show.number(show.seconds(row.duration_us / 1_000_000), f"{row.duration_us:,} µs")

    @display(description="a second", ordering="rate_nano_usd_per_second")
    def price(self, row: Usage) -> SafeString:
        return show.money(row.rate_nano_usd_per_second)

    @display(description="cost", ordering="cost_nano_usd")
    def cost(self, row: Usage) -> SafeString:
        return show.cost(row.cost_nano_usd, row.sandbox)

    @display(description="sandbox")
    def machine(self, row: Usage) -> Any:
        return show.link_to("sandbox", row.sandbox_id)

    @display(description="execution")
    def run(self, row: Usage) -> Any:
        return show.link_to("execution", row.execution_id)

    @display(description="age", ordering="at")
    def age(self, row: Usage) -> Any:
        return show.when(row.at)


@admin.register(CostTotal)
class CostTotalPage(RecordPage):
    list_display = ["day", "grain", "agent_link", "backend", "kind", "language", "lasted", "cost", "by", "label"]
    list_filter = [("grain", ChoicesDropdownFilter), ("kind", ChoicesDropdownFilter), filters.ByBackend]
    list_select_related = ["agent"]
    search_fields = ["label__startswith", "agent__name__startswith"]
    ordering = ["-id"]
    paginator = InfinitePaginator

    @display(description="agent")
    def agent_link(self, row: CostTotal) -> Any:
        return show.link(row.agent)

    @display(description="lasted", ordering="duration_us")
    def lasted(self, row: CostTotal) -> SafeString:
        return show.number(show.seconds(row.duration_us / 1_000_000), f"{row.duration_us:,} µs")

    @display(description="cost", ordering="cost_nano_usd")
    def cost(self, row: CostTotal) -> SafeString:
        title = "No rate was known: charged at the ceiling" if not row.is_priced else ""
        return show.money(row.cost_nano_usd) if row.is_priced else show.number("unpriced", title)


@admin.register(ProviderCharge)
class ProviderChargePage(RecordPage):
    list_display = ["day", "backend", "sandbox", "cost", "source", "age"]
    list_filter = [filters.ByBackend]
    search_fields = ["sandbox__startswith", "source"]
    ordering = ["-day", "-id"]

    @display(description="cost", ordering="nano_usd")
    def cost(self, row: ProviderCharge) -> SafeString:
        return show.money(row.nano_usd)

    @display(description="imported", ordering="imported_at")
    def age(self, row: ProviderCharge) -> Any:
        return show.when(row.imported_at)
