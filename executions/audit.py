"""What people and programs did to configuration, keys, sign-ins and levers, and who read whose code: a chain of hashes.

Each event holds the hash of the one before it, so that nothing can be changed or taken out unseen; the database refuses
both (migration 0013). Secrets, code and file contents are never in it: of those it keeps a fingerprint.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from django.core.cache import cache
from django.db import connection, transaction
from django.db.models import Model
from django.utils import timezone

from executions.models import AuditEvent, AuditHead, Execution, Sandbox

if TYPE_CHECKING:
    from executions.keys import Caller

log = logging.getLogger(__name__)
SECRET = ("password", "secret", "token", "digest")  # anywhere in a name
CONTENT = {"code", "env", "files", "start_command"}  # exactly the name
UNREMARKABLE = {"last_login"}
REPEATS_SECONDS = 3600  # one person's reading of one run, one key's denials: written down once in so long
HASHED = (
    "seq", "previous", "at", "team_id", "actor_id", "key_id", "action", "subject", "before", "after", "reason", "ip",
)  # fmt: skip
COLUMNS = (*HASHED, "digest")
TRIGGERS = {"audit_event_is_not_changed", "audit_event_is_not_deleted"}


def record(
    action: str,
    *,
    caller: Caller | None = None,
    actor: Any = None,
    subject: str = "",
    before: Any = None,
    after: Any = None,
    reason: str = "",
    ip: str | None = None,
) -> AuditEvent:
    """Write one event down, at the end of the chain, in the transaction that is open.

    Whoever else writes one waits until that transaction ends: keep it short, and never let an execution wait here.
    """
    event = AuditEvent(
        team=caller.team if caller else None,
        actor=caller.person if caller else actor,
        key=caller.key if caller else None,
        ip=_plain_ip(caller.ip if caller else ip),
        action=action,
        subject=_plain(subject)[:80],
        before=told(before),
        after=told(after),
        reason=_plain(reason)[:200],
        at=timezone.now(),
    )
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO executions_audithead (id, seq, digest) VALUES (1, 1, '') "
            "ON CONFLICT (id) DO UPDATE SET seq = executions_audithead.seq + 1 RETURNING seq, digest"
        )
        event.seq, event.previous = cursor.fetchone()
        event.digest = digest({name: getattr(event, name) for name in HASHED})
        event.save(force_insert=True)
        AuditHead.objects.update(digest=event.digest)
    return event


def once(action: str, *, caller: Caller | None = None, subject: str = "", **facts: Any) -> None:
    """As `record`, but repeats of the same by the same within the hour are not written down again."""
    who = (caller.key or caller.person) if caller else None
    same = f"{action} {who.pk if who else facts.get('ip')} {subject} {facts.get('reason', '')}"
    if _is_new(f"audit:{hashlib.sha256(same.encode(errors='replace')).hexdigest()}"):
        record(action, caller=caller, subject=subject, **facts)


def _is_new(same: str) -> bool:
    """Whether it was not seen within the hour. A cache that is away remembers nothing, and all is written down."""
    try:
        return cache.add(same, 1, REPEATS_SECONDS)
    except Exception as e:
        log.warning("cache_away", extra={"error": type(e).__name__})
        return True


def denied(error: Exception) -> None:
    """Write down that somebody who is known asked for what they may not have, or with a key that is no longer good.

    Any other error is let pass: doors may give this whatever they answer with.
    """
    if not tells(error):
        return
    caller: Caller = error.caller  # type: ignore[attr-defined]
    subject = caller.key.pk if caller.key else caller.person.get_username() if caller.person else ""
    once("access_denied", caller=caller, subject=subject, reason=str(error))


def tells(error: Exception) -> bool:
    """Whether it is a denial that belongs here: spares a door the hop to the database."""
    return getattr(error, "caller", None) is not None


def seen(what: str, *, caller: Caller, of: Execution | Sandbox) -> None:
    """A person looks at the `what` (code, output, artifact) of a run or a session that is not their own."""
    person = caller.person
    if person is not None and person.pk not in (of.actor_id, of.agent.person_id):
        once(f"{what}_read", caller=caller, subject=of.pk)


def digest(event: dict[str, Any]) -> str:
    """SHA-256 of the event's canonical JSON: sorted names, no spaces, ASCII, the moment in UTC to the microsecond."""
    at: datetime = event["at"]
    whole = {**event, "at": at.astimezone(UTC).isoformat(timespec="microseconds")}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# What may be told


