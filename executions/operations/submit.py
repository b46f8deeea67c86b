"""Admission: one transaction in which a request is checked, paid for, and becomes rows."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import F
from django.utils import timezone

from executions import backends, breaker, capacity, egress, faults, metrics, pool, quotas, routes
from executions.errors import Conflict, Forbidden, Invalid, KeyReused, NotFound, QueueFull, Refused, SessionGone
from executions.keys import Caller
from executions.models import (
    Agent,
    Attempt,
    Execution,
    IdempotencyRecord,
    IllegalTransition,
    Refusal,
    Sandbox,
    Template,
    hot,
)
from executions.operations import artifacts, pausing
from executions.serializers import KeptFile, Submission, nano
from executions.states import AttemptOutcome, ExecutionState, SandboxState, Scope, SkipCode

E = ExecutionState
ELSEWHERE_SECONDS = 30  # in which a process on the session's machine takes what is left for it
INTERPRETERS = {"python": "python3 -u", "bash": "bash", "javascript": "node", "r": "Rscript"}


def submit(
    *, caller: Caller, request: Submission, idempotency_key: str | None = None, later: bool = False
) -> Execution:
    """Admit one execution: quotas and money taken, sandbox claimed or intended, rows inserted, or nothing at all.

    The execution comes back claimed by this process, to be passed to `start`; unless it `is_unclaimed`, as there is no
    room for it now, or its session lives on another machine, or `later` leaves it to whichever process is first; or
    `replayed` is set on it, as the same request was admitted before. Raises Refused; the refusal is stored.
    """
    caller.needs(Scope.RUN)
    if request.dry_run:
        raise Invalid("dry_run: only POST /executions prices a request, one at a time.", field="dry_run")
    caller = asking(caller, request)
    try:
        try:
            return _admitted(caller, request, idempotency_key, later)
        except TwinAdmitted:
            return _admitted(caller, request, idempotency_key, later)
    except Refused as refusal:
        record_refusal(caller, refusal)
        raise


def asking(caller: Caller, request: Submission) -> Caller:
    """The caller with what the request says of itself: agent, end user, workflow and the most that it may cost."""
    most = nano(request.max_cost_usd)
    return replace(caller.acting_as(request.agent), user=request.user, workflow=request.workflow, max_nano_usd=most)


def _admitted(caller: Caller, request: Submission, idempotency_key: str | None, later: bool) -> Execution:
    """Now; where a quota or a plan has no room, on this machine or later, as it says; else its refusal is raised."""
    try:
        return _admit(caller, request, idempotency_key, later=later)
    except Refused as e:
        full = e
    if full.goes_local:
        here = [
            a for a in backends.aliases() if not backends.get(a).remote and backends.get(a).isolation != "simulated"
        ]
        return _admit(caller, request, idempotency_key, route=here)
    patience = full.waits_seconds
    if request.max_wait_seconds is not None:
        patience = min(patience, request.max_wait_seconds)
    if not patience:
        raise full
    return _admit(caller, request, idempotency_key, full=full, patience_seconds=patience)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a run needs before it can start, kept with one that waits."""

    session_id: str = ""
    asked: list[str] | None = None
    template: str = ""
    memory_mib: int = 0
    network: tuple[str, ...] = ()


