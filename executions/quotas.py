"""Ceilings: one conditional UPDATE per level, all or nothing within the transaction of the verb that asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from django.conf import settings
from django.db.models import Q, QuerySet, Sum
from django.utils import timezone

from executions.costs import usd
from executions.errors import BudgetExhausted, QuotaExceeded, Refused
from executions.keys import Caller
from executions.models import Artifact, Execution, LedgerEntry, Quota, Sandbox, hot
from executions.states import ExecutionState, Unit, WhenExhausted, Window

R = TypeVar("R", bound=Refused)
CONCURRENT: dict[str, str] = {Unit.CONCURRENT_EXECUTIONS: "execution", Unit.CONCURRENT_SANDBOXES: "sandbox"}
LATER_SECONDS = 1  # by then one that runs may have ended
SPANS = {
    Window.SECOND: timedelta(seconds=1),
    Window.MINUTE: timedelta(minutes=1),
    Window.HOUR: timedelta(hours=1),
}
FOLLOWED = (  # by the rows of each one: what may be changed of a quota
    "limit", "soft_percent", "when_exhausted", "max_wait_seconds", "raised_by", "raised_until", "raised_why",
)  # fmt: skip

_of = hot.Compiled(
    lambda team, agent, key, user, workflow, backend: (
        Quota.objects.select_related("team", "agent", "key")
        .filter(Q(team=None, agent=None, key=None) | Q(team=team, agent=None, key=None) | Q(agent=agent) | Q(key=key))
        .filter(user__in=["", user], workflow__in=["", workflow], backend__in=["", backend])
        .order_by("id")
    )
)


def of(caller: Caller, backend: str = "") -> list[Quota]:
    """The quotas that govern this caller there, in the fixed order in which they are taken.

    Those of each agent or end user are there as the row of this one, where it has been needed before.
    """
    agent, key = caller.agent, caller.key
    ids = caller.team.pk, agent.pk if agent else "", key.pk if key else ""
    found = _of(*ids, caller.user, caller.workflow, backend)
    own = {quota.parent_id for quota in found}
    return [quota for quota in found if not quota.each or (quota.pk not in own and _whom(quota, caller))]


def visible_to(caller: Caller) -> list[Quota]:
    """Those, and the ones that only govern some end user, workflow or backend of theirs; of end users' own rows the caller's."""
    own = Q(team=None, agent=None, key=None) | Q(team=caller.team, agent=None, key=None)
    own |= Q(agent=caller.agent) if caller.agent else Q()
    own |= Q(key=caller.key) if caller.key else Q()
    of_others = Q(parent__each=Quota.USER) & ~Q(user=caller.user)
    found = Quota.objects.select_related("team", "agent", "key").filter(own).exclude(of_others)
    return list(found.order_by("id"))


def _whom(each: Quota, caller: Caller) -> str:
    """Which one of each the caller is; empty where it is none: a request that names no end user."""
    if each.each == Quota.AGENT:
        return caller.agent.pk if caller.agent else ""
    return f"{caller.team.pk}:{caller.user}" if caller.user else ""


def _told_apart(found: list[Quota], caller: Caller) -> list[Quota]:
    """The caller's own row in the place of a quota of each: made when it is first needed, and changed as that one was."""
    if not any(quota.each or quota.parent_id for quota in found):
        return found
    parents = {quota.pk: quota for quota in Quota.objects.filter(pk__in=[quota.parent_id for quota in found])}
    held([quota.pk for quota in found if quota.each])  # whoever makes the same row waits here, and holds no other
    own = sorted((_made_for(quota, caller) if quota.each else quota for quota in found), key=lambda quota: quota.pk)
    changed = {
        quota.pk: {name: value for name in FOLLOWED if (value := getattr(parent, name)) != getattr(quota, name)}
        for quota in own
        if (parent := parents.get(quota.parent_id or 0))
    }
    if any(changed.values()):
        held([quota.pk for quota in own])
    for quota in own:
        if fields := changed.get(quota.pk):
            Quota.objects.filter(pk=quota.pk).update(**fields)
            quota.refresh_from_db(fields=list(fields))
    return own


