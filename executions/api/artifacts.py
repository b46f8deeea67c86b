"""/api/v1/artifacts: files that were kept, as lists of a run or a session, and in full or in part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

from executions import operations
from executions.api.auth import caller_of
from executions.api.problems import answers
from executions.errors import Invalid
from executions.hop import rows
from executions.models import Artifact
from executions.serializers import ArtifactList, artifact_shape

SHOWN = {  # types that no browser runs; the rest is sent as bytes
    "text/plain", "text/csv", "text/markdown", "application/json", "application/pdf", "application/zip",
    "application/vnd.apache.parquet", "image/png", "image/jpeg", "image/gif", "image/webp", "audio/mpeg", "video/mp4",
}  # fmt: skip


@answers
async def of_execution(request: HttpRequest, execution_id: str) -> HttpResponse:
    def find() -> ArtifactList:
        caller = caller_of(request)
        execution = operations.find_execution(caller, execution_id)
        found = operations.artifacts_of(caller, execution=execution)
        return ArtifactList(kept=execution.kept_said, results=[artifact_shape(a) for a in found])

    return await _listed(request, find)


@answers
async def of_session(request: HttpRequest, session_id: str) -> HttpResponse:
    """Those of its runs, too. `kept` says what became of its files when it ended."""

    def find() -> ArtifactList:
        caller = caller_of(request)
        session = operations.find_session(caller, session_id)
        found = operations.artifacts_of(caller, session=session)
        return ArtifactList(kept=session.kept_said, results=[artifact_shape(a) for a in found])

    return await _listed(request, find)


async def _listed(request: HttpRequest, find) -> HttpResponse:
    if request.method not in ("GET", "HEAD"):
        raise Invalid("GET only.", field="method")
    return HttpResponse((await rows(find)).model_dump_json(), content_type="application/json")


@answers
async def content(request: HttpRequest, artifact_id: str) -> HttpResponseBase:
    if request.method not in ("GET", "HEAD"):
        raise Invalid("GET only.", field="method")
    artifact = await rows(lambda: operations.find_artifact(caller_of(request), artifact_id))
    return served(artifact, request)


def served(artifact: Artifact, request: HttpRequest) -> HttpResponseBase:
    """The content or the part of it that was asked for (RFC 9110, 14): never a page that a browser would run."""
    headers, size = request.headers, artifact.size_bytes
    tag = f'"{artifact.sha256}"'
    known = headers.get("If-None-Match", "")
    if known.strip() == "*" or tag in [one.strip().removeprefix("W/") for one in known.split(",")]:
        return _dressed(HttpResponse(status=304), artifact, tag)
    part = wanted(headers, size, tag)
    if part == "none":
        response: HttpResponseBase = HttpResponse(status=416)
        response["Content-Range"] = f"bytes */{size}"
        return _dressed(response, artifact, tag)
    start, length = part if isinstance(part, tuple) else (0, size)
    body = b"" if request.method == "HEAD" else operations.artifact_pieces(artifact.sha256, start, length)
    response = StreamingHttpResponse(body) if body else HttpResponse()
    if isinstance(part, tuple):
        response.status_code = 206
        response["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    response["Content-Length"] = str(length)
    response["Content-Type"] = artifact.mime if artifact.mime in SHOWN else "application/octet-stream"
    return _dressed(response, artifact, tag)


def _dressed(response: HttpResponseBase, artifact: Artifact, tag: str) -> HttpResponseBase:
    name = artifact.name.rsplit("/", 1)[-1]
    response["ETag"] = tag
    response["Accept-Ranges"] = "bytes"
    response["Cache-Control"] = "private, no-cache"
    response["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(name, safe='', errors='replace')}"
    response["Content-Security-Policy"] = "sandbox; default-src 'none'"
    response["X-Content-Type-Options"] = "nosniff"
    return response


def wanted(headers: Mapping[str, str], size: int, tag: str) -> tuple[int, int] | str:
    """(start, length) of the one range that is asked for; "none" where it lies outside, "" for all of it.

    Several ranges, other units and what cannot be read are answered with all of it, as the RFC allows.
    """
    condition = headers.get("If-Range", tag).strip()
    found = re.fullmatch(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", headers.get("Range", ""))
    if found is None or condition != tag:
        return ""
    first, last = found.groups()
    if not first:
        if not last:
            return ""
        length = min(int(last), size)
        return (size - length, length) if length else "none"
    start, end = int(first), min(int(last or size), size - 1)
    if last and int(last) < start:
        return ""
    return (start, end - start + 1) if start < size else "none"