@transaction.atomic  # a savepoint where a batch is admitted in one transaction
@hot.together()
def _admit(
    caller: Caller,
    request: Submission,
    idempotency_key: str | None,
    *,
    later: bool = False,
    route: list[str] | None = None,
    full: Refused | None = None,
    patience_seconds: int = 0,
) -> Execution:
    """With `route` on these instead of those that were asked for; with `full` it is let wait for room instead."""
    agent = caller.agent
    assert agent is not None
    fingerprint = ""
    if idempotency_key:
        fingerprint = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
        if earlier := replay(agent, idempotency_key, fingerprint):
            return earlier
    timeout, wish = wanted(caller, request, route)
    now = timezone.now()
    is_command = request.code is None
    code = _command_line(request) if is_command else request.code or ""
    execution = Execution(
        team=caller.team,
        agent=agent,
        key=caller.key,
        actor=caller.person,
        language=request.language,
        code=code,
        code_sha256=hashlib.sha256(code.encode(errors="surrogatepass")).hexdigest(),
        command=is_command,
        context=request.context_id or "",
        env=request.env,
        files=_files(caller, request),
        timeout_seconds=timeout,
        limits=request.limits.model_dump(exclude_none=True),
        max_cost_nano_usd=caller.max_nano_usd,
        keep_files=_kept_by(agent, request),
        cancel_on_disconnect=request.cancel_on_disconnect,
        user=request.user,
        workflow=request.workflow,
        step=request.step,
        parent=_parent(caller, request.parent),
        metadata=request.metadata,
        door=caller.door,
        ip=caller.ip,
        request_id=caller.request_id,
        trace_id=caller.trace_id,
        created_at=now,
    )
    if full is None:
        path, fields, planned = _place(caller, execution, wish)
        if _is_left(fields["sandbox"], later):
            path, fields = (E.STARTING,), fields | _unclaimed(fields["sandbox"])
            execution.wish = asdict(wish)  # should whoever takes it die before anything has run
        for name, value in fields.items():
            setattr(execution, name, value)
        execution.bear(E.QUEUED, *path)
        _try_first(execution, planned)
    else:
        if Execution.objects.filter(state=E.QUEUED).count() >= settings.QUEUE_LENGTH:
            raise QueueFull(f"{full.detail} {settings.QUEUE_LENGTH} requests wait for room already.", retry_after=5)
        execution.wish = asdict(wish)
        execution.waits_for, execution.waits_until = full.detail[:300], now + timedelta(seconds=patience_seconds)
        execution.bear(E.QUEUED, reason=full.code)
    if idempotency_key:
        remember(agent, idempotency_key, fingerprint, execution=execution)
    faults.point("admitting")
    return execution


def wanted(caller: Caller, request: Submission, route: list[str] | None = None) -> tuple[int, Wish]:
    """Its wall time in seconds and what it needs to start; with `route`, there. Raises Invalid, Forbidden."""
    agent = caller.agent
    assert agent is not None
    timeout = request.timeout_seconds or agent.timeout_seconds
    most = min(agent.timeout_max_seconds, settings.EXECUTION_TIMEOUT_MAX_SECONDS)
    if timeout > most:
        raise Invalid(f"timeout_seconds: at most {most} for agent {agent.name}.", field="timeout_seconds")
    limits = request.limits.model_dump(exclude_none=True)
    if request.session_id:
        if "memory_mib" in limits:
            raise Invalid("limits.memory_mib: a session has its memory already.", field="limits.memory_mib")
        if request.network is not None:
            raise Invalid("network: a session has its network already; say it when you open one.", field="network")
        return timeout, Wish(session_id=request.session_id)
    template = find_template(agent, request.template)
    memory_mib = limits.get("memory_mib", template.memory_mib)
    if memory_mib > template.memory_mib:
        most = f"at most {template.memory_mib}, which template {template.name} has"
        raise Invalid(f"limits.memory_mib: {most}.", field="limits.memory_mib")
    network = egress.allowed(agent, request.network)
    return timeout, Wish("", route or request.route, template.name, memory_mib, tuple(network))


def begin(execution_id: str, turned_away: dict[int, Refused] | None = None) -> Execution | None:
    """Start one that has waited: all that its admission would have taken is taken now. None when it waits no more.

    `turned_away`: the quotas that had no room for one whose turn was before, and what they said.
    Raises Refused, and nothing has changed. It comes back claimed by this process, unless its session lives elsewhere.
    """
    with transaction.atomic(durable=True), hot.together():
        still = Execution.objects.select_for_update(skip_locked=True, of=("self",)).filter(pk=execution_id)
        execution = still.filter(state=E.QUEUED).select_related("team", "agent__template", "key", "actor").first()
        if execution is None:
            return None
        caller = replace(caller_of(execution).acting_as(None), turned_away=turned_away or {})
        if caller.key is not None and not caller.key.is_live:
            raise Forbidden("The key that asked for it has expired or was revoked while it waited.")
        path, fields, route = _place(caller, execution, Wish(**execution.wish))
        if _is_left(fields["sandbox"], False):
            path, fields = (E.STARTING,), fields | _unclaimed(fields["sandbox"])
        execution.advance(*path, **fields)
        _try_first(execution, route, tried=execution.attempts.count())
        faults.point("beginning")
    return execution


