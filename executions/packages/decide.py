"""The decision: allow, ask or deny, and the one sentence that says why; the strictest rule that applies wins."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from django.db.models import Q
from django.utils import timezone

from executions import requirements
from executions.errors import PackageDenied
from executions.models import Agent, PackagePolicy
from executions.packages.names import imitated
from executions.states import Answer

STRICTNESS = (Answer.ALLOW, Answer.ASK, Answer.DENY)


@dataclass(slots=True)
class Item:
    """One package of a resolved set and what is known about it; None and "" are unknown."""

    name: str
    version: str = ""  # not resolved yet
    requested: bool = True
    needed_by: list[str] = field(default_factory=list)
    wheel: str = ""
    sha256: str = ""
    url: str = ""
    size_bytes: int | None = None
    published_at: datetime | None = None
    private: bool = False  # it comes from the private index
    licence: str = ""
    advisories: list[str] | None = None
    advised_at: datetime | None = None  # how old that knowledge is
    answer: str = Answer.ALLOW
    reason: str = ""

    @property
    def named(self) -> str:
        return f"{self.name} {self.version}".strip()

    def facts(self) -> dict[str, Any]:
        """As JSON keeps it."""
        told = asdict(self)
        return told | {n: told[n] and told[n].isoformat() for n in ("published_at", "advised_at")}


@dataclass(frozen=True, slots=True)
class Decision:
    answer: str
    reason: str


def rules_of(agent: Agent) -> list[PackagePolicy]:
    """The team's policy and the agent's own; where neither is written, what a new one would say."""
    of_both = Q(agent=agent) | Q(team=agent.team_id, agent=None)
    found = list(PackagePolicy.objects.filter(of_both).select_related("team", "agent").order_by("agent"))
    return found or [PackagePolicy(team=agent.team)]


def outlook(agent: Agent, name: str) -> Decision:
    """What can be said by the name alone. Raises PackageDenied where no version is allowed: nothing has been looked up yet."""
    decision = decide(agent, rules_of(agent), Item(name))
    if decision.answer == Answer.DENY:
        raise PackageDenied(decision.reason, package=name)
    return decision


def decide(agent: Agent, rules: list[PackagePolicy], item: Item, *, read: bool = True) -> Decision:
    """What becomes of one package, before its wheel was `read` or after. An empty allow list means none."""
    worst = Decision(Answer.ALLOW, _granted(agent, item))
    for answer, reason in _findings(agent, rules, item, read):
        if STRICTNESS.index(Answer(answer)) > STRICTNESS.index(Answer(worst.answer)):
            worst = Decision(answer, reason)
    return worst


def _granted(agent: Agent, item: Item) -> str:
    if not item.requested:
        return f"needed by {' and '.join(item.needed_by[:3]) or 'a package that was asked for'}"
    by_name = any(text != "*" and requirements.names(text, item.name, None) for text in agent.packages)
    return (
        f"{item.name} is on the list of agent {agent.name}"
        if by_name
        else f"agent {agent.name} may install any package"
    )


def _findings(agent: Agent, rules: list[PackagePolicy], item: Item, read: bool) -> Iterator[tuple[str, str]]:
    version = item.version or None
    if item.requested and not _in(agent.packages, item):
        listed = ", ".join(sorted(map(str, agent.packages))) or "none"
        yield Answer.DENY, f"Agent {agent.name} may not install {item.named}; allowed are: {listed}."
    for rule in rules:
        whose = f"agent {rule.agent.name}" if rule.agent else f"team {rule.team.name}"
        for text in rule.deny:
            if requirements.names(text, item.name, version) and (version or not _narrow(text)):
                yield Answer.DENY, f"The policy of {whose} denies {text}."
        if item.requested and not _in(rule.allow, item):
            listed = ", ".join(rule.allow) or "none"
            yield Answer.DENY, f"The policy of {whose} does not allow {item.named}; allowed are: {listed}."
        if version:
            yield from _of_the_version(rule, whose, item)
        if version and read and rule.licences:
            yield from _of_the_licence(rule, whose, item)
        written_down = any(text != "*" and requirements.names(text, item.name, None) for text in agent.packages)
        if item.requested and not written_down and (other := imitated(item.name)):
            yield rule.lookalike, f"{item.name} is almost {other}, which is far better known."
        for text in rule.ask:
            if (item.requested or text != "*") and requirements.names(text, item.name, version):
                yield Answer.ASK, f"The policy of {whose} has a person approve {item.named}."


def _of_the_version(rule: PackagePolicy, whose: str, item: Item) -> Iterator[tuple[str, str]]:
    if any(fnmatch.fnmatchcase(item.name, glob.lower()) for glob in rule.private) and not item.private:
        yield Answer.DENY, f"{item.name} may come from the private index only, and that does not have it."
    if item.advisories:
        told = f" (advisories of {item.advised_at:%Y-%m-%d})" if item.advised_at else ""
        yield rule.vulnerable, f"{item.named} has the known vulnerability {', '.join(item.advisories[:3])}{told}."
    if rule.most_bytes is not None:
        if item.size_bytes is None:
            yield rule.unknown, f"The size of {item.named} is unknown, and {whose} limits it."
        elif item.size_bytes > rule.most_bytes:
            yield (
                Answer.DENY,
                f"{item.named} has {item.size_bytes:,} bytes; the policy of {whose} allows {rule.most_bytes:,}.",
            )
    if rule.least_age_days:
        if item.published_at is None:
            yield (
                rule.unknown,
                f"When {item.named} was published is unknown, and {whose} waits {rule.least_age_days} days.",
            )
        elif (timezone.now() - item.published_at).days < rule.least_age_days:
            on = f"{item.published_at:%Y-%m-%d}"
            yield Answer.DENY, f"{item.named} was published on {on}; {whose} waits {rule.least_age_days} days."


def _of_the_licence(rule: PackagePolicy, whose: str, item: Item) -> Iterator[tuple[str, str]]:
    if not item.licence:
        yield rule.unknown, f"The licence of {item.named} is unknown, and {whose} allows certain ones only."
    elif not _licensed(item.licence, rule.licences):
        listed = ", ".join(rule.licences)
        yield Answer.DENY, f"{item.named} is under {item.licence}; the policy of {whose} allows {listed}."


def _in(entries: list[str], item: Item) -> bool:
    return any(requirements.names(text, item.name, item.version or None) for text in entries)


def _narrow(text: str) -> bool:
    return text != "*" and bool(requirements.parsed(text).specifier)


def _licensed(licence: str, allowed: list[str]) -> bool:
    """Of alternatives one must be allowed, of what applies together all."""

    def one(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name.strip(" ()").lower(), glob.lower()) for glob in allowed)

    return any(all(map(one, choice.split(" AND "))) for choice in licence.split(" OR "))
