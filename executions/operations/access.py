"""Agents and keys, made and changed by programs: never more than the key that asks may do itself, and written into the audit."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.db.models import QuerySet
from django.utils import timezone

from executions import audit, backends, keys, network
from executions.errors import Conflict, Forbidden, Invalid, NotFound
from executions.keys import Caller
from executions.models import Agent, ApiKey, Template
from executions.serializers.access import AgentChange, AgentRequest, KeyRequest
from executions.states import Scope

TEST_BACKEND = "scripted"


# Agents


def agents_of(caller: Caller) -> QuerySet[Agent]:
    """The agents that a caller sees: their team's, or only their own where the key has one."""
    found = Agent.objects.filter(team=caller.team).select_related("template", "person")
    return found.filter(pk=caller.key.agent_id) if caller.key is not None and caller.key.agent_id else found


def find_agent(caller: Caller, agent_id: str) -> Agent:
    """By id or name. Raises NotFound, also for another team's."""
    found = agents_of(caller)
    agent = found.filter(pk=agent_id).first() or found.filter(name=agent_id).first()
    if agent is None:
        raise NotFound(f"There is no agent {agent_id[:100]!r} in this team.", field="agent")
    return agent


@transaction.atomic
def make_agent(*, caller: Caller, asked: AgentRequest) -> Agent:
    """Raises Forbidden for a key of one agent, Conflict for a name that is taken, Invalid."""
    _manages_team(caller)
    return _saved(caller, Agent(team=caller.team), asked, {})


@transaction.atomic
def change_agent(*, caller: Caller, agent_id: str, asked: AgentChange) -> Agent:
    """Set what was sent. Raises Forbidden, NotFound, Conflict, Invalid."""
    _manages_team(caller)
    agent = Agent.objects.select_for_update().get(pk=find_agent(caller, agent_id).pk)
    return _saved(caller, agent, asked, audit.facts(agent))


@transaction.atomic
def switch_off_agent(*, caller: Caller, agent_id: str) -> None:
    """Its keys and sessions are refused from now on; what it has run stays on record. Idempotent."""
    _manages_team(caller)
    agent = find_agent(caller, agent_id)
    if Agent.objects.filter(pk=agent.pk, is_active=True).update(is_active=False):
        audit.record(
            "agent_changed", caller=caller, subject=agent.pk, before={"is_active": True}, after={"is_active": False}
        )


def _manages_team(caller: Caller) -> None:
    caller.needs(Scope.MANAGE)
    if caller.key is not None and caller.key.agent_id:
        raise caller.denied(Forbidden("A key of one agent changes no agents; use a key of the team."))


def _saved(caller: Caller, agent: Agent, asked: AgentChange, before: dict[str, Any]) -> Agent:
    fields: dict[str, Any] = asked.model_dump(exclude_unset=True)
    for name, value in fields.items():
        column: Any = agent._meta.get_field(name)
        if name == "template":
            value = _template(value)
        elif value is None and not column.null:
            value = column.get_default()
        setattr(agent, name, value)
    for alias in agent.route:
        if alias not in backends.aliases():
            raise Invalid(f"There is no backend {alias!r}; there are {', '.join(backends.aliases())}.", field="route")
    if agent.timeout_seconds > agent.timeout_max_seconds:
        raise Invalid("timeout_seconds: more than timeout_max_seconds.", field="timeout_seconds")
    try:
        agent.full_clean(validate_unique=False, validate_constraints=False)
        with transaction.atomic():
            agent.save()
    except ValidationError as wrong:
        field, said = next(iter(wrong.message_dict.items()))
        raise Invalid(f"{field}: {said[0]}", field=field) from None
    except IntegrityError:
        raise Conflict(f"This team has an agent {agent.name!r} already.", field="name") from None
    was, is_now = audit.difference(before, audit.facts(agent))
    if was or is_now:
        action = "agent_changed" if before else "agent_made"
        audit.record(action, caller=caller, subject=agent.pk, before=was or None, after=is_now)
    return agent


def _template(name: str | None) -> Template | None:
    if name is None:
        return None
    found = Template.objects.filter(name=name, is_active=True).first()
    if found is None:
        raise Invalid(f"There is no template {name!r}.", field="template")
    return found


# Keys


def keys_of(caller: Caller) -> QuerySet[ApiKey]:
    """The keys that a caller sees: all of the team, or those of the one agent."""
    caller.needs(Scope.MANAGE)
    found = ApiKey.objects.filter(team=caller.team).select_related("agent", "created_by")
    return found.filter(agent=caller.key.agent_id) if caller.key is not None and caller.key.agent_id else found