def _is_left(sandbox: Sandbox, later: bool) -> bool:
    """Whether another process is to run it. What is simulated lives in the memory of the process that has made it."""
    if sandbox.handle is not None and backends.get(sandbox.backend).isolation == "simulated":
        return False
    return later or not sandbox.is_here


def _unclaimed(sandbox: Sandbox) -> dict[str, Any]:
    """The columns of an execution that no process runs yet. Where its machine's are to, others end it after a while."""
    columns: dict[str, Any] = {"started_at": None, "running_at": None, "heartbeat_at": None}
    if not sandbox.is_here:
        columns["waits_for"] = f"No process on machine {sandbox.node}, where its session lives, has taken it."
        columns["waits_until"] = timezone.now() + timedelta(seconds=ELSEWHERE_SECONDS)
    return columns


def _place(
    caller: Caller, execution: Execution, wish: Wish
) -> tuple[tuple[ExecutionState, ...], dict[str, Any], routes.Route]:
    """Take what it needs: the states that it has then reached, its columns, and its route. Raises Refused."""
    kind: dict[str, Any] = {
        "language": execution.language,
        "commands": execution.command,
        "run_limits": bool(execution.limits.keys() & {"memory_mib", "cpu_seconds"}),  # the journal keeps the others
    }
    timeout = execution.timeout_seconds
    ready = True
    if wish.session_id:
        sandbox = claim_session(caller, wish.session_id)
        worst = sandbox.rate_nano_usd_per_second * timeout  # of what the session has reserved
        if caller.max_nano_usd is not None and worst > caller.max_nano_usd:
            raise quotas.too_dear(caller.max_nano_usd, worst)
        quotas.take(caller, executions=1, backend=sandbox.backend)
        route = routes.plan(caller, asked=[sandbox.backend], network=sandbox.network_allow, fresh=False, **kind)
        timeout = max(1, min(timeout, int((sandbox.leased_until - timezone.now()).total_seconds())))
        ready = sandbox.state != SandboxState.PAUSED
    else:
        assert caller.agent is not None
        template, network = find_template(caller.agent, wish.template), list(wish.network)
        route = routes.plan(caller, asked=wish.asked, template=template, network=network, **kind)
        sandbox = routes.first(
            route,
            lambda alias: pool.claim(
                caller, alias=alias, template=template, seconds=timeout, executions=1, env=template.env,
                memory_mib=wish.memory_mib, network_allow=network,
            ),
        )  # fmt: skip
        ready = sandbox.handle is not None  # out of a pool
    now = timezone.now()
    fields = {
        "sandbox": sandbox, "backend": sandbox.backend, "route": route.aliases, "timeout_seconds": timeout,
        "started_at": now, "running_at": now if ready else None, "heartbeat_at": now,
    }  # fmt: skip
    return (E.STARTING, E.RUNNING) if ready else (E.STARTING,), fields, route


def _try_first(execution: Execution, route: routes.Route, *, tried: int = 0) -> None:
    """Its attempts: those that were left out, with why, and the first; `tried` it has already."""
    attempts = [
        Attempt(
            execution=execution,
            number=n,
            backend=left.alias,
            outcome=AttemptOutcome.SKIPPED,
            reason=left.why[:500],
            code=left.code,
        )
        for n, left in enumerate(route.skipped, start=tried + 1)
    ]
    first = {"backend": execution.backend, "sandbox": execution.sandbox}
    attempts.append(Attempt(execution=execution, number=tried + len(attempts) + 1, **first))
    hot.insert(attempts)
    execution.tried = attempts


