"""Files that outlive their sandbox: found by its agent's patterns, streamed into the store, listed, fetched, let go of.

Everything a sandbox says of its files is a claim: sizes are counted as they come, types are guessed from names, and the
host resolves no path of a guest's.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import mimetypes
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Q, QuerySet, Sum
from django.utils import timezone

from executions import backends, globs, quotas, store
from executions.backends.base import FileInfo
from executions.errors import (
    BackendError,
    BudgetExhausted,
    FileRefused,
    NotFound,
    QuotaExceeded,
    SandboxLost,
    SessionGone,
)
from executions.hop import rows
from executions.keys import Caller
from executions.models import Artifact, Execution, Sandbox, Transition
from executions.states import EndReason, SandboxState, Scope

S = SandboxState
SESSION_DEFAULT = ["outputs"]
KEEP_SECONDS = 60  # for the files of one sandbox
READ_SECONDS = 20  # for the next piece of one file
SPARE_SECONDS = 4  # of what the provider still gives the sandbox, for its kill
DEPTH, FOLDERS = 16, 500
TOLD = 10  # artifacts that an error names
DIED = "Nothing was kept: the sandbox had died."
KILLED = "Nothing was kept: it was killed."
WHY = {
    EndReason.FINISHED: "it was ended",
    EndReason.EXPIRED: "its time was over",
    EndReason.KILLED: "it was killed",
    EndReason.EVICTED: "its place was needed",
    EndReason.BUDGET: "the budget is used up",
    EndReason.QUOTA: "a quota is used up",
    EndReason.LOST: "its sandbox died",
    EndReason.OUTAGE: "its backend is out",
    EndReason.SHUTDOWN: "the server was stopped",
}
log = logging.getLogger(__name__)


# Keep


@dataclass
class Tally:
    """What was kept of one sandbox, and what was left out, by reason."""

    names: list[str] = field(default_factory=list)
    size_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    stopped: str = ""

    def leave_out(self, why: str) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + 1

    def sentence(self) -> str:
        count = len(self.names)
        said = [
            f"{count} file{'' if count == 1 else 's'} kept ({self.size_bytes:,} byte{'' if self.size_bytes == 1 else 's'})"
            if count
            else "Nothing was kept"
        ]
        said += [f"{number} left out: {why}" for why, number in self.left_out.items()]
        said += [self.stopped] if self.stopped else []
        return ("; ".join(said) + ".")[:300]


async def keep_of_run(execution: Execution) -> str:
    """Keep what a run has asked for, while its sandbox is still there; says what became of it."""
    assert execution.sandbox is not None
    tally = Tally()
    await _keep(execution.sandbox, execution.keep_files, execution, tally, settings.KEEP_GRACE_SECONDS)
    return tally.sentence()


async def keep_at_end(sandbox: Sandbox, reason: str) -> bool:
    """Keep the files of a session that is RETIRING. False while another process does: the kill must wait for it.

    Whatever goes wrong, the session ends, and its row says what was kept.
    """
    if not sandbox.kept or not sandbox.keep_files or sandbox.collected_at or sandbox.handle is None:
        return True
    if reason in (EndReason.LOST, EndReason.OUTAGE, EndReason.KILLED):
        await rows(_done, sandbox, KILLED if reason == EndReason.KILLED else DIED)
        return True
    if not await rows(_take_turn, sandbox):
        return sandbox.collected_at is not None or sandbox.state == S.GONE
    tally, now = Tally(), timezone.now()
    try:
        if await rows(_was_paused, sandbox):
            await rows(_pay_for_keeping, sandbox)
            await backends.get(sandbox.backend).resume(sandbox.machine, timeout_seconds=KEEP_SECONDS)
            seconds = float(KEEP_SECONDS)
        else:
            seconds = (sandbox.leased_until - now).total_seconds() + sandbox.grace_seconds - SPARE_SECONDS
        await _keep(sandbox, sandbox.keep_files, None, tally, seconds)
    except BudgetExhausted:
        tally.stopped = "the budget does not cover waking it up"
    except SandboxLost:
        tally.stopped = "the sandbox had died"
    except Exception as e:
        log.exception("keeping_failed", extra={"sandbox_id": sandbox.pk})
        tally.stopped = f"it failed ({type(e).__name__})"
    await rows(_done, sandbox, tally.sentence())
    return True


def _take_turn(sandbox: Sandbox) -> bool:
    now = timezone.now()
    mine = Sandbox.objects.filter(Q(turning_until=None) | Q(turning_until__lte=now), pk=sandbox.pk, state=S.RETIRING)
    taken = mine.filter(collected_at=None).update(turning_until=now + timedelta(seconds=KEEP_SECONDS + READ_SECONDS))
    if not taken:
        sandbox.refresh_from_db()
    return taken == 1


def _was_paused(sandbox: Sandbox) -> bool:
    last = Transition.objects.filter(sandbox=sandbox, after=S.RETIRING).order_by("-pk").first()
    return last is not None and last.before == S.PAUSED


@transaction.atomic(durable=True)
def _pay_for_keeping(sandbox: Sandbox) -> None:
    """Reserve the time for which a paused one runs once more. Raises BudgetExhausted."""
    from executions.operations import pausing

    row, now = pausing.locked(sandbox.pk), timezone.now()
    if sandbox.turning_until is None and pausing.is_free(row):  # else it may have run, and is billed since then
        Sandbox.objects.filter(pk=row.pk).update(metered_until=now)
        row.metered_until = now
    pausing.reserve_until(row, now + timedelta(seconds=KEEP_SECONDS))


def _done(sandbox: Sandbox, said: str) -> None:
    sandbox.collected_at, sandbox.kept_said, sandbox.turning_until = timezone.now(), said, None
    sandbox.save(update_fields=["collected_at", "kept_said", "turning_until"])


async def _keep(
    sandbox: Sandbox, patterns: Sequence[str], execution: Execution | None, tally: Tally, seconds: float
) -> None:
    """Fill the tally; what breaks it off stands in it."""
    if not backends.get(sandbox.backend).capabilities.files:
        tally.stopped = f"sandboxes of {sandbox.backend} have no files"
        return
    seen = await rows(_already, sandbox, execution, tally)
    try:
        async with asyncio.timeout(max(1.0, min(seconds, KEEP_SECONDS))):
            for pattern in patterns:
                async with aclosing(_found(sandbox, pattern)) as found:
                    async for name, info in found:
                        if name not in seen:
                            seen.add(name)
                            await _keep_one(sandbox, execution, name, info, tally)
    except Stop as e:
        tally.stopped = str(e)
    except TimeoutError:
        tally.stopped = "there was no time for more"
    except SandboxLost:
        tally.stopped = "the sandbox died meanwhile"
    except BackendError as e:
        tally.stopped = f"the sandbox could not be read ({e.detail[:100]})"
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        tally.stopped = "the disk of this installation is full" if full else f"the store failed ({e.strerror})"


class Stop(Exception):
    """No more is kept, and this is why."""


def _already(sandbox: Sandbox, execution: Execution | None, tally: Tally) -> set[str]:
    """What an earlier try, whose process has died, has kept already. Raises Stop when the store is full."""
    for name, size in Artifact.objects.filter(sandbox=sandbox, execution=execution).values_list("name", "size_bytes"):
        tally.names.append(name)
        tally.size_bytes += size
    return set(tally.names)


def _stored_bytes() -> int:
    return Artifact.objects.values("sha256").distinct().aggregate(total=Sum("size_bytes"))["total"] or 0


async def _keep_one(sandbox: Sandbox, execution: Execution | None, name: str, info: FileInfo, tally: Tally) -> None:
    if len(tally.names) >= settings.ARTIFACTS_MAX_FILES:
        raise Stop(f"more than {settings.ARTIFACTS_MAX_FILES} files")
    room = settings.ARTIFACTS_MAX_BYTES - tally.size_bytes
    if len(name) > 500:
        return tally.leave_out("its path is too long")
    if info.size_bytes > room:
        return tally.leave_out("too large")
    if await rows(_stored_bytes) + info.size_bytes > settings.ARTIFACTS_TOTAL_BYTES:
        raise Stop("the store of this installation is full")
    incoming = await asyncio.to_thread(store.Incoming)
    try:
        async with aclosing(backends.get(sandbox.backend).read_file(sandbox.machine, info.path)) as read:  # type: ignore[type-var]
            while piece := await _next(read):
                if incoming.size_bytes + len(piece) > room:  # it has grown, or its size was a lie
                    return tally.leave_out("too large")
                await asyncio.to_thread(incoming.write, piece)
        await rows(_add, sandbox, execution, name, incoming)
        tally.names.append(name)
        tally.size_bytes += incoming.size_bytes
    except FileRefused:
        tally.leave_out("cannot be read")
    except QuotaExceeded as e:
        tally.leave_out(e.detail.rstrip("."))
    finally:
        await asyncio.to_thread(incoming.close)


async def _next(read: AsyncIterator[bytes]) -> bytes:
    """The next piece; empty at the end. Raises Stop where none comes."""
    try:
        async with asyncio.timeout(READ_SECONDS):
            async for piece in read:
                if piece:
                    return piece
            return b""
    except TimeoutError:
        raise Stop("a file did not come to its end") from None


def _add(sandbox: Sandbox, execution: Execution | None, name: str, incoming: store.Incoming) -> None:
    days = sandbox.agent.artifact_days or settings.ARTIFACT_DAYS
    artifact = Artifact(
        team_id=sandbox.team_id,
        sandbox=sandbox,
        execution=execution,
        name=name,
        mime=(mimetypes.guess_type(name)[0] or "application/octet-stream")[:100],
        size_bytes=incoming.size_bytes,
        sha256=incoming.sha256,
        expires_at=timezone.now() + timedelta(days=days),
    )
    owner = Caller(team=sandbox.team, agent=sandbox.agent, key=sandbox.key)
    with store.adding(), transaction.atomic():
        quotas.take(owner, bytes_stored=incoming.size_bytes, backend=sandbox.backend)
        incoming.settle()
        Artifact.objects.bulk_create([artifact], ignore_conflicts=True)  # once: two may be at it


# Find what the patterns mean, inside


async def _found(sandbox: Sandbox, pattern: str) -> AsyncGenerator[tuple[str, FileInfo]]:
    """(name, file) for each ordinary file of the sandbox that the pattern means; a folder means all below it."""
    backend, handle = backends.get(sandbox.backend), sandbox.machine
    base = "/" if pattern.startswith("/") else globs.HOME
    waiting: list[tuple[str, str, tuple[str, ...]]] = [(base, "", tuple(pattern.strip("/").split("/")))]
    visited: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        folder, prefix, left = waiting.pop()
        while len(left) > 1 and globs.is_literal(left[0]):  # no need to look
            folder, prefix, left = f"{folder.rstrip('/')}/{left[0]}", f"{prefix}{left[0]}/", left[1:]
        if (folder, left) in visited or prefix.count("/") > DEPTH:
            continue
        visited.add((folder, left))
        if len(visited) > FOLDERS:
            raise Stop(f"more than {FOLDERS} folders")
        try:
            entries = await backend.list_files(handle, folder)
        except FileRefused as e:
            if e.status == 404:
                continue
            raise Stop(f"a folder cannot be listed ({e.detail[:100]})") from None
        for entry in entries:
            name = prefix + entry.name.encode("utf-8", "replace").decode().replace("\0", "")
            for rest in globs.rests(left, entry.name):
                if entry.type == "directory":
                    waiting.append((entry.path, f"{name}/", rest or ("**", "*")))
                elif entry.type == "file" and not rest:
                    yield name, entry
                    break


# Look


def find_artifact(caller: Caller, artifact_id: str) -> Artifact:
    """An artifact of the caller's team, and of their agent when they have one. Another's is not found."""
    caller.needs(Scope.READ)
    artifact = _visible(caller).filter(pk=artifact_id).first()
    if artifact is None or not store.place(artifact.sha256).is_file():
        raise NotFound(
            f"There is no artifact {artifact_id}.",
            field="artifact_id",
            remedy="Check the id; artifacts are let go of when their time is over, and another team's are not visible.",
        )
    return artifact


def _visible(caller: Caller) -> QuerySet[Artifact]:
    found = Artifact.objects.filter(team=caller.team, expires_at__gt=timezone.now())
    if caller.key is not None and caller.key.agent_id:
        found = found.filter(sandbox__agent=caller.key.agent_id)
    return found


def artifacts_of(
    caller: Caller, *, execution: Execution | None = None, session: Sandbox | None = None
) -> list[Artifact]:
    """What a run has kept; what a session has kept, its runs' included."""
    found = _visible(caller).filter(execution=execution) if execution else _visible(caller).filter(sandbox=session)
    return list(found.order_by("name", "pk")[:1000])


