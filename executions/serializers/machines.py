"""Sandboxes, and what one does in them beside running cells."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, Field

from executions.models import Sandbox
from executions.serializers.requests import Accepted, NameValue
from executions.serializers.shapes import dollars


class SandboxShape(BaseModel):
    """One isolated machine, a session or the sandbox of a single run."""

    id: str
    state: str
    backend: str
    isolation: str
    agent: str
    template: str
    is_session: bool
    from_pool: bool
    cpu_count: int
    memory_mib: int
    end_at: datetime | None
    end_reason: str
    reserved_usd: str
    cost_usd: str
    created_at: datetime
    ended_at: datetime | None


class ContextRequest(Accepted):
    """A further interpreter in the session, with variables of its own."""

    language: str = Field("python", max_length=20)
    cwd: str | None = Field(None, description="Its folder; left out: /home/user.", max_length=4096)


class ContextShape(BaseModel):
    id: str = Field(description="The context_id of executions that run in it.")
    language: str
    cwd: str


class CommandRequest(Accepted):
    """A line for bash; what it does is an execution like any other."""

    command: str = Field(min_length=1, max_length=32_000)
    env: NameValue = {}
    timeout_seconds: int | None = Field(None, ge=1)


class FileAct(Accepted):
    """What POST does to the file or folder at `path`."""

    move_to: str = Field(description="Its new path; the folders on the way are made.", min_length=1, max_length=4096)


class WrittenShape(BaseModel):
    path: str
    size_bytes: int | None = Field(None, description="Of the file as it stands now, where it was appended to.")


def sandbox_shape(sandbox: Sandbox) -> SandboxShape:
    return SandboxShape(
        id=sandbox.id,
        state=sandbox.state,
        backend=sandbox.backend,
        isolation=sandbox.isolation,
        agent=sandbox.agent.name,
        template=sandbox.template.name,
        is_session=sandbox.kept,
        from_pool=bool(sandbox.made_of),
        cpu_count=sandbox.cpu_count,
        memory_mib=sandbox.memory_mib,
        end_at=sandbox.leased_until,
        end_reason=sandbox.end_reason,
        reserved_usd=dollars(sandbox.reserved_nano_usd),
        cost_usd=dollars(sandbox.spent_nano_usd),
        created_at=sandbox.created_at,
        ended_at=sandbox.ended_at,
    )
