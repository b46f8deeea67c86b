"""Where a request may run: the backends of its route, in order, and why others are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from django.conf import settings

from executions import backends, breaker, capacity
from executions.backends.base import Backend
from executions.errors import Invalid, NoBackend, RateUnknown
from executions.keys import Caller
from executions.models import Agent, Template
from executions.states import ISOLATION, LANGUAGES, SkipCode

T = TypeVar("T")


class Skipped(NamedTuple):
    """A backend that was left out, and why: `code` is empty where a rule or a capability says so."""

    alias: str
    why: str
    code: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """The aliases to try, first one first, and those that were left out."""

    aliases: list[str]
    skipped: list[Skipped] = field(default_factory=list)


def plan(
    caller: Caller,
    *,
    asked: list[str] | None,
    language: str,
    commands: bool = False,
    template: Template | None = None,
    run_limits: bool = False,
    network: Sequence[str] | None = None,
    fresh: bool = True,
) -> Route:
    """Raises Invalid for an alias that does not exist, NoBackend when none of the route can take the request.

    `network` are the rules of the sandbox; left out, the agent's. `fresh`: a sandbox is to be made, so that a backend
    that is out is left out; what lives there already may live on.
    """
    agent = caller.agent
    assert agent is not None
    if language not in LANGUAGES:
        raise Invalid(f"{language!r} is not a language here; there are {', '.join(LANGUAGES)}.", field="language")
    if agent.languages and language not in agent.languages:
        raise Invalid(f"Agent {agent.name} may use {', '.join(agent.languages)}.", field="language")
    bound = caller.key.backend if caller.key is not None else ""
    for alias in asked or []:
        if alias not in settings.SANDBOXES:
            known = ", ".join(backends.aliases())
            raise Invalid(f"There is no backend {alias!r}; there are {known}.", field="route")
    wanted = [bound] if bound else asked or agent.route or _default()
    rules = agent.network_allow if network is None else network
    route, waits = Route([]), []
    for alias in wanted:
        why = _unfit(alias, agent, language, commands, template, run_limits)
        if why := why or backends.get(alias).network_refusal(rules):
            route.skipped.append(Skipped(alias, why))
        elif fresh and (out := breaker.outage(alias)) and not breaker.lets_one_through(alias):
            route.skipped.append(Skipped(alias, out, SkipCode.OUT))
            waits.append(breaker.retry_after(alias))
        else:
            route.aliases.append(alias)
    if not route.aliases:
        raise _none_of(route, waits)
    return route


def first(route: Route, claim: Callable[[str], T]) -> T:
    """What `claim` gives at the first alias whose plan has room and whose price is known; those before it join the skipped.

    Raises NoBackend, or RateUnknown, where there is none. Call it in the transaction of the admission: `claim` raises
    capacity.Full and RateUnknown before it has changed anything.
    """
    unpriced: RateUnknown | None = None
    for alias in list(route.aliases):
        try:
            return claim(alias)
        except capacity.Full as full:
            left = Skipped(alias, str(full), SkipCode.FULL)
        except RateUnknown as e:
            unpriced, left = e, Skipped(alias, "no rate is known for it, and no ceiling is set", e.code)
        route.aliases.remove(alias)
        route.skipped.append(left)
    if unpriced and not any(left.code == SkipCode.FULL for left in route.skipped):
        raise unpriced
    refusal = _none_of(route, [capacity.RETRY_SECONDS])
    refusal.waits_seconds = settings.QUEUE_SECONDS
    raise refusal


def below_floor(agent: Agent, backend: Backend) -> bool:
    """Whether this backend's walls are weaker than the agent's code may be behind; on each machine they may be others."""
    floor = agent.isolation_floor or settings.ISOLATION_FLOOR
    return ISOLATION.index(backend.isolation) < ISOLATION.index(floor)


def _none_of(route: Route, waits: list[int]) -> NoBackend:
    """Nothing in the route can take it; `waits` are the seconds after which some of it may."""
    said = "; ".join(f"{left.alias}: {left.why}" for left in route.skipped) or "the route is empty"
    return NoBackend(
        f"No backend can take this: {said}.",
        remedy=f"Try again in {min(waits)} s, or name another route." if waits else None,
        skipped=[[left.alias, left.why] for left in route.skipped],
        retry_after=min(waits, default=None),
    )


def _default() -> list[str]:
    """Every configured backend in order, but for the simulated ones: those are asked for by name."""
    return [alias for alias in backends.aliases() if backends.get(alias).isolation != "simulated"]


def _unfit(alias: str, agent: Agent, language: str, commands: bool, template: Template | None, run_limits: bool) -> str:
    if not backends.is_known(alias):
        return "is not configured"
    backend = backends.get(alias)
    if language not in backend.capabilities.languages:
        return f"has no {language}"
    if commands and not backend.capabilities.commands:
        return "runs no commands"
    if run_limits and not backend.capabilities.run_limits:
        return "cannot limit the memory or the CPU time of one run"
    if template is not None and (why := lacking(template, backend)):
        return why
    if backend.refusal:
        return backend.refusal
    if agent.stays_here and backend.remote:
        return f"is not on this machine, which the code of agent {agent.name} never leaves"
    floor = agent.isolation_floor or settings.ISOLATION_FLOOR
    if below_floor(agent, backend):
        return f"its isolation ({backend.isolation}) is below the agent's floor ({floor})"
    return ""


def lacking(template: Template, backend: Backend) -> str:
    """Why this backend cannot make the template's sandboxes as its row says; empty where it can, or where nothing runs."""
    if why := backend.size_refusal(template.cpu_count, template.memory_mib, template.disk_mib):
        return f"{why}, which template {template.name} has"
    if not template.own_content or template.e2b_template:
        return ""
    if backend.capabilities.templates or backend.isolation == "simulated":
        return ""
    return f"template {template.name} has {template.own_content} of its own and no id there: name it in e2b_template"
