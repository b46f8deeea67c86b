"""What every door sends."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from executions.egress import hint
from executions.models import Artifact, Attempt, Egress, Event, Execution, Package, Sandbox, Template
from executions.states import AttemptOutcome, EventKind, ExecutionState, NamedLimit, SkipCode


class Logs(BaseModel):
    stdout: str = ""
    stderr: str = ""


class CodeError(BaseModel):
    """What the code raised."""

    name: str
    value: str
    traceback: str


class AttemptShape(BaseModel):
    number: int
    backend: str
    outcome: str
    code: str
    reason: str


class EgressShape(BaseModel):
    """One connection that the code asked for, or one refusal and how often it was repeated; bytes out are the sandbox's."""

    host: str
    port: int
    address: str = Field(description="What the name led to; the address that was connected to.")
    verdict: str = Field(description="allowed, denied or failed")
    reason: str
    bytes_out: int
    bytes_in: int
    times: int
    at: datetime


class UsageShape(BaseModel):
    """Seconds of wall time by phase, and what was measured outside the sandbox."""

    queue_seconds: float | None = None
    start_seconds: float | None = None
    run_seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    output_bytes: int = 0


class QueueShape(BaseModel):
    """Where one waits that has not been started."""

    position: int = Field(description="From 1, in the order in which they will be started; 0 where it is not known.")
    reason: str = Field(description="What there was no room for.")
    until: datetime | None = Field(None, description="Not started by then, it is refused.")


class ExecutionShape(BaseModel):
    """One execution, as every door shows it."""

    id: str
    state: str
    language: str
    code: str
    results: list[dict[str, Any]] = Field(
        [], description="MIME bundles, in order; the cell's value has main=true in `mains`."
    )
    mains: list[bool] = []
    logs: Logs = Logs()
    error: CodeError | None = None
    exit_code: int | None = Field(None, description="Of a script that has ended by itself.")
    truncated: bool = False
    limits: dict[str, int] = Field({}, description="What was asked for below the usual.")
    limits_reached: list[str] = Field([], description="Named limits: of error_code, and of what was cut.")
    execution_count: int | None = None
    queue: QueueShape | None = Field(None, description="While it waits for room.")
    attempts: list[AttemptShape] = []
    fell_back: str = Field("", description="What was out or full, so that it did not run on the first of its route.")
    egress: list[EgressShape] = Field(
        default=[], description="What went out, or was refused; seen from outside the sandbox."
    )
    backend: str = ""
    isolation: str = ""
    sandbox_id: str | None = None
    from_pool: bool = Field(False, description="Its sandbox had been booted before it was asked for.")
    session_id: str | None = None
    timeout_seconds: int
    usage: UsageShape
    cost_usd: str = Field(
        description='Dollars as a decimal string; empty while it runs; "unpriced" where no rate was known.'
    )
    cost_nano_usd: int | None = Field(None, description="null while it runs, and where it is unpriced.")
    unpriced_charged_nano_usd: int | None = Field(
        None, description="What budgets were charged at the ceiling rate, where no rate was known."
    )
    max_cost_usd: str = Field("", description="The most that it was allowed to cost, where its request said so.")
    error_code: str = Field("", description="A code of ours when the run did not end by itself.")
    detail: str = ""
    agent: str
    key_id: str | None = None
    actor: str | None = None
    user: str = ""
    workflow: str = ""
    step: str = ""
    parent: str | None = None
    metadata: dict[str, Any] = {}
    keep_files: list[str] = []
    kept: str = Field("", description="What was kept as artifacts: GET /executions/{id}/artifacts.")
    door: str = ""
    request_id: str = ""
    trace_id: str = Field("", description="Of the traceparent that it was sent with.")
    ip: str | None = None
    code_sha256: str = ""
    last_seq: int = 0
    created_at: datetime
    started_at: datetime | None = None
    running_at: datetime | None = None
    ended_at: datetime | None = None


class SessionShape(BaseModel):
    id: str
    state: str
    name: str
    agent: str
    template: str
    backend: str
    isolation: str
    from_pool: bool = Field(False, description="It had been booted before it was asked for.")
    network: list[str]
    end_at: datetime
    idle_timeout_seconds: int
    pause_after_seconds: int = Field(0, description="Paused when nothing has run for so long; 0: never.")
    keep_files: list[str] = Field([], description="Kept as artifacts at its end: GET /sessions/{id}/artifacts.")
    kept: str = Field("", description="What was kept at its end, or why not.")
    end_reason: str
    reserved_usd: str
    cost_usd: str = Field(description='"unpriced" where no rate was known; budgets are charged the ceiling rate then.')
    metadata: dict[str, Any]
    created_at: datetime
    last_used_at: datetime
    ended_at: datetime | None


class FileShape(BaseModel):
    name: str
    path: str
    type: str
    size_bytes: int
    modified_at: str


class EventShape(BaseModel):
    seq: int
    kind: str
    data: dict[str, Any]
    at: datetime


