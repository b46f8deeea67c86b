"""OAuth for MCP clients of people: an access token acts as the person's personal agent. Off unless SANDGATE_OAUTH is on."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from django.conf import settings

from executions import keys, network
from executions.errors import Unauthenticated
from executions.models import Agent, ApiKey, User

METADATA = "/.well-known/oauth-protected-resource/mcp"  # RFC 9728: the resource's path behind the well-known one


def resource() -> str:
    """What tokens are for (RFC 8707): this server's MCP address."""
    return f"{settings.PUBLIC_URL}/mcp"


def challenge(*, sent: bool) -> str:
    """WWW-Authenticate of a 401: where a client learns how to get a token; `sent`: one came, and was not good."""
    if not settings.OAUTH:
        return "Bearer"
    error = 'error="invalid_token", ' if sent else ""
    return f'Bearer {error}resource_metadata="{settings.PUBLIC_URL}{METADATA}"'


def caller_of(token: str, *, ip: str | None, request_id: str) -> keys.Caller:
    """The person behind an access token, as their personal agent. Raises Unauthenticated, Forbidden without a team."""
    from allauth.idp.oidc.models import Token

    valid = Token.objects.valid().by_value(token).filter(type=Token.Type.ACCESS_TOKEN, user__is_active=True)
    found = valid.select_related("user", "client").first()
    if found is None or (found.get_resources() and resource() not in found.get_resources()):
        raise Unauthenticated(
            "The access token is unknown, expired, revoked or for another server.",
            remedy="Get a new one by signing in, or use a key (sg_…).",
        )
    caller = keys.caller_for(found.user, door="mcp", ip=ip, request_id=request_id)
    scopes = caller.scopes & frozenset(found.get_scopes())
    assert caller.agent is not None
    key = _key_of(found.client, found.user, caller.agent, sorted(caller.scopes))
    caller = replace(caller, key=key, scopes=scopes)
    if not key.is_live or (key.allow_from and not network.lies_in(ip, key.allow_from)):
        raise caller.denied(Unauthenticated("This client's access was revoked, or is not good at this address."))
    return caller


def _key_of(client: Any, person: User, agent: Agent, scopes: list[str]) -> ApiKey:
    """The row that stands for what this client does for this person: its runs, its quotas, and the place to revoke it.

    No secret belongs to it: its digest is that of none.
    """
    public = hashlib.sha256(f"oauth {client.pk} {person.pk} {agent.pk}".encode()).hexdigest()[:16]
    found = ApiKey.objects.select_related("team", "agent__template").filter(public=public).first()
    if found is None:
        name = f"OAuth: {client.name or client.pk}"[:100]
        fields = {"team": agent.team, "agent": agent, "name": name, "scopes": scopes, "created_by": person}
        found, _ = ApiKey.objects.get_or_create(public=public, defaults=fields)
    return found