def held(ids: Iterable[int] | QuerySet) -> None:
    """Hold these rows to the end of the transaction: first the quotas of each, then the others, by their ids.

    Everybody takes them in this order, so that two never wait for each other.
    """
    for each in (~Q(each=""), Q(each="")):
        list(Quota.objects.select_for_update().filter(each, pk__in=ids).order_by("pk").values_list("pk"))


def _made_for(each: Quota, caller: Caller) -> Quota:
    row = Quota(
        parent=each, of_whom=_whom(each, caller), unit=each.unit, window=each.window, workflow=each.workflow,
        backend=each.backend, **{name: getattr(each, name) for name in FOLLOWED},
    )  # fmt: skip
    if each.each == Quota.AGENT:
        row.agent, row.user = caller.agent, each.user
    else:
        row.user, row.agent, row.key = caller.user, each.agent, each.key
        row.team = each.team if each.team or each.agent or each.key else caller.team
    Quota.objects.bulk_create([row], ignore_conflicts=True)  # somebody else may be making it
    return Quota.objects.select_related("team", "agent", "key").get(parent=each, of_whom=row.of_whom)


def zone_of(quota: Quota, team_zone: str) -> str:
    """Where its days begin: at its team, or, for one that holds for all teams, at the installation."""
    return settings.TIME_ZONE if quota.is_global else team_zone


def window_start(window: str, zone: str, now: datetime) -> datetime | None:
    """When the current window began, in the team's time zone; None for a total."""
    local = now.astimezone(ZoneInfo(zone))
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)  # the first where it comes twice
    match window:
        case Window.DAY:
            return midnight
        case Window.MONTH:
            return midnight.replace(day=1)
        case Window.TOTAL:
            return None
    since = timedelta(microseconds=local.microsecond)
    since += timedelta(seconds=local.second) if window != Window.SECOND else timedelta()
    since += timedelta(minutes=local.minute) if window == Window.HOUR else timedelta()
    return (now.astimezone(UTC) - since).astimezone(local.tzinfo)  # an hour is one also where the clock is changed


def window_end(window: str, zone: str, now: datetime) -> datetime | None:
    """When the current window ends; None for a total."""
    start = window_start(window, zone, now)
    if start is None:
        return None
    if span := SPANS.get(Window(window)):
        return (start.astimezone(UTC) + span).astimezone(start.tzinfo)
    if window == Window.DAY:  # by the calendar: a day may have 23 or 25 hours
        return (start.replace(tzinfo=None) + timedelta(days=1)).replace(tzinfo=start.tzinfo)
    return start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)


@dataclass(frozen=True, slots=True)
class Ask:
    """What an admission needs: `seconds` are those for which a sandbox may live from now on.

    `is_open`: the sandbox changes hands, so that ceilings for everybody have counted it already.
    """

    executions: int = 0
    sandboxes: int = 0
    seconds: int = 0
    nano_usd: int = 0
    bytes_stored: int = 0
    is_open: bool = False

    def of(self, quota: Quota) -> int:
        """How much of it in the quota's unit; 0: it does not concern this one."""
        counted = self.is_open and quota.is_global
        match quota.unit:
            case Unit.EXECUTIONS | Unit.CONCURRENT_EXECUTIONS:
                return self.executions
            case Unit.CONCURRENT_SANDBOXES:
                return 0 if counted else self.sandboxes
            case Unit.CREATIONS:
                return 0 if self.is_open else self.sandboxes
            case Unit.COMPUTE_US:
                return 0 if counted else self.seconds * 1_000_000
            case Unit.BYTES_STORED:
                return self.bytes_stored
        return self.nano_usd


@dataclass(frozen=True, slots=True)
class Standing:
    """What a quota has left at a moment, and what is asked of it."""

    quota: Quota
    limit: int
    used: int
    reserved: int
    resets_at: datetime | None
    needed: int = 0

    @property
    def remaining(self) -> int:
        return max(0, self.limit - self.used - self.reserved)

    @property
    def suffices(self) -> bool:
        return self.needed <= self.remaining


def standing(quota: Quota, zone: str, ask: Ask | None = None) -> Standing:
    """As it is now; nothing is written, though its window may be over."""
    now, zone = timezone.now(), zone_of(quota, zone)
    start = window_start(quota.window, zone, now)
    used = 0 if quota.each else in_use(quota)  # the row of one who has asked for nothing yet
    if start is not None and quota.window_started_at < start:  # nobody has asked in this window yet
        used = spent_since(quota, start) if quota.unit == Unit.NANO_USD else 0
    ends, needed = window_end(quota.window, zone, now), ask.of(quota) if ask else 0
    return Standing(quota, ceiling(quota, now), used, 0 if quota.each else reserved(quota), ends, needed)