class PackageShape(BaseModel):
    name: str
    version: str
    sha256: str
    size_bytes: int | None
    verdict: str
    reason: str
    requested: bool
    licence: str = Field("", description="Empty: unknown.")
    advisories: list[str] | None = Field(None, description="Known vulnerabilities of this version; null: unknown.")


class InstalledShape(BaseModel):
    """What can be imported now, and how that has changed."""

    verdict: str = Field("allowed", description="Anything else is a problem: package_denied, approval_pending, …")
    packages: list[PackageShape]
    lock_hash: str = Field("", description="Of the agent's lock; empty where a session was installed into.")
    added: dict[str, str] = Field({}, description="Name to version.")
    removed: dict[str, str] = {}
    changed: dict[str, list[str]] = Field({}, description="Name to the versions before and after.")


class TemplateShape(BaseModel):
    name: str
    description: str
    languages: list[str]
    cpu_count: int
    memory_mib: int
    disk_mib: int
    packages: list[str]
    files: list[str] = Field(description="Paths of the files that every fresh sandbox finds.")
    start_command: str


class LimitShape(BaseModel):
    """One ceiling; nano-dollars where the unit is nano_usd."""

    scope: str
    unit: str
    window: str
    each: str = Field("", description="user or agent: it holds for every one of them separately.")
    user: str = Field("", description="Where it only governs what runs for this end user; likewise the next two.")
    workflow: str = ""
    backend: str = ""
    limit: int
    used: int
    reserved: int
    remaining: int
    remaining_usd: str = ""
    is_nearly_exhausted: bool = False
    when_exhausted: str = Field("refuse", description="refuse, wait or local: what becomes of a request without room.")
    raised_until: datetime | None = Field(None, description="Until when the limit is raised to what it says.")
    resets_at: datetime | None = None


class ArtifactShape(BaseModel):
    """A file that was kept: of one run, or of the whole session."""

    id: str
    name: str = Field(description="Its path below /home/user, or where it lay elsewhere.")
    mime: str
    size_bytes: int
    sha256: str
    execution_id: str | None = None
    session_id: str | None = None
    created_at: datetime
    expires_at: datetime
    url: str


class ArtifactList(BaseModel):
    """`kept` says in one sentence what was kept and what was left out, once the end has come."""

    kept: str
    results: list[ArtifactShape]


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return round((end - start).total_seconds(), 6) if start and end else None


def dollars(nano_usd: int | None) -> str:
    """An exact decimal string of dollars, without exponent; empty where unknown."""
    return "" if nano_usd is None else f"{nano_usd / 1_000_000_000:.9f}".rstrip("0").rstrip(".")


UNPRICED = "unpriced"


def priced(nano_usd: int | None, is_priced: bool) -> str:
    """Dollars; "unpriced" where the amount is the ceiling's, as no rate was known; empty where nothing is settled yet."""
    return dollars(nano_usd) if is_priced or nano_usd is None else UNPRICED


def execution_shape(
    execution: Execution,
    *,
    events: list[Event] | None = None,
    attempts: list | None = None,
    egress: list[Egress] | None = None,
) -> ExecutionShape:
    """The whole of an execution. `events`, `attempts` and `egress` spare the queries where the caller has them."""
    if events is None:
        events = list(execution.events.order_by("seq"))
    if attempts is None:
        attempts = list(execution.attempts.all())
    allow = execution.sandbox.network_allow if execution.sandbox else []
    if egress is None:
        egress = list(execution.egress.order_by("pk")) if allow else []
    shape = execution_head(execution)
    stdout, stderr = [], []
    for event in events:
        match event.kind:
            case EventKind.STDOUT:
                stdout.append(event.data["text"])
            case EventKind.STDERR:
                stderr.append(event.data["text"])
            case EventKind.RESULT:
                shape.results.append(event.data["mime"])
                shape.mains.append(bool(event.data.get("main")))
            case EventKind.ERROR:
                shape.error = CodeError(**event.data)
            case EventKind.TRUNCATED:
                shape.truncated = True
                reached = event.data.get("reason", NamedLimit.OUTPUT_TRUNCATED)
                if reached not in shape.limits_reached:
                    shape.limits_reached.append(reached)
        shape.last_seq = event.seq
    shape.logs = Logs(stdout="".join(stdout), stderr="".join(stderr))
    shape.attempts = [
        AttemptShape(number=a.number, backend=a.backend, outcome=a.outcome, code=a.code, reason=a.reason)
        for a in attempts
    ]
    shape.fell_back = _fell_back(attempts)
    shape.egress = [egress_shape(row) for row in egress]
    if shape.error and not shape.detail:
        shape.detail = hint(execution.agent.name, allow, shape.error.name, shape.error.value, egress)
    return shape


def _fell_back(attempts: list[Attempt]) -> str:
    """Why another backend had to take it; empty where the first did that its agent's rules allow."""
    said = [
        f"{a.backend}: {a.reason}" for a in attempts if a.outcome == AttemptOutcome.UNAVAILABLE or a.code in SkipCode
    ]
    return "; ".join(said)


def egress_shape(row: Egress) -> EgressShape:
    return EgressShape(**{name: getattr(row, name) for name in EgressShape.model_fields})


