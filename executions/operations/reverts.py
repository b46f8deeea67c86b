"""Taking a change of configuration back: its row gets the values that the audit says it had before."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.db import transaction
from django.db.models import Field, ForeignKey, Model

from executions import audit
from executions.errors import Conflict
from executions.keys import Caller
from executions.models import (
    Agent,
    ApiKey,
    AuditEvent,
    Membership,
    PackagePolicy,
    Pool,
    Quota,
    Rate,
    Team,
    Template,
    User,
)

CONFIGURATION: dict[str, type[Model]] = {
    "agent": Agent, "key": ApiKey, "membership": Membership, "packagepolicy": PackagePolicy, "pool": Pool, "quota": Quota, "rate": Rate, "team": Team,
    "template": Template, "user": User,
}  # fmt: skip


@transaction.atomic
def revert(event: AuditEvent, *, caller: Caller, reason: str) -> Model:
    """Give the row its former values, checked as a form would, and write that down. Raises Conflict, which says why not."""
    row, fields = _row(event, lock=True)
    before = audit.facts(row)
    for name, field in fields.items():
        setattr(row, name, field.to_python((event.before or {})[name]))
    try:
        row.full_clean()
    except ValidationError as wrong:
        raise Conflict(f"The former values are not valid any more: {' '.join(wrong.messages)}") from None
    row.save(update_fields=[field.name for field in fields.values()])
    was, is_now = audit.difference(before, audit.facts(type(row)._base_manager.get(pk=row.pk)))
    noun = event.action.split("_")[0]
    audit.record(
        f"{noun}_changed", caller=caller, subject=event.subject, before=was, after=is_now,
        reason=f"takes back event {event.seq}: {reason}",
    )  # fmt: skip
    return row


def model_of(event: AuditEvent) -> type[Model] | None:
    """The kind of configuration that the event is about; None for anything else."""
    return CONFIGURATION.get(event.action.split("_")[0])


def why_not(event: AuditEvent) -> str:
    """Why this event cannot be taken back; empty where it can."""
    try:
        _row(event)
    except Conflict as no:
        return no.detail
    return ""


def _row(event: AuditEvent, *, lock: bool = False) -> tuple[Model, dict[str, Field[Any, Any]]]:
    """The row of a change and the fields that it changed. Raises Conflict where it cannot be taken back."""
    before, after, model = event.before, event.after, model_of(event)
    if model is None or not isinstance(before, dict) or not isinstance(after, dict) or before.keys() != after.keys():
        raise Conflict("Only a change of plain fields can be taken back.")
    fields: dict[str, Field[Any, Any]] = {}
    for name, value in before.items():
        fields[name] = _field(model, name)
        if isinstance(value, str) and value.startswith(("(secret)", "(kept as sha256 ")):
            raise Conflict(f"{name}: its former value is not in the audit.")
    rows = model._base_manager.select_for_update(of=("self",)) if lock else model._base_manager.all()
    row = rows.filter(pk=event.subject.split(" ")[-1]).first()
    if row is None:
        raise Conflict("There is no such row any more.")
    now = audit.told(audit.facts(row))
    if changed := [name for name in fields if now[name] != after[name]]:
        raise Conflict(f"{changed[0]} has changed again since: take that back first.")
    return row, fields


def _field(model: type[Model], name: str) -> Field[Any, Any]:
    try:
        found = model._meta.get_field(name.removesuffix("_id"))
    except FieldDoesNotExist:
        found = None
    if not isinstance(found, Field) or found.many_to_many or (isinstance(found, ForeignKey) and found.attname != name):
        raise Conflict(f"{name} is no plain field.")
    return found