async def pieces(sha256: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
    """The content, read in threads. Closing it early lets go of the file. FileRefused where it is not kept any more."""
    read = store.pieces(sha256, start, length)
    try:
        while piece := await asyncio.to_thread(next, read, b""):
            yield piece
    except FileNotFoundError:
        raise FileRefused("The file is not kept any more.", missing=True) from None
    finally:
        read.close()  # type: ignore[attr-defined]


def gone(sandbox: Sandbox) -> SessionGone:
    """The error for a session that has ended, or is about to: when, why, and what was kept."""
    kept = list(Artifact.objects.filter(sandbox=sandbox, expires_at__gt=timezone.now()).order_by("name")[: TOLD + 1])
    idle = f"idle {_length(sandbox.idle_timeout_seconds)}"
    why = (
        idle
        if sandbox.end_reason == EndReason.IDLE
        else WHY.get(EndReason(sandbox.end_reason), "")
        if sandbox.end_reason
        else ""
    )
    when = f"ended {sandbox.ended_at:%H:%M} UTC" if sandbox.ended_at else "is ending"
    files = f"files are kept as {', '.join(a.pk for a in kept[:TOLD])}{' and more' if len(kept) > TOLD else ''}."
    if not kept:
        files = (
            f"{sandbox.kept_said[:1].lower()}{sandbox.kept_said[1:]}" if sandbox.kept_said else "no files were kept."
        )
    facts: dict[str, Any] = {
        "session_id": sandbox.pk,
        "ended_at": sandbox.ended_at.isoformat() if sandbox.ended_at else None,
        "reason": sandbox.end_reason,
        "kept": sandbox.kept_said,
        "artifacts": [{"id": a.pk, "name": a.name, "size_bytes": a.size_bytes} for a in kept[:TOLD]],
    }
    if not kept:
        return SessionGone(f"The session {when}{f' ({why})' if why else ''}. Variables are lost; {files}", **facts)
    again = f'files={{"{_plain(kept[0].name)}": {{"artifact": "{kept[0].pk}"}}}}'
    return SessionGone(
        f"The session {when}{f' ({why})' if why else ''}. Variables are lost; {files}",
        remedy=f"Call execute_code (POST /executions) with {again}; GET /api/v1/artifacts/{kept[0].pk} fetches it.",
        **facts,
    )


def _plain(name: str) -> str:
    """A guest's name in a sentence that a model reads: one line, no quotes."""
    return "".join(c if c.isprintable() and c not in '"\\' else "_" for c in name)[:100]


def _length(seconds: int) -> str:
    return f"{seconds // 60} min" if seconds >= 60 else f"{seconds} s"


# Let go


async def prune() -> int:
    """Forget the artifacts whose time is over, and remove the contents that no row refers to any more."""
    await rows(_forget)
    return await rows(store.sweep, _referenced)


def _forget() -> None:
    over = Artifact.objects.filter(expires_at__lte=timezone.now()).values_list("pk", flat=True)[:5000]
    Artifact.objects.filter(pk__in=list(over)).delete()


def _referenced(names: list[str]) -> set[str]:
    return set(Artifact.objects.filter(sha256__in=names).values_list("sha256", flat=True))