def find_key(caller: Caller, key_id: str) -> ApiKey:
    key = keys_of(caller).filter(pk=key_id).first()
    if key is None:
        raise NotFound(f"There is no key {key_id[:100]}.", field="key_id")
    return key


@transaction.atomic
def issue_key(*, caller: Caller, asked: KeyRequest) -> tuple[ApiKey, str]:
    """A new key and its secret. It may do no more than the one that asks. Raises Forbidden, NotFound, Invalid."""
    caller.needs(Scope.MANAGE)
    own = caller.key
    agent = find_agent(caller, asked.agent) if asked.agent else None
    if own is not None and own.agent_id:
        agent = agent or caller.agent
    new = ApiKey(
        team=caller.team,
        agent=agent,
        name=asked.name,
        scopes=[str(scope) for scope in asked.scopes],
        backend=TEST_BACKEND if asked.test else own.backend if own is not None else "",
        allow_from=asked.allow_from or (own.allow_from if own is not None else []),
        expires_at=timezone.now() + timedelta(seconds=asked.expires_in_seconds) if asked.expires_in_seconds else None,
        created_by=caller.person,
    )
    return new, _made(caller, new)


@transaction.atomic
def rotate_key(*, caller: Caller, key_id: str, overlap_seconds: int) -> tuple[ApiKey, str, ApiKey]:
    """(a new key like this one, its secret, the old one, which still works for so long). Raises NotFound, Conflict, Forbidden."""
    found = find_key(caller, key_id)
    old = ApiKey.objects.select_for_update(of=("self",)).select_related("agent", "created_by").get(pk=found.pk)
    if not old.is_live:
        raise Conflict(f"Key {old.name} has expired or was revoked: make a new one.", key_id=old.pk)
    if not old.has_secret:
        raise Conflict(
            f"Key {old.name} stands for a client that signs in by OAuth; it has no secret that could be rotated.",
            key_id=old.pk,
            remedy="Revoke it to end that client's access, or make a key for a program of yours.",
        )
    alike = ("team", "agent", "name", "scopes", "backend", "allow_from", "created_by")
    new = ApiKey(**{name: getattr(old, name) for name in alike})
    if old.expires_at:
        new.expires_at = timezone.now() + (old.expires_at - old.created_at)
    secret = _made(caller, new, replaces=old.pk)
    ends = timezone.now() + timedelta(seconds=overlap_seconds)
    if old.expires_at is None or ends < old.expires_at:
        before, old.expires_at = old.expires_at, ends
        old.save(update_fields=["expires_at"])
        audit.record(
            "key_changed",
            caller=caller,
            subject=old.pk,
            before={"expires_at": before},
            after={"expires_at": ends},
            reason=f"rotated: {new.pk} replaces it",
        )
    return new, secret, old


@transaction.atomic
def revoke_key(*, caller: Caller, key_id: str) -> None:
    """It is refused from now on. Idempotent. Raises NotFound."""
    key = find_key(caller, key_id)
    if ApiKey.objects.filter(pk=key.pk, revoked_at=None).update(revoked_at=timezone.now()):
        audit.record("key_revoked", caller=caller, subject=key.pk, before={"name": key.name})


def _made(caller: Caller, new: ApiKey, replaces: str = "") -> str:
    """Store it; its secret. Raises Forbidden where it could do more than the caller's own, Invalid."""
    try:
        new.clean()
    except ValidationError as wrong:
        field, said = next(iter(wrong.message_dict.items()))
        raise Invalid(f"{field}: {said[0]}", field=field) from None
    if more := sorted(set(new.scopes) - caller.scopes):
        raise caller.denied(Forbidden(f"This key does not have the scope {more[0]} itself.", scope=more[0]))
    if (own := caller.key) is not None:
        if own.backend and new.backend != own.backend:
            raise caller.denied(Forbidden(f"This key is bound to {own.backend}, and so are those that it makes."))
        if own.allow_from and not network.within(new.allow_from, own.allow_from):
            raise caller.denied(Forbidden("This key is good in fewer networks than that one.", field="allow_from"))
        if own.expires_at and (new.expires_at is None or new.expires_at > own.expires_at):
            raise caller.denied(Forbidden("A key cannot outlive the one that made it.", field="expires_in_seconds"))
    secret = keys.store_key(new)
    after = audit.difference({}, audit.facts(new))[1]
    audit.record(
        "key_made", caller=caller, subject=new.pk, after=after, reason=f"replaces {replaces}" if replaces else ""
    )
    return secret