def _files(caller: Caller, request: Submission) -> dict[str, Any]:
    """Path to base64, or to a content of the store. Raises NotFound for what is not kept, or another team's."""
    return {
        path: {"artifact": content.artifact, "sha256": artifacts.find_artifact(caller, content.artifact).sha256}
        if isinstance(content, KeptFile)
        else content
        for path, content in request.files.items()
    }


def _kept_by(agent: Agent, request: Submission) -> list[str]:
    """What is kept of a run: what it says, else what its agent keeps, but for a session's, which keeps at its own end."""
    if request.keep_files is not None:
        return request.keep_files
    return [] if request.session_id else agent.keep_files or []


def caller_of(execution: Execution) -> Caller:
    """Who asked for it, for what is admitted on its behalf later."""
    return Caller(
        team=execution.team,
        agent=execution.agent,
        key=execution.key,
        person=execution.actor,
        user=execution.user,
        workflow=execution.workflow,
        door=execution.door,
        max_nano_usd=execution.max_cost_nano_usd,
    )


def next_attempt(*, caller: Caller, execution: Execution, alias: str) -> Sandbox | None:
    """The intent to boot on the next backend of the route; None, and an attempt that says why, where it is left out."""
    faults.point("unavailable")
    if why := breaker.outage(alias):
        return _skip(execution, alias, why, SkipCode.OUT)
    try:
        with transaction.atomic(durable=True):
            old = execution.sandbox
            assert old is not None
            sandbox = pool.intend(
                caller, alias=alias, template=old.template, seconds=execution.timeout_seconds, env=old.template.env,
                memory_mib=old.memory_mib, network_allow=old.network_allow,
            )  # fmt: skip
            still = Execution.objects.open().filter(pk=execution.pk, sandbox=old)
            if not still.update(sandbox=sandbox, backend=alias):
                raise IllegalTransition(f"{execution.pk}: it has ended, or was given to another process.")
            attempt = Attempt.objects.create(
                execution=execution,
                number=execution.tried[-1].number + 1 if execution.tried else 1,
                backend=alias,
                sandbox=sandbox,
            )
    except Refused as refusal:
        return _skip(execution, alias, refusal.detail, refusal.code)
    except capacity.Full as full:
        return _skip(execution, alias, str(full), SkipCode.FULL)
    execution.tried.append(attempt)
    execution.sandbox, execution.backend = sandbox, alias
    return sandbox


def _skip(execution: Execution, alias: str, why: str, code: str) -> None:
    number = execution.tried[-1].number + 1 if execution.tried else 1
    fields = {"outcome": AttemptOutcome.SKIPPED, "reason": why[:500], "code": code}
    execution.tried.append(Attempt.objects.create(execution=execution, number=number, backend=alias, **fields))


def claim_session(caller: Caller, session_id: str) -> Sandbox:
    """The caller's live session, touched, so that it does not end idle under the run; PAUSED where `awake` is to resume it.

    Raises NotFound, SessionGone, Conflict, BudgetExhausted.
    """
    sandbox = find_session(caller, session_id)
    if sandbox.ended_at or sandbox.state == SandboxState.RETIRING:
        raise artifacts.gone(sandbox)
    now = timezone.now()
    if sandbox.leased_until <= now:
        raise SessionGone("The session has reached its end.", session_id=session_id)
    if sandbox.handle is None:
        raise Conflict("The session is still starting.", session_id=session_id, retry_after=1)
    if not hot.move(sandbox, SandboxState.LEASED, {"last_used_at": now}):
        pausing.rouse(sandbox)
    return sandbox


_session = hot.Compiled(
    lambda session, team: Sandbox.objects.select_related("agent", "template").filter(id=session, team=team, kept=True)
)


def find_session(caller: Caller, session_id: str) -> Sandbox:
    """A session of the caller's team, and of their agent when they have one. Another's is not found."""
    sandbox = next(iter(_session(session_id, caller.team.pk)), None)
    key = caller.key
    if sandbox is None or (
        key and (key.agent_id not in (None, sandbox.agent_id) or key.backend not in ("", sandbox.backend))
    ):
        raise NotFound(
            f"There is no session {session_id}.",
            field="session_id",
            remedy="Check the id, or leave session_id out to start fresh; another team's are not visible.",
        )
    return sandbox


