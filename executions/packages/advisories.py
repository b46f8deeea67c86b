"""Known vulnerabilities: read from OSV files that an operator imports, asked for name and version."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from django.db import transaction
from django.db.models import Max
from django.utils import timezone
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from executions.models import Advisory

ECOSYSTEM = "PyPI"


class Known:
    """The advisories about some names; `of` answers for one version. `told_at` is None where none were ever imported."""

    def __init__(self, names: Iterable[str]) -> None:
        self.told_at: datetime | None = Advisory.objects.aggregate(at=Max("told_at"))["at"]
        self._rows: dict[str, list[Advisory]] = {}
        for row in Advisory.objects.filter(package__in=set(names)) if self.told_at else ():
            self._rows.setdefault(row.package, []).append(row)

    def of(self, name: str, version: str) -> list[str] | None:
        """The identifiers that name this version, or None: nobody knows."""
        if self.told_at is None:
            return None
        return sorted(row.identifier for row in self._rows.get(name, []) if _hit(row.affected, version))


def _hit(affected: list[dict[str, Any]], version: str) -> bool:
    """Whether OSV's `versions` or `ranges` hold this one; see the OSV schema, "evaluating whether a version is affected"."""
    for part in affected:
        if version in part.get("versions", []):
            return True
        for span in part.get("ranges", []):
            if span.get("type") == "ECOSYSTEM" and _within(span.get("events", []), Version(version)):
                return True
    return False


def _within(events: list[dict[str, str]], version: Version) -> bool:
    def at(event: dict[str, str]) -> tuple[Version, int]:
        kind, text = next(iter(event.items()))
        return Version(text), 1 if kind == "last_affected" else 0

    inside = False
    for event in sorted((e for e in events if _readable(e)), key=at):
        kind, text = next(iter(event.items()))
        match kind:
            case "introduced" if Version(text) <= version:
                inside = True
            case "fixed" if Version(text) <= version:
                inside = False
            case "last_affected" if Version(text) < version:
                inside = False
    return inside


def _readable(event: dict[str, str]) -> bool:
    try:
        Version(next(iter(event.values())))
    except (InvalidVersion, StopIteration, TypeError):
        return False
    return True


@transaction.atomic
def take(path: Path) -> tuple[int, int]:
    """Take in a file: (advisories that hold, withdrawn ones that were removed). ValueError for one that is not OSV."""
    held, gone = [], 0
    now = timezone.now()
    for told in _told(path):
        try:
            identifier, modified = str(told["id"]), datetime.fromisoformat(str(told["modified"]))
            affected = [part for part in told.get("affected", []) if part["package"]["ecosystem"] == ECOSYSTEM]
        except (KeyError, TypeError, ValueError) as problem:
            raise ValueError(f"{path.name} holds something that is no OSV advisory: {problem!r}") from None
        if told.get("withdrawn"):
            gone += Advisory.objects.filter(identifier=identifier).delete()[0]
            continue
        severity = "; ".join(str(one.get("score", "")) for one in told.get("severity", []))
        severity = str(told.get("database_specific", {}).get("severity", "") or severity)
        for name in {canonicalize_name(part["package"]["name"]) for part in affected}:
            own = [part for part in affected if canonicalize_name(part["package"]["name"]) == name]
            kept = [{key: part[key] for key in ("versions", "ranges") if key in part} for part in own]
            words = str(told.get("summary") or told.get("details") or "")[:300]
            held.append(
                Advisory(
                    identifier=identifier[:80], package=name, summary=words, severity=severity[:120], affected=kept,
                    modified_at=modified, told_at=modified, imported_at=now,
                )
            )  # fmt: skip
    if held:
        newest = max(row.modified_at for row in held)
        for row in held:
            row.told_at = newest
        Advisory.objects.bulk_create(
            held,
            batch_size=200,
            update_conflicts=True,
            unique_fields=["package", "identifier"],
            update_fields=["summary", "severity", "affected", "modified_at", "told_at", "imported_at"],
        )
    return len(held), gone


def _told(path: Path) -> Iterator[dict[str, Any]]:
    """Each advisory of a JSON file, of one with a line for each, or of a zip of such files."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".json"):
                    yield json.loads(archive.read(name))
        return
    text = path.read_text()
    try:
        told = json.loads(text)
    except ValueError:
        told = [json.loads(line) for line in text.splitlines() if line.strip()]
    yield from told.get("vulns", [told]) if isinstance(told, dict) else told
