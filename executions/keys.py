"""Who is calling: API keys, sign-in links, and the `Caller` that every verb is given."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import zlib
from dataclasses import dataclass, field, replace
from datetime import timedelta

from django.conf import settings
from django.utils import timezone

from executions import network
from executions.errors import Forbidden, Invalid, NotFound, Refused, Unauthenticated
from executions.models import Agent, ApiKey, Membership, SignInLink, Team, User, hot
from executions.states import Role, Scope

SIGN_IN_LINK_LASTS = timedelta(hours=1)
ROLE_SCOPES: dict[str, frozenset[str]] = {
    Role.OWNER: frozenset(Scope.values),
    Role.OPERATOR: frozenset(Scope.values),
    Role.DEVELOPER: frozenset({Scope.RUN, Scope.READ}),
    Role.VIEWER: frozenset({Scope.READ}),
    Role.AUDITOR: frozenset({Scope.READ}),
}


_by_public = hot.Compiled(lambda public: ApiKey.objects.select_related("team", "agent__template").filter(public=public))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, for which agent, and what they may do."""

    team: Team
    agent: Agent | None
    key: ApiKey | None = None
    person: User | None = None
    scopes: frozenset[str] = frozenset()
    door: str = ""
    ip: str | None = None
    request_id: str = ""
    trace_id: str = ""
    user: str = ""  # the end user and the workflow of one request: quotas may name them
    workflow: str = ""
    max_nano_usd: int | None = None  # the most that what is asked for may cost
    # Of one that has waited, and whose turn has come: the quotas that had no room for one before it, and what they said.
    turned_away: dict[int, Refused] | None = field(default=None, compare=False)

    def needs(self, scope: str) -> None:
        """Raises Forbidden without the scope."""
        if scope not in self.scopes:
            raise self.denied(Forbidden(f"This needs the scope {scope}.", scope=scope))

    def denied(self, error: Refused) -> Refused:
        """The same error, with who was denied: the door writes that into the audit."""
        error.caller = self
        return error

    def acting_as(self, name: str | None) -> Caller:
        """The caller with its agent settled: the key's own, or the one that a team's key names per request."""
        if self.key is not None and self.key.agent_id:
            if name and self.agent and name not in (self.agent.name, self.agent.id):
                raise self.denied(Forbidden(f"This key acts as agent {self.agent.name} only.", field="agent"))
            agent = self.agent
        elif name:
            agent = (
                Agent.objects.select_related("template").filter(team=self.team, name=name).first()
                or Agent.objects.select_related("template").filter(team=self.team, id=name).first()
            )
            if agent is None or (agent.person_id and self.person and agent.person_id != self.person.pk):
                raise NotFound(f"There is no agent {name!r} in this team.", field="agent")
        else:
            agent = self.agent
        if agent is None:
            raise Invalid(
                "This key belongs to the whole team: name the agent.",
                field="agent",
                remedy='Add "agent": "<name>" to the request.',
            )
        if not agent.is_active:
            raise Forbidden(f"Agent {agent.name} is switched off.", remedy="An operator can switch it on in the admin.")
        return replace(self, agent=agent)


def digest_of(secret: str) -> str:
    """A fast keyed hash is right here: the secret has 256 random bits, and a slow hash would cost 0.3 s a call."""
    return hmac.new(settings.SECRET_KEY.encode(), b"api key:" + secret.encode(), hashlib.sha256).hexdigest()


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def make_key(*, team: Team, name: str, agent: Agent | None = None, **fields) -> tuple[ApiKey, str]:
    """A new key and its token, which is never shown again."""
    key = ApiKey(team=team, agent=agent, name=name, **fields)
    return key, store_key(key)


def store_key(key: ApiKey) -> str:
    """Give it a secret and insert it; the token, which is never shown again."""
    public, secret = secrets.token_hex(8), secrets.token_hex(32)
    key.public, key.digest = public, digest_of(secret)
    key.save(force_insert=True)
    return f"sg_{public}{secret}{_checksum(public + secret)}"


def authenticate(
    token: str | None, *, door: str = "", ip: str | None = None, request_id: str = "", trace_id: str = ""
) -> Caller:
    """The caller behind a token `sg_…` (or the same hex behind `e2b_`). Raises Unauthenticated."""
    if not token:
        raise Unauthenticated("No key was sent.")
    body = token.strip().removeprefix("sg_").removeprefix("e2b_")
    public, secret, checksum = body[:16], body[16:80], body[80:]
    if len(body) != 88 or not body.isascii() or not hmac.compare_digest(_checksum(public + secret), checksum):
        raise Unauthenticated("That is not one of this installation's keys: it is mistyped or cut off.")
    key = next(iter(_by_public(public)), None)
    if key is None:
        raise Unauthenticated("The key is unknown, expired or revoked.")
    caller = Caller(
        team=key.team,
        agent=key.agent,
        key=key,
        scopes=frozenset(key.scopes) - ({Scope.MANAGE} if key.backend else set()),  # a test key changes nothing real
        door=door,
        ip=ip,
        request_id=request_id,
        trace_id=trace_id,
    )
    if not hmac.compare_digest(key.digest, digest_of(secret)) or not key.is_live:
        raise caller.denied(Unauthenticated("The key is unknown, expired or revoked."))
    if key.allow_from and not network.lies_in(ip, key.allow_from):
        raise caller.denied(Unauthenticated("The key is not good at this address."))
    return caller


def bearer(headers) -> str | None:
    """The token of a request: `Authorization: Bearer …`, or `X-API-KEY` as the E2B SDKs send it."""
    authorization = headers.get("Authorization", "")
    if authorization[:7].lower() == "bearer ":
        return authorization[7:]
    return headers.get("X-API-KEY")


def caller_for(user: User, *, door: str = "console", ip: str | None = None, request_id: str = "") -> Caller:
    """A signed-in person, as their personal agent in their first team. Raises Forbidden without a team."""
    membership = Membership.objects.select_related("team").filter(user=user).order_by("id").first()
    if membership is None:
        raise Forbidden("You are in no team yet.", remedy="Ask an owner to add you in the admin, under Memberships.")
    return Caller(
        team=membership.team,
        agent=personal_agent(user, membership.team),
        person=user,
        scopes=ROLE_SCOPES[membership.role],
        door=door,
        ip=ip,
        request_id=request_id,
    )


def personal_agent(user: User, team: Team) -> Agent:
    """The agent through which a person runs code, made when first needed."""
    found = Agent.objects.select_related("template").filter(team=team, person=user).first()
    if found is not None:
        return found
    agent, _ = Agent.objects.get_or_create(
        team=team, person=user, defaults={"name": f"person-{user.pk}", "packages": ["*"], "description": str(user)}
    )
    return agent


def make_sign_in_link(user: User) -> str:
    """The path of a link that signs this person in, once, within the hour."""
    token = secrets.token_urlsafe(32)
    SignInLink.objects.create(
        digest=hashlib.sha256(token.encode()).hexdigest(),
        user=user,
        expires_at=timezone.now() + SIGN_IN_LINK_LASTS,
    )
    return f"/sign-in/{token}"


def redeem_sign_in(token: str) -> User | None:
    """The person that a link signs in; None when it is unknown, used or too old. Two at once: one wins."""
    now = timezone.now()
    digest = hashlib.sha256(token.encode()).hexdigest()
    fresh = SignInLink.objects.filter(digest=digest, used_at__isnull=True, expires_at__gt=now, user__is_active=True)
    if fresh.update(used_at=now) != 1:
        return None
    return SignInLink.objects.select_related("user").get(digest=digest).user
