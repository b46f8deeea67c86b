"""Files and packages of a session, for the panels: JSON, streams, and nothing that names a path of the host."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import PurePosixPath

from django.conf import settings
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.utils.http import content_disposition_header
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from executions import audit, operations
from executions.console.frame import MemberRequest, body, member
from executions.downloads import served
from executions.errors import TooLarge
from executions.hop import rows
from executions.models import Package
from executions.serializers import FileShape, InstallRequest, parse

HOME = "/home/user"
PIECE_BYTES = 256 * 1024


@member
@require_http_methods(["GET", "PUT"])
async def files(request: MemberRequest, session_id: str) -> HttpResponse:
    """GET lists a folder, PUT creates or replaces one file with the body."""
    path = request.GET.get("path") or HOME
    if request.method == "PUT":
        if int(request.headers.get("Content-Length") or 0) > settings.FILE_MAX_BYTES:
            raise TooLarge(f"A file may have {settings.FILE_MAX_BYTES // 1_000_000} MB here.", field="path")
        await operations.put_file(caller=request.caller, session_id=session_id, path=path, data=_pieces(request))
        return JsonResponse({"path": path}, status=201)
    found = await operations.list_files(caller=request.caller, session_id=session_id, path=path)
    entries = [
        FileShape(name=f.name, path=f.path, type=f.type, size_bytes=f.size_bytes, modified_at=f.modified_at)
        for f in found
    ]
    entries.sort(key=lambda entry: (entry.type != "directory", entry.name))
    return JsonResponse({"entries": [entry.model_dump() for entry in entries]})


async def _pieces(request: MemberRequest) -> AsyncIterator[bytes]:
    while piece := request.read(PIECE_BYTES):
        yield piece


@member
@require_GET
async def download(request: MemberRequest, session_id: str) -> StreamingHttpResponse:
    """A file of the sandbox, never shown but saved: its content is the guest's."""
    path = request.GET.get("path", "")
    pieces = await operations.get_file(caller=request.caller, session_id=session_id, path=path)
    response = StreamingHttpResponse(pieces, content_type="application/octet-stream")
    response["Content-Disposition"] = content_disposition_header(True, PurePosixPath(path).name or "file")
    response["X-Content-Type-Options"] = "nosniff"
    response["Content-Security-Policy"] = "sandbox; default-src 'none'"
    return response


@member
@require_GET
async def artifact(request: MemberRequest, artifact_id: str) -> HttpResponseBase:
    """A file that was kept, whole or in part."""
    kept = await rows(operations.find_artifact, request.caller, artifact_id)
    await rows(lambda: audit.seen("artifact", caller=request.caller, of=kept.execution or kept.sandbox))
    return served(kept, request, partial(operations.artifact_pieces, kept.sha256))


@member
@require_POST
async def packages(request: MemberRequest, session_id: str) -> HttpResponse:
    """Install into the session; says what became of it in one sentence."""
    asked = parse(InstallRequest, body(request))
    installed = await operations.install(caller=request.caller, session_id=session_id, requirements=asked.packages)
    return JsonResponse({"sentence": sentence(installed.packages)})


def sentence(installed: list[Package]) -> str:
    """What an installation did: `emoji 2.14.0 installed.`"""
    here = [p for p in installed if p.requested and p.reason == "was there already"]
    new = [p for p in installed if p.requested and p not in here]
    more = len(installed) - len(here) - len(new)
    said = []
    if new:
        said.append(f"{', '.join(map(str, new))} installed{f', with {more} more' if more else ''}.")
    if here:
        said.append(f"{', '.join(map(str, here))} {'was' if len(here) == 1 else 'were'} there already.")
    return " ".join(said)
