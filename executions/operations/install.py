"""Packages: decided by the policy, resolved and fetched outside the sandbox, into one session or into an agent's lock."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from django.db import transaction
from django.db.models import Q
from packaging.requirements import Requirement

from executions import audit, packages
from executions.errors import Conflict, Forbidden, InstallFailed, NotFound, PackageDenied
from executions.hop import rows
from executions.keys import Caller
from executions.models import Agent, Execution, Package, PackageLock, Sandbox, Template
from executions.operations import approvals, bases, pausing
from executions.operations.bases import Base
from executions.operations.placing import once, put
from executions.operations.sessions import gone_is_recorded
from executions.operations.submit import claim_session, find_session, find_template, record_refusal
from executions.packages import index
from executions.packages.advisories import Known
from executions.packages.decide import Item
from executions.packages.progress import Progress
from executions.states import Answer, Scope, Verdict

ONES = 5  # tries to be the one who changes an agent's lock


@dataclass(slots=True)
class Installed:
    """What can be imported now, and how the set has changed: names to versions."""

    packages: list[Package]
    lock_hash: str = ""
    added: dict[str, str] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)  # name: before, after


async def install(
    *, caller: Caller, session_id: str, requirements: list[str], progress: Progress | None = None
) -> Installed:
    """Make packages importable in a live session, without a restart; `progress` says meanwhile how far that is.

    Raises PackageDenied, ApprovalPending, InstallFailed, SessionGone.
    """
    asked = packages.requirements_of(requirements)
    who, there = await rows(_claimed, caller, session_id, asked)
    who = replace(who, progress=progress or who.progress)
    assert who.sandbox is not None
    await pausing.awake(who.sandbox)
    with gone_is_recorded(who.sandbox):
        return await _put_into(who, who.sandbox, asked, there)


def _claimed(caller: Caller, session_id: str, asked: list[Requirement]) -> tuple[Who, dict[str, str]]:
    caller.needs(Scope.RUN)
    if (found := find_session(caller, session_id)).ended_at is None:
        found.must_be_here()  # before anything of it is changed
    sandbox = claim_session(caller, session_id)
    who = Who(caller, sandbox.agent, sandbox)
    return who, _looked_at(who, asked)


async def install_into(
    caller: Caller, sandbox: Sandbox, asked: list[Requirement], execution: Execution | None = None
) -> Installed:
    """The same for a sandbox that is at hand; `execution` is the run whose code asks."""
    who = Who(caller, sandbox.agent, sandbox, execution)
    return await _put_into(who, sandbox, asked, await rows(_looked_at, who, asked))


async def _put_into(who: Who, sandbox: Sandbox, asked: list[Requirement], there: dict[str, str]) -> Installed:
    base = await bases.of_sandbox(sandbox)
    present = {**base.present, **there}
    items = await _decided(who, asked, Base(base.python, base.machine, present))
    if items:
        who.progress.begin(f"putting {len(items)} packages into the session")
        await put(sandbox, [item.sha256 for item in items])
    return await rows(_record, who, asked, items, present)


async def install_for_agent(
    *, caller: Caller, agent: str | None = None, requirements: list[str], progress: Progress | None = None
) -> Installed:
    """Make packages importable in all the agent's future sandboxes. Raises PackageDenied, ApprovalPending, InstallFailed."""
    asked = packages.requirements_of(requirements)
    caller, template = await rows(_acting, caller, agent)
    assert caller.agent is not None
    for_whom = Who(caller, caller.agent, progress=progress or Progress())
    await rows(_denied_at_once, for_whom, asked)
    if caller.key is not None and caller.key.backend:
        raise caller.denied(Forbidden("A test key changes no agent's packages; name a session."))
    base = await asyncio.to_thread(bases.of_template, template)
    for _ in range(ONES):
        before = await rows(_lock_of, caller.agent)
        items = await _locked(for_whom, asked, base, before)
        if (done := await rows(_relock, for_whom, asked, before, base, items)) is not None:
            return done
    raise Conflict("The agent's packages are being changed by others; nothing has been installed.", retry_after=1)


def _acting(caller: Caller, agent: str | None) -> tuple[Caller, Template]:
    caller.needs(Scope.RUN)
    caller = _as(caller, agent)
    assert caller.agent is not None
    return caller, find_template(caller.agent, None)


@dataclass(frozen=True, slots=True)
class Who:
    """For whom, where to (no sandbox: the agent's lock), the run that asks, and how far it is."""

    caller: Caller
    agent: Agent
    sandbox: Sandbox | None = None
    execution: Execution | None = None
    progress: Progress = field(default_factory=Progress)


