"""/api/v1/artifacts: files that were kept, as lists of a run or a session, and in full or in part."""

from __future__ import annotations

from functools import partial

from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from executions import operations
from executions.api.auth import caller_of
from executions.api.operation import ANY, operation
from executions.downloads import served
from executions.hop import rows
from executions.serializers import ArtifactList, artifact_shape


@operation("Files kept of an execution", gives={200: ArtifactList})
async def of_execution(request: HttpRequest, execution_id: str) -> HttpResponse:
    def find() -> ArtifactList:
        caller = caller_of(request)
        execution = operations.find_execution(caller, execution_id)
        found = operations.artifacts_of(caller, execution=execution)
        return ArtifactList(kept=execution.kept_said, results=[artifact_shape(a) for a in found])

    return await _listed(request, find)


@operation("Files kept of a session", gives={200: ArtifactList})
async def of_session(request: HttpRequest, session_id: str) -> HttpResponse:
    """Those of its runs, too. `kept` says what became of its files when it ended."""

    def find() -> ArtifactList:
        caller = caller_of(request)
        session = operations.find_session(caller, session_id)
        found = operations.artifacts_of(caller, session=session)
        return ArtifactList(kept=session.kept_said, results=[artifact_shape(a) for a in found])

    return await _listed(request, find)


async def _listed(request: HttpRequest, find) -> HttpResponse:
    return HttpResponse((await rows(find)).model_dump_json(), content_type="application/json")


@operation(
    "A kept file, whole or in part",
    gives={200: ANY, 206: ANY, 304: None, 416: None},
    headers={"Range": "bytes=…: a part of it.", "If-None-Match": "Its ETag, which is its SHA-256."},
    fails=(410,),
)
async def content(request: HttpRequest, artifact_id: str) -> HttpResponseBase:
    artifact = await rows(lambda: operations.find_artifact(caller_of(request), artifact_id))
    return served(artifact, request, partial(operations.artifact_pieces, artifact.sha256))
