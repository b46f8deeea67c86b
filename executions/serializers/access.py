"""Agents and keys: who may run what, and how programs prove who they are."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field

from executions.models import Agent, ApiKey
from executions.serializers.requests import Accepted, Short
from executions.states import Scope

Names = Annotated[list[Annotated[str, Field(max_length=250)]] | None, Field(max_length=100)]
Seconds = Annotated[int | None, Field(ge=1, le=86_400)]


class AgentChange(Accepted):
    """What is left out stays as it is; null is the installation's own."""

    name: str | None = Field(None, pattern=r"^[-a-zA-Z0-9_]+$", min_length=1, max_length=64)
    description: str | None = Field(None, max_length=300)
    is_active: bool | None = Field(None, description="false: its keys and sessions are refused.")
    route: list[Short] | None = Field(None, description="Backend aliases in order; []: the default.", max_length=8)
    isolation_floor: str | None = Field(None, description="none, reduced, namespaces or microvm.", max_length=12)
    template: Short | None = None
    stays_here: bool | None = Field(None, description="Its code and data never leave this machine.")
    languages: Names = None
    tools: Names = Field(None, description="MCP tools that it sees; []: all.")
    packages: Names = Field(None, description='Names that may be installed; []: none; ["*"]: any.')
    network_allow: Names = Field(None, description='Hosts that it may reach; []: none; ["*"]: every public one.')
    timeout_seconds: Seconds = None
    timeout_max_seconds: Seconds = None
    pause_after_seconds: int | None = Field(None, ge=0, le=86_400)
    keep_files: Names = None
    artifact_days: int | None = Field(None, ge=1, le=3650)


class AgentRequest(AgentChange):
    """A program that runs code, with what it may do and where."""

    name: str = Field(pattern=r"^[-a-zA-Z0-9_]+$", min_length=1, max_length=64)


class AgentShape(BaseModel):
    id: str
    name: str
    description: str
    person: str | None = Field(description="Whose personal agent this is.")
    is_active: bool
    route: list[str]
    isolation_floor: str
    template: str | None
    stays_here: bool
    languages: list[str]
    tools: list[str]
    packages: list[str]
    network_allow: list[str]
    timeout_seconds: int
    timeout_max_seconds: int
    pause_after_seconds: int | None
    keep_files: list[str] | None
    artifact_days: int | None
    created_at: datetime


class KeyRequest(Accepted):
    """A new key. Its scopes are at most those of the key that asks."""

    name: str = Field(min_length=1, max_length=100)
    agent: Short | None = Field(None, description="Whose key it is; left out: of the whole team.")
    scopes: list[Scope] = Field([Scope.RUN, Scope.READ], min_length=1, max_length=len(Scope))
    expires_in_seconds: int | None = Field(None, ge=60, le=315_360_000, description="Left out: it does not expire.")
    allow_from: list[Annotated[str, Field(max_length=50)]] = Field(
        [], description='Networks that it may be sent from, such as ["10.0.0.0/8"]; []: any.', max_length=50
    )
    test: bool = Field(
        False,
        description="A key for tests: nothing runs, what comments in the code say is answered, and nothing costs.",
    )


class RotateRequest(Accepted):
    """A new secret beside the old one, which is good for a while longer."""

    overlap_seconds: int = Field(3600, ge=0, le=2_592_000, description="How long the old key still works; 0: no more.")


class KeyShape(BaseModel):
    id: str
    name: str
    begins_with: str
    agent: str | None = Field(description="null: of the whole team, which names the agent per request.")
    scopes: list[str]
    test: bool
    backend: str = Field(description="Bound to this one; empty: by the agent's route.")
    allow_from: list[str]
    is_live: bool
    created_by: str | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class MadeKeyShape(KeyShape):
    secret: str | None = Field(
        description="Shown this once; null where an Idempotency-Key is repeated: rotate the key if it was lost."
    )
    replaces: str | None = Field(None, description="The key that was rotated.")


def agent_shape(agent: Agent) -> AgentShape:
    own: dict[str, Any] = {name: getattr(agent, name) for name in AgentShape.model_fields}
    return AgentShape(
        **own
        | {
            "template": agent.template.name if agent.template else None,
            "person": agent.person.get_username() if agent.person else None,
        }
    )


def key_shape(key: ApiKey) -> KeyShape:
    return KeyShape(
        id=key.id,
        name=key.name,
        begins_with=f"sg_{key.public}",
        agent=key.agent.name if key.agent else None,
        scopes=key.scopes,
        test=key.backend == "scripted",
        backend=key.backend,
        allow_from=key.allow_from,
        is_live=key.is_live,
        created_by=key.created_by.get_username() if key.created_by else None,
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
    )


def made_key_shape(key: ApiKey, secret: str | None, replaces: str | None = None) -> MadeKeyShape:
    return MadeKeyShape(**key_shape(key).model_dump(), secret=secret, replaces=replaces)
