"""The cost report: what was spent by day, by whom and on what, what it will come to, what it would cost elsewhere."""

from __future__ import annotations

import json
from collections import Counter
from datetime import date, datetime, timedelta
from typing import Any

from asgiref.sync import async_to_sync
from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from unfold.widgets import UnfoldAdminFileFieldWidget, UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from executions import audit, backends
from executions.admin import charts, show
from executions.admin.base import caller_of
from executions.costs import usd
from executions.errors import BackendError, Invalid
from executions.models import Agent, ProviderCharge, Rate, Team
from executions.reports import bills, exports, listing, spend, totals

DAYS = 30
SERIES = 4  # of the chart; the rest is one more
SHORT = 14  # days: a longer table starts folded
TOP = 20  # lines of a table; the files have them all
BATCHES = 5  # of usage rows that a page may still add up itself
BY = {
    "backend": "backend",
    "agent": "agent",
    "kind": "kind",
    "language": "language",
    "user": "user",
    "workflow": "workflow",
}
OF_FILE = ("day", "team", "agent", "backend", "kind")


def midnight(day: date | None = None) -> datetime:
    """When the installation's day began."""
    return totals.midnight(day or timezone.localdate(), timezone.get_current_timezone_name())


class PeriodForm(forms.Form):
    first = forms.DateField(label="From", required=False, widget=UnfoldAdminTextInputWidget({"type": "date"}))
    last = forms.DateField(label="To", required=False, widget=UnfoldAdminTextInputWidget({"type": "date"}))
    team = forms.ModelChoiceField(
        Team.objects.order_by("name"), required=False, empty_label="every team", widget=UnfoldAdminSelectWidget
    )
    by = forms.ChoiceField(
        label="Chart by", required=False, choices=[(b, b) for b in BY], widget=UnfoldAdminSelectWidget
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
        if (last - first).days >= spend.MOST_DAYS:
            raise forms.ValidationError(f"At most {spend.MOST_DAYS} days at once.")
        return {**data, "first": first, "last": last}


def report(request: HttpRequest, model_admin: Any) -> HttpResponse:
    if not model_admin.has_view_permission(request):
        raise PermissionDenied
    totals.roll_up(batches=BATCHES)
    typed = request.GET.copy()
    form = PeriodForm(typed)
    today = timezone.localdate()
    period, by = spend.Period(today - timedelta(days=DAYS - 1), today), "backend"
    if valid := form.is_valid():
        data = form.cleaned_data
        period = spend.Period(data["first"], data["last"], data["team"], data["agent"])
        by = data["by"] or by
        typed["first"], typed["last"] = period.first.isoformat(), period.last.isoformat()  # what is shown, named
    typed["by"] = by
    if valid and (export := request.GET.get("format")) in FILES:
        return FILES[export](period)
    whole = spend.total(period)
    table = by_day(period, by)
    query = request.GET.copy()
    links = []
    for name in FILES:
        query["format"] = name
        links.append(("FOCUS 1.2" if name == "focus" else name.upper(), f"?{query.urlencode()}"))
    forecast = spend.forecast(today, **period.scope)
    aliases = list(
        dict.fromkeys(
            [
                *settings.SANDBOXES,
                *Rate.objects.exclude(nano_usd=0).order_by("backend").values_list("backend", flat=True),
            ]
        )
    )
    context = {
        **admin.site.each_context(request),
        "title": "Costs",
        "form": form,
        "period": period,
        "whole": whole,
        "total": whole.charged_nano_usd,
        "numbers": numbers(whole, forecast, today),
        "days": len(period.days),
        "short": len(period.days) <= SHORT,
        "by": by,
        "chart": charts.spend(table),
        "table": table,
        "tables": [
            ("By agent", "agent", shares(period, "agent", "agent_id", "team")),
            ("By backend", "backend", shares(period, "backend")),
            *([] if by in ("agent", "backend", "kind") else [(f"By {by}", by, shares(period, by))]),
        ],
        "standing": spend.standing_costs(period),
        "choices": spend.what_if(period, aliases),
        "unrated": spend.unrated(),
        "pending": totals.pending(),
        "links": links,
        "bills_link": reverse("admin:executions_usage_bills"),
        "zone": period.team.time_zone if period.team else timezone.get_current_timezone_name(),
        "usage_link": show.rows_of("usage"),
        "rates_link": show.rows_of("rate"),
        "ranges": [
            ("today" if n == 1 else f"{n} days", f"?first={today - timedelta(days=n - 1)}&last={today}&by={by}")
            for n in (1, 7, 30, 90)
        ],
    }
    return TemplateResponse(request, "admin/costs.html", context)


def numbers(whole: spend.Line, forecast: spend.Forecast, today: date) -> list[dict[str, Any]]:
    """The row of numbers: the split of the period, and what the month will come to."""
    said = {"run": "code ran", "idle": "sessions waited", "boot": "sandboxes started", "pool": "kept ready, unclaimed"}
    found = [
        {
            "label": kind.capitalize(),
            "nano_usd": whole.split[kind],
            "note": f"{show.seconds(whole.split_us[kind] / 1_000_000)} · {words}",
        }
        for kind, words in said.items()
    ]
    if whole.unpriced_us:
        note = f"{show.seconds(whole.unpriced_us / 1_000_000)} · budgets were charged {usd(whole.unpriced_nano_usd)}"
        found.append({"label": "Unpriced", "nano_usd": None, "note": note})
    if forecast.days_known:
        note = f"{usd(forecast.so_far_nano_usd)} so far; each coming day as the same weekday of the last seven"
        if forecast.days_known < 7:
            note += f", of which {forecast.days_known} known"
    else:
        note = "so far; there is no full day yet to go by"
    found.append({"label": f"Forecast for {today:%B}", "nano_usd": forecast.nano_usd, "note": note})
    return found


def by_day(period: spend.Period, by: str) -> charts.Table:
    """Dollars of each day, the dearest few told apart."""
    found = [
        (line.keys[0], line.keys[1] or f"no {by}", line.charged_nano_usd) for line in spend.lines(period, "day", by)
    ]
    sums: Counter[str] = Counter()
    for _, name, nano_usd in found:
        sums[name] += nano_usd
    named = [name for name, _ in sums.most_common(SERIES)]
    cells: Counter[tuple[date, str]] = Counter()
    for day, name, nano_usd in found:
        cells[day, name if name in named else "others"] += nano_usd
    return charts.table(period.days, [(day, name, nano_usd) for (day, name), nano_usd in cells.items()], sorted(named))


def shares(period: spend.Period, *groups: str) -> list[dict[str, Any]]:
    """The dearest of one kind, each with its part of the whole."""
    found = sorted(spend.lines(period, *groups), key=lambda line: (-line.charged_nano_usd, line.keys))
    whole = sum(line.charged_nano_usd for line in found) or 1
    rows = [
        dict(zip(groups, line.keys, strict=True))
        | {
            "name": line.keys[0] or f"no {groups[0]}",
            "line": line,
            "nano_usd": line.charged_nano_usd,
            "percent": round(100 * line.charged_nano_usd / whole, 1),
            "split": [line.shown_of(kind) for kind in spend.KINDS],
        }
        for line in found[:TOP]
    ]
    return rows


# Files


def _file(period: spend.Period, content: str, kind: str, name: str) -> HttpResponse:
    response = HttpResponse(content, content_type=kind)
    response["Content-Disposition"] = f'attachment; filename="costs-{period.first}-{period.last}{name}"'
    return response


def as_csv(period: spend.Period) -> HttpResponse:
    """One line for each day, team, agent, backend and kind; exact nano-dollars beside the dollars."""
    content = exports.csv_of(spend.lines(period, *OF_FILE), OF_FILE)
    return _file(period, content, "text/csv; charset=utf-8", ".csv")


def as_json(period: spend.Period) -> HttpResponse:
    lines = [exports.as_dict(line, OF_FILE) for line in spend.lines(period, *OF_FILE)]
    return _file(period, json.dumps(lines, default=exports.plain, indent=1), "application/json", ".json")


def as_focus(period: spend.Period) -> HttpResponse:
    return _file(period, exports.focus_csv(period), "text/csv; charset=utf-8", "-focus-1.2.csv")


FILES = {"csv": as_csv, "json": as_json, "focus": as_focus}


# Bills


class BillForm(forms.Form):
    backend = forms.ChoiceField(widget=UnfoldAdminSelectWidget)
    file = forms.FileField(widget=UnfoldAdminFileFieldWidget)

    def __init__(self, *args: Any, aliases: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["backend"].choices = [(alias, alias) for alias in aliases]  # type: ignore[attr-defined]


def reconciliation(request: HttpRequest, model_admin: Any) -> HttpResponse:
    """What the provider bills beside what the ledger says, and the form that takes a bill in."""
    may_import = request.user.has_perm("executions.add_providercharge")
    if not model_admin.has_view_permission(request):
        raise PermissionDenied
    totals.roll_up(batches=BATCHES)
    known = ProviderCharge.objects.order_by("backend").values_list("backend", flat=True).distinct()
    aliases = list(dict.fromkeys([*settings.SANDBOXES, *known, "e2b"]))
    form = BillForm(request.POST or None, request.FILES or None, aliases=aliases)
    if request.method == "POST":
        if not may_import:
            raise PermissionDenied
        if form.is_valid():
            alias, file = form.cleaned_data["backend"], form.cleaned_data["file"]
            try:
                days = bills.import_bill(alias, file.name, file.read(bills.MOST_BYTES + 1))
            except Invalid as wrong:
                form.add_error("file", wrong.detail)
            else:
                told = {"backend": alias, "file": file.name, "days": days}
                audit.record("bill_imported", caller=caller_of(request, None), subject=alias, after=told)
                messages.info(
                    request, f"{days} {'day' if days == 1 else 'days'} of {alias} are known from {file.name}."
                )
                return redirect(f"{request.path}?backend={alias}")
    alias = request.GET.get("backend", "")
    alias = alias if alias in aliases else next(iter(known), "e2b" if "e2b" in aliases else aliases[0])
    last = timezone.now().date()
    first = last - timedelta(days=90)
    compared = bills.reconcile(alias, first, last)
    both = [day for day in compared if day.theirs_nano_usd is not None]
    listed = _listed(request, alias) if request.GET.get("listed") and alias in settings.SANDBOXES else None
    context = {
        **admin.site.each_context(request),
        "title": "Bills and ledger",
        "form": form,
        "may_import": may_import,
        "alias": alias,
        "aliases": aliases,
        "compared": compared,
        "ours": sum(day.ours_nano_usd for day in both),
        "theirs": sum(day.theirs_nano_usd or 0 for day in both),
        "difference": sum(day.difference_nano_usd or 0 for day in both),
        "both": len(both),
        "may_list": alias in settings.SANDBOXES,
        "listed": listed,
        "strangers": bills.strangers(alias, first, last)[:TOP],
        "back": reverse("admin:executions_usage_costs"),
    }
    return TemplateResponse(request, "admin/bills.html", context)


def _listed(request: HttpRequest, alias: str) -> listing.Listing | None:
    """What the backend has now beside what is open here; None, and a message, where it does not say."""
    asked_at = timezone.now()
    try:
        found = async_to_sync(backends.get(alias).list)()
    except (BackendError, OSError, TimeoutError) as e:
        messages.error(request, f"{alias} does not say what it has: {e}")
        return None
    return listing.compare(alias, found, asked_at)