_noted: ContextVar[list[Standing] | None] = ContextVar("noted", default=None)


@contextmanager
def noted() -> Iterator[list[Standing]]:
    """Collect what `take` leaves of each quota within this block, on whichever thread it is called."""
    notes: list[Standing] = []
    mine = _noted.set(notes)
    try:
        yield notes
    finally:
        _noted.reset(mine)


def _note(quota: Quota, limit: int, used: int, reserved: int, ends: datetime | None) -> None:
    if (notes := _noted.get()) is not None:
        notes.append(Standing(quota, limit, used, reserved, ends))


def take(
    caller: Caller,
    *,
    executions: int = 0,
    sandboxes: int = 0,
    seconds: int = 0,
    nano_usd: int = 0,
    bytes_stored: int = 0,
    backend: str = "",
    fits: Callable[[int], str] | None = None,
    is_open: bool = False,
) -> list[int]:
    """Take from every quota of the caller, or from none. Returns the ids of the budgets that now hold `nano_usd`.

    The amounts are those of `Ask`. Raises QuotaExceeded or BudgetExhausted with what was needed, what is left and when it
    resets; the transaction around it undoes what was taken before. `fits` says what so many nano-dollars would pay for.
    """
    ask = Ask(executions, sandboxes, seconds, nano_usd, bytes_stored, is_open)
    now = timezone.now()
    found = _told_apart(of(caller, backend), caller)
    if caller.max_nano_usd is not None and nano_usd > caller.max_nano_usd:
        raise too_dear(caller.max_nano_usd, nano_usd, _fits(found, caller, now, fits))
    budgets: list[int] = []
    for quota in found:
        zone = zone_of(quota, caller.team.time_zone)
        _begin_window(quota, zone, now)
        if not (needed := ask.of(quota)):
            continue
        if caller.turned_away is None:
            if executions and quota.when_exhausted == WhenExhausted.WAIT:
                _leave_to_others(quota, needed, now)
        elif needed == 1 and quota.pk in caller.turned_away:  # what has come free meanwhile is not for those behind
            raise caller.turned_away[quota.pk]
        used, aside = quota.used + needed, quota.reserved
        match quota.unit:
            case Unit.CONCURRENT_EXECUTIONS | Unit.CONCURRENT_SANDBOXES | Unit.BYTES_STORED:
                used = _take_open(quota, needed, now) + needed
            case Unit.COMPUTE_US:
                _take_time(quota, needed, zone, now)
            case Unit.EXECUTIONS | Unit.CREATIONS:
                _take_counted(quota, needed, zone, now)
            case Unit.NANO_USD:
                if not hot.take(quota.pk, "reserved", needed, now):
                    raise _by(quota, _exhausted(quota, needed, zone, now, _fits(found, caller, now, fits)))
                budgets.append(quota.pk)
                used, aside = quota.used, quota.reserved + needed
        if _noted.get() is not None:
            _note(quota, ceiling(quota, now), used, aside, window_end(quota.window, zone, now))
    return budgets


def _begin_window(quota: Quota, zone: str, now: datetime) -> None:
    """Count anew where the window is over; of money what was spent in the new one already stays."""
    start = window_start(quota.window, zone, now)
    if start is None or quota.window_started_at >= start:
        return
    used = 0
    if quota.unit == Unit.NANO_USD:
        list(Quota.objects.select_for_update().filter(pk=quota.pk))  # who is billing has written it, or waits
        used = spent_since(quota, start)
    Quota.objects.filter(pk=quota.pk, window_started_at__lt=start).update(used=used, window_started_at=start)
    quota.refresh_from_db(fields=["used", "window_started_at"])


def spent_since(quota: Quota, start: datetime) -> int:
    """Nano-dollars by the ledger: what the budget's new window has used already when nobody has asked in it yet."""
    spent = LedgerEntry.objects.filter(quota=quota, kind=LedgerEntry.SPEND, at__gte=start)
    return spent.aggregate(total=Sum("amount_nano_usd"))["total"] or 0