def told(facts: Any) -> Any:
    """Facts fit for the audit: secrets named, code and contents as fingerprints, the rest as both databases keep it."""
    if not isinstance(facts, dict):
        return _plain(facts)
    return {_plain(str(name)): _fit(str(name), value) for name, value in facts.items()}


def _fit(name: str, value: Any) -> Any:
    if any(word in name.lower() for word in SECRET):
        return "(secret)"
    if name in CONTENT and value and not (isinstance(value, str) and value.startswith("(kept as sha256 ")):
        text = json.dumps(_plain(value), sort_keys=True).encode()
        return f"(kept as sha256 {hashlib.sha256(text).hexdigest()[:16]}, {len(text)} bytes)"
    return _plain(value)


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int():
            return value
        case float():
            return int(value) if value.is_integer() else value if value == value else str(value)
        case datetime():
            return value.isoformat()
        case dict():
            return {_plain(str(name)): _fit(str(name), item) for name, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
    return str(value).encode(errors="replace").decode().replace("\x00", "�")


def _plain_ip(ip: str | None) -> str | None:
    """As both databases give it back."""
    if not ip:
        return None
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return None
    return str(getattr(address, "ipv4_mapped", None) or address)


def facts(row: Model) -> dict[str, Any]:
    """What a row says now, many-to-many relations included."""
    found = {field.attname: getattr(row, field.attname) for field in row._meta.concrete_fields}
    for field in row._meta.many_to_many:
        found[field.name] = sorted(getattr(row, field.name).values_list("pk", flat=True))
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Only what differs, fit for the audit."""
    names = sorted((before.keys() | after.keys()) - UNREMARKABLE)
    changed = [name for name in names if before.get(name) != after.get(name)]
    was, is_now = ({name: side[name] for name in changed if name in side} for side in (before, after))
    return told(was), told(is_now)


# The chain


@dataclass(frozen=True, slots=True)
class Chain:
    """How far the chain is whole. `problem` says what is wrong with the first wrong row, whose number is `broken_at`."""

    length: int
    digest: str
    broken_at: int | None = None
    problem: str = ""


def verify() -> Chain:
    """Read the whole chain and name the first row at which it breaks, if there is one."""
    length, previous = 0, ""
    for event in _events():
        seq, stored = event["seq"], event.pop("digest")
        if seq != length + 1:
            return Chain(length, previous, length + 1, f"Event {length + 1} is missing: after {length} comes {seq}.")
        if event["previous"] != previous:
            return Chain(length, previous, seq, f"Event {seq} does not follow event {length}: that has another hash.")
        if digest(event) != stored:
            return Chain(length, previous, seq, f"Event {seq} was changed: its content has another hash.")
        length, previous = seq, stored
    head = AuditHead.objects.first() or AuditHead(seq=0, digest="")
    if (head.seq, head.digest) != (length, previous):
        return Chain(length, previous, length + 1, f"Events after {length} are missing: there were {head.seq}.")
    if missing := TRIGGERS - triggers():
        return Chain(
            length, previous, None, f"The database does not refuse changes: {', '.join(sorted(missing))} is gone."
        )
    return Chain(length, previous)


def export() -> Iterator[str]:
    """Each event as one line of JSON, in order, with both hashes: the chain can be checked anywhere."""
    for event in _events():
        yield _line({**event, "at": _moment(event)}) + "\n"


def cells() -> Iterator[dict[str, Any]]:
    """Each event as the cells of a table, COLUMNS, in order; what was before and after as JSON."""
    for event in _events():
        yield {**event, "at": _moment(event), "before": cell(event["before"]), "after": cell(event["after"])}


def _moment(event: dict[str, Any]) -> str:
    at: datetime = event["at"]
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def cell(facts: Any) -> str:
    """As JSON, which no spreadsheet takes for a formula unless it is a bare text."""
    return "" if facts is None else _line(facts)


def _line(facts: Any) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def _events() -> Iterator[dict[str, Any]]:
    return AuditEvent.objects.order_by("seq").values(*COLUMNS).iterator(chunk_size=2000)


def triggers() -> set[str]:
    tables = {
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'trigger'",
        "postgresql": "SELECT tgname FROM pg_trigger",
    }
    with connection.cursor() as cursor:
        cursor.execute(tables[connection.vendor])
        return {name for (name,) in cursor.fetchall()}
