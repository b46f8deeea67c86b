"""What an agent's runs have left behind, as MCP resources: executions, their output, and the files that were kept."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from django.db.models import QuerySet
from django.utils import timezone

from executions import newest, operations
from executions.errors import Invalid, NotFound, TooLarge
from executions.hop import rows
from executions.keys import Caller
from executions.models import Artifact, Execution
from executions.serializers import execution_shape
from executions.states import EventKind, Scope

PAGE = 50
READ_BYTES = 4_000_000  # of one resource; a larger one is read in parts over REST
URI = re.compile(r"sandgate://(executions|artifacts)/([a-z]+_[A-Za-z0-9]{1,36})(/output)?")
TEMPLATES = {
    "sandgate://executions/{execution_id}": (
        "execution",
        "One run: state, results, error, usage, cost.",
        "application/json",
    ),
    "sandgate://executions/{execution_id}/output": ("output", "All that a run printed, uncut.", "text/plain"),
    "sandgate://artifacts/{artifact_id}": ("artifact", "A file that a run or a session has kept.", None),
}


@dataclass(frozen=True)
class Link:
    """Something that can be read; `mime` and `size_bytes` where they are known."""

    uri: str
    name: str
    description: str = ""
    mime: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class Content:
    """Text, or bytes where it is none."""

    mime: str
    text: str | None = None
    raw: bytes = b""

    @property
    def base64(self) -> str:
        return base64.b64encode(self.raw).decode()


def of_execution(execution: Execution) -> Link:
    line = execution.code.strip().partition("\n")[0][:80]
    return Link(f"sandgate://executions/{execution.pk}", execution.pk, f"{execution.state}: {line}", "application/json")


def of_output(execution_id: str, size_bytes: int | None = None) -> Link:
    uri = f"sandgate://executions/{execution_id}/output"
    return Link(uri, f"output of {execution_id}", "All that it printed, uncut.", "text/plain", size_bytes)


def of_artifact(artifact: Artifact) -> Link:
    came = f"kept of {artifact.execution_id or artifact.sandbox_id}"
    return Link(f"sandgate://artifacts/{artifact.pk}", artifact.name, came, artifact.mime, artifact.size_bytes)


def listed(caller: Caller, cursor: str | None) -> tuple[list[Link], str | None]:
    """A page of the agent's artifacts, then of its executions, the newest first, and where the next page begins. Raises Invalid."""
    caller.needs(Scope.READ)
    kind, _, last = (cursor or "artifacts:").partition(":")
    if kind not in ("artifacts", "executions"):
        raise _no_cursor()
    links: list[Link] = []
    if kind == "artifacts":
        kept = list(_before(_artifacts(caller), last))
        links = [of_artifact(artifact) for artifact in kept]
        if len(kept) == PAGE:
            return links, f"artifacts:{kept[-1].pk}"
        last = ""
    after = newest.place(last)
    if last and after is None:
        raise _no_cursor()
    of = Execution.objects.filter(agent=caller.agent).only("id", "state", "code", "created_at")
    runs, further = newest.page(newest.also(of, team_id=caller.team.pk), PAGE, of=of, after=after)
    return links + [of_execution(execution) for execution in runs], f"executions:{further}" if further else None


def _before(found: QuerySet, last: str) -> QuerySet:
    return (found.filter(pk__lt=last) if last else found).order_by("-pk")[:PAGE]


def _artifacts(caller: Caller) -> QuerySet[Artifact]:
    return Artifact.objects.filter(team=caller.team, sandbox__agent=caller.agent, expires_at__gt=timezone.now())


def _executions(caller: Caller) -> QuerySet[Execution]:
    return Execution.objects.filter(team=caller.team, agent=caller.agent)


async def read(caller: Caller, uri: str) -> Content:
    """What stands behind a URI. Raises NotFound, also for another agent's; TooLarge."""
    found = URI.fullmatch(uri)
    if found is None or (found[1] == "artifacts" and found[3]):
        raise _unknown(uri)
    if found[1] == "artifacts":
        return await _file(await rows(_find, _artifacts, caller, found[2], uri))
    if found[3]:
        return Content("text/plain", await rows(_output, caller, found[2], uri))
    return Content("application/json", await rows(_shape, caller, found[2], uri))


def _find(visible, caller: Caller, pk: str, uri: str):
    caller.needs(Scope.READ)
    row = visible(caller).filter(pk=pk).first()
    if row is None:
        raise _unknown(uri)
    return row


def _no_cursor() -> Invalid:
    return Invalid("That is not a cursor of this list.", field="cursor", remedy="Begin again without a cursor.")


def _unknown(uri: str) -> NotFound:
    return NotFound(
        f"There is no resource {uri[:120]}.",
        field="uri",
        remedy="resources/list has those of this agent; files are let go of when their time is over.",
    )


def _shape(caller: Caller, pk: str, uri: str) -> str:
    _find(_executions, caller, pk, uri)
    text = execution_shape(operations.find_execution(caller, pk)).model_dump_json()
    return _within(text, f"GET /api/v1/executions/{pk}")


def _output(caller: Caller, pk: str, uri: str) -> str:
    execution = _find(_executions, caller, pk, uri)
    texts = execution.events.filter(kind__in=[EventKind.STDOUT, EventKind.STDERR]).order_by("seq")
    text = "".join(data["text"] for data in texts.values_list("data", flat=True))
    return _within(text, f"GET /api/v1/executions/{pk}/events")


def _within(text: str, elsewhere: str) -> str:
    if len(text.encode(errors="replace")) > READ_BYTES:
        raise _too_large(elsewhere)
    return text


def _too_large(elsewhere: str) -> TooLarge:
    return TooLarge(f"It is larger than {READ_BYTES:,} bytes.", remedy=f"{elsewhere} streams all of it.")


async def _file(artifact: Artifact) -> Content:
    if artifact.size_bytes > READ_BYTES:
        raise _too_large(f"GET /api/v1/artifacts/{artifact.pk}, also in parts (Range),")
    raw = b"".join([piece async for piece in operations.artifact_pieces(artifact.sha256)])
    if artifact.mime.startswith("text/") or artifact.mime == "application/json":
        try:
            return Content(artifact.mime, raw.decode())
        except UnicodeDecodeError:
            pass
    return Content(artifact.mime, raw=raw)