# The decision


def _denied_at_once(who: Who, asked: list[Requirement]) -> None:
    """What is denied by its name alone is refused before anything is looked up or started."""
    for requirement in asked:
        with _refusals_kept(who, requirement.name):
            packages.outlook(who.agent, requirement.name)


class _refusals_kept:
    """A denial leaves a row of the package, and one of the refusal."""

    def __init__(self, who: Who, name: str = "", version: str = "") -> None:
        self.who, self.name, self.version = who, name, version

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, PackageDenied):
            with transaction.atomic(durable=True):
                facts = {"version": self.version, "verdict": Verdict.DENIED, "reason": error.detail[:300]}
                _row(self.who, self.name or error.facts.get("package", ""), **facts).save()
                record_refusal(self.who.caller, error)


def _row(who: Who, name: str, **fields: Any) -> Package:
    caller = who.caller
    return Package(
        team=caller.team, agent=who.agent, sandbox=who.sandbox, execution=who.execution, key=caller.key,
        actor=caller.person, name=name, **fields,
    )  # fmt: skip


async def _decided(who: Who, asked: list[Requirement], base: Base, hold: dict[str, str] | None = None) -> list[Item]:
    """What has to be added to the base, decided and in the store. Raises PackageDenied, ApprovalPending, InstallFailed."""
    words = [str(requirement) for requirement in asked]
    who.progress.begin(f"resolving {', '.join(words)}")
    look = partial(
        index.resolved, words, python=base.python, machine=base.machine, present=base.present, hold=hold or {}
    )
    told = await once(index.digest_of("resolve", words, base.python, base.present, hold), lambda: _facts(look()))
    items = [index.item_of(facts) for facts in told]
    names = {requirement.name for requirement in asked}
    for item in items:
        item.requested = item.name in names
    if not all(index.is_known(item) for item in items):  # nothing that is denied is fetched
        await rows(_judged, who, words, items, False)
    who.progress.begin("fetched", items)
    found = await asyncio.gather(*(once(item.sha256, partial(index.have, item)) for item in items))
    index.told(items, {item.sha256: facts for item, facts in zip(items, found, strict=True)})
    await rows(_judged, who, words, items, True)
    return items


def _facts(items: list[Item]) -> list[dict[str, Any]]:
    return [item.facts() for item in items]


def _judged(who: Who, asked: list[str], items: list[Item], whole: bool) -> None:
    """Ask the policy about each; with `whole` all is known, licences too, and what needs a person's word waits for it."""
    rules, known = packages.rules_of(who.agent), Known(item.name for item in items)
    for item in items:
        item.advisories, item.advised_at = known.of(item.name, item.version), known.told_at
        decision = packages.decide(who.agent, rules, item, read=whole)
        item.answer, item.reason = decision.answer, decision.reason
    for item in items:
        if item.answer == Answer.DENY:
            with _refusals_kept(who, item.name, item.version):
                raise PackageDenied(item.reason, package=item.name)
    if whole:
        with _refusals_kept(who):
            approvals.ask(who.caller, who.agent, who.sandbox, who.execution, asked, items)


# Into a session


def _looked_at(who: Who, asked: list[Requirement]) -> dict[str, str]:
    """What this sandbox was given beside its template's packages. Raises PackageDenied for a name that may not be had."""
    _denied_at_once(who, asked)
    sandbox = who.sandbox
    assert sandbox is not None
    found = dict(sandbox.lock.versions) if sandbox.lock else {}
    mine = Package.objects.filter(sandbox=sandbox, verdict=Verdict.ALLOWED).exclude(sha256="").order_by("pk")
    return found | dict(mine.values_list("name", "version"))


@transaction.atomic(durable=True)
def _record(who: Who, asked: list[Requirement], items: list[Item], present: dict[str, str]) -> Installed:
    new = [_row(who, item.name, **_columns(item)) for item in items]
    there = {item.name for item in items}
    old = [
        _row(who, r.name, version=present.get(r.name, ""), verdict=Verdict.ALLOWED, reason="was there already")
        for r in asked
        if r.name not in there
    ]
    found = Package.objects.bulk_create([*new, *old])
    return Installed(found, added={item.name: item.version for item in items})


