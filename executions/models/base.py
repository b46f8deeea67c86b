"""What every row shares: ids that sort by time, and roads between states."""

from __future__ import annotations

import secrets
import time
from itertools import pairwise
from typing import Any, ClassVar, Self

from django.db import models, transaction
from django.utils import timezone

from executions.models import hot

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id(prefix: str) -> str:
    """`prefix_` and 26 lowercase letters and digits: 48 bits of milliseconds, 80 random bits. Sorts by time of birth."""
    number = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    return f"{prefix}_" + "".join(ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


class IdField(models.CharField):
    """A primary key such as `exe_01j…`, made in Python so that a row can be named before it is stored."""

    def __init__(self, prefix: str = "", **kwargs: Any) -> None:
        self.prefix = prefix
        kwargs |= {"max_length": 32, "primary_key": True, "editable": False}
        super().__init__(**kwargs)

    def get_default(self) -> str:
        return new_id(self.prefix)

    def has_default(self) -> bool:
        return True

    def deconstruct(self) -> Any:
        name, path, args, kwargs = super().deconstruct()
        kwargs.pop("default", None)
        return name, path, args, {**kwargs, "prefix": self.prefix}


class IllegalTransition(Exception):
    """That state cannot be reached from this one, or somebody else moved the row first."""


class HasLifecycle(models.Model):
    """A row whose `state` moves by a table, atomically, with a `Transition` row for every step."""

    NEXT: ClassVar[dict[str, frozenset[str]]]
    ENDED: ClassVar[frozenset[str]]
    SUBJECT: ClassVar[str]  # the name of Transition's foreign key to this model

    state: Any
    ended_at: Any

    class Meta:
        abstract = True

    @classmethod
    def legal(cls, before: str, after: str) -> bool:
        return after in cls.NEXT.get(before, frozenset())

    @classmethod
    def born(cls, *states: str, reason: str = "", **fields: Any) -> Self:
        """Insert a row that has already taken the roads through `states`; each is recorded. Call it in a transaction."""
        row = cls(**fields)
        row.bear(*states, reason=reason)
        return row

    def bear(self, *states: str, reason: str = "") -> None:
        """Insert this row, which has already taken the roads through `states`."""
        self.state = states[-1]
        hot.insert([self])
        self._record(("", *states), reason)

    def advance(self, *states: str, reason: str = "", **fields: Any) -> None:
        """Move through `states` in one step, with `fields` set at once. IllegalTransition when the table forbids it
        or when another process moved the row first; then nothing has changed."""
        before = self.state
        for here, there in zip((before, *states), states, strict=False):
            if not self.legal(here, there):
                raise IllegalTransition(f"{self.pk}: {here} → {there} is not allowed.")
        fields["state"] = states[-1]
        if states[-1] in self.ENDED:
            fields.setdefault("ended_at", timezone.now())
        with transaction.atomic(savepoint=False):
            moved = hot.move(self, before, fields)
            if moved:
                self._record((before, *states), reason)
        if not moved:
            raise IllegalTransition(f"{self.pk}: {before} → {states[-1]}: somebody else moved it first.")
        for name, value in fields.items():
            setattr(self, name, value)

    def _record(self, path: tuple[str, ...], reason: str) -> None:
        from executions.models.records import Transition

        subject, now = {f"{self.SUBJECT}_id": self.pk}, timezone.now()
        hot.insert([Transition(**subject, before=b, after=a, reason=reason[:200], at=now) for b, a in pairwise(path)])
