"""What went out of sandboxes, as operators look for it."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import ChoicesDropdownFilter
from unfold.decorators import display
from unfold.paginator import InfinitePaginator

from executions.admin import filters, show
from executions.admin.base import RecordPage
from executions.models import Egress


@admin.register(Egress)
class EgressPage(RecordPage):
    list_display = ["where", "badge", "why", "out", "into", "run", "inside", "age"]
    list_filter = [filters.SinceAt, ("verdict", ChoicesDropdownFilter)]
    search_fields = ["host__startswith", "sandbox__id__startswith", "execution__id__startswith"]
    search_help_text = "The host, or the id of a sandbox or an execution, from its beginning."
    ordering = ["-id"]
    paginator = InfinitePaginator

    @display(description="to")
    def where(self, row: Egress) -> Any:
        return show.mono(f"{row.host}:{row.port}" if row.port else row.host or show.NONE)

    @display(description="verdict", ordering="verdict")
    def badge(self, row: Egress) -> SafeString:
        return show.badge(row.verdict, row.address)

    @display(description="why")
    def why(self, row: Egress) -> str:
        return (f"{row.times} times: " if row.times > 1 else "") + (row.reason or row.address or show.NONE)[:160]

    @display(description="out", ordering="bytes_out")
    def out(self, row: Egress) -> SafeString:
        return show.number(show.size(row.bytes_out), f"{row.bytes_out:,} bytes")

    @display(description="in", ordering="bytes_in")
    def into(self, row: Egress) -> SafeString:
        return show.number(show.size(row.bytes_in), f"{row.bytes_in:,} bytes")

    @display(description="execution")
    def run(self, row: Egress) -> Any:
        return show.link_to("execution", row.execution_id) if row.execution_id else show.NONE

    @display(description="sandbox")
    def inside(self, row: Egress) -> Any:
        return show.link_to("sandbox", row.sandbox_id)

    @display(description="age", ordering="at")
    def age(self, row: Egress) -> Any:
        return show.when(row.at)
