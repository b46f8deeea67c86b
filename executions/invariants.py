"""What must be true between rows, whatever died in between: each check names the rows that contradict others.

A check is a generator over what it finds wrong, the oldest row first. All of them read one `snapshot`, so that they give
no false alarm on a running system.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Model, Q, QuerySet, Sum
from django.utils import timezone

from executions import audit, ledger, store
from executions.models import (
    Artifact,
    Attempt,
    Claim,
    CostTotal,
    Execution,
    LedgerEntry,
    Quota,
    Sandbox,
    Transition,
    Usage,
)
from executions.states import AttemptOutcome, ExecutionState, SandboxState, Unit, Window

MOST = 20  # wrong rows of one check that are told
AT_ONCE = timedelta(seconds=2)  # an admission that had begun when a quota's window did may count in it or not
FAR_PATIENCE = timedelta(minutes=2)  # as `reap` has with what lives on another machine
OVERDUE_SECONDS = 30  # after which what a dead process has left is taken care of
NEVER_TWICE = (AttemptOutcome.RAN, AttemptOutcome.LOST)


@dataclass(frozen=True, slots=True)
class Wrong:
    """A row that contradicts others: what they say of it, and what it says itself."""

    model: str
    id: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.model} {self.id}: expected {self.expected}, found {self.found}."


@dataclass
class Check:
    """One promise, and the rows that break it, at most twenty."""

    name: str
    promise: str
    wrong: list[Wrong] = field(default_factory=list)
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": not self.wrong}


def verify() -> list[Check]:
    """Every check of the rows, in one snapshot; then of kept files, which no snapshot holds still."""
    with snapshot():
        checks = [Check(name, promise, list(islice(look(), MOST))) for name, promise, look in OF_ROWS]
    return [*checks, Check("artifacts", "Every kept file is in the store, whole.", list(islice(artifacts(), MOST)))]


@contextmanager
def snapshot() -> Iterator[None]:
    """All reads within see one moment, and hold up nobody. Inside a transaction that one is kept as it is."""
    if connection.in_atomic_block:
        yield
        return
    connection.ensure_connection()
    own: Any = connection
    if own.vendor == "sqlite":
        mode, own.transaction_mode = own.transaction_mode, "DEFERRED"  # the usual one waits for the lock of writers
        try:
            with transaction.atomic():
                yield
        finally:
            own.transaction_mode = mode
    else:
        with transaction.atomic(), own.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield


# Money


def reservations() -> Iterator[Wrong]:
    held: Counter[int] = Counter()
    for pk, amount, budgets, ended_at in Sandbox.objects.exclude(reserved_nano_usd=0).values_list(
        "pk", "reserved_nano_usd", "reserved_on", "ended_at"
    ):
        if ended_at is not None:
            yield Wrong("sandbox", pk, "no reservation, as it has ended", _nano(amount))
        held.update(dict.fromkeys(budgets, amount))
    for amount, budgets in Claim.objects.filter(spent_nano_usd=None).values_list("reserved_nano_usd", "reserved_on"):
        held.update(dict.fromkeys(budgets, amount))
    for quota in Quota.objects.order_by("pk"):
        expected = held[quota.pk] if quota.unit == Unit.NANO_USD else 0
        if quota.reserved != expected:
            yield Wrong("quota", str(quota.pk), f"{_nano(expected)} reserved", _nano(quota.reserved))


def books() -> Iterator[Wrong]:
    for sandbox_id, should, holds in ledger.unbalanced():
        yield Wrong("sandbox", sandbox_id, f"{_nano(should)} held in the ledger", _nano(holds))


def used() -> Iterator[Wrong]:
    for quota in Quota.objects.filter(each="").order_by("pk"):  # the rows of each one count, not that which they follow
        least, most = _used(quota)
        if not least <= quota.used <= most:
            amount = f"{least:,}" if least == most else f"between {least:,} and {most:,}"
            yield Wrong("quota", str(quota.pk), f"{amount} used", f"{quota.used:,}")


def _used(quota: Quota) -> tuple[int, int]:
    """The least and the most that may stand as used: by the rows, since the quota's window began.

    What is spent when a window has begun and nobody has asked in it yet is forgotten with the one before.
    """
    began = quota.window_started_at
    match quota.unit:
        case Unit.EXECUTIONS if not quota.backend:  # a fallback changes an execution's backend, not what was taken
            whose = {f"execution__{name}": value for name, value in _scope(quota, "user", "workflow").items()}
            begun = Transition.objects.filter(before=ExecutionState.QUEUED, **whose)
            begun = begun.filter(after__in=[ExecutionState.STARTING, ExecutionState.RUNNING])
            return _count(begun, at__gte=began + AT_ONCE), _count(begun, at__gte=began - AT_ONCE)
        case Unit.CREATIONS if not (quota.user or quota.workflow):
            made = _made_for(quota)
            return _count(made, created_at__gte=began + AT_ONCE), _count(made, created_at__gte=began - AT_ONCE)
        case Unit.NANO_USD:
            entries = LedgerEntry.objects.filter(quota=quota, kind=LedgerEntry.SPEND)
            if quota.window == Window.TOTAL:
                return (_sum(entries, "amount_nano_usd"),) * 2
            return 0, _sum(entries.filter(at__gte=began - AT_ONCE), "amount_nano_usd")
        case Unit.COMPUTE_US:
            booked = Usage.objects.filter(
                **{f"sandbox__{n}" if n == "key_id" else n: v for n, v in _scope(quota).items()}
            )
            booked = booked.filter(backend=quota.backend) if quota.backend else booked
            late = Q(execution=None, kind__in=[Usage.BOOT, Usage.POOL])  # a pool's, booked after it was claimed
            booked = booked.exclude(late) if quota.key_id else booked
            if quota.window == Window.TOTAL:
                return _sum(booked.filter(at__gte=began + AT_ONCE), "duration_us"), _sum(booked, "duration_us")
            return 0, _sum(booked.filter(late | Q(at__gte=began - AT_ONCE)), "duration_us")
        case Unit.CONCURRENT_EXECUTIONS | Unit.CONCURRENT_SANDBOXES | Unit.BYTES_STORED:
            return 0, 0  # counted from the rows themselves
    return quota.used, quota.used


def _made_for(quota: Quota) -> QuerySet[Sandbox]:
    """The sandboxes that counted as its creations: of a pool's, those that its own account had made."""
    by_pool = {"agent_id": "pool__agent", "team_id": "pool__agent__team", "key_id": "pool__agent__in"}
    accounts = {by_pool[name]: value if name != "key_id" else () for name, value in _scope(quota).items()}
    made = Sandbox.objects.filter(Q(made_of="", **_scope(quota)) | Q(~Q(made_of=""), **accounts))
    return made.filter(backend=quota.backend) if quota.backend else made


