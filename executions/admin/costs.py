"""The cost report: what was spent by day, agent and backend, with a chart, its table, and a CSV."""

from __future__ import annotations

import csv
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from django import forms
from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet, Sum
from django.db.models.functions import TruncDate
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils import timezone
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from executions.admin import charts, show
from executions.costs import NANO
from executions.models import Agent, Team, Usage

DAYS = 30
MOST_DAYS = 400


def midnight(day: date | None = None) -> datetime:
    """When the installation's day began."""
    return timezone.make_aware(datetime.combine(day or timezone.localdate(), time.min))


class Period(forms.Form):
    first = forms.DateField(label="From", required=False, widget=UnfoldAdminTextInputWidget({"type": "date"}))
    last = forms.DateField(label="To", required=False, widget=UnfoldAdminTextInputWidget({"type": "date"}))
    team = forms.ModelChoiceField(
        Team.objects.order_by("name"), required=False, empty_label="every team", widget=UnfoldAdminSelectWidget
    )
    agent = forms.ModelChoiceField(Agent.objects.none(), required=False, widget=forms.HiddenInput)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["agent"].queryset = Agent.objects.all()  # type: ignore[attr-defined]

    def clean(self) -> dict[str, Any]:
        data = super().clean() or self.cleaned_data
        last = data.get("last") or timezone.localdate()
        first = data.get("first") or last - timedelta(days=DAYS - 1)
        if first > last:
            raise forms.ValidationError("The period ends before it begins.")
        if (last - first).days >= MOST_DAYS:
            raise forms.ValidationError(f"At most {MOST_DAYS} days at once.")
        return {**data, "first": first, "last": last}


def spent(period: dict[str, Any]) -> QuerySet:
    """The usage of the period, both days included."""
    found = Usage.objects.filter(at__gte=midnight(period["first"]), at__lt=midnight(period["last"] + timedelta(days=1)))
    for scope in ("team", "agent"):
        if period.get(scope):
            found = found.filter(**{scope: period[scope]})
    return found


def report(request: HttpRequest, model_admin: Any) -> HttpResponse:
    if not model_admin.has_view_permission(request):
        raise PermissionDenied
    typed = request.GET.copy()
    form = Period(typed)
    today = timezone.localdate()
    period: dict[str, Any] = {"first": today - timedelta(days=DAYS - 1), "last": today}
    if valid := form.is_valid():
        period = form.cleaned_data
        typed["first"], typed["last"] = period["first"].isoformat(), period["last"].isoformat()  # what is shown, named
    usage = spent(period)
    if valid and request.GET.get("format") == "csv":
        return as_csv(usage, period)
    by_day = usage.annotate(day=TruncDate("at")).values("day", "backend").annotate(nano_usd=Sum("cost_nano_usd"))
    days = [period["first"] + timedelta(days=n) for n in range((period["last"] - period["first"]).days + 1)]
    table = charts.table(days, [(row["day"], row["backend"], row["nano_usd"]) for row in by_day])
    by_agent = _shares(usage, "agent__name", "team__name", "agent")
    by_backend = _shares(usage, "backend")
    total = sum(row["nano_usd"] for row in by_backend)
    query = request.GET.copy()
    query["format"] = "csv"
    context = {
        **admin.site.each_context(request),
        "title": "Costs",
        "form": form,
        "period": period,
        "total": total,
        "days": len(days),
        "chart": charts.spend(table),
        "table": table,
        "by_agent": by_agent,
        "by_backend": by_backend,
        "csv_link": f"?{query.urlencode()}",
        "zone": timezone.get_current_timezone_name(),
        "usage_link": show.rows_of("usage"),
        "ranges": [
            ("today" if n == 1 else f"{n} days", f"?first={today - timedelta(days=n - 1)}&last={today}")
            for n in (1, 7, 30, 90)
        ],
    }
    return TemplateResponse(request, "admin/costs.html", context)


def _shares(usage: QuerySet, *columns: str) -> list[dict[str, Any]]:
    rows = list(
        usage.values(*columns)
        .annotate(nano_usd=Sum("cost_nano_usd"), duration_us=Sum("duration_us"))
        .order_by("-nano_usd", *columns)
    )
    whole = sum(row["nano_usd"] for row in rows) or 1
    for row in rows:
        row["percent"] = round(100 * row["nano_usd"] / whole, 1)
        row["seconds"] = row["duration_us"] / 1_000_000
    return rows


def as_csv(usage: QuerySet, period: dict[str, Any]) -> HttpResponse:
    """One line for each day, team, agent, backend and kind; exact nano-dollars beside the dollars."""
    response = HttpResponse(content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="costs-{period["first"]}-{period["last"]}.csv"'
    writer = csv.writer(response)
    writer.writerow(["day", "team", "agent", "backend", "kind", "seconds", "usd", "nano_usd"])
    rows = (
        usage.annotate(day=TruncDate("at"))
        .values_list("day", "team__name", "agent__name", "backend", "kind")
        .annotate(duration_us=Sum("duration_us"), nano_usd=Sum("cost_nano_usd"))
        .order_by("day", "team__name", "agent__name", "backend", "kind")
    )
    for *words, duration_us, nano_usd in rows:
        dollars = f"{Decimal(nano_usd) / NANO:f}"
        writer.writerow([*map(harmless, words), f"{Decimal(duration_us) / 1_000_000:f}", dollars, nano_usd])
    return response


def harmless(cell: Any) -> str:
    """A spreadsheet must not take a name for a formula."""
    text = str(cell)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