def settle(budgets: list[int], *, release: int = 0, spend: int = 0) -> None:
    """Give back what was set aside and book what was spent, on the budgets that `take` named."""
    for quota_id in sorted(budgets):  # in the order in which they are taken, so that two never wait for each other
        hot.settle(quota_id, release, spend)


def book(sandbox: Sandbox, *, release: int, spend: int, used_us: int) -> None:
    """The same on the budgets of a sandbox, with a stretch of its life on the quotas of compute time that govern it."""
    hot.book(
        sandbox.reserved_on,
        release,
        spend,
        team=sandbox.team_id,
        agent=sandbox.agent_id,
        key=sandbox.key_id or "",
        backend=sandbox.backend,
        used_us=used_us,
    )


def ceiling(quota: Quota, now: datetime | None = None) -> int:
    """The limit, with what it is raised by for now."""
    raised = quota.raised_until is not None and quota.raised_until > (now or timezone.now())
    return quota.limit + (quota.raised_by if raised else 0)


def in_use(quota: Quota, *, lock: bool = False) -> int:
    """What counts against a quota now: open rows for the concurrent units, kept files for bytes, else the counter.

    With `lock`, nobody else can be admitted against it until the transaction ends.
    """
    if quota.unit == Unit.BYTES_STORED:
        if lock:
            Quota.objects.select_for_update().get(pk=quota.pk)
        scope = {name if name == "team_id" else f"sandbox__{name}": value for name, value in _scope(quota).items()}
        kept = Artifact.objects.filter(expires_at__gt=timezone.now(), **scope)
        return kept.aggregate(total=Sum("size_bytes"))["total"] or 0
    table = CONCURRENT.get(quota.unit)
    if table is None:
        return quota.used
    return hot.count_open(table, _scope(quota), locked=quota.pk if lock else None)


def reserved(quota: Quota) -> int:
    """What is set aside: money as booked; of compute time what the living may still use."""
    if quota.unit == Unit.COMPUTE_US:
        return _left_of_the_living(quota, timezone.now())
    return quota.reserved


def _scope(quota: Quota) -> dict[str, str]:
    """The columns by which rows count against it, and their values."""
    owner = next((s for s in ("key", "agent", "team") if getattr(quota, f"{s}_id")), None)
    found = {f"{owner}_id": getattr(quota, f"{owner}_id")} if owner else {}
    return found | {name: getattr(quota, name) for name in ("user", "workflow", "backend") if getattr(quota, name)}


def _leave_to_others(quota: Quota, needed: int, now: datetime) -> None:
    """Whoever comes later leaves what there is room for to those who wait. Raises QuotaExceeded where nothing is left then."""
    scope = {name: value for name, value in _scope(quota).items() if name != "backend"}  # they have none yet
    waiting = Execution.objects.open().filter(heartbeat_at__isnull=True, state=ExecutionState.QUEUED, **scope).count()
    if not waiting:
        return
    limit, used, aside = ceiling(quota, now), in_use(quota), reserved(quota)
    if used + aside + needed * (waiting + 1) <= limit:
        return
    refusal = QuotaExceeded(
        f"{waiting:,} wait{'s' if waiting == 1 else ''} already for {quota.scope_name}, {quota.get_unit_display().lower()}{_per(quota)}.",
        unit=quota.unit, limit=limit, used=used, reserved=aside, needed=needed,
        remaining=max(0, limit - used - aside), retry_after=LATER_SECONDS,
    )  # fmt: skip
    raise _by(quota, refusal)


def _take_open(quota: Quota, asked: int, now: datetime) -> int:
    """What was in use before."""
    used, limit = in_use(quota, lock=True), ceiling(quota, now)
    if used + asked <= limit:
        return used
    refusal = QuotaExceeded(
        f"{quota.scope_name} is at {used:,} of {limit:,} {quota.get_unit_display().lower()}.",
        unit=quota.unit,
        limit=limit,
        used=used,
        needed=asked,
        remaining=max(0, limit - used),
        retry_after=LATER_SECONDS,
    )
    raise _by(quota, refusal)