def _scope(quota: Quota, *more: str) -> dict[str, Any]:
    owner = next((f"{s}_id" for s in ("key", "agent", "team") if getattr(quota, f"{s}_id")), None)
    return {name: getattr(quota, name) for name in (owner, *more) if name and getattr(quota, name)}


def _count(found: QuerySet[Any], **since: Any) -> int:
    return found.filter(**since).count()


def _sum(found: QuerySet[Any], column: str) -> int:
    return int(found.aggregate(total=Sum(column))["total"] or 0)


def spent() -> Iterator[Wrong]:
    yield from _contradictions(
        "sandbox",
        """SELECT s.id, COALESCE(u.total, 0), s.spent_nano_usd + COALESCE(c.spent_nano_usd, 0)
        FROM executions_sandbox s LEFT JOIN executions_claim c ON c.sandbox_id = s.id
        LEFT JOIN (SELECT sandbox_id, SUM(cost_nano_usd) AS total FROM executions_usage GROUP BY sandbox_id) u
        ON u.sandbox_id = s.id WHERE s.spent_nano_usd + COALESCE(c.spent_nano_usd, 0) <> COALESCE(u.total, 0)""",
        "{} nano-dollars by its usage",
    )
    yield from _contradictions(
        "execution",
        """SELECT e.id, COALESCE(u.total, 0), COALESCE(e.cost_nano_usd, 0) FROM executions_execution e
        LEFT JOIN (SELECT execution_id, SUM(cost_nano_usd) AS total FROM executions_usage GROUP BY execution_id) u
        ON u.execution_id = e.id WHERE COALESCE(e.cost_nano_usd, 0) <> COALESCE(u.total, 0)""",
        "{} nano-dollars by its usage",
    )


