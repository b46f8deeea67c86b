"""Long lists, the newest row first: a page costs the same however long the table has grown, and whatever filters leave out."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from django.db.models import BooleanField, F, Func, QuerySet
from django.db.models.functions import Coalesce

LOOKED_AT = 2000  # rows of one page: some 10 ms where filters leave out all; too few for PostgreSQL to start workers
COUNTED = 10_000
ORDER = ("-created_at", "-id")
SORTED = (Coalesce("created_at", "created_at").desc(), Coalesce("id", "id").desc())  # the same, and no index has it


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a list: behind the row with this id, or behind all rows of that moment where it is empty."""

    at: datetime
    id: str = ""

    def __str__(self) -> str:
        return base64.urlsafe_b64encode(f"{self.at.isoformat()} {self.id}".encode()).decode().rstrip("=")


def place(text: str) -> Place | None:
    """What `str` made of a place; None of any other text."""
    try:
        at, _, pk = base64.urlsafe_b64decode(text.encode() + b"==").decode().partition(" ")
        moment = datetime.fromisoformat(at)
        if moment.tzinfo is None or not pk.isprintable():
            return None
        return Place(moment.astimezone(UTC), pk)
    except (ValueError, binascii.Error, OverflowError):  # the last: before the first year, or behind the last one
        return None


def page(found: QuerySet, size: int, *, of: QuerySet, after: Place | None = None) -> tuple[list[Any], Place | None]:
    """Up to `size` rows of `found`, and the place where more may follow; None behind the last.

    `of` has the rows that an index gives in order, and `found` those of them that filters let through. A page goes
    through LOOKED_AT rows of `of` at most, so it can be short, or empty, with more to follow.
    """
    edge = _behind(of, after).order_by("-created_at").values_list("created_at", flat=True)[LOOKED_AT:].first()
    found = _behind(found, after) if edge is None else _behind(found, after).filter(created_at__gte=edge)
    rows = list(found.order_by(*ORDER)[: size + 1])
    if len(rows) > size:
        return rows[:size], Place(rows[size - 1].created_at, rows[size - 1].pk)
    return rows, None if edge is None else Place(edge)


def few(found: QuerySet, size: int, *, after: Place | None = None) -> tuple[list[Any], Place | None]:
    """As `page`, of rows that are few by themselves and that an index of their own finds, in no order: open ones, or of one session."""
    rows = list(_behind(found, after).order_by(*SORTED)[: size + 1])
    return rows[:size], Place(rows[size - 1].created_at, rows[size - 1].pk) if len(rows) > size else None


def counted(found: QuerySet) -> str:
    """How many rows there are, for people: exactly up to COUNTED."""
    number = found.order_by()[: COUNTED + 1].count()
    return f"{number:,}" if number <= COUNTED else f"{COUNTED:,}+"


def _behind(rows: QuerySet, after: Place | None) -> QuerySet:
    if after is None:
        return rows
    if not after.id:
        return rows.filter(created_at__lt=after.at)
    return rows.filter(created_at__lte=after.at).exclude(created_at=after.at, id__gte=after.id)


def also(rows: QuerySet, **columns: Any) -> QuerySet:
    """Those of the rows that have these texts in these columns, by which no index is chosen: SQLite would take one that sorts."""
    aliases = {f"also_{name}": Coalesce(F(name), F(name)) for name in columns}
    return rows.alias(**aliases).filter(**{f"also_{name}": value for name, value in columns.items()})


class Labelled(Func):
    """Whether a text is not empty, without a parameter: so SQLite sees that a partial index has the row."""

    template = "NOT (%(expressions)s = '')"
    output_field = BooleanField()
    conditional = True
