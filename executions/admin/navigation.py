"""The sidebar, the styles and the search of the admin; settings.UNFOLD names them."""

from __future__ import annotations

import re
from typing import Any

from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse
from unfold.dataclasses import SearchResult

from executions.admin import show
from executions.models import Execution, Sandbox

GROUPS: list[tuple[str, list[tuple[str, str, str]]]] = [
    (
        "Monitor",
        [
            ("Executions", "play_circle", "execution"),
            ("Sandboxes", "deployed_code", "sandbox"),
            ("Approvals", "inbox", "approval"),
            ("Refusals", "front_hand", "refusal"),
            ("Backend states", "electrical_services", "backendstate"),
            ("Attestations", "verified_user", "attestation"),
        ],
    ),
    (
        "Configuration",
        [
            ("Agents", "smart_toy", "agent"),
            ("API keys", "key", "apikey"),
            ("Templates", "stacks", "template"),
            ("Warm pools", "bolt", "pool"),
            ("Package policies", "policy", "packagepolicy"),
            ("Webhooks", "webhook", "webhook"),
            ("Teams", "groups", "team"),
            ("Memberships", "badge", "membership"),
            ("People", "person", "user"),
        ],
    ),
    (
        "Money",
        [
            ("Quotas and budgets", "speed", "quota"),
            ("Rates", "sell", "rate"),
            ("Usage", "timer", "usage"),
            ("Ledger", "receipt_long", "ledgerentry"),
            ("Totals", "functions", "costtotal"),
            ("Provider's bills", "request_quote", "providercharge"),
        ],
    ),
    (
        "Records",
        [
            ("Audit", "history", "auditevent"),
            ("Audit's head", "link", "audithead"),
            ("Transitions", "swap_horiz", "transition"),
            ("Claims", "front_loader", "claim"),
            ("Attempts", "alt_route", "attempt"),
            ("Events", "notes", "event"),
            ("Artifacts", "draft", "artifact"),
            ("Packages", "package_2", "package"),
            ("Package locks", "lock", "packagelock"),
            ("Advisories", "gpp_maybe", "advisory"),
            ("Egress", "north_east", "egress"),
            ("Deliveries", "outgoing_mail", "delivery"),
            ("Idempotency", "repeat_one", "idempotencyrecord"),
            ("Answers of writes", "reply", "answerrecord"),
            ("Sign-in links", "login", "signinlink"),
            ("Metrics", "monitoring", "metrictotal"),
        ],
    ),
]


def sidebar(request: HttpRequest) -> list[dict[str, Any]]:
    """Four groups; what somebody may not see is left out."""

    def item(title: str, icon: str, model: str) -> dict[str, Any]:
        link = show.rows_of(model)
        here = request.path.startswith(link) and "/costs/" not in request.path
        seen = request.user.has_perm(f"executions.view_{model}")
        return {"title": title, "icon": icon, "link": link, "active": lambda _: here, "permission": lambda _: seen}

    def costs(request: HttpRequest) -> dict[str, Any]:
        link = reverse("admin:executions_usage_costs")
        return {
            "title": "Costs",
            "icon": "payments",
            "link": link,
            "active": lambda _: request.path.startswith(link),
            "permission": lambda _: request.user.has_perm("executions.view_usage"),
        }

    groups = [{"title": title, "items": [item(*entry) for entry in entries]} for title, entries in GROUPS]
    home = {"title": "Overview", "icon": "monitoring", "link": reverse("admin:index")}
    groups[0]["items"].insert(0, home)  # type: ignore[attr-defined]
    groups[2]["items"].insert(0, costs(request))  # type: ignore[attr-defined]
    return groups


def stylesheet(request: HttpRequest) -> str:
    return static("admin/sandgate.css")


def icon(request: HttpRequest) -> str:
    return static("console/icon.svg")


def find(request: HttpRequest, term: str) -> list[SearchResult]:
    """A pasted id leads straight to its row."""
    for prefix, model in (("exe", Execution), ("sbx", Sandbox)):
        if not re.fullmatch(rf"{prefix}_?[0-9a-z]{{26}}", term) or not request.user.has_perm(
            f"executions.view_{model._meta.model_name}"
        ):
            continue
        row = model.objects.only("pk").filter(pk=f"{prefix}_{term[-26:]}").first()
        if row is not None:
            return [
                SearchResult(
                    title=row.pk, description=str(model._meta.verbose_name), link=show.page_of(row), icon="tag"
                )
            ]
    return []