_template = hot.Compiled(lambda name: Template.objects.filter(name=name, is_active=True)[:1])


def find_template(agent: Agent, name: str | None) -> Template:
    """The template of that name, else the agent's, else "default". Raises Invalid."""
    if name is None and agent.template is not None:
        return agent.template
    found = next(iter(_template(name or "default")), None)
    if found is None:
        known = ", ".join(Template.objects.filter(is_active=True).values_list("name", flat=True))
        raise Invalid(f"There is no template {name or 'default'!r}; there are: {known or 'none'}.", field="template")
    return found


def _parent(caller: Caller, parent_id: str | None) -> Execution | None:
    if parent_id is None:
        return None
    parent = Execution.objects.filter(id=parent_id, team=caller.team).first()
    if parent is None:
        raise Invalid(f"There is no execution {parent_id}.", field="parent")
    return parent


def _command_line(request: Submission) -> str:
    """A script as one line for bash; every word is quoted."""
    if request.command is not None:
        return request.command
    interpreter = INTERPRETERS.get(request.language)
    if interpreter is None:
        raise Invalid(f"Scripts in {request.language} cannot be run; send code.", field="language")
    assert request.script_path is not None
    if "\x00" in request.script_path or any("\x00" in a for a in request.args):
        raise Invalid("script_path: a NUL cannot be part of a path.", field="script_path")
    path = request.script_path if "/" in request.script_path else f"./{request.script_path}"  # never an option
    return shlex.join([*interpreter.split(), path, *request.args])


# Idempotency: the row is inserted with what it promises, in one transaction.


def replay(agent: Agent, token: str, fingerprint: str) -> Any:
    """What was admitted under this token before, marked as `replayed`; None for a new one. Raises KeyReused."""
    record = (
        IdempotencyRecord.objects.select_related(
            "execution__sandbox__template", "execution__agent", "sandbox__agent", "sandbox__template"
        )
        .filter(agent=agent, token=token)
        .first()
    )
    if record is None:
        return None
    if record.fingerprint != fingerprint:
        raise KeyReused
    row: Any = record.execution or record.sandbox
    row.replayed = True
    return row


def remember(agent: Agent, token: str, fingerprint: str, **row: Any) -> None:
    if len(token) > 255 or not token.isprintable():
        raise Invalid("Idempotency-Key: at most 255 printable characters.", field="Idempotency-Key")
    try:
        with transaction.atomic():
            IdempotencyRecord.objects.create(agent=agent, token=token, fingerprint=fingerprint, **row)
    except IntegrityError:  # its twin was admitted between our look and now: undo everything, answer as the twin
        raise TwinAdmitted from None


class TwinAdmitted(Exception):
    """The same Idempotency-Key was admitted by another process a moment ago."""


def record_refusal(caller: Caller, refusal: Refused) -> None:
    """Keep a denied admission, repeats within the hour as a count."""
    metrics.refused(refusal.code)
    now = timezone.now()
    who = (
        caller.team.pk,
        caller.agent and caller.agent.pk,
        caller.key and caller.key.pk,
        caller.person and caller.person.pk,
    )
    roll = hashlib.sha256(json.dumps([*who, refusal.code, now.strftime("%Y%m%d%H")]).encode()).hexdigest()
    row, fresh = Refusal.objects.get_or_create(
        roll=roll,
        defaults={
            "team": caller.team,
            "agent": caller.agent,
            "key": caller.key,
            "actor": caller.person,
            "code": refusal.code,
            "detail": refusal.detail[:500],
            "facts": refusal.facts,
            "first_at": now,
            "last_at": now,
        },
    )
    if not fresh:
        Refusal.objects.filter(pk=row.pk).update(
            times=F("times") + 1, last_at=now, detail=refusal.detail[:500], facts=refusal.facts
        )