def _take_counted(quota: Quota, asked: int, zone: str, now: datetime) -> None:
    if hot.take(quota.pk, "used", asked, now):
        return
    facts = _facts(quota, asked, zone, now)
    said = f"{facts['used']:,} of {facts['limit']:,} {quota.get_unit_display().lower()}"
    raise _by(quota, QuotaExceeded(f"{quota.scope_name} has used {said}{_per(quota)}{_resets(facts)}.", **facts))


def _take_time(quota: Quota, asked_us: int, zone: str, now: datetime) -> None:
    """What the living may still use counts as used."""
    used = Quota.objects.select_for_update().values_list("used", flat=True).get(pk=quota.pk)
    living, limit = _left_of_the_living(quota, now), ceiling(quota, now)
    if used + living + asked_us <= limit:
        return
    left = max(0, limit - used - living)
    facts = _facts(quota, asked_us, zone, now) | {"reserved": living, "remaining": left}
    said = f"{left / 1e6:,.0f} s of {limit / 1e6:,.0f} s of compute time{_per(quota)} left{_resets(facts)}"
    raise _by(quota, QuotaExceeded(f"This could take {asked_us / 1e6:,.0f} s; {quota.scope_name} has {said}.", **facts))


def _left_of_the_living(quota: Quota, now: datetime) -> int:
    """Microseconds that the open sandboxes may still use, from where their time was last booked."""
    found = Sandbox.objects.open().filter(**_scope(quota)).values_list("leased_until", "metered_until", "created_at")
    left = (max(until, now) - (metered or created) for until, metered, created in found)
    return sum(max(0, int(stretch.total_seconds() * 1_000_000)) for stretch in left)


def _by(quota: Quota, refusal: R) -> R:
    """The refusal, with what the quota says of such requests."""
    facts, refusal.quota_id = refusal.facts, quota.pk
    ends = facts.get("resets_at")
    ends = datetime.fromisoformat(ends) if ends else None
    _note(quota, facts["limit"], facts["limit"] - facts["remaining"], 0, ends)
    if quota.when_exhausted == WhenExhausted.WAIT:
        refusal.waits_seconds = quota.max_wait_seconds
    refusal.goes_local = quota.when_exhausted == WhenExhausted.LOCAL
    return refusal


def _facts(quota: Quota, needed: int, zone: str, now: datetime) -> dict[str, Any]:
    quota.refresh_from_db()
    ends, limit = window_end(quota.window, zone, now), ceiling(quota, now)
    return {
        "unit": quota.unit,
        "limit": limit,
        "used": quota.used,
        "reserved": quota.reserved,
        "needed": needed,
        "remaining": max(0, limit - quota.used - quota.reserved),
        "resets_at": ends.isoformat() if ends else None,
        "retry_after": max(1, int((ends - now).total_seconds())) if ends else None,
    }


def _resets(facts: dict) -> str:
    return f", resets {facts['resets_at']}" if facts["resets_at"] else ""


def _per(quota: Quota) -> str:
    return "" if quota.window == Window.TOTAL else f" per {quota.window}"


def _fits(found: list[Quota], caller: Caller, now: datetime, fits: Callable[[int], str] | None) -> str:
    """What the tightest of the budgets would pay for, in a sentence."""
    left = [ceiling(quota, now) - quota.used - quota.reserved for quota in found if quota.unit == Unit.NANO_USD]
    left += [caller.max_nano_usd] if caller.max_nano_usd is not None else []
    return fits(max(0, min(left))) if fits and left else ""


def _exhausted(quota: Quota, needed: int, zone: str, now: datetime, fits: str) -> BudgetExhausted:
    facts = _facts(quota, needed, zone, now)
    left = f"{usd(facts['remaining'])} of {usd(facts['limit'])}{_per(quota)} left{_resets(facts)}"
    return BudgetExhausted(
        f"This could cost {usd(needed)}; {quota.scope_name} has {left}.",
        remedy=f"{fits} {BudgetExhausted.remedy}".strip(),
        **facts,
    )


def too_dear(most: int, needed: int, fits: str = "") -> BudgetExhausted:
    """The refusal of what could cost more than its own `max_cost_usd`."""
    return BudgetExhausted(
        f"This could cost {usd(needed)}, and max_cost_usd is {usd(most)}.",
        remedy=f"{fits} Ask for less time, or for a higher max_cost_usd.".strip(),
        unit=Unit.NANO_USD, limit=most, needed=needed, remaining=most,
    )  # fmt: skip