def execution_head(execution: Execution) -> ExecutionShape:
    """An execution without its journal: what lists show."""
    sandbox = execution.sandbox
    is_priced = sandbox is None or sandbox.is_priced
    return ExecutionShape(
        id=execution.id,
        state=execution.state,
        language=execution.language,
        code=execution.code,
        results=[],
        mains=[],
        exit_code=_exit_code(execution),
        limits=execution.limits,
        limits_reached=[execution.error_code] if execution.error_code in NamedLimit else [],
        execution_count=execution.execution_count,
        backend=execution.backend,
        isolation=sandbox.isolation if sandbox else "",
        sandbox_id=execution.sandbox_id,
        from_pool=bool(sandbox and sandbox.made_of),
        session_id=execution.sandbox_id if sandbox and sandbox.kept else None,
        timeout_seconds=execution.timeout_seconds,
        usage=UsageShape(
            queue_seconds=_seconds(execution.created_at, execution.started_at),
            start_seconds=_seconds(execution.started_at, execution.running_at),
            run_seconds=_seconds(execution.running_at, execution.ended_at),
            cpu_seconds=None if execution.cpu_us is None else execution.cpu_us / 1_000_000,
            peak_memory_bytes=execution.peak_memory_bytes,
            output_bytes=execution.output_bytes,
        ),
        cost_usd=priced(execution.cost_nano_usd, is_priced),
        cost_nano_usd=execution.cost_nano_usd if is_priced else None,
        unpriced_charged_nano_usd=None if is_priced else execution.cost_nano_usd,
        max_cost_usd=dollars(execution.max_cost_nano_usd),
        error_code=execution.error_code,
        detail=execution.error_value if execution.error_code else "",
        agent=execution.agent.name,
        key_id=execution.key_id,
        actor=str(execution.actor) if execution.actor_id else None,
        user=execution.user,
        workflow=execution.workflow,
        step=execution.step,
        parent=execution.parent_id,
        metadata=execution.metadata,
        keep_files=execution.keep_files,
        kept=execution.kept_said,
        door=execution.door,
        request_id=execution.request_id,
        trace_id=execution.trace_id,
        ip=execution.ip,
        code_sha256=execution.code_sha256,
        queue=QueueShape(position=0, reason=execution.waits_for, until=execution.waits_until)
        if execution.waits
        else None,
        created_at=execution.created_at,
        started_at=execution.started_at,
        running_at=execution.running_at,
        ended_at=execution.ended_at,
    )


def _exit_code(execution: Execution) -> int | None:
    if execution.command and execution.state == ExecutionState.SUCCEEDED:
        return 0
    return int(execution.error_value) if execution.command and execution.error_name == "ExitCode" else None


def session_shape(sandbox: Sandbox) -> SessionShape:
    return SessionShape(
        id=sandbox.id,
        state=sandbox.state,
        name=sandbox.name,
        agent=sandbox.agent.name,
        template=sandbox.template.name,
        backend=sandbox.backend,
        isolation=sandbox.isolation,
        from_pool=bool(sandbox.made_of),
        network=sandbox.network_allow,
        end_at=sandbox.leased_until,
        idle_timeout_seconds=sandbox.idle_timeout_seconds,
        pause_after_seconds=sandbox.pause_after_seconds,
        keep_files=sandbox.keep_files,
        kept=sandbox.kept_said,
        end_reason=sandbox.end_reason,
        reserved_usd=dollars(sandbox.reserved_nano_usd),
        cost_usd=priced(sandbox.spent_nano_usd, sandbox.is_priced),
        metadata=sandbox.metadata,
        created_at=sandbox.created_at,
        last_used_at=sandbox.last_used_at,
        ended_at=sandbox.ended_at,
    )


def event_shape(event: Event) -> EventShape:
    return EventShape(seq=event.seq, kind=event.kind, data=event.data, at=event.at)


def package_shape(package: Package) -> PackageShape:
    return PackageShape(
        name=package.name,
        version=package.version,
        sha256=package.sha256,
        size_bytes=package.size_bytes,
        verdict=package.verdict,
        reason=package.reason,
        requested=package.requested,
        licence=package.licence,
        advisories=package.advisories,
    )


def template_shape(template: Template) -> TemplateShape:
    return TemplateShape(
        name=template.name,
        description=template.description,
        languages=template.languages,
        cpu_count=template.cpu_count,
        memory_mib=template.memory_mib,
        disk_mib=template.disk_mib,
        packages=template.packages,
        files=sorted(template.files),
        start_command=template.start_command,
    )


def artifact_shape(artifact: Artifact) -> ArtifactShape:
    return ArtifactShape(
        id=artifact.id,
        name=artifact.name,
        mime=artifact.mime,
        size_bytes=artifact.size_bytes,
        sha256=artifact.sha256,
        execution_id=artifact.execution_id,
        session_id=None if artifact.execution_id else artifact.sandbox_id,
        created_at=artifact.created_at,
        expires_at=artifact.expires_at,
        url=f"/api/v1/artifacts/{artifact.id}",
    )