def _columns(item: Item) -> dict[str, Any]:
    return {
        "version": item.version, "sha256": item.sha256, "size_bytes": item.size_bytes, "verdict": Verdict.ALLOWED,
        "reason": item.reason[:300], "requested": item.requested, "licence": item.licence, "advisories": item.advisories,
    }  # fmt: skip


# Into an agent's lock


def lock_of(caller: Caller, agent: str | None) -> PackageLock | None:
    """The lock of this agent of the caller's. Raises NotFound."""
    caller.needs(Scope.READ)
    acting = _as(caller, agent).agent
    assert acting is not None
    return _lock_of(acting)


def _as(caller: Caller, agent: str | None) -> Caller:
    """The caller for this agent of their team; another team's is not found."""
    mine = Agent.objects.filter(team=caller.team)
    if agent and not mine.filter(Q(pk=agent) | Q(name=agent)).exists():
        raise NotFound(f"There is no agent {agent!r} in this team.", field="agent")
    return caller.acting_as(agent)


def _lock_of(agent: Agent) -> PackageLock | None:
    return PackageLock.objects.filter(pk=Agent.objects.values_list("lock", flat=True).get(pk=agent.pk)).first()


async def _locked(who: Who, asked: list[Requirement], base: Base, before: PackageLock | None) -> list[Item]:
    """The whole set: what was asked for now and before; what is pinned stays as it is where that is possible."""
    names = {requirement.name for requirement in asked}
    earlier = [r for r in packages.requirements_of(before.asked) if r.name not in names] if before else []
    hold = {name: v for name, v in before.versions.items() if name not in names} if before else {}
    try:
        return await _decided(who, [*earlier, *asked], base, hold)
    except InstallFailed:
        if not hold:
            raise
        return await _decided(who, [*earlier, *asked], base)


@transaction.atomic(durable=True)
def _relock(
    who: Who, asked: list[Requirement], before: PackageLock | None, base: Base, items: list[Item]
) -> Installed | None:
    """The agent's next lock, with who changed what in the audit; None where somebody else has changed it meanwhile."""
    agent = Agent.objects.select_for_update(of=("self",)).get(pk=who.agent.pk)
    if agent.lock_id != (before.pk if before else None):
        return None
    names = {requirement.name for requirement in asked}
    words = sorted(
        {*(str(r) for r in asked), *(w for w in (before.asked if before else []) if packages.name_of(w) not in names)}
    )
    pins = [
        {name: facts[name] for name in ("name", "version", "wheel", "sha256", "url", "size_bytes")}
        for facts in _facts(items)
    ]
    digest = index.digest_of(base.python, sorted((p["name"], p["version"], p["sha256"]) for p in pins))
    lock, fresh = PackageLock.objects.get_or_create(
        agent=agent,
        digest=digest,
        defaults={
            "python": base.python,
            "asked": words,
            "pins": pins,
            "key": who.caller.key,
            "actor": who.caller.person,
        },
    )
    if fresh:
        Package.objects.bulk_create([_row(who, item.name, lock=lock, **_columns(item)) for item in items])
    done = Installed(
        [_row(who, item.name, lock=lock, **_columns(item)) for item in items if item.name in names], lock.digest
    )
    done.packages += [
        _row(
            who,
            r.name,
            version=base.present.get(r.name, ""),
            verdict=Verdict.ALLOWED,
            reason="is in the template already",
        )
        for r in asked
        if r.name not in lock.versions
    ]
    _difference(done, before.versions if before else {}, lock.versions)
    if lock.pk != agent.lock_id:
        Agent.objects.filter(pk=agent.pk).update(lock=lock)
        audit.record(
            "agent_changed", caller=who.caller, subject=agent.pk, before={"lock_id": agent.lock_id},
            after={"lock_id": lock.pk}, reason=f"packages: {summary(done)}",
        )  # fmt: skip
    return done


def _difference(done: Installed, before: dict[str, str], after: dict[str, str]) -> None:
    done.added = {name: v for name, v in after.items() if name not in before}
    done.removed = {name: v for name, v in before.items() if name not in after}
    done.changed = {name: [before[name], v] for name, v in after.items() if before.get(name, v) != v}


def summary(done: Installed) -> str:
    """The difference as one line."""
    said = [f"+{name} {v}" for name, v in done.added.items()] + [f"-{name} {v}" for name, v in done.removed.items()]
    return ", ".join(said + [f"{name} {a} to {b}" for name, (a, b) in done.changed.items()]) or "nothing new"


__all__ = ["Installed", "install", "install_for_agent", "install_into", "lock_of", "summary"]