def totals() -> Iterator[Wrong]:
    counted = dict(Usage.objects.filter(is_counted=True).values_list("team").annotate(Sum("cost_nano_usd")).order_by())
    for grain in (CostTotal.HOUR, CostTotal.DAY):
        sums = (
            CostTotal.objects.filter(grain=grain, by=CostTotal.ALL).values_list("team").annotate(Sum("cost_nano_usd"))
        )
        found = dict(sums.order_by())
        for team in sorted(counted.keys() | found.keys()):
            if found.get(team, 0) != counted.get(team, 0):
                yield Wrong(f"totals by {grain} of team", team, _nano(counted.get(team, 0)), _nano(found.get(team, 0)))


def _nano(amount: int) -> str:
    return f"{amount:,} nano-dollars"


# Lives

STATES: tuple[tuple[str, type[Model], str], ...] = (
    ("execution", Execution, ExecutionState.QUEUED),
    ("sandbox", Sandbox, SandboxState.BOOTING),
)


def transitions() -> Iterator[Wrong]:
    for subject, model, first in STATES:
        yield from _contradictions(
            subject,
            f"""SELECT s.id, COALESCE(t.after, 'no transition'), s.state FROM executions_{subject} s
            LEFT JOIN (SELECT {subject}_id, MAX(id) AS id FROM executions_transition GROUP BY {subject}_id) l
            ON l.{subject}_id = s.id LEFT JOIN executions_transition t ON t.id = l.id
            WHERE t.after IS NULL OR t.after <> s.state""",
            "{} by its last transition",
        )
        legal = [("", str(first)), *((str(b), str(a)) for b, after in model.NEXT.items() for a in sorted(after))]  # type: ignore[attr-defined]
        places = " AND ".join(["NOT (before = %s AND after = %s)"] * len(legal))
        yield from _contradictions(
            "transition",
            f"""SELECT id, 'a legal step', before || ' → ' || after FROM executions_transition
            WHERE {subject}_id IS NOT NULL AND {places}""",
            "{}",
            [state for pair in legal for state in pair],
        )
    yield from _contradictions(
        "transition",
        """SELECT id, former, before FROM (SELECT id, before, COALESCE(
            LAG(after) OVER (PARTITION BY execution_id, sandbox_id ORDER BY id), '') AS former FROM executions_transition) t
        WHERE before <> former""",
        "'{}' before it, as the one before left it",
    )


def never_twice() -> Iterator[Wrong]:
    yield from _contradictions(
        "execution",
        """SELECT execution_id, 1, COUNT(*) FROM executions_attempt WHERE outcome IN ('ran', 'lost')
        GROUP BY execution_id HAVING COUNT(*) > 1""",
        "{} attempt that may have run its code",
    )
    yield from _contradictions(
        "sandbox",
        """SELECT s.id, 1, COUNT(*) FROM executions_sandbox s JOIN executions_execution e ON e.sandbox_id = s.id
        WHERE NOT s.kept GROUP BY s.id HAVING COUNT(*) > 1""",
        "{} execution, as it is no session",
    )
    yield from _contradictions(
        "execution",
        """SELECT e.id, s.team_id, e.team_id FROM executions_execution e JOIN executions_sandbox s ON s.id = e.sandbox_id
        WHERE e.team_id <> s.team_id""",
        "team {}, whose sandbox it ran in",
    )


