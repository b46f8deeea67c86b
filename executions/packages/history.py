"""Which runs had a version: of a package that went into their sandbox before they began, or was in its lock."""

from __future__ import annotations

from django.db.models import Exists, F, OuterRef, Q, QuerySet

from executions.models import Execution, Package, Team
from executions.states import Verdict


def runs_with(team: Team, name: str, version: str) -> QuerySet[Execution]:
    """Newest first; those included that were running when it came."""
    had = Package.objects.filter(team=team, name=name, version=version, verdict=Verdict.ALLOWED)
    put = had.filter(sandbox=OuterRef("sandbox"), lock=None, at__lte=OuterRef("over"))
    locked = had.filter(lock=OuterRef("sandbox__lock"))
    found = Execution.objects.filter(team=team).annotate(over=F("ended_at"))
    still_open = Q(ended_at=None, sandbox__in=had.filter(lock=None).values("sandbox"))
    return found.filter(Exists(put) | Exists(locked) | still_open).order_by("-id")
