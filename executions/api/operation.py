"""One method of one address: a view that says what it takes and gives, so that the schema cannot forget it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from pydantic import BaseModel

from executions.api.problems import answers, problem
from executions.errors import MethodNotAllowed

View = Callable[..., Awaitable[HttpResponseBase]]
BYTES = "application/octet-stream"
ANY = "*/*"  # as the file or the question has it


@dataclass(frozen=True, slots=True)
class Many:
    """An answer `{"results": [shape, …]}`; `paged` with `next`, the address of the following page."""

    shape: type[BaseModel] | None = None
    paged: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """What the schema says of it; `gives` maps each good status to its shape, to a media type, to a tuple of such
    alternatives, or to None for no body."""

    summary: str
    gives: dict[int, Any]
    body: type[BaseModel] | str | None = None
    query: dict[str, dict[str, Any]] | None = None
    headers: dict[str, str] | None = None  # of the request, with what they mean
    fails: frozenset[int] = frozenset()


def operation(
    summary: str,
    *,
    gives: dict[int, Any],
    body: type[BaseModel] | str | None = None,
    query: dict[str, dict[str, Any]] | None = None,
    headers: dict[str, str] | None = None,
    fails: Iterable[int] = (),
) -> Callable[[Callable[..., Any]], View]:
    """An async view as `answers` makes it, with its part of the schema. `fails` are statuses beyond those of every address."""

    def described(view: Callable[..., Any]) -> View:
        answering = answers(view)
        answering.operation = Operation(summary, gives, body, query, headers, frozenset(fails))
        return answering

    return described


def methods(**views: View) -> Any:
    """One view for an address: by method, HEAD like GET, OPTIONS told, every other method refused with what there is."""
    allowed = ", ".join(sorted({*views, *(["HEAD"] if "GET" in views else []), "OPTIONS"}))

    async def by_method(request: HttpRequest, **path: str) -> HttpResponseBase:
        method = str(request.method)
        view = views.get("GET" if method == "HEAD" else method)
        if view is not None:
            return await view(request, **path)
        if method == "OPTIONS":
            return HttpResponse(status=204, headers={"Allow": allowed})
        refused = problem(MethodNotAllowed(f"{method[:20]} is not for this address, but {allowed}."), request)
        refused["Allow"] = allowed
        return refused

    by_method.csrf_exempt = True  # type: ignore[attr-defined]
    by_method.views = views  # type: ignore[attr-defined]
    return by_method