def attempts() -> Iterator[Wrong]:
    left = Attempt.objects.filter(outcome=AttemptOutcome.OPEN, execution__ended_at__isnull=False).order_by("pk")
    for attempt in left:
        yield Wrong("attempt", str(attempt.pk), "an outcome, as its execution has ended", "open")


def owned() -> Iterator[Wrong]:
    """Only a running plane keeps this one: after a stop there are rows that wait for the next start."""
    now = timezone.now()
    before = now - timedelta(seconds=OVERDUE_SECONDS)
    live = Execution.objects.open().order_by("pk")
    for execution in live.exclude(state=ExecutionState.QUEUED).filter(heartbeat_at__lt=before):
        yield Wrong("execution", execution.pk, "a sign of life or an end", f"none since {execution.heartbeat_at}")
    for execution in live.filter(heartbeat_at=None, waits_until__lt=before):
        yield Wrong("execution", execution.pk, f"a runner or an end by {execution.waits_until}", "neither")
    held = Sandbox.objects.open().exclude(state=SandboxState.RETIRING).order_by("pk")
    ends = before - timedelta(seconds=settings.KEEP_GRACE_SECONDS)
    late = Q(node__in=["", settings.NODE], leased_until__lt=ends) | Q(leased_until__lt=ends - FAR_PATIENCE)
    for sandbox in held.filter(late):
        yield Wrong("sandbox", sandbox.pk, f"an end by {sandbox.leased_until}", sandbox.state)
    used = Execution.objects.open().filter(sandbox__isnull=False).values("sandbox")
    for sandbox in (
        held.here().filter(kept=False, state=SandboxState.LEASED, last_used_at__lt=before).exclude(pk__in=used)
    ):
        if sandbox.ready_at is None or sandbox.ready_at < before:
            yield Wrong("sandbox", sandbox.pk, "an execution or an end", "leased by nobody")


def chain() -> Iterator[Wrong]:
    found = audit.verify()
    if found.problem:
        yield Wrong("audit event", str(found.broken_at or "triggers"), "a whole chain", found.problem.rstrip("."))


def artifacts() -> Iterator[Wrong]:
    kept = Artifact.objects.filter(expires_at__gt=timezone.now()).order_by("pk")
    for pk, sha256, size in kept.values_list("pk", "sha256", "size_bytes").iterator(chunk_size=1000):
        try:
            found = store.place(sha256).stat().st_size
        except FileNotFoundError:
            found = -1
        if found != size and Artifact.objects.filter(pk=pk).exists():  # it may have been let go of meanwhile
            yield Wrong("artifact", pk, f"{size:,} bytes", f"{found:,} bytes" if found >= 0 else "no content")


def _contradictions(model: str, statement: str, expected: str, values: list[Any] | None = None) -> Iterator[Wrong]:
    """The statement gives id, what is expected, and what was found."""
    with connection.cursor() as cursor:
        cursor.execute(f"{statement} ORDER BY 1 LIMIT {MOST}", values or [])
        for pk, should, found in cursor.fetchall():
            yield Wrong(model, str(pk), expected.format(should), str(found))


OF_ROWS: tuple[tuple[str, str, Callable[[], Iterator[Wrong]]], ...] = (
    ("reservations", "Every budget has set aside what open sandboxes and unsettled claims hold.", reservations),
    ("books", "Every sandbox holds by the ledger what its row says, against each budget.", books),
    ("used", "Every quota has used what the ledger, the usage and the rows say.", used),
    ("spent", "Every sandbox and execution has cost what its usage sums to.", spent),
    ("totals", "The totals of the cost reports sum to the usage that they count.", totals),
    ("transitions", "Every history is one road of legal steps to the row's state.", transitions),
    ("once", "Nothing ran twice, and no sandbox served strangers.", never_twice),
    ("attempts", "Every attempt of what has ended has an outcome.", attempts),
    ("owned", f"Whatever is open has shown signs of life, or is not {OVERDUE_SECONDS} s over its time.", owned),
    ("audit", "The audit's chain is whole, and the database refuses to change it.", chain),
)
