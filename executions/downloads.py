"""Kept files over HTTP: whole or in part, saved and never shown as a page, since their content is a guest's."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from urllib.parse import quote

from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

from executions.models import Artifact

SHOWN = {  # types that no browser runs; the rest is sent as bytes
    "text/plain", "text/csv", "text/markdown", "application/json", "application/pdf", "application/zip",
    "application/vnd.apache.parquet", "image/png", "image/jpeg", "image/gif", "image/webp", "audio/mpeg", "video/mp4",
}  # fmt: skip


def served(
    artifact: Artifact, request: HttpRequest, read: Callable[[int, int], AsyncIterator[bytes]]
) -> HttpResponseBase:
    """The content or the part of it that was asked for (RFC 9110, 14): never a page that a browser would run.

    `read` gives so many bytes from a place on.
    """
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
    body = b"" if request.method == "HEAD" else read(start, length)
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
